// Rows of int8 and int4 as numbers, for matrix products of many tokens.
#pragma once

#include "isa.h"

namespace ffn {

struct Reading {
    const std::byte* rows;
    std::int64_t stride, count;  // bytes from one row to the next
    RowFormat format;
    DType dtype;  // of what is written
    void* to;     // `count` rows of `format.width` numbers
};

void read_rows(const Reading& reading, const Isa& isa, int threads);

}  // namespace ffn
