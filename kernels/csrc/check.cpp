// Drives the kernels under a sanitizer (`make sanitize`): every instruction set, format and odd
// shape against two plain loops, alone and from two threads at once, and without memory. Exits with
// 1 on a difference.
#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "failing_new.h"
#include "sparse_ffn.h"

namespace {

using namespace ffn;

struct Case {
    int tokens, width, neurons, experts, inputs, threads, few;
    DType dtype;
    Act act;
    bool masked, biased, screened, off;
};

struct Problem {
    Case c;
    std::int64_t lines, padded, bytes;  // of a row
    std::vector<float> values;          // of rows_FPD, as stored
    std::vector<std::byte> rows;
    std::vector<float> scales, biases, off, down, x, errors;
    std::vector<std::byte> screen;
    std::vector<std::uint8_t> mask;
};

template <class W>
void store(float& value, std::byte* row, std::int64_t d) {
    W& to = reinterpret_cast<W*>(row)[d];
    from_float(value, to);
    value = to_float(to);
}

void store_int8(float& value, std::byte* row, std::int64_t d) {
    const auto rounded = std::int8_t(value * 50);
    reinterpret_cast<std::int8_t*>(row)[d] = rounded;
    value = rounded / 64.0f;
}

void store_int4(float& value, std::byte* row, std::int64_t d, std::int64_t lines) {
    const int code = std::clamp(int(value * 8), -7, 7);
    auto* words = reinterpret_cast<std::uint32_t*>(row + d / 128 * kLine);
    words[d % 16] |= std::uint32_t(code + 8) << (d % 128 / 16 * 4);
    auto* scales = reinterpret_cast<Bf16*>(row + lines * kLine);
    from_float(d / kGroup % 2 ? 0.125f : 0.25f, scales[d / kGroup]);
    value = float(code) * to_float(scales[d / kGroup]);
}

void store_all(Problem& p) {
    for (std::size_t i = 0; i < p.values.size(); ++i) {
        const auto d = std::int64_t(i) % p.padded;
        std::byte* row = p.rows.data() + std::int64_t(i) / p.padded * p.bytes;
        float& value = p.values[i];
        if (p.c.dtype == DType::f32) store<float>(value, row, d);
        if (p.c.dtype == DType::bf16) store<Bf16>(value, row, d);
        if (p.c.dtype == DType::f16) store<Half>(value, row, d);
        if (p.c.dtype == DType::i8) store_int8(value, row, d);
        if (p.c.dtype == DType::i4) store_int4(value, row, d, p.lines);
    }
}

// The first rows in eight bits, with errors so large that nothing may be left out but by the gate.
void make_screen(Problem& p) {
    const std::int64_t bytes = row_bytes(DType::i8, (p.c.width + kLine - 1) / kLine);
    p.screen.resize(std::size_t(p.c.neurons * bytes));
    for (int n = 0; n < p.c.neurons; ++n)
        for (int d = 0; d < p.c.width; ++d) {
            float value = p.values[std::size_t(n * (p.c.inputs + 1) * p.padded + d)];
            store_int8(value, p.screen.data() + n * bytes, d);
        }
    p.errors.assign(std::size_t(p.c.neurons), 1.0f * float(p.c.width));
}

Problem make(const Case& c, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const std::int64_t line = per_line(c.dtype), lines = (c.width + line - 1) / line;
    Problem p{};
    p.c = c, p.lines = lines, p.padded = lines * line, p.bytes = row_bytes(c.dtype, lines);
    const auto rows = std::size_t(c.neurons) * std::size_t(c.inputs + 1);
    p.values.resize(rows * std::size_t(p.padded));
    for (std::size_t i = 0; i < p.values.size(); ++i)
        p.values[i] = std::int64_t(i) % p.padded < c.width ? normal(random) / 4 : 0;
    p.rows.resize(rows * std::size_t(p.bytes));
    store_all(p);
    if (c.dtype == DType::i8) p.scales.assign(rows, 1 / 64.0f);
    for (int i = 0; c.off && i < c.neurons; ++i) p.off.push_back(normal(random));
    if (c.screened) make_screen(p);
    for (int i = 0; c.biased && i < c.neurons * c.inputs; ++i) p.biases.push_back(normal(random));
    for (int i = 0; c.biased && i < c.width; ++i) p.down.push_back(normal(random));
    for (int i = 0; i < c.tokens * c.width; ++i) p.x.push_back(normal(random) / 4);
    for (int i = 0; c.masked && i < c.tokens * c.experts; ++i) p.mask.push_back(random() % 2);
    return p;
}

float hidden(const Problem& p, int token, int neuron) {
    float h = 1;
    for (int part = 0; part < p.c.inputs; ++part) {
        float z = p.biases.empty() ? 0 : p.biases[neuron * p.c.inputs + part];
        const float* row = &p.values[(neuron * (p.c.inputs + 1) + part) * p.padded];
        for (int d = 0; d < p.c.width; ++d) z += row[d] * p.x[token * p.c.width + d];
        if (!part) Activation{p.c.act, 0}(&z, 1, 1, 0);
        h *= z;
    }
    return h;
}

std::vector<float> slow(const Problem& p) {
    std::vector<float> y(p.x.size());
    for (int t = 0; t < p.c.tokens; ++t) {
        float* y_D = &y[t * p.c.width];
        for (int d = 0; d < p.c.width && !p.down.empty(); ++d) y_D[d] = p.down[d];
        const int size = p.c.neurons / p.c.experts, longer = p.c.neurons % p.c.experts;
        for (int e = 0, n = 0; e < p.c.experts; ++e)
            for (const int end = n + size + (e < longer); n < end; ++n) {
                if (!p.mask.empty() && !p.mask[t * p.c.experts + e]) continue;
                const float h = hidden(p, t, n) - (p.off.empty() ? 0 : p.off[n]);
                const float* row = &p.values[(n * (p.c.inputs + 1) + p.c.inputs) * p.padded];
                for (int d = 0; d < p.c.width; ++d) y_D[d] += h * row[d];
            }
    }
    return y;
}

std::vector<float> fast(const Problem& p, const Isa& isa) {
    std::vector<float> y(p.x.size());
    const auto data = [](const auto& v) { return v.empty() ? nullptr : v.data(); };
    const std::vector<float> scales(std::size_t(p.c.neurons), 1 / 64.0f);
    const Weights weights{p.rows.data(), data(p.scales), data(p.biases), data(p.off), data(p.down),
                          p.c.neurons,   p.c.width,      p.lines,        p.c.inputs,
                          p.c.dtype,     {Activation{p.c.act, 0}, Activation{}},
                          {data(p.screen), scales.data(), data(p.errors), 1}};
    const Batch batch{p.x.data(), y.data(), DType::f32, p.c.tokens, data(p.mask), p.c.experts};
    sparse_ffn(weights, batch, isa, p.c.threads, {p.c.few, 1.0, 1.0});
    return y;
}

void compare(const Problem& p, const Isa& isa, const std::vector<float>& y) {
    const std::vector<float> expected = slow(p);
    for (std::size_t i = 0; i < y.size(); ++i) {
        if (std::abs(y[i] - expected[i]) <= 1e-4f * (1 + std::abs(expected[i]))) continue;
        std::fprintf(stderr, "%s: y[%zu] is %g, should be %g (T %d, D %d, F %d, dtype %d)\n",
                     isa.name, i, y[i], expected[i], p.c.tokens, p.c.width, p.c.neurons,
                     int(p.c.dtype));
        std::exit(1);
    }
}

Case draw(std::mt19937& random) {
    const auto pick = [&](std::initializer_list<int> from) {
        return from.begin()[random() % from.size()];
    };
    const int neurons = pick({1, 7, 64, 65, 300});
    const bool screened = pick({0, 1});
    return {pick({1, 2, 5, 16, 19, 260}),
            pick({1, 31, 64, 65, 600}),
            neurons,
            1 + int(random() % unsigned(neurons)),
            pick({1, 2}),
            pick({1, 2, 4}),
            pick({0, 4, 1000}),
            DType(pick({0, 1, 2, 3, 4})),
            Act(screened ? 1 : pick({1, 5, 6, 7})),
            bool(pick({0, 1})),
            bool(pick({0, 1})),
            screened,
            !screened && pick({0, 1})};
}

void check_all(unsigned seed, int cases) {
    std::mt19937 random(seed);
    for (int i = 0; i < cases; ++i) {
        const Problem problem = make(draw(random), random());
        for (const Isa* isa : kIsas)
            if (isa->runs_here()) compare(problem, *isa, fast(problem, *isa));
    }
}

// Lets allocation n fail, or all from it on: the call throws or is right, the next one is right.
// Returns whether there was an allocation n.
bool fail_one(const Problem& p, const Isa& isa, long n, bool and_all_behind) {
    std::vector<float> y;
    fail_calls(n, and_all_behind ? LONG_MAX : n);
    try {
        y = fast(p, isa);
    } catch (const std::bad_alloc&) {
    }
    const bool failed = stop_failing();
    if (!y.empty()) compare(p, isa, y);
    compare(p, isa, fast(p, isa));
    return failed;
}

// Every time in a new thread, which keeps no memory of calls before.
void check_without_memory(int tokens, int threads) {
    const bool screened = tokens < 4;
    const Case c{tokens,     31,        65,   9,    2,        threads, 4,
                 DType::f16, Act::relu, true, true, screened, false};
    const Problem problem = make(c, 3);
    for (const bool and_all_behind : {false, true}) {
        bool failed = true;
        for (long n = 0; failed; ++n)
            std::thread([&] { failed = fail_one(problem, kPortable, n, and_all_behind); }).join();
    }
}

}  // namespace

int main() {
    check_all(0, 60);
    std::thread beside(check_all, 1, 30);
    check_all(2, 30);
    beside.join();
    for (const int tokens : {3, 40})
        for (const int threads : {1, 3}) check_without_memory(tokens, threads);
    std::puts("ok");
}
