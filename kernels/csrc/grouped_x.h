// x of a token in int8, in groups of 32 that share a scale, as integer products want it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace ffn {

constexpr int kScales = 16;  // groups whose scales are loaded at once

namespace {  // see rows.h

// In memory: the codes, then a scale for each group, then for each group its scale times the sum of
// its codes. Behind the last group stand zeros up to a multiple of kScales.
struct GroupedX {
    const std::int8_t* codes;
    const float* scales;
    const float* sums;

    GroupedX(const void* x, std::int64_t padded)
        : codes(static_cast<const std::int8_t*>(x)),
          scales(reinterpret_cast<const float*>(codes + padded)),
          sums(scales + groups(padded)) {}

    static std::int64_t groups(std::int64_t padded) {
        return (padded / kGroup + kScales - 1) / kScales * kScales;
    }
    static std::size_t bytes(std::int64_t padded) {
        return std::size_t(padded) + std::size_t(groups(padded)) * 2 * sizeof(float);
    }
};

}  // namespace

// Rounds x to the nearest codes from -127 to 127. Groups with an infinite or NaN number get a scale
// of NaN. `to` has GroupedX::bytes, on a cache line.
void to_groups(const void* x, DType dtype, std::int64_t width, std::int64_t padded, void* to);

}  // namespace ffn
