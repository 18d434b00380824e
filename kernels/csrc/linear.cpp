#include "linear.h"

#include <algorithm>
#include <vector>

#include "numbers.h"
#include "parallel.h"
#include "scratch.h"
#include "sparse_ffn.h"

namespace ffn {
namespace {

constexpr std::int64_t kTokens = 256;         // whose x is prepared at a time
constexpr int kRows = 64;                     // that are multiplied at a time
constexpr std::int64_t kPieceBytes = 131072;  // of W that a thread takes at a time

class Job {
  public:
    Job(const Linear& weights, const Product& product, const Isa& isa)
        : w_(weights),
          p_(product),
          bytes_(row_bytes(weights.dtype, weights.lines)),
          kernels_(kernels_for(isa, weights.dtype, product.dtype)) {}

    void run(int threads) {
        thread_local Scratch scratch;
        const std::int64_t padded = w_.lines * per_line(w_.dtype);
        std::byte* memory = scratch.get(std::size_t(p_.tokens) * Inputs::stride(padded));
        const Batch batch{p_.x_TD, nullptr, p_.dtype, p_.tokens, nullptr, 1};
        x_.prepare(batch, w_.width, padded, kernels_.x, memory);
        const std::int64_t least = std::max<std::int64_t>(1, kPieceBytes / bytes_);
        const std::int64_t each = (w_.rows + threads - 1) / threads;
        const std::int64_t piece = (std::min(least, each) + 3) / 4 * 4;
        const int pieces = int((w_.rows + piece - 1) / piece);
        const auto multiply = [&](int i) {
            rows(i * piece, std::min((i + 1) * piece, w_.rows));
        };
        in_parallel(std::min(threads, pieces), pieces, multiply, 0, [](int) {});
    }

  private:
    void rows(std::int64_t begin, std::int64_t end) const {
        thread_local std::vector<float> z;
        z.resize(std::size_t(kRows * p_.tokens));
        const void* list[kRows + kAhead];
        for (; begin < end; begin += kRows) {
            const int count = int(std::min<std::int64_t>(kRows, end - begin));
            for (int i = 0; i < count + kAhead; ++i)
                list[i] = w_.rows_ND + std::min(begin + i, w_.rows - 1) * bytes_;
            kernels_.dot({list, count, w_.lines, w_.zero}, x_.data(), int(p_.tokens), z.data());
            write(begin, count, z.data());
        }
    }

    void write(std::int64_t begin, int count, const float* z) const {
        for (std::int64_t t = 0; t < p_.tokens; ++t) {
            float y[kRows];
            for (int i = 0; i < count; ++i)
                y[i] = z[i * p_.tokens + t] + (w_.bias_N ? w_.bias_N[begin + i] : 0);
            const char* to = element(p_.y_TN, p_.dtype, t * w_.rows + begin);
            from_floats(y, count, p_.dtype, const_cast<char*>(to));
        }
    }

    const Linear& w_;
    const Product& p_;
    const std::int64_t bytes_;
    const RowKernels& kernels_;
    Inputs x_;
};

}  // namespace

void linear(const Linear& weights, const Product& product, const Isa& isa, int threads) {
    if (weights.rows == 0) return;
    for (std::int64_t t = 0; t < product.tokens; t += kTokens) {
        Product part = product;
        part.x_TD = element(product.x_TD, product.dtype, t * weights.width);
        part.y_TN = const_cast<char*>(element(product.y_TN, product.dtype, t * weights.rows));
        part.tokens = std::min(kTokens, product.tokens - t);
        Job(weights, part, isa).run(std::max(threads, 1));
    }
}

}  // namespace ffn
