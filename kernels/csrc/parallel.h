// Two loops, one behind the other, on a team of threads.
//
// With OpenMP it is the team that torch uses: a second one would fight with it for the cores. Its
// threads sleep after a short spin, so a core that is shared costs its share and no more. Without
// OpenMP (and for ThreadSanitizer, which does not know its barriers) threads are made per loop.
//
// An exception may leave neither an OpenMP region nor a thread: the first one is kept, what has not
// begun by then is left out, and the caller gets it once the team is done.
#pragma once

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace ffn {

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

// Calls first(i) for i below `firsts`; when all are done, then(j) for j below `thens`. Throws what
// one of them threw.
template <class First, class Then>
void in_parallel(int threads, int firsts, const First& first, int thens, const Then& then) {
    FirstException failure;
    const auto one = [&](int i) { failure.guard([&] { first(i); }); };
    const auto other = [&](int j) { failure.guard([&] { then(j); }); };
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < firsts; ++i) one(i);
#pragma omp for schedule(static)
        for (int j = 0; j < thens; ++j) other(j);
    }
#else
    share_out(threads, firsts, one);
    share_out(threads, thens, other);
#endif
    failure.rethrow();
}

}  // namespace ffn
