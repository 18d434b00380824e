// What each instruction set offers: products of a few rows with a few tokens, and back.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace ffn {

// Rows of one matrix, each `padded` elements long, zeros behind the last column. The pointers go on
// for `kAhead` more: the rows that are likely to be read next, for prefetching only.
constexpr int kAhead = 4;

struct Rows {
    const void* const* data;
    int count;
    std::int64_t padded;
};

struct RowKernels {
    // z[row * tokens + token] = row . x[token]
    void (*dot)(const Rows& rows, const void* x, int tokens, float* z);
    // y[token] += sum over rows of h[row * tokens + token] * row
    void (*add)(const Rows& rows, const float* h, int tokens, float* y);
    // In which format `dot` wants x.
    DType x;
};

struct Isa {
    const char* name;
    bool (*runs_here)();
    RowKernels of[4];  // by DType of the weights
    const Isa* widened;  // for x in another format than `of` wants; may be itself
};

extern const Isa kPortable;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FFN_X86 1
extern const Isa kAvx2, kAvx512, kAvx512Bf16;
#endif

// From the plainest to the fastest.
inline constexpr const Isa* kIsas[] = {
    &kPortable,
#ifdef FFN_X86
    &kAvx2, &kAvx512, &kAvx512Bf16,
#endif
};

}  // namespace ffn
