// y = W_down (act(W_gate x) * up_act(W_up x)), for the neurons that can contribute.
//
// Letters: T tokens, D width, F neurons, E experts, P parts of a neuron: its rows of each matrix.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activation.h"
#include "isa.h"

namespace ffn {

// A copy of the rows of the first part in eight bits: what it says can never be above zero is not
// read in full. |row . x - copy . x| <= reach * error * |x| for every row, or nearly every one.
struct Screen {
    const std::byte* rows_FD = nullptr;  // null: there is none
    const float* scales_F = nullptr;
    const float* errors_F = nullptr;  // |row - copy|
    float reach = 1;
};

// An FFN as it is stored once: neuron by neuron its rows of gate (if any), up and W_down
// transposed, each of whole cache lines, with zeros behind column D.
struct Weights {
    const std::byte* rows_FPD;
    const float* biases_FP;  // of every part but down; null: 0
    const float* off_F;      // what is taken from h of a neuron that is on; null: 0
    const float* down_D;     // the bias of the output; null: 0
    std::int64_t neurons, width, lines;
    int inputs;  // parts that multiply x: 2 with a gate, 1 without
    DType dtype;
    Activation acts[2];  // of each of them; the hidden value is the product
    Screen screen = {};

    std::int64_t padded() const { return lines * per_line(dtype); }
    const std::byte* row(std::int64_t neuron, int part) const {
        return rows_FPD + (neuron * (inputs + 1) + part) * row_bytes(dtype, lines);
    }
    float off(std::int64_t neuron) const { return off_F ? off_F[neuron] : 0; }
    float bias(std::int64_t neuron, int part) const {
        return biases_FP ? biases_FP[neuron * inputs + part] : 0;
    }
};

struct Batch {
    const void* x_TD;
    void* y_TD;  // in the format of x
    DType dtype;
    std::int64_t tokens;
    const std::uint8_t* mask_TE;  // 0 or 1; null: every neuron may run
    std::int64_t experts;         // contiguous slices; the first F mod E have a neuron more
};

struct Limits {
    std::int64_t few;    // up to so many tokens, all are multiplied with every row that one wants
    double most_few;     // share of the neurons that few tokens may want
    double most_many;    // share of the products that many tokens may want
};

// Runs on at most `threads` threads. The result depends on their number, not on their timing.
//
// A row is read only if its product can count: the rows of experts that some token wants, and of
// those with a gate or up that an activation made zero not what comes behind it. Of many tokens,
// only those that want a row, or one of its three neighbours, are multiplied with it, and h is
// rounded to bf16 where x and the weights are.
//
// Returns how many rows it read, those of the screen left out, every group of at most `kFew` or
// `kMany` tokens by itself. If the tokens want more than the limits say, returns -1 and leaves y
// alone.
std::int64_t sparse_ffn(const Weights& weights, const Batch& batch, const Isa& isa, int threads,
                        const Limits& limits);

constexpr std::int64_t kFew = 16;
constexpr std::int64_t kMany = 256;

// The two ways of it; for at most kFew, and for at most kMany tokens.
std::int64_t few_tokens(const Weights& weights, const Batch& batch, const Isa& isa, int threads,
                        double most);
std::int64_t many_tokens(const Weights& weights, const Batch& batch, const Isa& isa, int threads,
                         double most);

// What to multiply with: the fastest, or what takes x in a format that this would lose digits of.
inline const RowKernels& kernels_for(const Isa& isa, DType weights, DType x) {
    const RowKernels& found = isa.of[int(weights)];
    const bool any = found.x == DType::f32 || found.x == DType::i8;
    return any || found.x == x ? found : isa.widened->of[int(weights)];
}

}  // namespace ffn
