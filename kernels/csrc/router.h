// Which experts a token wants, said by the sigmoid of a linear, or of two with a narrow middle: those
// above a threshold, or the highest. Letters: T tokens, E experts.
#pragma once

#include "linear.h"

namespace ffn {

struct Router {
    const Linear* weight;  // E rows
    const float* bias_E;   // null: 0
    bool by_rank;          // the highest scores, in place of those above a threshold
    const Linear* first;   // what comes before `weight`; null: nothing does
};

// Writes mask_TE: 1 where a token wants an expert, else 0. `knob` is the threshold, or how many; of
// equal scores the lower experts come first, and NaN counts as the highest. On at most `threads`
// threads; the result depends neither on their number nor on their timing.
void choose(const Router& router, const void* x_TD, DType dtype, std::int64_t tokens, float knob,
            std::uint8_t* mask_TE, const Isa& isa, int threads);

}  // namespace ffn
