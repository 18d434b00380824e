// x86-64 with AVX-VNNI: AVX2, and one instruction for products of integers. Desktop CPUs have it
// where they lack AVX-512.
#include "isa.h"

#ifdef FFN_X86
#include <immintrin.h>

#include "agrees.h"
#include "target.h"

namespace ffn {
namespace {

// Every CPU runs this one: it stands before the pragma.
bool runs_here() {
    static const bool runs = kAvx2.runs_here() && __builtin_cpu_supports("avxvnni") &&
                             agrees(kAvxVnni, kPortable);
    return runs;
}

}  // namespace
}  // namespace ffn

FFN_TARGET_BEGIN("avx2,fma,f16c,avxvnni")
#include "avx2.h"
#include "rows.h"
#include "acts.h"
#include "grouped.h"
#include "read_row.h"

namespace ffn {
namespace {

struct AvxVnni : Avx2 {
    // One of the factors has to be unsigned: the sign of w moves to x.
    static F product(Codes w, const std::int8_t* x) {
        const __m256i signed_x = _mm256_sign_epi8(shifted(reinterpret_cast<const char*>(x)), w);
        return summed(_mm256_abs_epi8(w), signed_x);
    }
    static F small_product(Codes w, const std::int8_t* x) {
        return summed(w, shifted(reinterpret_cast<const char*>(x)));
    }

  private:
    static F summed(__m256i w, __m256i x) {
        return _mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), w, x));
    }
};

}  // namespace

extern const Isa kAvxVnni = {
    "avx_vnni",
    runs_here,
    {row_kernels<Avx2, float>(), row_kernels<Avx2, Bf16>(), row_kernels<Avx2, Half>(),
     int8_kernels<Avx2, AvxVnni>(), int4_kernels<Avx2, AvxVnni>()},
    dot<Avx2, std::int8_t>,
    activate,
    powers,
    read_row<Avx2>,
    &kAvxVnni,
};

}  // namespace ffn
FFN_TARGET_END
#endif
