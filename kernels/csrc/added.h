// Rows of int8 and int4 that are added to y, for AVX-512 with products of bf16 pairs.
//
// Included behind a `target` pragma, as rows.h, which comes first.
#pragma once

#include "rows.h"

namespace ffn {
namespace {

// The scales of sixteen groups from a line on; behind the last stands whatever is in memory.
inline __m512 scales_from(const char* numbers, std::int64_t before, std::int64_t group) {
    return Avx512::load(scales_of(numbers, before) + group);
}

inline __m512 one_of(__m512 values, int i) {
    return _mm512_permutexvar_ps(_mm512_set1_epi32(i), values);
}

// Lines whose scales are loaded at once.
template <DType dtype>
constexpr int lines_at_once = kScales * kGroup / per_line(dtype);

// int8 becomes floats.
template <int R, int T>
struct AddInt8 {
    static constexpr DType dtype = DType::i8;
    const char* now[R];
    __m512 h_RT[R][T], scales[R];

    AddInt8(const void* const* rows, std::int64_t before, const float* h, int stride) {
        for (int r = 0; r < R; ++r) {
            now[r] = static_cast<const char*>(rows[r]) + before * kLine;
            for (int t = 0; t < T; ++t) h_RT[r][t] = _mm512_set1_ps(h[r * stride + t]);
        }
    }
    void load(std::int64_t before, std::int64_t group) {
        for (int r = 0; r < R; ++r) scales[r] = scales_from(now[r], before, group);
    }
    // Line k of those whose scales are loaded.
    void line(std::int64_t line, int k, float* const* y, std::int64_t at) const {
        for (int g = 0; g < 2; ++g) {
            __m512 f[R][T];
            for (int r = 0; r < R; ++r) {
                const __m512 scale = one_of(scales[r], 2 * k + g);
                for (int t = 0; t < T; ++t) f[r][t] = _mm512_mul_ps(h_RT[r][t], scale);
            }
            for (int v = 0; v < 2; ++v) {
                const int i = g * kGroup + v * 16;
                __m512 w[R];
                for (int r = 0; r < R; ++r)
                    w[r] = Avx512::load(
                        reinterpret_cast<const std::int8_t*>(now[r] + line * kLine) + i);
                for (int t = 0; t < T; ++t) {
                    __m512 sum = _mm512_loadu_ps(y[t] + at + i);
                    for (int r = 0; r < R; ++r) sum = _mm512_fmadd_ps(w[r], f[r][t], sum);
                    _mm512_storeu_ps(y[t] + at + i, sum);
                }
            }
        }
    }
};

// int4 becomes pairs of bf16, of two rows and one column. h times the scale is rounded to bf16: one
// part in 512, where a code is off by one part in 14.
template <int R, int T>
struct AddInt4 {
    static_assert(R == 4);
    static constexpr DType dtype = DType::i4;
    static constexpr int pairs = 2;
    const char* now[R];
    float h_RT[R][T];
    __m512i f[pairs][T];  // h times the scale of two rows, for sixteen groups

