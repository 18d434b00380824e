// Activations and powers of e of many numbers, once for every instruction set: plain loops, which the
// compiler makes vectors of.
//
// Included behind a `target` pragma, as rows.h, and in an unnamed namespace for the same reason;
// math.h's functions are the library's, where those of cmath are inline.
#pragma once

#include <math.h>

#include "isa.h"

namespace ffn {
namespace {

// e^x to a few units in the last place, without a call or a branch: a loop of it is made vectors.
// 2^(n + f) with f within a half: the exponent n, times a polynomial (Cephes' expf).
inline float exponential(float x) {
    constexpr float rounds = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction
    x = x < -87.0f ? -87.0f : x;           // not std::max: NaN stays NaN
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + rounds, n = shifted - rounds;
    const float f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    return p * from_bits((to_bits(shifted) << 23) + 0x3f800000u);
}

template <Act kind>
inline float activate(float x, float threshold) {
    if constexpr (kind == Act::relu) return x < 0 ? 0 : x;  // not `x > 0 ? x : 0`: NaN stays NaN
    if constexpr (kind == Act::relu2) return x < 0 ? 0 : x * x;
    if constexpr (kind == Act::fatrelu) return x < threshold ? 0 : x;
    if constexpr (kind == Act::shifted_relu) return x < threshold ? 0 : x - threshold;
    if constexpr (kind == Act::silu) return x / (1 + exponential(-x));
    if constexpr (kind == Act::gelu) return 0.5f * x * (1 + erff(x * 0.70710678f));
    if constexpr (kind == Act::gelu_tanh) {  // (1 + tanh u) / 2 = 1 / (1 + e^-2u)
        const float u = 0.79788456f * (x + 0.044715f * x * x * x);
        return x / (1 + exponential(-2 * u));
    }
    return x;
}

template <Act kind>
void activate_all(float threshold, float* z, std::size_t count, float bias) {
    for (std::size_t i = 0; i < count; ++i) z[i] = activate<kind>(z[i] + bias, threshold);
}

void activate(const Activation& act, float* z, std::size_t count, float bias) {
    switch (act.kind) {
        case Act::relu: return activate_all<Act::relu>(act.threshold, z, count, bias);
        case Act::relu2: return activate_all<Act::relu2>(act.threshold, z, count, bias);
        case Act::fatrelu: return activate_all<Act::fatrelu>(act.threshold, z, count, bias);
        case Act::shifted_relu: return activate_all<Act::shifted_relu>(act.threshold, z, count, bias);
        case Act::silu: return activate_all<Act::silu>(act.threshold, z, count, bias);
        case Act::gelu: return activate_all<Act::gelu>(act.threshold, z, count, bias);
        case Act::gelu_tanh: return activate_all<Act::gelu_tanh>(act.threshold, z, count, bias);
        case Act::identity: return activate_all<Act::identity>(act.threshold, z, count, bias);
    }
}

void powers(float* x, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
        const float power = exponential(x[i]);
        x[i] = x[i] == -INFINITY ? 0 : power;
    }
}

}  // namespace
}  // namespace ffn
