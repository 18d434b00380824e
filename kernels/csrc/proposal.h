// Which single neurons of an FFN are worth computing, said by copies of its rows in few bits:
// |act(gate~ x) * up_act(up~ x)| * norm > tau. Letters: T tokens, F neurons.
#pragma once

#include "activation.h"
#include "linear.h"

namespace ffn {

struct Proposal {
    const Linear *gate, *up;  // copies; gate is null where there is none
    Activation act, up_act;   // of the gate, or of up where there is none; of up behind a gate
    const float* norm_F;
};

// Writes mask_TF: 1 where a token wants a neuron, else 0. On at most `threads` threads; the result
// depends neither on their number nor on their timing.
void propose(const Proposal& proposal, const void* x_TD, DType dtype, std::int64_t tokens,
             float tau, std::uint8_t* mask_TF, const Isa& isa, int threads);

}  // namespace ffn
