// Drives the kernels under a sanitizer (`make sanitize`): every instruction set, format and odd
// shape against two plain loops, alone and from two threads at once, and without memory; a stack
// against its layers. Exits with 1 on a difference.
#include <algorithm>
#include <cmath>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "decoder_layer.h"
#include "failing_new.h"
#include "agrees.h"
#include "columns.h"
#include "linear.h"
#include "proposal.h"
#include "router.h"
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
        if (!part) kPortable.activate({p.c.act, 0}, &z, 1, 0);
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

// The rows of a part of the FFN, one behind the other.
std::vector<std::byte> rows_of(const Problem& p, int part) {
    std::vector<std::byte> packed;
    for (std::int64_t n = 0; n < p.c.neurons; ++n) {
        const auto* row = p.rows.data() + (n * (p.c.inputs + 1) + part) * p.bytes;
        packed.insert(packed.end(), row, row + p.bytes);
    }
    return packed;
}

// The first rows of the FFN as a linear.
void check_linear(const Problem& p, const Isa& isa) {
    const std::int64_t apart = p.c.inputs + 1, rows = p.c.neurons;
    const std::vector<std::byte> packed = rows_of(p, 0);
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

// The rows of down as the columns of a linear, which meet an x that is zero in every third place.
void check_columns(const Problem& p, const Isa& isa) {
    const std::int64_t apart = p.c.inputs + 1, columns = p.c.neurons;
    const std::vector<std::byte> packed = rows_of(p, p.c.inputs);
    const Columns weights{packed.data(), data(p.down), columns, p.c.width, p.lines, p.c.dtype};
    std::vector<float> x(std::size_t(p.c.tokens * columns)), y(std::size_t(p.c.tokens * p.c.width));
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = i % 3 ? p.x[i % p.x.size()] : 0;
    ffn::columns(weights, {x.data(), y.data(), DType::f32, p.c.tokens}, isa, p.c.threads);
    for (std::int64_t t = 0; t < p.c.tokens; ++t)
        for (std::int64_t n = 0; n < p.c.width; ++n) {
            float expected = p.down.empty() ? 0 : p.down[n], size = 1;
            for (std::int64_t d = 0; d < columns; ++d) {
                const float part = p.values[((d + 1) * apart - 1) * p.padded + n] * x[t * columns + d];
                expected += part, size += std::abs(part);
            }
            // int4: x times a scale is rounded to bf16
            const float allowed = p.c.dtype == DType::i4 ? 4e-3f : 1e-4f;
            if (std::abs(y[t * p.c.width + n] - expected) <= allowed * size) continue;
            std::fprintf(stderr, "%s: columns give %g, should be %g (T %d, D %d, dtype %d)\n",
                         isa.name, y[t * p.c.width + n], expected, p.c.tokens, int(columns),
                         int(p.c.dtype));
            std::exit(1);
        }
}

// All rows but those of down as a proposal, whose scores are the hidden values. Near ties may differ.
void check_proposal(const Problem& p, const Isa& isa) {
    const std::int64_t neurons = p.c.neurons;
    std::vector<std::byte> rows[2];
    std::vector<float> biases[2];
    Linear linears[2];
    for (int part = 0; part < p.c.inputs; ++part) {
        rows[part] = rows_of(p, part);
        for (std::int64_t n = 0; n < neurons && !p.biases.empty(); ++n)
            biases[part].push_back(p.biases[n * p.c.inputs + part]);
        linears[part] = {rows[part].data(), p.biases.empty() ? nullptr : biases[part].data(),
                         neurons,           p.c.width,
                         p.lines,           p.c.dtype};
    }
    const std::vector<float> norm(std::size_t(neurons), 0.5f);
    const bool gated = p.c.inputs == 2;
    const Proposal proposal{gated ? &linears[0] : nullptr, &linears[gated], {p.c.act, 0},
                            Activation{},                  norm.data()};
    std::vector<std::uint8_t> mask(std::size_t(p.c.tokens * neurons), 7);
    const float tau = 0.05f;
    propose(proposal, p.x.data(), DType::f32, p.c.tokens, tau, mask.data(), isa, p.c.threads);
    for (int t = 0; t < p.c.tokens; ++t)
        for (int n = 0; n < neurons; ++n) {
            const float score = std::abs(hidden(p, t, n)) / 2;
            const int found = mask[t * neurons + n];
            if (found == (score > tau) || (found < 2 && std::abs(score - tau) < 1e-4f * (1 + score)))
                continue;
            std::fprintf(stderr, "%s: a neuron of score %g is proposed: %d (T %d, D %d, dtype %d)\n",
                         isa.name, score, found, p.c.tokens, p.c.width, int(p.c.dtype));
            std::exit(1);
        }
}

// All rows but those of down as a router. Near ties may differ.
void check_router(const Problem& p, const Isa& isa) {
    const std::int64_t apart = p.c.inputs + 1, experts = p.c.neurons;
    std::vector<std::byte> packed;
    for (std::int64_t n = 0; n < experts; ++n) {
        const auto* row = p.rows.data() + n * apart * p.bytes;
        packed.insert(packed.end(), row, row + p.bytes);
    }
    const Linear weight{packed.data(), nullptr, experts, p.c.width, p.lines, p.c.dtype};
    const std::int64_t count = 1 + experts / 3;
    for (const bool by_rank : {false, true}) {
        std::vector<std::uint8_t> mask(std::size_t(p.c.tokens * experts), 2);
        const Router router{&weight, nullptr, by_rank, nullptr};
        choose(router, p.x.data(), DType::f32, p.c.tokens, by_rank ? float(count) : 0.5f, mask.data(),
               isa, p.c.threads);
        for (std::int64_t t = 0; t < p.c.tokens; ++t) {
            std::vector<float> z;
            for (std::int64_t n = 0; n < experts; ++n) {
                float sum = 0;
                for (int d = 0; d < p.c.width; ++d)
                    sum += p.values[n * apart * p.padded + d] * p.seen[t * p.c.width + d];
                z.push_back(sum);
            }
            std::vector<float> sorted = z;
            std::sort(sorted.rbegin(), sorted.rend());
            const float limit = by_rank ? sorted[std::size_t(count - 1)] : 0;
            std::int64_t chosen = 0;
            for (std::int64_t n = 0; n < experts; ++n) {
                const int on = mask[t * experts + n];
                chosen += on;
                const bool tie = std::abs(z[n] - limit) <= 1e-4f * (1 + std::abs(limit));
                const bool expected = by_rank ? z[n] >= limit : z[n] > limit;
                if (on > 1 || (!tie && on != expected && z[n] < 16)) {
                    std::fprintf(stderr, "%s: expert %d is %d\n", isa.name, int(n), on);
                    std::exit(1);
                }
            }
            if (by_rank && chosen != count) std::exit(1);
        }
    }
}

// --- decoder layers -------------------------------------------------------------------------------

struct LayerCase {
    int sequences, width, key_heads, sharing, lines, neurons, positions, threads;
    DType dtype, weights;
    Act act;
    Mask mask;
    unsigned norms;  // a bit for each
    bool gated, biased, one_position;
};

enum Part { kQ, kK, kV, kO, kGate, kUp, kDown, kParts };

struct LayerProblem {
    LayerCase c;
    std::int64_t head, queries, keys;  // numbers of a head, and of all heads
    std::vector<Problem> parts;
    std::vector<std::vector<std::byte>> rows;
    std::vector<Linear> linears;
    std::vector<std::vector<float>> norms;  // weights of six, without offset
    // As the kernels see them: rounded to the format of h.
    std::vector<float> h, cos, sin, q, cached_keys, cached_values, added;
    std::vector<std::uint8_t> allowed;
    Problem chosen;  // an FFN whose neurons are proposed

    float offset(int norm) const { return norm % 2 ? 1.0f : 0.0f; }
};

std::vector<std::byte> stored(const std::vector<float>& values, DType dtype) {
    std::vector<std::byte> made(values.size() * std::size_t(kLine / per_line(dtype)));
    from_floats(values.data(), std::int64_t(values.size()), dtype, made.data());
    return made;
}

std::vector<float> read(const std::vector<std::byte>& bytes, DType dtype) {
    std::vector<float> made(bytes.size() / std::size_t(kLine / per_line(dtype)));
    to_floats(bytes.data(), dtype, std::int64_t(made.size()), made.data());
    return made;
}

std::vector<float> rounded(const std::vector<float>& values, DType dtype) {
    return read(stored(values, dtype), dtype);
}

void add_linear(LayerProblem& p, std::int64_t rows, std::int64_t width, unsigned seed) {
    const Case c{1,   int(width),  int(rows), 1,     1,          1,     0,
                 p.c.weights, Act::identity, false, p.c.biased, false, false};
    p.parts.push_back(make(c, seed));
    const Problem& made = p.parts.back();
    std::vector<std::byte> packed;
    for (std::int64_t n = 0; n < rows; ++n) {  // every second row is one of W_down
        const auto* row = made.rows.data() + 2 * n * made.bytes;
        packed.insert(packed.end(), row, row + made.bytes);
    }
    p.rows.push_back(packed);
    p.linears.push_back({p.rows.back().data(), made.biases.empty() ? nullptr : made.biases.data(),
                         rows, width, made.lines, p.c.weights});
}

LayerProblem make_layer(const LayerCase& c, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto numbers = [&](std::int64_t count) {
        std::vector<float> made;
        for (std::int64_t i = 0; i < count; ++i) made.push_back(normal(random));
        return rounded(made, c.dtype);
    };
    LayerProblem p{};
    p.c = c, p.head = c.lines * per_line(c.dtype);
    p.keys = c.key_heads * p.head, p.queries = p.keys * c.sharing;
    const std::int64_t neurons = std::max(c.neurons, 1);
    p.parts.reserve(kParts), p.rows.reserve(kParts), p.linears.reserve(kParts);
    const std::int64_t shapes[kParts][2] = {
        {p.queries, c.width}, {p.keys, c.width},  {p.keys, c.width}, {c.width, p.queries},
        {neurons, c.width},   {neurons, c.width}, {c.width, neurons}};
    for (const auto& shape : shapes) add_linear(p, shape[0], shape[1], random());
    for (int i = 0; i < 6; ++i) p.norms.push_back(numbers(i == 1 || i == 2 ? p.head : c.width));
    p.h = numbers(c.sequences * c.width);
    const std::int64_t positions = c.one_position ? 1 : c.sequences;
    p.cos = numbers(positions * p.head), p.sin = numbers(positions * p.head);
    p.q = numbers(c.sequences * p.queries);
    p.cached_keys = numbers(c.sequences * p.keys * c.positions);
    p.cached_values = numbers(c.sequences * p.keys * c.positions);
    p.added = numbers(positions * c.positions);
    for (std::int64_t i = 0; i < positions * c.positions; ++i)
        p.allowed.push_back(i % c.positions == c.positions - 1 || random() % 2);
    p.chosen = make({1,         c.width, int(neurons), 1,     1 + c.gated, 1,     0,
                     c.weights, c.act,   false,        false, false,       false},
                    random());
    return p;
}

// y_BN of x_BD, as linear `part` has it.
std::vector<float> multiplied(const LayerProblem& p, Part part, std::vector<float> x) {
    const Linear& linear = p.linears[part];
    const Problem& made = p.parts[part];
    x = rounded(x, p.c.dtype);
    std::vector<float> y;
    for (std::int64_t b = 0; b < p.c.sequences; ++b) {
        float* x_D = &x[std::size_t(b * linear.width)];
        for (std::int64_t d = 0; grouped(linear.dtype) && d < linear.width; d += kGroup)
            round_group(x_D + d, int(std::min<std::int64_t>(kGroup, linear.width - d)));
        for (std::int64_t n = 0; n < linear.rows; ++n) {
            double sum = linear.bias_N ? linear.bias_N[n] : 0;
            for (std::int64_t d = 0; d < linear.width; ++d)
                sum += double(made.values[std::size_t(2 * n * made.padded + d)]) * x_D[d];
            y.push_back(float(sum));
        }
    }
    return y;
}

void normalize(const LayerProblem& p, int norm, std::vector<float>& x) {
    const std::vector<float>& weight = p.norms[std::size_t(norm)];
    if (!(p.c.norms >> norm & 1)) return;
    for (std::size_t from = 0; from < x.size(); from += weight.size()) {
        double sum = 0;
        for (std::size_t i = 0; i < weight.size(); ++i) sum += double(x[from + i]) * x[from + i];
        const double factor = 1 / std::sqrt(sum / double(weight.size()) + 1e-5);
        for (std::size_t i = 0; i < weight.size(); ++i)
            x[from + i] = float(x[from + i] * factor * (weight[i] + p.offset(norm)));
    }
}

void rotate(const LayerProblem& p, std::vector<float>& x) {
    const auto head = std::size_t(p.head), each = x.size() / std::size_t(p.c.sequences);
    for (std::size_t from = 0; from < x.size(); from += head)
        for (std::size_t i = 0; i < head / 2; ++i) {
            const std::size_t at = p.c.one_position ? i : from / each * head + i;
            const float a = x[from + i], b = x[from + i + head / 2];
            x[from + i] = a * p.cos[at] - b * p.sin[at];
            x[from + i + head / 2] = b * p.cos[at + head / 2] + a * p.sin[at + head / 2];
        }
}

std::vector<float> attended(const LayerProblem& p) {
    std::vector<float> x;
    const std::int64_t heads = p.c.key_heads * p.c.sharing, positions = p.c.positions;
    for (std::int64_t i = 0; i < p.c.sequences * heads; ++i) {
        const std::int64_t b = i / heads, cached = i / p.c.sharing * positions * p.head;
        std::vector<double> weights, sums(std::size_t(p.head));
        double all = 0;
        for (std::int64_t s = 0; s < positions; ++s) {
            double score = 0;
            for (std::int64_t d = 0; d < p.head; ++d)
                score += double(p.q[i * p.head + d]) * p.cached_keys[cached + s * p.head + d];
            const std::int64_t at = (p.c.one_position ? 0 : b) * positions + s;
            const bool on = p.c.mask != Mask::allowed || p.allowed[at];
            score = score * 0.2 + (p.c.mask == Mask::added ? p.added[at] : 0);
            weights.push_back(on ? std::exp(score) : 0);
            all += weights.back();
        }
        for (std::int64_t s = 0; s < positions; ++s)
            for (std::int64_t d = 0; d < p.head; ++d)
                sums[d] += weights[s] / all * p.cached_values[cached + s * p.head + d];
        x.insert(x.end(), sums.begin(), sums.end());
    }
    return x;
}

// Queries, keys, values, h behind the layer; without an FFN also what goes into it.
std::vector<float> slow_layer(const LayerProblem& p) {
    std::vector<float> x = p.h, all;
    const auto keep = [&](const std::vector<float>& some) {
        all.insert(all.end(), some.begin(), some.end());
    };
    normalize(p, 0, x);
    for (const Part part : {kQ, kK, kV}) {
        std::vector<float> heads = multiplied(p, part, x);
        if (part != kV) normalize(p, part == kQ ? 1 : 2, heads), rotate(p, heads);
        keep(heads);
    }
    std::vector<float> h = p.h, y = multiplied(p, kO, attended(p));
    const auto add = [&](int norm) {
        normalize(p, norm, y);
        for (std::size_t i = 0; i < h.size(); ++i) h[i] += y[i];
        h = rounded(h, p.c.dtype);
    };
    add(3);
    x = h;
    normalize(p, 4, x);
    if (p.c.neurons) {
        std::vector<float> up = multiplied(p, kUp, x), gate = multiplied(p, kGate, x);
        kPortable.activate({p.c.act, 0}, p.c.gated ? gate.data() : up.data(), up.size(), 0);
        for (std::size_t i = 0; p.c.gated && i < up.size(); ++i) up[i] *= gate[i];
        y = multiplied(p, kDown, up);
        add(5);
    }
    keep(h);
    if (!p.c.neurons) keep(x);
    return all;
}

// Layers as a stack, against the same in two calls each, bit by bit. `keys` and `values` are what
// the caches hold, but for the last position; `mask` is that of a call.
void check_stack(const DecoderLayer* const (&layers)[3], const LayerProblem& p,
                 const std::vector<std::byte>& h, const std::vector<std::byte>& cos,
                 const std::vector<std::byte>& sin, const std::vector<std::byte>& keys,
                 const std::vector<std::byte>& values, const void* mask, const Isa& isa) {
    constexpr std::size_t kCount = 3;
    const LayerCase& c = p.c;
    const std::int64_t size = kLine / per_line(c.dtype), one = c.one_position ? 1 : c.sequences;
    const std::int64_t head = p.head * c.positions, sequence = p.keys * c.positions;
    const std::int64_t mask_sequence = c.one_position ? 0 : c.positions;
    const std::vector<double> taus(kCount, 0.05);
    using Bytes = std::vector<std::byte>;
    std::vector<Bytes> held(2 * kCount, keys);
    for (std::size_t i = kCount; i < held.size(); ++i) held[i] = values;
    std::vector<Bytes> caches = held;
    Bytes q(std::size_t(c.sequences * p.queries * size)), k(std::size_t(c.sequences * p.keys * size));
    Bytes v = k, from = h, to = h, x = h;
    for (std::size_t i = 0; i < kCount; ++i) {
        new_heads(*layers[i], {c.sequences, from.data(), cos.data(), sin.data(), one, q.data(),
                               k.data(), v.data()}, isa, c.threads);
        for (std::int64_t row = 0; row < c.sequences * c.key_heads; ++row) {
            const std::int64_t at = (row * c.positions + c.positions - 1) * p.head * size;
            const auto bytes = std::size_t(p.head * size);
            std::memcpy(&held[i][std::size_t(at)], &k[std::size_t(row) * bytes], bytes);
            std::memcpy(&held[kCount + i][std::size_t(at)], &v[std::size_t(row) * bytes], bytes);
        }
        const auto cached = [&](const Bytes& data) {
            return Cached{reinterpret_cast<const char*>(data.data()), sequence, head, p.head};
        };
        new_token(*layers[i], {c.sequences, c.positions, from.data(), q.data(), cached(held[i]),
                               cached(held[kCount + i]), {c.mask, c.dtype, mask, mask_sequence},
                               float(taus[i]), to.data(), x.data()}, isa, c.threads);
        from = to;
    }
    const auto layer_bytes = keys.size();
    std::vector<char> memory(2 * kCount * layer_bytes);
    const auto place = [&](std::size_t i) { return memory.data() + i * layer_bytes; };
    for (std::size_t i = 0; i < 2 * kCount; ++i)
        std::memcpy(place(i), caches[i].data(), layer_bytes);
    Bytes out(h.size());
    run_stack(layers,
              {kCount, c.sequences, c.positions - 1, h.data(), cos.data(), sin.data(), one,
               place(0), place(kCount), std::int64_t(layer_bytes) / size, sequence, head, p.head,
               {c.mask, c.dtype, mask, mask_sequence}, taus.data(), Norm{}, out.data()},
              isa, c.threads);
    for (std::size_t i = 0; i < 2 * kCount; ++i)
        std::memcpy(caches[i].data(), place(i), layer_bytes);
    if (out == to && caches == held) return;
    std::fprintf(stderr, "%s: a stack differs from its layers (B %d, D %d, S %d, dtype %d)\n", isa.name,
                 c.sequences, c.width, c.positions, int(c.dtype));
    std::exit(1);
}

std::vector<float> fast_layer(const LayerProblem& p, const Isa& isa, bool stacked = false) {
    const LayerCase& c = p.c;
    std::vector<std::vector<std::byte>> weights;
    for (const auto& norm : p.norms) weights.push_back(stored(norm, c.dtype));
    const auto norm = [&](int i) {
        const void* weight = c.norms >> i & 1 ? weights[std::size_t(i)].data() : nullptr;
        return Norm{weight, c.dtype, 1e-5f, p.offset(i)};
    };
    const auto linear = [&](Part part, bool there) { return there ? &p.linears[part] : nullptr; };
    const bool ffn = c.neurons > 0;
    const DecoderLayer layer{
        c.width, c.key_heads * c.sharing, c.key_heads, p.head, c.dtype, 0.2f,
        linear(kQ, true), linear(kK, true), linear(kV, true), linear(kO, true),
        linear(kGate, ffn && c.gated), linear(kUp, ffn), linear(kDown, ffn), {c.act, 0},
        nullptr, nullptr, nullptr, nullptr,
        norm(0), norm(1), norm(2), norm(3), norm(4), norm(5)};
    const auto made = [&](std::int64_t count) {
        return stored(std::vector<float>(std::size_t(count)), c.dtype);
    };
    const auto h = stored(p.h, c.dtype), cos = stored(p.cos, c.dtype), sin = stored(p.sin, c.dtype);
    auto q = made(c.sequences * p.queries);
    auto k = made(c.sequences * p.keys), v = k, out = made(c.sequences * c.width), x = out;
    new_heads(layer,
              {c.sequences, h.data(), cos.data(), sin.data(), c.one_position ? 1 : c.sequences,
               q.data(), k.data(), v.data()},
              isa, c.threads);
    const auto queries = stored(p.q, c.dtype), keys = stored(p.cached_keys, c.dtype),
               values = stored(p.cached_values, c.dtype), added = stored(p.added, c.dtype);
    const auto cached = [&](const std::vector<std::byte>& data) {
        return Cached{reinterpret_cast<const char*>(data.data()), p.keys * c.positions,
                      p.head * c.positions, p.head};
    };
    const void* mask = c.mask == Mask::none      ? nullptr
                       : c.mask == Mask::allowed ? static_cast<const void*>(p.allowed.data())
                                                 : added.data();
    new_token(layer,
              {c.sequences, c.positions, h.data(), queries.data(), cached(keys), cached(values),
               {c.mask, c.dtype, mask, c.one_position ? 0 : c.positions}, 0, out.data(), x.data()},
              isa, c.threads);
    const std::vector<float> norms(std::size_t(p.chosen.c.neurons), 1.0f);
    const Proposal proposal{linear(kGate, c.gated), linear(kUp, true), {c.act, 0}, Activation{},
                            norms.data()};
    const Weights neurons{p.chosen.rows.data(), nullptr, nullptr, nullptr, p.chosen.c.neurons, c.width,
                          p.chosen.lines, p.chosen.c.inputs, c.weights, {{c.act, 0}, Activation{}}};
    DecoderLayer proposed = layer;
    proposed.gate = proposed.up = proposed.down = nullptr;
    proposed.proposal = &proposal, proposed.neurons = &neurons, proposed.constant_D = p.h.data();
    const DecoderLayer* const layers[] = {&layer, &proposed, &layer};
    if (stacked) check_stack(layers, p, h, cos, sin, keys, values, mask, isa);
    std::vector<float> all;
    for (const auto* part : {&q, &k, &v, &out, &x}) {
        if (part == &x && ffn) continue;
        const std::vector<float> numbers = read(*part, c.dtype);
        all.insert(all.end(), numbers.begin(), numbers.end());
    }
    return all;
}

void compare_layer(const LayerProblem& p, const Isa& isa, const std::vector<float>& y) {
    const std::vector<float> expected = slow_layer(p);
    // A rounding of x to fewer digits may go the other way.
    const float rounding = grouped(p.c.weights) ? 3e-2f : p.c.dtype == DType::f32 ? 1e-4f : 2e-2f;
    float largest = 1;
    for (const float value : expected) largest = std::max(largest, std::abs(value));
    bool same = y.size() == expected.size();
    for (std::size_t i = 0; same && i < y.size(); ++i) {
        if (std::abs(y[i] - expected[i]) <= rounding * largest) continue;
        std::fprintf(stderr, "a layer's number %zu is %g, should be %g\n", i, y[i], expected[i]);
        same = false;
    }
    if (same) return;
    std::fprintf(stderr, "%s: B %d, D %d, K %d, S %d, F %d, dtype %d, weights %d\n", isa.name,
                 p.c.sequences, p.c.width, p.c.key_heads, p.c.positions, p.c.neurons,
                 int(p.c.dtype), int(p.c.weights));
    std::exit(1);
}

LayerCase draw_layer(std::mt19937& random) {
    const auto pick = [&](std::initializer_list<int> from) {
        return from.begin()[random() % from.size()];
    };
    const DType dtype = DType(pick({0, 1, 2}));
    return {pick({1, 2, 5}),
            pick({1, 31, 64, 65, 300}),
            pick({1, 3}),
            pick({1, 3}),
            pick({1, 2}),
            pick({0, 1, 65, 130}),
            pick({1, 5, 256, 257, 300}),
            pick({1, 2, 4}),
            dtype,
            pick({0, 1}) ? dtype : DType(pick({0, 1, 2, 3, 4})),
            Act(pick({1, 5, 6, 7})),
            Mask(pick({0, 1, 2})),
            unsigned(random() % 64),
            bool(pick({0, 1})),
            bool(pick({0, 1})),
            bool(pick({0, 1}))};
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
                check_columns(problem, *isa);
                check_proposal(problem, *isa);
                check_router(problem, *isa);
            }
        const LayerProblem layer = make_layer(draw_layer(random), random());
        for (const Isa* isa : kIsas)
            if (isa->runs_here()) compare_layer(layer, *isa, fast_layer(layer, *isa, true));
    }
}

