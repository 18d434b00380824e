// Sixteen floats at a time. Included behind a `target` pragma.
#pragma once

#include <immintrin.h>

#include "dtype.h"

namespace ffn {
namespace {

struct Avx512 {
    static constexpr int lanes = 16, tokens = 6;
    using F = __m512;

    static F zero() { return _mm512_setzero_ps(); }
    static F set(float value) { return _mm512_set1_ps(value); }
    static F set(Bf16 value) {
        return _mm512_castsi512_ps(_mm512_set1_epi32(int(std::uint32_t{value.bits} << 16)));
    }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static float sum(F v) { return _mm512_reduce_add_ps(v); }
    static void store(float* p, F v) { _mm512_storeu_ps(p, v); }

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static F load(const Half* p) { return _mm512_cvtph_ps(half_line(p)); }
    static F load(const Bf16* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half_line(p)), 16));
    }
    static F load(const std::int8_t* p) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
    static F load(const Int8* p) { return load(&p->code); }
    static F nibbles(const Int4* p, int n) {
        const __m512 values = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
        const __m512i at = _mm512_srlv_epi32(_mm512_loadu_si512(p), _mm512_set1_epi32(4 * n));
        return _mm512_permutexvar_ps(at, values);  // which looks at the last four bits only
    }

  private:
    static __m256i half_line(const void* p) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    }
};

}  // namespace
}  // namespace ffn
