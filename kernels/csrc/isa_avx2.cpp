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
#include "avx2.h"
#include "rows.h"
#include "acts.h"
#include "grouped.h"
#include "read_row.h"

namespace ffn {

extern const Isa kAvx2 = {
    "avx2",
    runs_here,
    {row_kernels<Avx2, float>(), row_kernels<Avx2, Bf16>(), row_kernels<Avx2, Half>(),
     int8_kernels<Avx2, Avx2>(), int4_kernels<Avx2, Avx2>()},
    dot<Avx2, std::int8_t>,
    activate,
    powers,
    read_row<Avx2>,
    &kAvx2,
};

}  // namespace ffn
FFN_TARGET_END
#endif
