// x86-64 with AVX2: eight floats at a time. Chosen when the program runs, not when it is compiled.
#include "isa.h"

#ifdef FFN_X86
#include <immintrin.h>

#include "target.h"

namespace ffn {
namespace {

// Every CPU runs this one: it stands before the pragma.
bool runs_here() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

}  // namespace
}  // namespace ffn

FFN_TARGET_BEGIN("avx2,fma,f16c")
#include "rows.h"

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
    static F nibbles(const Int4* p, int n) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        const __m256i shifted = _mm256_srlv_epi32(words, _mm256_set1_epi32(4 * n));
        const __m256i codes = _mm256_and_si256(shifted, _mm256_set1_epi32(15));
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(8)));
    }

  private:
    static __m128i half_line(const void* p) {
        return _mm_loadu_si128(static_cast<const __m128i*>(p));
    }
};

}  // namespace

extern const Isa kAvx2 = {
    "avx2",
    runs_here,
    {row_kernels<Avx2, float>(), row_kernels<Avx2, Bf16>(), row_kernels<Avx2, Half>(),
     row_kernels<Avx2, std::int8_t>(), row_kernels<Avx2, Int4>()},
    &kAvx2,
};

}  // namespace ffn
FFN_TARGET_END
#endif
