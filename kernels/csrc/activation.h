// Activations, by name. The names and the order are those of kernels/activations.py; acts.h computes
// them.
#pragma once

#include <cstddef>

namespace ffn {

enum class Act : int { identity, relu, relu2, fatrelu, shifted_relu, silu, gelu, gelu_tanh };
constexpr int kActs = 8;

struct Activation {
    Act kind = Act::identity;
    float threshold = 0;
};

// Whether it makes exact zeros of whole ranges of numbers.
inline bool gives_zeros(Act act) {
    return act == Act::relu || act == Act::relu2 || act == Act::fatrelu || act == Act::shifted_relu;
}

// h *= z, where h is not zero: of a neuron that is off not even infinity counts.
inline void multiply(float* h, const float* z, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) h[i] = h[i] == 0 ? 0 : h[i] * z[i];
}

}  // namespace ffn
