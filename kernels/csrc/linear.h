// y = x W^T + b. Of few tokens it is as fast as W is read; of many, four rows meet all of them.
// Letters: T tokens, D columns, N rows of W.
#pragma once

#include "isa.h"
#include "numbers.h"

namespace ffn {

struct Linear {
    const std::byte* rows_ND;  // `row_bytes` apart
    const float* bias_N;       // null: 0
    std::int64_t rows, width, lines;
    DType dtype;
    float zero = 8;  // of int4: the code that stands for 0

    std::int64_t padded() const { return lines * per_line(dtype); }
};

struct Product {
    const void* x_TD;
    void* y_TN;  // in the format of x
    DType dtype;
    std::int64_t tokens;
};

// Runs on at most `threads` threads; the result depends neither on their number nor on their
// timing. x is rounded to int8 in groups where the weights are int8 or int4.
void linear(const Linear& weights, const Product& product, const Isa& isa, int threads);

// The same in pieces, for who shares them out together with other work.
class LinearPieces {
  public:
    LinearPieces(const Linear& weights, DType x, const Isa& isa, int threads);

    int count() const { return count_; }
    std::int64_t begin(int piece) const { return piece * rows_; }
    std::int64_t end(int piece) const { return std::min(begin(piece + 1), w_.rows); }
    DType x() const { return kernels_.x; }  // in which format `run` wants it

    // Writes the rows of a piece to y, which has T rows of N numbers.
    void run(int piece, const Inputs& x, std::int64_t tokens, void* y_TN, DType y) const;

  private:
    const Linear& w_;
    const RowKernels& kernels_;
    const std::int64_t bytes_;  // of a row
    std::int64_t rows_;         // of a piece
    int count_;
};

}  // namespace ffn
