// Integer products: rows of int8 and int4 with an x in int8, both in groups of 32 that share a
// scale, as in llama.cpp's Q8_0 and Q4_0. V says how an instruction set multiplies a unit of
// numbers; a unit is one or two groups.
//
// Codes are multiplied as they are stored. Where 0 is stored as another code, that times the sum of
// x is taken away at the end.
//
// Included behind a `target` pragma, as rows.h, which comes first.
#pragma once

#include "grouped_x.h"
#include "rows.h"

namespace ffn {
namespace {

// A unit of a line of int8. 0 is the code 0, but for what the instruction set adds.
template <class V>
struct Int8Units {
    static constexpr DType dtype = DType::i8;
    static constexpr int numbers = per_line(dtype);
    static float zero(float) { return V::shift; }
    static typename V::Codes codes(const char* line, int unit) {
        return V::shifted(line + unit * V::unit);
    }
    static typename V::F product(typename V::Codes w, const std::int8_t* x) {
        return V::product(w, x);
    }
};

// A unit of a line of int4.
template <class V>
struct Int4Units {
    static constexpr DType dtype = DType::i4;
    static constexpr int numbers = per_line(dtype);
    static float zero(float given) { return given; }
    static typename V::Codes codes(const char* line, int unit) {
        const int first = unit * V::unit;
        return first < kLine ? V::low(line + first) : V::high(line + first - kLine);
    }
    static typename V::F product(typename V::Codes w, const std::int8_t* x) {
        return V::small_product(w, x);
    }
};

// The sum over groups of a row's scale times x's sum, in as many parts as V has lanes.
template <class V>
inline typename V::F sum_of_zeros(const Bf16* scales, const float* sums, std::int64_t groups) {
    typename V::F sum = V::zero();
    for (std::int64_t g = 0; g < groups; g += V::lanes)
        sum = V::fma(V::load(scales + g), V::load(sums + g), sum);
    return sum;
}

// `ahead` is null where the rows have been read before.
template <class V, class Units, int R, int T>
inline void dot_groups(const void* const* rows, const void* const* x, std::int64_t lines,
                       float zero, Ahead* ahead, float* z, int stride) {
    constexpr int in_line = Units::numbers / kGroup, units = Units::numbers / V::unit;
    constexpr int together = kScales / in_line;  // lines whose scales are loaded at once
    const std::int64_t padded = lines * Units::numbers;
    const std::int64_t before = scale_lines(Units::dtype, lines);
    const char* now[R];
    for (int r = 0; r < R; ++r) now[r] = static_cast<const char*>(rows[r]) + before * kLine;
    typename V::F sum[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) sum[r][t] = V::zero();
    for (std::int64_t first = 0; first < lines; first += together) {
        typename V::Scales scales[R][T];
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < T; ++t)
                scales[r][t] = V::scales(scales_of(now[r], before) + first * in_line,
                                         GroupedX(x[t], padded).scales + first * in_line);
        const int count = int(lines - first < together ? lines - first : together);
        for (int k = 0; k < count; ++k) {
            const std::int64_t line = first + k;
            if (ahead) ahead->fetch();
            for (int u = 0; u < units; ++u)
                for (int r = 0; r < R; ++r) {
                    const auto w = Units::codes(now[r] + line * kLine, u);
                    for (int t = 0; t < T; ++t) {
                        const auto* x_t = static_cast<const std::int8_t*>(x[t]);
                        const auto p = Units::product(w, x_t + line * Units::numbers + u * V::unit);
                        sum[r][t] = V::fma(p, V::spread(scales[r][t], k * units + u), sum[r][t]);
                    }
                }
        }
    }
    for (std::int64_t line = 0; ahead && line < before; ++line) ahead->fetch();
    const float code = Units::zero(zero);
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) {
            if (code != 0) {
                const float* sums = GroupedX(x[t], padded).sums;
                const Bf16* scales_r = scales_of(now[r], before);
                const auto zeros = sum_of_zeros<V>(scales_r, sums, padded / kGroup);
                sum[r][t] = V::fma(V::set(-code), zeros, sum[r][t]);
            }
            z[r * stride + t] = V::sum(sum[r][t]);
        }
}

template <class V, class Units, int R, int T>
inline void dot_groups_tokens(const void* const* rows, const void* const* x, std::int64_t lines,
                              float zero, Ahead* ahead, int left, float* z, int stride) {
    for (; left >= T; left -= T, x += T, z += T, ahead = nullptr)
        dot_groups<V, Units, R, T>(rows, x, lines, zero, ahead, z, stride);
    if constexpr (T > 1)
        dot_groups_tokens<V, Units, R, T - 1>(rows, x, lines, zero, ahead, left, z, stride);
}

template <class V, class Units>
void dot_grouped(const RowList& list, const void* const* x_T, int tokens, float* z) {
    Ahead ahead(list, scale_lines(Units::dtype, list.lines) + list.lines);
    int i = 0;
    for (; i + kTogether <= list.count; i += kTogether)
        dot_groups_tokens<V, Units, kTogether, 2>(list.data + i, x_T, list.lines, list.zero, &ahead,
                                          tokens, z + i * tokens, tokens);
    for (; i < list.count; ++i)
        dot_groups_tokens<V, Units, 1, 2>(list.data + i, x_T, list.lines, list.zero, &ahead,
                                          tokens, z + i * tokens, tokens);
}

// Both ways of a format in groups. I is the instruction set's integers.
template <class V, class I, class W, class Units>
constexpr RowKernels grouped_kernels() {
    return {dot_grouped<I, Units>, add<V, W>, add<V, W>, DType::i8};
}

template <class V, class I>
constexpr RowKernels int8_kernels() {
    return grouped_kernels<V, I, Int8, Int8Units<I>>();
}

template <class V, class I>
constexpr RowKernels int4_kernels() {
    return grouped_kernels<V, I, Int4, Int4Units<I>>();
}

}  // namespace
}  // namespace ffn
