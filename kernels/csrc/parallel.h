// Two loops, one behind the other, on a team of threads.
//
// With OpenMP it is the team that torch uses: a second one would fight with it for the cores. Its
// threads sleep after a short spin, so a core that is shared costs its share and no more. Without
// OpenMP (and for ThreadSanitizer, which does not know its barriers) threads are made per loop.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

namespace ffn {

#ifndef _OPENMP
// Every index once; whoever is free takes the next.
template <class Body>
void share_out(int threads, int count, const Body& body) {
    std::atomic<int> next{0};
    const auto work = [&] {
        for (int i = next++; i < count; i = next++) body(i);
    };
    std::vector<std::thread> team;
    for (int i = 1; i < threads; ++i) team.emplace_back(work);
    work();
    for (std::thread& one : team) one.join();
}
#endif

// first(i) for i below `firsts`; when all are done, then(j) for j below `thens`.
template <class First, class Then>
void in_parallel(int threads, int firsts, const First& first, int thens, const Then& then) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < firsts; ++i) first(i);
#pragma omp for schedule(static)
        for (int j = 0; j < thens; ++j) then(j);
    }
#else
    share_out(threads, firsts, first);
    share_out(threads, thens, then);
#endif
}

}  // namespace ffn
