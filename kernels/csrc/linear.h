// y = x W^T + b. Of few tokens it is as fast as W is read; of many, four rows meet all of them.
// Letters: T tokens, D columns, N rows of W.
#pragma once

#include "isa.h"

namespace ffn {

struct Linear {
    const std::byte* rows_ND;  // `row_bytes` apart
    const float* bias_N;       // null: 0
    std::int64_t rows, width, lines;
    DType dtype;
    float zero = 8;  // of int4: the code that stands for 0
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

}  // namespace ffn
