#include "grouped_x.h"

#include <algorithm>
#include <cmath>

#include "numbers.h"

namespace ffn {
namespace {

// Adding it leaves the nearest whole number in the last bits, ties to even.
constexpr float kRounds = 12582912.0f;  // 1.5 * 2^23

void round_group(const float* x, std::int8_t* codes, float& scale, float& sum) {
    float most = 0, poison = 0;
    for (int i = 0; i < kGroup; ++i) {
        most = std::max(most, std::fabs(x[i]));
        poison += x[i] * 0;  // NaN where x is infinite or NaN, else 0
    }
    const float inverse = most > 0 ? 127 / most : 0;
    std::int32_t total = 0;
    for (int i = 0; i < kGroup; ++i) {
        const float rounded = x[i] * inverse + kRounds;
        const auto code = std::int32_t(to_bits(rounded) - to_bits(kRounds));
        codes[i] = std::int8_t(code);
        total += std::int8_t(code);
    }
    scale = most / 127 + poison;
    sum = scale * float(total);
}

}  // namespace

void to_groups(const void* x, DType dtype, std::int64_t width, std::int64_t padded, void* to) {
    const GroupedX made(to, padded);
    auto* codes = const_cast<std::int8_t*>(made.codes);
    auto* scales = const_cast<float*>(made.scales);
    auto* sums = const_cast<float*>(made.sums);
    const std::int64_t groups = (width + kGroup - 1) / kGroup;
    for (std::int64_t g = 0; g < groups; ++g) {
        float numbers[kGroup] = {};
        const std::int64_t count = std::min<std::int64_t>(kGroup, width - g * kGroup);
        to_floats(element(x, dtype, g * kGroup), dtype, count, numbers);
        round_group(numbers, codes + g * kGroup, scales[g], sums[g]);
    }
    std::fill(codes + groups * kGroup, codes + padded, std::int8_t{0});
    std::fill(scales + groups, scales + GroupedX::groups(padded), 0.0f);
    std::fill(sums + groups, sums + GroupedX::groups(padded), 0.0f);
}

}  // namespace ffn
