// 64-bit ARM with dot products of integers (ARMv8.2's dotprod: Neoverse N1 and newer, Apple M1).
#include "isa.h"

#ifdef FFN_ARM
#include <arm_neon.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>

#include "agrees.h"
#include "target.h"

namespace ffn {
namespace {

// Every CPU runs this one: it stands before the pragma.
bool runs_here() {
    static const bool runs =
        (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0 && agrees(kDotprod, kPortable);
    return runs;
}

}  // namespace
}  // namespace ffn

FFN_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#include "portable.h"
#include "rows.h"
#include "acts.h"
#include "grouped.h"
#include "read_row.h"

namespace ffn {
namespace {

struct Dotprod : Portable {
    static F product(const Codes& w, const std::int8_t* x) {
        int32x4_t sum = vdupq_n_s32(0);
        for (int k = 0; k < unit; k += 16) sum = vdotq_s32(sum, vld1q_s8(w.of + k), vld1q_s8(x + k));
        const float32x4_t floats = vcvtq_f32_s32(sum);
        F made;
        std::memcpy(&made, &floats, sizeof made);
        return made;
    }
    static F small_product(const Codes& w, const std::int8_t* x) { return product(w, x); }
};

}  // namespace

extern const Isa kDotprod = {
    "dotprod",
    runs_here,
    {row_kernels<Portable, float>(), row_kernels<Portable, Bf16>(), row_kernels<Portable, Half>(),
     int8_kernels<Portable, Dotprod>(), int4_kernels<Portable, Dotprod>()},
    dot<Portable, std::int8_t>,
    activate,
    powers,
    read_row<Portable>,
    &kDotprod,
};

}  // namespace ffn
FFN_TARGET_END
#endif
