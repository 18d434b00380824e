// Any CPU.
#include "isa.h"

#include "portable.h"
#include "rows.h"
#include "acts.h"
#include "grouped.h"
#include "read_row.h"

namespace ffn {
namespace {

bool runs_here() { return true; }

}  // namespace

extern const Isa kPortable = {
    "portable",
    runs_here,
    {row_kernels<Portable, float>(), row_kernels<Portable, Bf16>(), row_kernels<Portable, Half>(),
     int8_kernels<Portable, Portable>(), int4_kernels<Portable, Portable>()},
    dot<Portable, std::int8_t>,
    activate,
    powers,
    read_row<Portable>,
    &kPortable,
};

}  // namespace ffn
