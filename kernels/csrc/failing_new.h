// Replaces `operator new` by one that fails on demand. For tests: included once in a program, or in
// a library that is loaded before the C++ runtime.
#pragma once

#include <atomic>
#include <climits>
#include <cstdlib>
#include <new>

namespace failing_new {

inline std::atomic<long> calls{0}, first{LONG_MAX}, last{LONG_MAX};

inline void count() {
    const long call = calls++;
    if (call >= first && call <= last) throw std::bad_alloc();
}

inline void* checked(void* made) {
    if (!made) throw std::bad_alloc();
    return made;
}

}  // namespace failing_new

void* operator new(std::size_t bytes) {
    failing_new::count();
    return failing_new::checked(std::malloc(bytes ? bytes : 1));
}
void* operator new(std::size_t bytes, std::align_val_t alignment) {
    failing_new::count();
    const auto align = std::size_t(alignment);
    return failing_new::checked(std::aligned_alloc(align, (bytes + align - 1) / align * align));
}
void operator delete(void* data) noexcept { std::free(data); }
void operator delete(void* data, std::size_t) noexcept { std::free(data); }
void operator delete(void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete(void* data, std::size_t, std::align_val_t) noexcept { std::free(data); }

extern "C" {

// From here on, the calls `from` to `to` fail; the next one is number 0.
inline void fail_calls(long from, long to) {
    failing_new::last = to;
    failing_new::calls = 0;
    failing_new::first = from;
}

// From here on, no call fails; whether one did.
inline int stop_failing() { return failing_new::calls > failing_new::first.exchange(LONG_MAX); }
}
