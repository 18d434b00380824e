// Activations of one number. The names and the order are those of kernels/activations.py.
#pragma once

#include <cmath>

namespace ffn {

enum class Act : int { identity, relu, relu2, fatrelu, shifted_relu, silu, gelu, gelu_tanh };

struct Activation {
    Act kind = Act::identity;
    float theta = 0;

    float operator()(float x) const {
        switch (kind) {
            case Act::relu: return x < 0 ? 0 : x;  // not `x > 0 ? x : 0`: NaN stays NaN
            case Act::relu2: return x < 0 ? 0 : x * x;
            case Act::fatrelu: return x < theta ? 0 : x;
            case Act::shifted_relu: return x < theta ? 0 : x - theta;
            case Act::silu: return x / (1 + std::exp(-x));
            case Act::gelu: return 0.5f * x * (1 + std::erf(x * 0.70710678f));
            case Act::gelu_tanh: {
                const float inner = 0.79788456f * (x + 0.044715f * x * x * x);
                return 0.5f * x * (1 + std::tanh(inner));
            }
            case Act::identity: break;
        }
        return x;
    }
};

}  // namespace ffn
