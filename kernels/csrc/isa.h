// What each instruction set offers: products of a few rows with a few tokens, and back.
#pragma once

#include <cstdint>

#include "activation.h"
#include "dtype.h"
#include "grouped_x.h"  // here, before any `target` pragma

namespace ffn {

// Rows of one matrix, each so many cache lines of numbers long, with zeros behind the last column.
// Behind `count` pointers stand `kAhead` more: the rows that are likely to be read next, for
// prefetching.
constexpr int kAhead = 32;

struct RowList {
    const void* const* data;
    int count;
    std::int64_t lines;
    float zero = 8;  // of int4 that meets x: the code that stands for 0
    bool in_a_row = false;  // whether they lie one behind the other in memory
    int fetched = 1;  // rows from each on that are fetched ahead together; 0: that has been done
};

// z[row * tokens + token] = row . x[token]
using Dot = void (*)(const RowList& rows, const void* const* x, int tokens, float* z);

// y[token] += sum over rows of h[row * tokens + token] * row, in the columns of lines from `begin`
// to `end`; y[token] is where the first of these columns goes.
using Add = void (*)(const RowList& rows, const float* h, float* const* y, int tokens,
                     std::int64_t begin, std::int64_t end);

// y[token * stride + row] = row . x[token], of many tokens. Rows are computed in tiles: y has room
// for whole ones, and what `data` holds behind `count` fills the last. `memory` has `tile_bytes`, on
// a cache line.
constexpr int kTileRows = 32;
static_assert(kTileRows <= kAhead);
using Tiles = void (*)(const RowList& rows, const void* const* x, int tokens, float* y,
                       std::int64_t stride, std::byte* memory);

// A byte for each number, and a float for each group.
static inline constexpr std::int64_t tile_bytes(std::int64_t padded) {
    return kTileRows * (padded + padded / kGroup * std::int64_t(sizeof(float)));
}

struct RowKernels {
    Dot dot;
    Add add;
    Add add_rounded;        // faster, and rounds h to the format of x
    DType x;                // in which format `dot` and `tiles` want x; i8 is that of GroupedX
    Tiles tiles = nullptr;  // null: `dot` serves many tokens, too
};

// z = act(z + bias)
using Activate = void (*)(const Activation& act, float* z, std::size_t count, float bias);

// x = e^x, exactly 0 where x is -infinity
using Powers = void (*)(float* x, std::size_t count);

// A row in groups.
struct RowFormat {
    DType dtype;  // i8 or i4
    std::int64_t width, lines;
    float zero;  // of int4: the code that stands for 0
    bool added;  // of int4: in the order of a row of W_down
};

// Writes the numbers of a row in a format of floats.
using ReadRow = void (*)(const std::byte* row, const RowFormat& format, DType dtype, void* to);

struct Isa {
    const char* name;
    bool (*runs_here)();
    RowKernels of[kDTypes];  // by DType of the weights
    Dot screen;              // of rows of int8 without scales with floats
    Activate activate;
    Powers powers;
    ReadRow read_row;
    const Isa* widened;  // for x in another format than `of` wants; may be itself
};

extern const Isa kPortable;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FFN_X86 1
extern const Isa kAvx2, kAvxVnni, kAvx512, kAvx512Bf16;
#endif
#if defined(__aarch64__) && defined(__linux__)
#define FFN_ARM 1
extern const Isa kDotprod;
#endif

// From the plainest to the fastest; a CPU may lack one and have what comes behind it.
inline constexpr const Isa* kIsas[] = {
    &kPortable,
#ifdef FFN_X86
    &kAvx2, &kAvxVnni, &kAvx512, &kAvx512Bf16,
#endif
#ifdef FFN_ARM
    &kDotprod,
#endif
};

}  // namespace ffn
