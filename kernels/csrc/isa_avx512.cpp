// x86-64 with AVX-512. Chosen when the program runs, not when it is compiled.
#include "isa.h"

#ifdef FFN_X86
#include <immintrin.h>

#include "target.h"

namespace ffn {
namespace {

// Every CPU runs this one: it stands before the pragma.
bool runs_here() { return __builtin_cpu_supports("avx512f"); }

}  // namespace
}  // namespace ffn

FFN_TARGET_BEGIN("avx2,fma,f16c,avx512f")
#include "avx2.h"
#include "avx512.h"
#include "rows.h"
#include "acts.h"
#include "grouped.h"
#include "read_row.h"

namespace ffn {

extern const Isa kAvx512 = {
    "avx512",
    runs_here,
    {row_kernels<Avx512, float>(), row_kernels<Avx512, Bf16>(), row_kernels<Avx512, Half>(),
     int8_kernels<Avx512, Avx2>(), int4_kernels<Avx512, Avx2>()},
    dot<Avx512, std::int8_t>,
    activate,
    powers,
    read_row<Avx512>,
    &kAvx512,
};

}  // namespace ffn
FFN_TARGET_END
#endif
