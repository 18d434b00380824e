// Rows of numbers in memory: from one format to another, and x as the kernels want it.
// Letters: T tokens, D width.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#include "dtype.h"
#include "grouped_x.h"
#include "sparse_ffn.h"

namespace ffn {

// The address of a number, in formats whose numbers have one.
inline const char* element(const void* data, DType dtype, std::int64_t index) {
    return static_cast<const char*>(data) + index * (kLine / per_line(dtype));
}

template <class From, class To>
void convert(const void* from, std::int64_t count, void* to) {
    const auto* source = static_cast<const From*>(from);
    auto* target = static_cast<To*>(to);
    for (std::int64_t i = 0; i < count; ++i) from_float(to_float(source[i]), target[i]);
}

inline void to_floats(const void* from, DType dtype, std::int64_t count, float* to) {
    if (dtype == DType::f32) convert<float, float>(from, count, to);
    if (dtype == DType::bf16) convert<Bf16, float>(from, count, to);
    if (dtype == DType::f16) convert<Half, float>(from, count, to);
}

inline void from_floats(const float* from, std::int64_t count, DType dtype, void* to) {
    if (dtype == DType::f32) convert<float, float>(from, count, to);
    if (dtype == DType::bf16) convert<float, Bf16>(from, count, to);
    if (dtype == DType::f16) convert<float, Half>(from, count, to);
}

// x of some tokens in a format, with zeros behind the last column.
class Inputs {
  public:
    // Bytes that `prepare` wants for a token: a line more than x, so that the tokens' columns do
    // not meet in the same few places of a cache.
    static std::size_t stride(std::int64_t padded) {
        return std::size_t(padded) * sizeof(float) + kLine;
    }

    void prepare(const Batch& batch, std::int64_t width, std::int64_t padded, DType format,
                 std::byte* memory) {
        x_.resize(std::size_t(batch.tokens));
        for (std::int64_t t = 0; t < batch.tokens; ++t) {
            std::byte* to = memory + std::size_t(t) * stride(padded);
            const char* from = element(batch.x_TD, batch.dtype, t * width);
            x_[std::size_t(t)] = to;
            if (format == DType::i8) {
                to_groups(from, batch.dtype, width, padded, to);
                continue;
            }
            if (format == batch.dtype)
                std::memcpy(to, from, std::size_t(element(nullptr, format, width) - (char*)nullptr));
            else
                to_floats(from, batch.dtype, width, reinterpret_cast<float*>(to));
            const char* behind = element(to, format, width);
            std::memset(const_cast<char*>(behind), 0, element(to, format, padded) - behind);
        }
    }

    const void* operator[](std::int64_t t) const { return x_[std::size_t(t)]; }
    const void* const* data() const { return x_.data(); }

    // Euclidean, of a token prepared as floats.
    float norm(std::int64_t t, std::int64_t width) const {
        const auto* x = static_cast<const float*>((*this)[t]);
        double sum = 0;
        for (std::int64_t d = 0; d < width; ++d) sum += double(x[d]) * x[d];
        return float(std::sqrt(sum));
    }

  private:
    std::vector<const void*> x_;
};

}  // namespace ffn
