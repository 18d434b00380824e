#include "linear.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "scratch.h"
#include "sparse_ffn.h"

namespace ffn {
namespace {

constexpr std::int64_t kTokens = 256;         // whose x is prepared at a time
constexpr std::int64_t kTiled = 12;           // tokens, from which on tiles are faster
constexpr int kRows = 2 * kTileRows;          // that are multiplied at a time
constexpr std::int64_t kPieceBytes = 131072;  // of W that a thread takes at a time, at most

void some_tokens(const Linear& weights, const Product& product, const Isa& isa, int threads) {
    thread_local Scratch scratch;
    const LinearPieces pieces(weights, product.dtype, isa, threads);
    const std::int64_t padded = weights.padded();
    std::byte* memory = scratch.get(std::size_t(product.tokens) * Inputs::stride(padded));
    const Batch batch{product.x_TD, nullptr, product.dtype, product.tokens, nullptr, 1};
    Inputs x;
    x.prepare(batch, weights.width, padded, pieces.x(), memory);
    const auto piece = [&](int i) {
        pieces.run(i, x, product.tokens, product.y_TN, product.dtype);
    };
    in_parallel(threads, Loop{pieces.count(), piece});
}

}  // namespace

LinearPieces::LinearPieces(const Linear& weights, DType x, const Isa& isa, int threads)
    : w_(weights),
      kernels_(kernels_for(isa, weights.dtype, x)),
      bytes_(row_bytes(weights.dtype, weights.lines)) {
    const std::int64_t bytes = w_.rows * bytes_;
    threads = useful_threads(threads, bytes);
    const std::int64_t rounds = bytes / (kPieceBytes * threads) + 1;
    const std::int64_t each = std::max<std::int64_t>(1, w_.rows / (rounds * threads));
    rows_ = (each + kTileRows - 1) / kTileRows * kTileRows;
    count_ = int((w_.rows + rows_ - 1) / rows_);
}

void LinearPieces::run(int piece, const Inputs& x, std::int64_t tokens, void* y_TN,
                       DType y) const {
    thread_local std::vector<float> z;
    z.resize(std::size_t(kRows * tokens));
    const bool tiled = kernels_.tiles && tokens >= kTiled;
    thread_local Scratch scratch;
    std::byte* memory = tiled ? scratch.get(std::size_t(tile_bytes(w_.padded()))) : nullptr;
    const std::int64_t of_row = tiled ? 1 : tokens, of_token = tiled ? kRows : 1;  // in z
    const void* list[kRows + kAhead];
    for (std::int64_t row = begin(piece); row < end(piece); row += kRows) {
        const int count = int(std::min<std::int64_t>(kRows, end(piece) - row));
        for (int i = 0; i < count + kAhead; ++i)
            list[i] = w_.rows_ND + std::min(row + i, w_.rows - 1) * bytes_;
        const RowList rows{list, count, w_.lines, w_.zero, true};
        if (tiled)
            kernels_.tiles(rows, x.data(), int(tokens), z.data(), kRows, memory);
        else
            kernels_.dot(rows, x.data(), int(tokens), z.data());
        for (std::int64_t t = 0; t < tokens; ++t) {
            float sums[kRows];
            const float* z_t = z.data() + t * of_token;
            for (int i = 0; i < count; ++i)
                sums[i] = z_t[i * of_row] + (w_.bias_N ? w_.bias_N[row + i] : 0);
            const char* to = element(y_TN, y, t * w_.rows + row);
            from_floats(sums, count, y, const_cast<char*>(to));
        }
    }
}

void linear(const Linear& weights, const Product& product, const Isa& isa, int threads) {
    if (weights.rows == 0) return;
    for (std::int64_t t = 0; t < product.tokens; t += kTokens) {
        Product part = product;
        part.x_TD = element(product.x_TD, product.dtype, t * weights.width);
        part.y_TN = const_cast<char*>(element(product.y_TN, product.dtype, t * weights.rows));
        part.tokens = std::min(kTokens, product.tokens - t);
        some_tokens(weights, part, isa, std::max(threads, 1));
    }
}

}  // namespace ffn
