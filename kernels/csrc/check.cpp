// Drives the kernels under a sanitizer (`make sanitize`): every instruction set, format and odd
// shape against two plain loops, alone and from two threads at once, and without memory. Exits with
// 1 on a difference.
#include <algorithm>
#include <cmath>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "failing_new.h"
#include "linear.h"
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
    std::vector<float> biases, off, down, x, errors;
    std::vector<float> seen;  // x as the rows meet it
    std::vector<std::byte> screen;
    std::vector<std::uint8_t> mask;
};

template <class W>
void store(float& value, std::byte* row, std::int64_t d) {
    W& to = reinterpret_cast<W*>(row)[d];
    from_float(value, to);
    value = to_float(to);
}

// The scale of column d: another one for every second group.
float scale(std::int64_t d) { return d / kGroup % 2 ? 1 / 64.0f : 1 / 32.0f; }

// Writes the scale of column d; where the row's numbers begin.
std::byte* store_scale(std::byte* row, std::int64_t d, DType dtype, std::int64_t lines, float by) {
    from_float(scale(d) * by, reinterpret_cast<Bf16*>(row)[d / kGroup]);
    return row + scale_lines(dtype, lines) * kLine;
}

void store_int8(float& value, std::byte* row, std::int64_t d, std::int64_t lines) {
    const int code = std::clamp(int(value * 50), -127, 127);
    std::byte* numbers = store_scale(row, d, DType::i8, lines, 1);
    reinterpret_cast<std::int8_t*>(numbers)[d] = std::int8_t(code);
    value = float(code) * scale(d);
}

void store_int4(float& value, std::byte* row, std::int64_t d, std::int64_t lines, bool added) {
    const int code = std::clamp(int(value * 8), -7, 7);
    std::byte* line = store_scale(row, d, DType::i4, lines, 8) + d / 128 * kLine;
    if (added) {
        const auto nibble = std::uint32_t(code + 8) << (d % 128 / 16 * 4);
        reinterpret_cast<std::uint32_t*>(line)[d % 16] |= nibble;
    } else {
        line[d % 64] |= std::byte((code + 8) << (d % 128 / 64 * 4));
    }
    value = float(code) * 8 * scale(d);
}

// Of a screen: without scales.
std::int8_t screened(float value) { return std::int8_t(value * 50); }

void store_all(Problem& p) {
    for (std::size_t i = 0; i < p.values.size(); ++i) {
        const auto d = std::int64_t(i) % p.padded;
        std::byte* row = p.rows.data() + std::int64_t(i) / p.padded * p.bytes;
        float& value = p.values[i];
        if (p.c.dtype == DType::f32) store<float>(value, row, d);
        if (p.c.dtype == DType::bf16) store<Bf16>(value, row, d);
        if (p.c.dtype == DType::f16) store<Half>(value, row, d);
        const bool added = std::int64_t(i) / p.padded % (p.c.inputs + 1) == p.c.inputs;
        if (p.c.dtype == DType::i8) store_int8(value, row, d, p.lines);
        if (p.c.dtype == DType::i4) store_int4(value, row, d, p.lines, added);
    }
}

// The first rows in eight bits, with errors so large that nothing may be left out but by the gate.
void make_screen(Problem& p) {
    const std::int64_t bytes = (p.c.width + kLine - 1) / kLine * kLine;
    p.screen.resize(std::size_t(p.c.neurons * bytes));
    for (int n = 0; n < p.c.neurons; ++n)
        for (int d = 0; d < p.c.width; ++d) {
            const float value = p.values[std::size_t(n * (p.c.inputs + 1) * p.padded + d)];
            p.screen[std::size_t(n * bytes + d)] = std::byte(screened(value));
        }
    p.errors.assign(std::size_t(p.c.neurons), 1.0f * float(p.c.width));
}

