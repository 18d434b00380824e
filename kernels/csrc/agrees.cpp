#include "agrees.h"

#include <cmath>
#include <random>
#include <vector>

#include "scratch.h"

namespace ffn {
namespace {

constexpr std::int64_t kLines = 3;
constexpr int kRows = 5, kTokens = 3;

// Any codes, scales around 1, and any x.
bool agree(const RowKernels& one, const RowKernels& other, DType dtype) {
    std::mt19937 random(0);
    std::uniform_real_distribution<float> around_1(0.5f, 2.0f), any(-4.0f, 4.0f);
    const std::int64_t padded = kLines * per_line(dtype), bytes = row_bytes(dtype, kLines);
    Scratch rows_memory, x_memory;
    std::byte* memory = rows_memory.get(std::size_t(kRows * bytes));
    const std::size_t each = (GroupedX::bytes(padded) + kLine - 1) / kLine * kLine;
    std::byte* inputs = x_memory.get(kTokens * each);
    const void *rows[kRows + kAhead], *x[kTokens];
    for (int r = 0; r < kRows; ++r) {
        std::byte* row = memory + r * bytes;
        for (std::int64_t i = 0; i < bytes; ++i) row[i] = std::byte(random());
        const std::int64_t scales = scale_lines(dtype, kLines) * kLine / std::int64_t(sizeof(Bf16));
        for (std::int64_t g = 0; g < scales; ++g)
            from_float(around_1(random), reinterpret_cast<Bf16*>(row)[g]);
        rows[r] = row;
    }
    for (int i = kRows; i < kRows + kAhead; ++i) rows[i] = rows[kRows - 1];
    for (int t = 0; t < kTokens; ++t) {
        std::vector<float> numbers(static_cast<std::size_t>(padded));
        for (float& number : numbers) number = any(random);
        to_groups(numbers.data(), DType::f32, padded, padded, inputs + t * each);
        x[t] = inputs + t * each;
    }
    float y[kRows * kTokens], expected[kRows * kTokens];
    one.dot({rows, kRows, kLines}, x, kTokens, y);
    other.dot({rows, kRows, kLines}, x, kTokens, expected);
    for (int i = 0; i < kRows * kTokens; ++i)
        if (!(std::fabs(y[i] - expected[i]) <= 1e-3f * (100 + std::fabs(expected[i])))) return false;
    return true;
}

}  // namespace

bool agrees(const Isa& isa, const Isa& other) {
    for (const DType dtype : {DType::i8, DType::i4})
        if (!agree(isa.of[int(dtype)], other.of[int(dtype)], dtype)) return false;
    return true;
}

}  // namespace ffn
