// The numbers of a row of int8 or int4, once for every instruction set.
//
// Included behind a `target` pragma, as rows.h, which comes first.
#pragma once

#include "rows.h"

namespace ffn {
namespace {

// The codes of a line, as bytes.
inline void codes_of(const char* line, const RowFormat& row, std::int8_t (&codes)[2 * kLine]) {
    if (row.dtype == DType::i8) {
        std::memcpy(codes, line, kLine);
        return;
    }
    for (int i = 0; i < kLine; ++i) codes[i] = line[i] & 15;
    for (int i = 0; i < kLine; ++i)
        codes[kLine + i] = std::int8_t(static_cast<unsigned char>(line[i]) >> 4);
}

template <class V>
void floats_of(const char* line, const RowFormat& row, float (&to)[2 * kLine]) {
    if (row.added && row.dtype == DType::i4) {
        const Line<V, Int4> codes(line);
        for (int k = 0; k < 2 * kLine; k += V::lanes) V::store(to + k, codes(k));
        return;
    }
    std::int8_t codes[2 * kLine] = {};
    codes_of(line, row, codes);
    const float zero = row.dtype == DType::i4 ? row.zero : 0;
    for (int k = 0; k < 2 * kLine; ++k) to[k] = float(codes[k]) - zero;
}

template <class V, class To>
void read_row_to(const std::byte* from, const RowFormat& row, To* to) {
    const auto* scales = reinterpret_cast<const Bf16*>(from);
    const char* line = reinterpret_cast<const char*>(from) + scale_lines(row.dtype, row.lines) * kLine;
    for (std::int64_t begin = 0; begin < row.width; begin += per_line(row.dtype), line += kLine) {
        float numbers[2 * kLine];
        floats_of<V>(line, row, numbers);
        const std::int64_t left = row.width - begin;
        const int count = int(left < per_line(row.dtype) ? left : per_line(row.dtype));
        for (int first = 0; first < count; first += kGroup) {
            const float scale = to_float(scales[(begin + first) / kGroup]);
            for (int k = first; k < first + kGroup; ++k) numbers[k] *= scale;
        }
        To made[2 * kLine];  // all of it, so that the loop is made vectors
        for (int k = 0; k < 2 * kLine; ++k) from_float(numbers[k], made[k]);
        std::memcpy(to + begin, made, std::size_t(count) * sizeof(To));
    }
}

template <class V>
void read_row(const std::byte* from, const RowFormat& row, DType dtype, void* to) {
    if (dtype == DType::f32) read_row_to<V>(from, row, static_cast<float*>(to));
    if (dtype == DType::bf16) read_row_to<V>(from, row, static_cast<Bf16*>(to));
    if (dtype == DType::f16) read_row_to<V>(from, row, static_cast<Half*>(to));
}

}  // namespace
}  // namespace ffn
