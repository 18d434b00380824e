// Loops, one behind the other, on a team of threads.
//
// With OpenMP it is the team that torch uses: a second one would fight with it for the cores. Its
// threads sleep after a short spin, so a core that is shared costs its share and no more. Without
// OpenMP (and for ThreadSanitizer, which does not know its barriers) threads are made per loop.
//
// An exception may leave neither an OpenMP region nor a thread: the first one is kept, what has not
// begun by then is left out, and the caller gets it once the team is done.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace ffn {

// How many threads are worth their waking up, for so many bytes that are read once.
inline int useful_threads(int threads, std::int64_t bytes) {
    constexpr std::int64_t least = 32768;
    return int(std::clamp<std::int64_t>(bytes / least, 1, threads));
}

class FirstException {
  public:
    // Runs the body, unless one has thrown already.
    template <class Body>
    void guard(const Body& body) noexcept {
        if (thrown_.load(std::memory_order_relaxed)) return;
        try {
            body();
        } catch (...) {
            if (!thrown_.exchange(true)) error_ = std::current_exception();
        }
    }

    // Only once the team is done.
    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

  private:
    std::atomic<bool> thrown_{false};
    std::exception_ptr error_;
};

#ifndef _OPENMP
// Calls body(i) for every index once; whoever is free takes the next. The body does not throw.
template <class Body>
void share_out(int threads, int count, const Body& body) {
    std::atomic<int> next{0};
    const auto work = [&] {
        for (int i = next++; i < count; i = next++) body(i);
    };
    std::vector<std::thread> team;
    try {
        for (int i = 1; i < threads; ++i) team.emplace_back(work);
    } catch (const std::exception&) {  // no memory or no thread: those that are there do the work
    }
    work();
    for (std::thread& one : team) one.join();
}
#endif

// body(i) for every i below `count`, in any order.
template <class Body>
struct Loop {
    int count;
    Body body;
};

template <class Body>
Loop(int, Body) -> Loop<Body>;

// Runs loop after loop: one begins when the one before is done. Throws what one of them threw.
template <class... Bodies>
void in_parallel(int threads, const Loop<Bodies>&... loops) {
    FirstException failure;
    const auto run = [&](const auto& loop) {
        const auto one = [&](int i) { failure.guard([&] { loop.body(i); }); };
#ifdef _OPENMP
        // Many in a row to a thread at first, since one that goes on where it was need not wait for
        // memory; one by one at the end, since a core may be shared.
#pragma omp for schedule(guided, 1)
        for (int i = 0; i < loop.count; ++i) one(i);
#else
        share_out(threads, loop.count, one);
#endif
    };
#ifdef _OPENMP
    const int most = std::max({loops.count...});
#pragma omp parallel num_threads(std::min(threads, most)) if (threads > 1 && most > 1)
    (run(loops), ...);
#else
    (run(loops), ...);
#endif
    failure.rethrow();
}

}  // namespace ffn
