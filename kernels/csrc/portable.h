// Four floats at a time in the compiler's own vectors (SSE2, NEON, or plain code).
//
// Included behind a `target` pragma, as rows.h, or without one.
#pragma once

#include <cstring>

#include "isa.h"

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
    static F load(const Int8* p) { return load(&p->code); }
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

    // Integers, 32 at a time: a group.
    static constexpr int unit = 32;
    static constexpr float shift = 0;
    using I = std::int32_t __attribute__((vector_size(16)));
    struct Codes {
        std::int8_t of[unit];
    };
    struct Scales {
        float of[kScales];
    };

    static Codes shifted(const char* p) { return read<Codes>(p); }
    static Codes low(const char* p) {
        Codes codes = shifted(p);
        for (std::int8_t& code : codes.of) code &= 15;
        return codes;
    }
    static Codes high(const char* p) {
        Codes codes = shifted(p);
        for (std::int8_t& code : codes.of) code = std::int8_t(std::uint8_t(code) >> 4);
        return codes;
    }
    static F product(const Codes& w, const std::int8_t* x) {
        I sum{};
        for (int k = 0; k < unit; k += lanes)
            sum += __builtin_convertvector(read<I8>(w.of + k), I) *
                   __builtin_convertvector(read<I8>(x + k), I);
        return __builtin_convertvector(sum, F);
    }
    static F small_product(const Codes& w, const std::int8_t* x) { return product(w, x); }
    static Scales scales(const Bf16* w, const float* x) {
        Scales made;
        for (int g = 0; g < kScales; ++g) made.of[g] = to_float(w[g]) * x[g];
        return made;
    }
    static F spread(const Scales& scales, int unit) { return set(scales.of[unit]); }

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

}  // namespace
}  // namespace ffn
