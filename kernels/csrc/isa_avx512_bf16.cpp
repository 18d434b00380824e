// AVX-512 with products of bf16 pairs: exact products, sums in fp32.
#include "isa.h"

#ifdef FFN_X86
#include <immintrin.h>

#include "target.h"
FFN_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512bf16")
#include "avx512.h"
#include "rows.h"

namespace ffn {
namespace {

struct Bf16Pairs {
    using X = Bf16;
    using Row = __m512bh;
    static constexpr int step = 32;
    static Row row(const Bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Row x(const Bf16* p) { return row(p); }
    static __m512 add(__m512 sum, Row w, Row x) { return _mm512_dpbf16_ps(sum, w, x); }
};

}  // namespace

extern const Isa kAvx512Bf16 = {
    "avx512_bf16",
    [] { return kAvx512.runs_here() && __builtin_cpu_supports("avx512bf16"); },
    {row_kernels<Avx512, float>(), row_kernels<Avx512, Bf16, Bf16Pairs>(DType::bf16),
     row_kernels<Avx512, Half>(), row_kernels<Avx512, std::int8_t>()},
    &kAvx512,
};

}  // namespace ffn
FFN_TARGET_END
#endif