// Lets allocation n fail, or all from it on: the call throws or is right, the next one is right.
// Returns whether there was an allocation n.
template <class Call, class Compare>
bool fail_one(const Call& call, const Compare& compare, long n, bool and_all_behind) {
    std::vector<float> y;
    fail_calls(n, and_all_behind ? LONG_MAX : n);
    try {
        y = call();
    } catch (const std::bad_alloc&) {
    }
    const bool failed = stop_failing();
    if (!y.empty()) compare(y);
    compare(call());
    return failed;
}

// Every time in a new thread, which keeps no memory of calls before.
template <class Call, class Compare>
void fail_each(const Call& call, const Compare& compare) {
    for (const bool and_all_behind : {false, true}) {
        bool failed = true;
        for (long n = 0; failed; ++n)
            std::thread([&] { failed = fail_one(call, compare, n, and_all_behind); }).join();
    }
}

// Sets that run here agree; one that takes rows of int4 for rows of int8 does not.
void check_agrees() {
    for (const Isa* isa : kIsas)
        if (isa->runs_here() && !agrees(*isa, kPortable)) {
            std::fprintf(stderr, "%s differs from %s\n", isa->name, kPortable.name);
            std::exit(1);
        }
    Isa wrong = kPortable;
    wrong.of[int(DType::i4)] = kPortable.of[int(DType::i8)];
    if (!agrees(wrong, kPortable)) return;
    std::fprintf(stderr, "a wrong instruction set agrees\n");
    std::exit(1);
}

