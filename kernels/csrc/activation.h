// Activations of one number, and of many. The names and the order are those of
// kernels/activations.py.
#pragma once

#include <cmath>
#include <cstddef>

#include "dtype.h"

namespace ffn {

enum class Act : int { identity, relu, relu2, fatrelu, shifted_relu, silu, gelu, gelu_tanh };
constexpr int kActs = 8;

// Whether it makes exact zeros of whole ranges of numbers.
inline bool gives_zeros(Act act) {
    return act == Act::relu || act == Act::relu2 || act == Act::fatrelu || act == Act::shifted_relu;
}

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
    if constexpr (kind == Act::gelu) return 0.5f * x * (1 + std::erf(x * 0.70710678f));
    if constexpr (kind == Act::gelu_tanh) {  // (1 + tanh u) / 2 = 1 / (1 + e^-2u)
        const float u = 0.79788456f * (x + 0.044715f * x * x * x);
        return x / (1 + exponential(-2 * u));
    }
    return x;
}

struct Activation {
    Act kind = Act::identity;
    float threshold = 0;

    // z = act(z + bias)
    void operator()(float* z, std::size_t count, float bias) const {
        switch (kind) {
            case Act::relu: return all<Act::relu>(z, count, bias);
            case Act::relu2: return all<Act::relu2>(z, count, bias);
            case Act::fatrelu: return all<Act::fatrelu>(z, count, bias);
            case Act::shifted_relu: return all<Act::shifted_relu>(z, count, bias);
            case Act::silu: return all<Act::silu>(z, count, bias);
            case Act::gelu: return all<Act::gelu>(z, count, bias);
            case Act::gelu_tanh: return all<Act::gelu_tanh>(z, count, bias);
            case Act::identity: return all<Act::identity>(z, count, bias);
        }
    }

  private:
    template <Act known>
    void all(float* z, std::size_t count, float bias) const {
        for (std::size_t i = 0; i < count; ++i) z[i] = activate<known>(z[i] + bias, threshold);
    }
};

// h *= z, where h is not zero: of a neuron that is off not even infinity counts.
inline void multiply(float* h, const float* z, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) h[i] = h[i] == 0 ? 0 : h[i] * z[i];
}

}  // namespace ffn