    AddInt4(const void* const* rows, std::int64_t before, const float* h, int stride) {
        for (int r = 0; r < R; ++r) {
            now[r] = static_cast<const char*>(rows[r]) + before * kLine;
            for (int t = 0; t < T; ++t) h_RT[r][t] = h[r * stride + t];
        }
    }
    void load(std::int64_t before, std::int64_t group) {
        alignas(64) static constexpr std::uint16_t order[32] = {
            0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        for (int p = 0; p < pairs; ++p) {
            const __m512 a = scales_from(now[2 * p], before, group);
            const __m512 b = scales_from(now[2 * p + 1], before, group);
            for (int t = 0; t < T; ++t) {
                const __m512 h_a = _mm512_set1_ps(h_RT[2 * p][t]);
                const __m512 h_b = _mm512_set1_ps(h_RT[2 * p + 1][t]);
                const auto both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(b, h_b),
                                                               _mm512_mul_ps(a, h_a));
                f[p][t] = _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
            }
        }
    }
    void line(std::int64_t line, int k, float* const* y, std::int64_t at) const {
        // What four bits stand for; the fifth bit, of whatever comes next, changes nothing.
        alignas(64) static constexpr std::uint16_t codes[32] = {
            0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
            0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
            0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
        const __m512i table = _mm512_load_si512(codes);
        __m512i w[pairs][2];  // in 32 bits: sixteen of the one row, then of the other
        for (int p = 0; p < pairs; ++p) {
            const __m512i a = _mm512_loadu_si512(now[2 * p] + line * kLine);
            const __m512i b = _mm512_loadu_si512(now[2 * p + 1] + line * kLine);
            w[p][0] = _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16));
            w[p][1] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
        }
        for (int g = 0; g < 4; ++g) {
            const __m512i group = _mm512_set1_epi32(4 * k + g);
            __m512bh f_PT[pairs][T];
            for (int p = 0; p < pairs; ++p)
                for (int t = 0; t < T; ++t)
                    f_PT[p][t] = (__m512bh)_mm512_permutexvar_epi32(group, f[p][t]);
            for (int v = 0; v < 2; ++v) {
                const int n = 2 * g + v;
                __m512bh columns[pairs];
                for (int p = 0; p < pairs; ++p) {
                    const __m512i moved = _mm512_srli_epi16(w[p][n / 4], unsigned(4 * (n % 4)));
                    columns[p] = (__m512bh)_mm512_permutexvar_epi16(moved, table);
                }
                for (int t = 0; t < T; ++t) {
                    float* to = y[t] + at + 16 * n;
                    __m512 sum = _mm512_loadu_ps(to);
                    for (int p = 0; p < pairs; ++p)
                        sum = _mm512_dpbf16_ps(sum, columns[p], f_PT[p][t]);
                    _mm512_storeu_ps(to, sum);
                }
            }
        }
    }
};

template <class Rows, int R, int T>
inline void add_rows(const void* const* rows, const float* h, int stride, float* const* y,
                     std::int64_t lines, std::int64_t begin, std::int64_t end, Ahead* ahead) {
    constexpr int numbers = per_line(Rows::dtype), together = lines_at_once<Rows::dtype>;
    const std::int64_t before = scale_lines(Rows::dtype, lines);
    Rows four(rows, before, h, stride);
    for (std::int64_t first = begin; first < end; first += together) {
        four.load(before, first * numbers / kGroup);
        const int count = int(end - first < together ? end - first : together);
        for (int k = 0; k < count; ++k) {
            if (ahead) ahead->fetch();
            four.line(first + k, k, y, (first + k - begin) * numbers);
        }
    }
    for (std::int64_t line = 0; ahead && line < before; ++line) ahead->fetch();
}

// Four rows with two tokens at a time; the rows that are left as any other format.
template <template <int, int> class Rows, class W>
void add_groups(const RowList& list, const float* h, float* const* y, int tokens,
                std::int64_t begin, std::int64_t end) {
    constexpr DType dtype = Rows<kTogether, 1>::dtype;
    Ahead ahead(list, scale_lines(dtype, list.lines) + list.lines);
    const bool whole = begin == 0 && end == list.lines;
    int i = 0;
    for (; i + kTogether <= list.count; i += kTogether) {
        const float* h_T = h + i * tokens;
        int t = 0;
        for (; t + 2 <= tokens; t += 2)
            add_rows<Rows<kTogether, 2>, kTogether, 2>(list.data + i, h_T + t, tokens, y + t,
                                                       list.lines, begin, end,
                                                       whole && t == 0 ? &ahead : nullptr);
        if (t < tokens)
            add_rows<Rows<kTogether, 1>, kTogether, 1>(list.data + i, h_T + t, tokens, y + t,
                                                       list.lines, begin, end,
                                                       whole && t == 0 ? &ahead : nullptr);
    }
    const RowList rest{list.data + i, list.count - i, list.lines};
    if (rest.count) add<Avx512, W>(rest, h + i * tokens, y, tokens, begin, end);
}

}  // namespace
}  // namespace ffn
