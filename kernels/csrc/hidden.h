// The hidden values of an FFN from its linears, in pieces: act(gate x) * up_act(up x), or, without
// a gate, act(up x). Letters: T tokens, F neurons.
#pragma once

#include "activation.h"
#include "linear.h"

namespace ffn {

class HiddenPieces {
  public:
    // `gate` may be null; it is stored as `up` is.
    HiddenPieces(const Linear* gate, const Linear& up, Activation act, Activation up_act, DType x,
                 const Isa& isa, int threads)
        : up_(up, x, isa, threads),
          gate_(gate ? *gate : up, x, isa, threads),
          gated_(gate != nullptr),
          act_(act),
          up_act_(up_act),
          isa_(isa),
          neurons_(up.rows) {}

    int count() const { return up_.count(); }
    std::int64_t begin(int piece) const { return up_.begin(piece); }
    std::int64_t end(int piece) const { return up_.end(piece); }
    DType x() const { return up_.x(); }

    // Writes a piece of h_TF; g_TF is memory of the same size.
    void run(int piece, const Inputs& x, std::int64_t tokens, float* h_TF, float* g_TF) const {
        up_.run(piece, x, tokens, h_TF, DType::f32);
        if (gated_) gate_.run(piece, x, tokens, g_TF, DType::f32);
        const auto count = std::size_t(end(piece) - begin(piece));
        for (std::int64_t t = 0; t < tokens; ++t) {
            float* h = h_TF + t * neurons_ + begin(piece);
            isa_.activate(gated_ ? up_act_ : act_, h, count, 0);
            if (!gated_) continue;
            float* g = g_TF + t * neurons_ + begin(piece);
            isa_.activate(act_, g, count, 0);
            for (std::size_t f = 0; f < count; ++f) h[f] *= g[f];
        }
    }

  private:
    const LinearPieces up_, gate_;
    const bool gated_;
    const Activation act_, up_act_;
    const Isa& isa_;
    const std::int64_t neurons_;
};

}  // namespace ffn
