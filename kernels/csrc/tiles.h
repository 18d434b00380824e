// Integer products of rows of int8 and int4 with many tokens. For few, reading the rows takes the
// time, and a vector holds numbers of one row; here arithmetic does, and each lane belongs to a row:
// a group's sum stays an integer, and scales meet it once a group, not once a line.
//
// Included behind a `target` pragma with AVX-512 VNNI, as grouped.h, which comes first.
#pragma once

#include "grouped.h"

namespace ffn {
namespace {

constexpr int kLanes = 16, kBlocks = 2;  // rows of a vector, vectors of rows that share an x
constexpr int kTileTokens = 6;           // that share a load of codes: their sums fill the registers
constexpr int kQuads = kGroup / 4;       // of four numbers, in a group

// Sixteen rows: of each group, eight vectors with four codes of every row, and one of scales.
struct Lanes {
    std::byte* codes;
    float* scales;
};

// In place: word j of vector i becomes word i of vector j.
inline void transpose(__m512i (&w)[kLanes]) {
    __m512i a[kLanes];
    for (int i = 0; i < kLanes; i += 2) {
        a[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
    }
    for (int i = 0; i < kLanes; i += 4)
        for (int k = 0; k < 2; ++k) {
            w[i + 2 * k] = _mm512_unpacklo_epi64(a[i + k], a[i + 2 + k]);
            w[i + 2 * k + 1] = _mm512_unpackhi_epi64(a[i + k], a[i + 2 + k]);
        }
    // Vector 4 i + k now holds words k, 4 + k, 8 + k, 12 + k of four rows each.
    for (int k = 0; k < 4; ++k) {
        const __m512i lower = _mm512_shuffle_i32x4(w[k], w[4 + k], 0x88);
        const __m512i lower_odd = _mm512_shuffle_i32x4(w[k], w[4 + k], 0xdd);
        const __m512i upper = _mm512_shuffle_i32x4(w[8 + k], w[12 + k], 0x88);
        const __m512i upper_odd = _mm512_shuffle_i32x4(w[8 + k], w[12 + k], 0xdd);
        a[k] = _mm512_shuffle_i32x4(lower, upper, 0x88);
        a[4 + k] = _mm512_shuffle_i32x4(lower_odd, upper_odd, 0x88);
        a[8 + k] = _mm512_shuffle_i32x4(lower, upper, 0xdd);
        a[12 + k] = _mm512_shuffle_i32x4(lower_odd, upper_odd, 0xdd);
    }
    for (int i = 0; i < kLanes; ++i) w[i] = a[i];
}

template <class V, class Units>
void fill(const Lanes& lanes, const void* const* rows, std::int64_t lines) {
    const std::int64_t before = scale_lines(Units::dtype, lines);
    const std::int64_t padded = lines * Units::numbers, groups = padded / kGroup;
    std::byte* to = lanes.codes;
    for (std::int64_t line = before; line < before + lines; ++line)
        for (int u = 0; u < Units::numbers / V::unit; ++u) {
            __m512i w[kLanes];
            for (int r = 0; r < kLanes; ++r)
                w[r] = Units::codes(static_cast<const char*>(rows[r]) + line * kLine, u);
            transpose(w);
            for (int q = 0; q < kLanes; ++q, to += kLine) _mm512_storeu_si512(to, w[q]);
        }
    for (int r = 0; r < kLanes; ++r) {
        const Bf16* scales = static_cast<const Bf16*>(rows[r]);
        for (std::int64_t g = 0; g < groups; ++g)
            lanes.scales[g * kLanes + r] = to_float(scales[g]);
    }
}

template <int T>
void multiply_tokens(const Lanes (&lanes)[kBlocks], std::int64_t padded, float zero,
                     const void* const* x, float* y, std::int64_t stride) {
    const std::int64_t groups = padded / kGroup;
    __m512 sum[kBlocks][T];
    for (auto& block : sum)
        for (__m512& one : block) one = _mm512_setzero_ps();
    for (std::int64_t g = 0; g < groups; ++g) {
        __m512i part[kBlocks][T];
        for (auto& block : part)
            for (__m512i& one : block) one = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int q = 0; q < kQuads; ++q) {
            __m512i w[kBlocks];
            for (int b = 0; b < kBlocks; ++b)
                w[b] = _mm512_loadu_si512(lanes[b].codes + (g * kQuads + q) * kLine);
            for (int t = 0; t < T; ++t) {
                std::int32_t four;
                const char* from = static_cast<const char*>(x[t]) + g * kGroup;
                std::memcpy(&four, from + 4 * q, sizeof four);
                const __m512i x_t = _mm512_set1_epi32(four);
                for (int b = 0; b < kBlocks; ++b)
                    part[b][t] = _mm512_dpbusd_epi32(part[b][t], w[b], x_t);
            }
        }
        for (int b = 0; b < kBlocks; ++b) {
            const __m512 scale = _mm512_loadu_ps(lanes[b].scales + g * kLanes);
            const __m512 zeros = _mm512_mul_ps(_mm512_set1_ps(-zero), scale);
            for (int t = 0; t < T; ++t) {
                const GroupedX x_t(x[t], padded);
                const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x_t.scales[g]));
                sum[b][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[b][t]), both, sum[b][t]);
                sum[b][t] = _mm512_fmadd_ps(zeros, _mm512_set1_ps(x_t.sums[g]), sum[b][t]);
            }
        }
    }
    for (int t = 0; t < T; ++t)
        for (int b = 0; b < kBlocks; ++b)
            _mm512_storeu_ps(y + t * stride + b * kLanes, sum[b][t]);
}

// T tokens at a time, then those that are left: two fewer at a time, at last one by one.
template <int T>
void multiply_left(const Lanes (&lanes)[kBlocks], std::int64_t padded, float zero,
                   const void* const* x, int left, float* y, std::int64_t stride) {
    for (; left >= T; left -= T, x += T, y += T * stride)
        multiply_tokens<T>(lanes, padded, zero, x, y, stride);
    if constexpr (T > 1)
        multiply_left<(T > 2 ? T - 2 : 1)>(lanes, padded, zero, x, left, y, stride);
}

template <class V, class Units>
void tiles(const RowList& list, const void* const* x, int tokens, float* y, std::int64_t stride,
           std::byte* memory) {
    static_assert(kLanes * kBlocks == kTileRows);
    const std::int64_t padded = list.lines * Units::numbers;
    auto* scales = reinterpret_cast<float*>(memory + kTileRows * padded);
    Lanes lanes[kBlocks];
    for (int b = 0; b < kBlocks; ++b)
        lanes[b] = {memory + b * kLanes * padded, scales + b * kLanes * padded / kGroup};
    for (int i = 0; i < list.count; i += kTileRows) {
        for (int b = 0; b < kBlocks; ++b)
            fill<V, Units>(lanes[b], list.data + i + b * kLanes, list.lines);
        multiply_left<kTileTokens>(lanes, padded, Units::zero(list.zero), x, tokens, y + i, stride);
    }
}

}  // namespace
}  // namespace ffn
