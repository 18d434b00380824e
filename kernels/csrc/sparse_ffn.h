// y = W_down (act(W_gate x) * up_act(W_up x)), for the neurons that can contribute.
//
// Letters: T tokens, D width, F neurons, E experts, P parts of a neuron: its rows of each matrix.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activation.h"
#include "isa.h"

namespace ffn {

// An FFN as it is stored once: neuron by neuron its rows of gate (if any), up and W_down
// transposed, each on 64 bytes and `padded` elements long, with zeros behind column D.
struct Weights {
    const std::byte* rows_FPD;
    const float* scales_FP;  // what a row of int8 is multiplied with; null: 1
    const float* biases_FP;  // of every part but down; null: 0
    const float* down_D;     // the bias of the output; null: 0
    std::int64_t neurons, width, padded;
    int inputs;  // parts that multiply x: 2 with a gate, 1 without
    DType dtype;
    Activation acts[2];  // of each of them; the hidden value is the product
};

struct Batch {
    const void* x_TD;
    void* y_TD;  // in the format of x
    DType dtype;
    std::int64_t tokens;
    const std::uint8_t* mask_TE;  // 0 or 1; null: every neuron may run
    std::int64_t experts;         // contiguous slices; the first F mod E have a neuron more
};

// Runs on at most `threads` threads. The result depends on their number, not on their timing.
//
// A row is read only if its product can count: the rows of experts that some token of up to sixteen
// wants, and of those with a gate or up that an activation made zero not what comes behind it.
//
// Returns how many rows it read. If the tokens want more than `most` of the neurons, returns -1 and
// leaves y alone.
std::int64_t sparse_ffn(const Weights& weights, const Batch& batch, const Isa& isa, int threads,
                        double most);

}  // namespace ffn
