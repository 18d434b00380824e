#include "proposal.h"

#include <cmath>
#include <vector>

#include "hidden.h"
#include "parallel.h"
#include "scratch.h"

namespace ffn {
namespace {

constexpr std::int64_t kTokens = 128;  // at a time

void some_tokens(const Proposal& proposal, const void* x_TD, DType dtype, std::int64_t tokens,
                 float tau, std::uint8_t* mask_TF, const Isa& isa, int threads) {
    thread_local Scratch scratch;
    thread_local std::vector<float> products;
    const Linear& up = *proposal.up;
    const std::int64_t neurons = up.rows;
    threads = useful_threads(threads, 2 * neurons * row_bytes(up.dtype, up.lines));
    const HiddenPieces hidden(proposal.gate, up, proposal.act, proposal.up_act, dtype, isa,
                              threads);
    Inputs x;
    const Batch batch{x_TD, nullptr, dtype, tokens, nullptr, 1};
    x.prepare(batch, up.width, up.padded(), hidden.x(),
              scratch.get(std::size_t(tokens) * Inputs::stride(up.padded())));
    products.resize(std::size_t(2 * tokens * neurons));
    float *h = products.data(), *g = h + tokens * neurons;
    const auto piece = [&](int i) {
        hidden.run(i, x, tokens, h, g);
        for (std::int64_t t = 0; t < tokens; ++t)
            for (std::int64_t f = hidden.begin(i); f < hidden.end(i); ++f)
                mask_TF[t * neurons + f] =
                    std::fabs(h[t * neurons + f]) * proposal.norm_F[f] > tau;
    };
    in_parallel(threads, Loop{hidden.count(), piece});
}

}  // namespace

void propose(const Proposal& proposal, const void* x_TD, DType dtype, std::int64_t tokens,
             float tau, std::uint8_t* mask_TF, const Isa& isa, int threads) {
    const Linear& up = *proposal.up;
    for (std::int64_t t = 0; t < tokens; t += kTokens) {
        const void* x = element(x_TD, dtype, t * up.width);
        const std::int64_t count = std::min(kTokens, tokens - t);
        some_tokens(proposal, x, dtype, count, tau, mask_TF + t * up.rows, isa,
                    std::max(threads, 1));
    }
}

}  // namespace ffn
