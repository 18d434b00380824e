// y = x W^T + b from the columns of W: those that meet nothing but zeros of x are not read.
// Letters: T tokens, D columns, N rows of W.
#pragma once

#include "isa.h"
#include "linear.h"

namespace ffn {

struct Columns {
    const std::byte* columns_DN;  // `row_bytes` apart; int4 in the order of rows of W_down
    const float* bias_N;          // null: 0
    std::int64_t columns, rows, lines;
    DType dtype;
};

// Runs on at most `threads` threads; the result depends neither on their number nor on their
// timing. Of several tokens, columns are read that one of them wants.
void columns(const Columns& weights, const Product& product, const Isa& isa, int threads);

}  // namespace ffn
