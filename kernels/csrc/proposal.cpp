#include "proposal.h"

#include <cmath>
#include <vector>

#include "parallel.h"
#include "scratch.h"

namespace ffn {
namespace {

constexpr std::int64_t kTokens = 64;  // at a time

void some_tokens(const Proposal& proposal, const void* x_TD, DType dtype, std::int64_t tokens,
                 float tau, std::uint8_t* mask_TF, const Isa& isa, int threads) {
    thread_local Scratch scratch;
    thread_local std::vector<float> products;
    const Linear &up = *proposal.up, &gate = proposal.gate ? *proposal.gate : up;
    const std::int64_t neurons = up.rows;
    threads = useful_threads(threads, 2 * neurons * row_bytes(up.dtype, up.lines));
    const LinearPieces ups(up, dtype, isa, threads), gates(gate, dtype, isa, threads);
    Inputs x;
    const Batch batch{x_TD, nullptr, dtype, tokens, nullptr, 1};
    x.prepare(batch, up.width, up.padded(), ups.x(),
              scratch.get(std::size_t(tokens) * Inputs::stride(up.padded())));
    products.resize(std::size_t(2 * tokens * neurons));
    float *u = products.data(), *g = u + tokens * neurons;
    const auto piece = [&](int i) {
        ups.run(i, x, tokens, u, DType::f32);
        if (proposal.gate) gates.run(i, x, tokens, g, DType::f32);
        const auto count = std::size_t(ups.end(i) - ups.begin(i));
        for (std::int64_t t = 0; t < tokens; ++t) {
            const std::int64_t from = t * neurons + ups.begin(i);
            if (proposal.gate) {
                proposal.act(g + from, count, 0);
                proposal.up_act(u + from, count, 0);
                for (std::size_t f = 0; f < count; ++f) u[from + f] *= g[from + f];
            } else {
                proposal.act(u + from, count, 0);
            }
            const float* norm = proposal.norm_F + ups.begin(i);
            for (std::size_t f = 0; f < count; ++f)
                mask_TF[from + f] = std::fabs(u[from + f]) * norm[f] > tau;
        }
    };
    in_parallel(threads, Loop{ups.count(), piece});
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
