#include "sparse_ffn.h"

#include <algorithm>

#include "numbers.h"

namespace ffn {
namespace {

Batch some_tokens(const Batch& batch, std::int64_t width, std::int64_t begin, std::int64_t count) {
    Batch part = batch;
    part.x_TD = element(batch.x_TD, batch.dtype, begin * width);
    part.y_TD = const_cast<char*>(element(batch.y_TD, batch.dtype, begin * width));
    part.tokens = count;
    if (batch.mask_TE) part.mask_TE += begin * batch.experts;
    return part;
}

}  // namespace

std::int64_t sparse_ffn(const Weights& weights, const Batch& batch, const Isa& isa, int threads,
                        const Limits& limits) {
    const bool few = batch.tokens <= limits.few;
    const std::int64_t most_tokens = few ? kFew : kMany;
    std::int64_t read = 0;
    for (std::int64_t t = 0; t < batch.tokens; t += most_tokens) {
        const std::int64_t count = std::min(most_tokens, batch.tokens - t);
        const Batch part = some_tokens(batch, weights.width, t, count);
        const double most = t ? 1.0 : few ? limits.most_few : limits.most_many;
        const auto run = few ? few_tokens : many_tokens;
        const std::int64_t rows = run(weights, part, isa, std::max(threads, 1), most);
        if (rows < 0) return rows;
        read += rows;
    }
    return read;
}

}  // namespace ffn
