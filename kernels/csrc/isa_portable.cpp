// Any CPU: four floats at a time in the compiler's own vectors (SSE2, NEON, or plain code).
#include "isa.h"

#include "rows.h"

namespace ffn {
namespace {

struct Portable {
    static constexpr int lanes = 4, tokens = 2;
    using F = float __attribute__((vector_size(16)));
    using U = std::uint32_t __attribute__((vector_size(16)));
    using U16 = std::uint16_t __attribute__((vector_size(8)));
    using I8 = std::int8_t __attribute__((vector_size(4)));

    static F zero() { return F{}; }
    static F set(float value) { return F{value, value, value, value}; }
    static F set(Bf16 value) {
        const std::uint32_t bits = std::uint32_t{value.bits} << 16;
        return as_floats(U{bits, bits, bits, bits});
    }
    static F fma(F a, F b, F c) { return a * b + c; }
    static F mul(F a, F b) { return a * b; }
    static float sum(F v) { return (v[0] + v[1]) + (v[2] + v[3]); }
    static void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

    static F load(const float* p) { return read<F>(p); }
    static F load(const Bf16* p) { return as_floats(widened(p) << 16); }
    static F load(const std::int8_t* p) { return __builtin_convertvector(read<I8>(p), F); }
    static F nibbles(const Int4* p, int n) {
        const U codes = read<U>(p) >> std::uint32_t(4 * n) & 15;
        return __builtin_convertvector(codes, F) - 8;
    }
    static F load(const Half* p) {  // `to_float` of dtype.h, four at a time
        const U bits = widened(p), rest = (bits & 0x7fff) << 13;
        const U special = U(rest >= (0x7c00u << 13)) & 0x7f800000;
        const F scaled = as_floats(rest) * 0x1p112f;
        return as_floats(bits_of(scaled) | special | (bits & 0x8000) << 16);
    }

  private:
    template <class T>
    static T read(const void* p) {
        T value;
        std::memcpy(&value, p, sizeof value);
        return value;
    }
    template <class W>
    static U widened(const W* p) {
        return __builtin_convertvector(read<U16>(p), U);
    }
    static F as_floats(U bits) { return read<F>(&bits); }
    static U bits_of(F value) { return read<U>(&value); }
};

bool runs_here() { return true; }

}  // namespace

extern const Isa kPortable = {
    "portable",
    runs_here,
    {row_kernels<Portable, float>(), row_kernels<Portable, Bf16>(), row_kernels<Portable, Half>(),
     row_kernels<Portable, std::int8_t>(), row_kernels<Portable, Int4>()},
    &kPortable,
};

}  // namespace ffn
