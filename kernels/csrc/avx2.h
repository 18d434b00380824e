// Eight floats at a time, and integers. Included behind a `target` pragma.
#pragma once

#include <immintrin.h>

#include "grouped_x.h"

namespace ffn {
namespace {

struct Avx2 {
    static constexpr int lanes = 8, tokens = 2;
    using F = __m256;

    static F zero() { return _mm256_setzero_ps(); }
    static F set(float value) { return _mm256_set1_ps(value); }
    static F set(Bf16 value) {
        return _mm256_castsi256_ps(_mm256_set1_epi32(int(std::uint32_t{value.bits} << 16)));
    }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
    static float sum(F v) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }

    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static F load(const Half* p) { return _mm256_cvtph_ps(half_line(p)); }
    static F load(const Bf16* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_line(p)), 16));
    }
    static F load(const std::int8_t* p) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
    static F load(const Int8* p) { return load(&p->code); }
    static F nibbles(const Int4* p, int n) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        const __m256i shifted = _mm256_srlv_epi32(words, _mm256_set1_epi32(4 * n));
        const __m256i codes = _mm256_and_si256(shifted, _mm256_set1_epi32(15));
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(8)));
    }

    // Integers, 32 at a time: a group.
    static constexpr int unit = 32;
    static constexpr float shift = 0;
    using Codes = __m256i;
    struct Scales {
        alignas(32) float of[kScales];
    };

    static Codes shifted(const char* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static Codes low(const char* p) { return _mm256_and_si256(shifted(p), _mm256_set1_epi8(15)); }
    static Codes high(const char* p) {
        return _mm256_and_si256(_mm256_srli_epi16(shifted(p), 4), _mm256_set1_epi8(15));
    }
    // One of the factors has to be unsigned: the sign of w moves to x.
    static F product(Codes w, const std::int8_t* x) {
        const __m256i signed_x = _mm256_sign_epi8(shifted(reinterpret_cast<const char*>(x)), w);
        return summed(_mm256_maddubs_epi16(_mm256_abs_epi8(w), signed_x));
    }
    static F small_product(Codes w, const std::int8_t* x) {
        return summed(_mm256_maddubs_epi16(w, shifted(reinterpret_cast<const char*>(x))));
    }
    static Scales scales(const Bf16* w, const float* x) {
        Scales made;
        for (int g = 0; g < kScales; g += lanes)
            _mm256_store_ps(made.of + g, mul(load(w + g), load(x + g)));
        return made;
    }
    static F spread(const Scales& scales, int unit) { return _mm256_broadcast_ss(&scales.of[unit]); }

  private:
    static F summed(__m256i pairs) {
        return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static __m128i half_line(const void* p) {
        return _mm_loadu_si128(static_cast<const __m128i*>(p));
    }
};

}  // namespace
}  // namespace ffn