// x as it meets rows of int8 and int4.
void round_group(float* x, int count) {
    float most = 0;
    for (int i = 0; i < count; ++i) most = std::max(most, std::abs(x[i]));
    for (int i = 0; i < count && most > 0; ++i) x[i] = std::nearbyint(x[i] * (127 / most)) * (most / 127);
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
    for (int i = 0; c.off && i < c.neurons; ++i) p.off.push_back(normal(random));
    if (c.screened) make_screen(p);
    for (int i = 0; c.biased && i < c.neurons * c.inputs; ++i) p.biases.push_back(normal(random));
    for (int i = 0; c.biased && i < c.width; ++i) p.down.push_back(normal(random));
    for (int i = 0; i < c.tokens * c.width; ++i) p.x.push_back(normal(random) / 4);
    p.seen = p.x;
    for (int t = 0; grouped(c.dtype) && t < c.tokens; ++t)
        for (int d = 0; d < c.width; d += kGroup)
            round_group(&p.seen[std::size_t(t * c.width + d)], std::min(kGroup, c.width - d));
    for (int i = 0; c.masked && i < c.tokens * c.experts; ++i) p.mask.push_back(random() % 2);
    return p;
}

float hidden(const Problem& p, int token, int neuron) {
    float h = 1;
    for (int part = 0; part < p.c.inputs; ++part) {
        float z = p.biases.empty() ? 0 : p.biases[neuron * p.c.inputs + part];
        const float* row = &p.values[(neuron * (p.c.inputs + 1) + part) * p.padded];
        for (int d = 0; d < p.c.width; ++d) z += row[d] * p.seen[token * p.c.width + d];
        if (!part) Activation{p.c.act, 0}(&z, 1, 0);
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
    const Weights weights{p.rows.data(), data(p.biases), data(p.off), data(p.down),
                          p.c.neurons,   p.c.width,      p.lines,     p.c.inputs,
                          p.c.dtype,     {Activation{p.c.act, 0}, Activation{}},
                          {data(p.screen), scales.data(), data(p.errors), 1}};
    const Batch batch{p.x.data(), y.data(), DType::f32, p.c.tokens, data(p.mask), p.c.experts};
    sparse_ffn(weights, batch, isa, p.c.threads, {p.c.few, 1.0, 1.0});
    return y;
}

void compare(const Problem& p, const Isa& isa, const std::vector<float>& y) {
    const std::vector<float> expected = slow(p);
    // With int4, h times a scale may be rounded to bf16.
    float largest = 0;
    for (const float value : expected) largest = std::max(largest, std::abs(value));
    const float rounding = p.c.dtype == DType::i4 ? 1e-2f * largest : 0;
    for (std::size_t i = 0; i < y.size(); ++i) {
        if (std::abs(y[i] - expected[i]) <= 1e-4f * (1 + std::abs(expected[i])) + rounding) continue;
        std::fprintf(stderr, "%s: y[%zu] is %g, should be %g (T %d, D %d, F %d, dtype %d)\n",
                     isa.name, i, y[i], expected[i], p.c.tokens, p.c.width, p.c.neurons,
                     int(p.c.dtype));
        std::exit(1);
    }
}

// The first rows of the FFN as a linear.
void check_linear(const Problem& p, const Isa& isa) {
    const std::int64_t apart = p.c.inputs + 1, rows = p.c.neurons;
    std::vector<std::byte> packed;
    for (std::int64_t n = 0; n < rows; ++n) {
        const auto* row = p.rows.data() + n * apart * p.bytes;
        packed.insert(packed.end(), row, row + p.bytes);
    }
    const bool biased = !p.biases.empty() && p.c.inputs == 1;
    const Linear linear{packed.data(), biased ? p.biases.data() : nullptr, rows, p.c.width,
                        p.lines,       p.c.dtype};
    std::vector<float> y(std::size_t(p.c.tokens * rows));
    ffn::linear(linear, {p.x.data(), y.data(), DType::f32, p.c.tokens}, isa, p.c.threads);
    for (std::int64_t t = 0; t < p.c.tokens; ++t)
        for (std::int64_t n = 0; n < rows; ++n) {
            float expected = biased ? p.biases[n] : 0;
            for (int d = 0; d < p.c.width; ++d)
                expected += p.values[n * apart * p.padded + d] * p.seen[t * p.c.width + d];
            if (std::abs(y[t * rows + n] - expected) <= 1e-4f * (1 + std::abs(expected))) continue;
            std::fprintf(stderr, "%s: a linear gives %g, should be %g (T %d, D %d, dtype %d)\n",
                         isa.name, y[t * rows + n], expected, p.c.tokens, p.c.width,
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
            if (isa->runs_here()) {
                compare(problem, *isa, fast(problem, *isa));
                check_linear(problem, *isa);
            }
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