void check_without_memory(int tokens, int threads) {
    const bool screened = tokens < 4;
    const Case c{tokens,     31,        65,   9,    2,        threads, 4,
                 DType::f16, Act::relu, true, true, screened, false};
    const Problem problem = make(c, 3);
    fail_each([&] { return fast(problem, kPortable); },
              [&](const std::vector<float>& y) { compare(problem, kPortable, y); });
}

void check_layer_without_memory(int neurons, int threads) {
    // As wide as gives three threads something to do.
    const LayerCase c{2,          300,        1,         1,             4,  neurons, 257,  threads,
                      DType::f32, DType::f32, Act::silu, Mask::allowed, 63, true,    true, false};
    const LayerProblem problem = make_layer(c, 4);
    fail_each([&] { return fast_layer(problem, kPortable); },
              [&](const std::vector<float>& y) { compare_layer(problem, kPortable, y); });
}

}  // namespace

int main() {
    check_agrees();
    check_all(0, 60);
    std::thread beside(check_all, 1, 30);
    check_all(2, 30);
    beside.join();
    for (const int tokens : {3, 40})
        for (const int threads : {1, 3}) check_without_memory(tokens, threads);
    for (const int neurons : {0, 65})
        for (const int threads : {1, 3}) check_layer_without_memory(neurons, threads);
    std::puts("ok");
}
