#include "router.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "activation.h"
#include "sparse_ffn.h"

namespace ffn {
namespace {

void above(const float* scores, std::int64_t experts, float tau, std::uint8_t* mask) {
    for (std::int64_t e = 0; e < experts; ++e) mask[e] = scores[e] > tau;
}

void highest(const float* scores, std::int64_t experts, std::int64_t count, std::uint8_t* mask) {
    thread_local std::vector<std::int32_t> order;
    order.resize(std::size_t(experts));
    std::iota(order.begin(), order.end(), 0);
    const auto before = [&](std::int32_t a, std::int32_t b) {
        const bool nan_a = std::isnan(scores[a]), nan_b = std::isnan(scores[b]);
        if (nan_a != nan_b) return nan_a;
        return nan_a || scores[a] == scores[b] ? a < b : scores[a] > scores[b];
    };
    count = std::min(count, experts);
    std::nth_element(order.begin(), order.begin() + (count - 1), order.end(), before);
    std::fill(mask, mask + experts, std::uint8_t{0});
    for (std::int64_t i = 0; i < count; ++i) mask[order[std::size_t(i)]] = 1;
}

}  // namespace

void choose(const Router& router, const void* x_TD, DType dtype, std::int64_t tokens, float knob,
            std::uint8_t* mask_TE, const Isa& isa, int threads) {
    const Linear& weight = *router.weight;
    const std::int64_t experts = weight.rows;
    const std::int64_t width = router.first ? router.first->width : weight.width;
    thread_local std::vector<float> x, middle, scores;
    x.resize(std::size_t(tokens * width));
    scores.resize(std::size_t(tokens * experts));
    to_floats(x_TD, dtype, tokens * width, x.data());
    const float* in = x.data();
    if (router.first) {
        middle.resize(std::size_t(tokens * router.first->rows));
        linear(*router.first, {in, middle.data(), DType::f32, tokens}, isa, threads);
        in = middle.data();
    }
    linear(weight, {in, scores.data(), DType::f32, tokens}, isa, threads);
    for (std::int64_t t = 0; t < tokens; ++t) {
        float* z = scores.data() + t * experts;
        for (std::int64_t e = 0; e < experts; ++e)
            z[e] = -(z[e] + (router.bias_E ? router.bias_E[e] : 0));
        isa.powers(z, std::size_t(experts));
        for (std::int64_t e = 0; e < experts; ++e) z[e] = 1 / (1 + z[e]);
        if (router.by_rank)
            highest(z, experts, std::int64_t(knob), mask_TE + t * experts);
        else
            above(z, experts, knob, mask_TE + t * experts);
    }
}

}  // namespace ffn
