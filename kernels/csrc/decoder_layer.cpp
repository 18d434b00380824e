#include "decoder_layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <vector>

#include "hidden.h"
#include "parallel.h"
#include "scratch.h"

namespace ffn {
namespace {

// Positions of a head that a thread attends to at a time: of short texts fewer, so that threads
// share them out evenly.
constexpr std::int64_t kChunk = 256, kShortChunk = 64, kShort = 8 * kShortChunk;
constexpr std::int64_t kFewest = 8;   // tokens that share one reading of chosen neurons
constexpr float kNever = -std::numeric_limits<float>::infinity();

std::int64_t bytes_of(std::initializer_list<const Linear*> linears) {
    std::int64_t bytes = 0;
    for (const Linear* one : linears)
        if (one) bytes += one->rows * row_bytes(one->dtype, one->lines);
    return bytes;
}

// Numbers in the format of x, in the order of some tokens, that several linears multiply.
class Prepared {
  public:
    void from(const float* x_BD, std::int64_t tokens, std::int64_t width, DType dtype,
              const Linear& weights, DType format) {
        const auto numbers = std::size_t(tokens * width);
        const std::size_t rounded = (numbers * sizeof(float) + kLine - 1) / kLine * kLine;
        const std::int64_t padded = weights.padded();
        std::byte* memory = scratch_.get(rounded + std::size_t(tokens) * Inputs::stride(padded));
        from_floats(x_BD, std::int64_t(numbers), dtype, memory);
        const Batch batch{memory, nullptr, dtype, tokens, nullptr, 1};
        inputs_.prepare(batch, width, padded, format, memory + rounded);
    }
    const Inputs& get() const { return inputs_; }

  private:
    Scratch scratch_;
    Inputs inputs_;
};

// In place. y may be x.
void normalize(const Norm& norm, const float* x, std::int64_t count, float* y) {
    if (!norm.weight_D) {
        if (x != y) std::copy(x, x + count, y);
        return;
    }
    float squares[8] = {};  // eight sums, so that the loop is made vectors
    std::int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int lane = 0; lane < 8; ++lane) squares[lane] += x[i + lane] * x[i + lane];
    for (; i < count; ++i) squares[0] += x[i] * x[i];
    float sum = 0;
    for (const float square : squares) sum += square;
    const float factor = 1 / std::sqrt(sum / float(count) + norm.eps);
    constexpr std::int64_t kPart = 256;
    float weight[kPart];
    for (i = 0; i < count; i += kPart) {
        const std::int64_t part = std::min(kPart, count - i);
        to_floats(element(norm.weight_D, norm.dtype, i), norm.dtype, part, weight);
        for (std::int64_t j = 0; j < part; ++j)
            y[i + j] = x[i + j] * factor * (weight[j] + norm.offset);
    }
}

// The first and the second half of a head are the parts of complex numbers, which turn.
void rotate(float* head, const float* cos, const float* sin, std::int64_t width) {
    const std::int64_t half = width / 2;
    for (std::int64_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

// Memory of a thread that calls, kept for its next call.
struct Work {
    std::vector<float> h, x, y, z, gate, cos, sin, partial;
    std::vector<std::uint8_t> mask;
    std::vector<std::byte> made;
    Prepared inputs[3];
};

Work& work() {
    thread_local Work made;
    return made;
}

float* sized(std::vector<float>& memory, std::int64_t count) {
    if (memory.size() < std::size_t(count)) memory.resize(std::size_t(count));
    return memory.data();
}

class Heads {
  public:
    Heads(const DecoderLayer& layer, const NewHeads& call, const Isa& isa, int threads)
        : l_(layer),
          c_(call),
          parts_{{*layer.q, layer.dtype, isa, threads},
                 {*layer.k, layer.dtype, isa, threads},
                 {*layer.v, layer.dtype, isa, threads}},
          linears_{layer.q, layer.k, layer.v} {}

    void run(int threads) {
        prepare();
        const int q = parts_[0].count(), qk = q + parts_[1].count(), all = qk + parts_[2].count();
        const auto rows = [&](int i) {
            const int which = i < q ? 0 : i < qk ? 1 : 2;
            const int piece = i - (which == 0 ? 0 : which == 1 ? q : qk);
            parts_[which].run(piece, input(which), c_.sequences, y_[which], DType::f32);
        };
        const auto finish = [&](int) { write(); };
        in_parallel(threads, Loop{all, rows}, Loop{1, finish});
    }

  private:
    void prepare() {
        Work& w = work();
        const std::int64_t numbers = c_.sequences * l_.width;
        float* h = sized(w.h, numbers);
        to_floats(c_.h_BD, l_.dtype, numbers, h);
        for (std::int64_t b = 0; b < c_.sequences; ++b)
            normalize(l_.before_attention, h + b * l_.width, l_.width, h + b * l_.width);
        for (int i = 0; i < 3; ++i)
            if (owner(i) == i)
                w.inputs[i].from(h, c_.sequences, l_.width, l_.dtype, *linears_[i], parts_[i].x());
        const std::int64_t q = c_.sequences * l_.query_heads * l_.head;
        const std::int64_t k = c_.sequences * l_.key_heads * l_.head;
        y_[0] = sized(w.y, q + 2 * k), y_[1] = y_[0] + q, y_[2] = y_[1] + k;
        const std::int64_t turns = c_.positions * l_.head;
        to_floats(c_.cos_BW, l_.dtype, turns, sized(w.cos, turns));
        to_floats(c_.sin_BW, l_.dtype, turns, sized(w.sin, turns));
        inputs_ = w.inputs;
        cos_ = w.cos.data(), sin_ = w.sin.data();
    }

    // The first linear that wants x as linear i does.
    int owner(int i) const {
        const auto as_wanted = [&](int j) {
            return parts_[j].x() == parts_[i].x() && linears_[j]->padded() == linears_[i]->padded();
        };
        int first = 0;
        while (!as_wanted(first)) ++first;
        return first;
    }
    const Inputs& input(int i) const { return inputs_[owner(i)].get(); }

    void write() const {
        turn(l_.of_queries, y_[0], l_.query_heads);
        turn(l_.of_keys, y_[1], l_.key_heads);
        const std::int64_t k = c_.sequences * l_.key_heads * l_.head;
        from_floats(y_[0], c_.sequences * l_.query_heads * l_.head, l_.dtype, c_.q_BHW);
        from_floats(y_[1], k, l_.dtype, c_.k_BKW);
        from_floats(y_[2], k, l_.dtype, c_.v_BKW);
    }

    void turn(const Norm& norm, float* heads, std::int64_t count) const {
        for (std::int64_t i = 0; i < c_.sequences * count; ++i) {
            float* head = heads + i * l_.head;
            normalize(norm, head, l_.head, head);
            const std::int64_t position = c_.positions == 1 ? 0 : i / count;
            rotate(head, cos_ + position * l_.head, sin_ + position * l_.head, l_.head);
        }
    }

    const DecoderLayer& l_;
    const NewHeads& c_;
    const LinearPieces parts_[3];
    const Linear* const linears_[3];
    float* y_[3] = {};
    const Prepared* inputs_ = nullptr;  // of the thread that called, for all threads
    const float *cos_ = nullptr, *sin_ = nullptr;
};

// Attention of the queries that share a head of keys to some positions: for each of them the
// largest score, the sum of e^(score - largest), and the sum of the values with these weights.
class Attention {
  public:
    Attention(const DecoderLayer& layer, const NewToken& call, const Isa& isa)
        : l_(layer),
          c_(call),
          isa_(isa),
          kernels_(kernels_for(isa, layer.dtype, layer.dtype)),
          sharing_(layer.query_heads / layer.key_heads),
          lines_((layer.head + per_line(layer.dtype) - 1) / per_line(layer.dtype)),
          padded_(lines_ * per_line(layer.dtype)),
          chunk_(call.positions <= kShort ? kShortChunk : kChunk),
          chunks_((call.positions + chunk_ - 1) / chunk_) {
        const std::int64_t queries = c_.sequences * l_.query_heads;
        partial_ = sized(work().partial, queries * chunks_ * (padded_ + 2));
        const Batch batch{c_.q_BHW, nullptr, l_.dtype, queries, nullptr, 1};
        thread_local Scratch scratch;
        queries_.prepare(batch, l_.head, padded_, kernels_.x,
                         scratch.get(std::size_t(queries) * Inputs::stride(padded_)));
    }

    int count() const { return int(c_.sequences * l_.key_heads * chunks_); }

    void run(int i) const {
        const std::int64_t chunk = i % chunks_, head = i / chunks_ % l_.key_heads;
        const std::int64_t b = i / chunks_ / l_.key_heads;
        const std::int64_t begin = chunk * chunk_;
        const int count = int(std::min(chunk_, c_.positions - begin));
        thread_local std::vector<float> scores;
        scores.resize(std::size_t(count * sharing_));
        const void *rows[kChunk + kAhead], *values[kChunk + kAhead];
        list(c_.keys, b, head, begin, count, rows);
        list(c_.values, b, head, begin, count, values);
        fetch(rows, count);
        fetch(values, count);
        const std::int64_t query = b * l_.query_heads + head * sharing_;
        kernels_.dot({rows, count, lines_}, queries_.data() + query, int(sharing_), scores.data());
        float *to[kMostSharing], *sums[kMostSharing];
        for (std::int64_t q = 0; q < sharing_; ++q) {
            to[q] = partial(query + q, chunk), sums[q] = to[q] + 2;
            std::fill(sums[q], sums[q] + padded_, 0.0f);
        }
        weigh(scores.data(), b, begin, count, to);
        kernels_.add({values, count, lines_}, scores.data(), sums, int(sharing_), 0, lines_);
    }

    // The chunks of every query together: x_BHW. Zeros where no position is allowed.
    void gather(float* x) const {
        for (std::int64_t q = 0; q < c_.sequences * l_.query_heads; ++q, x += l_.head) {
            float most = kNever, all = 0;
            for (std::int64_t c = 0; c < chunks_; ++c) most = std::max(most, partial(q, c)[0]);
            std::fill(x, x + l_.head, 0.0f);
            for (std::int64_t c = 0; c < chunks_; ++c) {
                const float* from = partial(q, c);
                if (from[1] == 0) continue;  // nothing is allowed; not so where a score is NaN
                const float weight = std::exp(from[0] - most);
                all += weight * from[1];
                for (std::int64_t d = 0; d < l_.head; ++d) x[d] += weight * from[2 + d];
            }
            for (std::int64_t d = 0; d < l_.head && all != 0; ++d) x[d] /= all;
        }
    }

    static constexpr std::int64_t kMostSharing = 64;  // heads of queries to one of keys

  private:
    float* partial(std::int64_t query, std::int64_t chunk) const {
        return partial_ + (query * chunks_ + chunk) * (padded_ + 2);
    }

    // The rows of some positions, and the last one again where the kernels look ahead.
    void list(const Cached& cached, std::int64_t b, std::int64_t head, std::int64_t begin,
              int count, const void** rows) const {
        const std::int64_t first = b * cached.sequence + head * cached.head;
        for (int i = 0; i < count; ++i)
            rows[i] = element(cached.data_BKSW, l_.dtype, first + (begin + i) * cached.position);
        std::fill(rows + count, rows + count + kAhead, rows[count - 1]);
    }

    // All at once: what the kernels fetch as they go comes late in so few rows.
    void fetch(const void* const* rows, int count) const {
        for (int i = 0; i < count; ++i)
            for (std::int64_t line = 0; line < lines_; ++line)
                __builtin_prefetch(static_cast<const char*>(rows[i]) + line * kLine, 0, 2);
    }

    // Scores become weights; the largest and the sum of each query go to `to`.
    void weigh(float* scores, std::int64_t b, std::int64_t begin, int count, float* const* to) const {
        float most[kMostSharing];
        std::fill(most, most + sharing_, kNever);
        float* score = scores;
        for (int i = 0; i < count; ++i) {
            const float added = masked(b, begin + i);
            for (std::int64_t q = 0; q < sharing_; ++q, ++score) {
                *score = added == kNever ? kNever : *score * l_.scale + added;  // whatever the key is
                most[q] = std::max(most[q], *score);
            }
        }
        score = scores;
        for (std::int64_t q = 0; q < sharing_; ++q) to[q][0] = most[q], to[q][1] = 0;
        for (int i = 0; i < count; ++i)
            for (std::int64_t q = 0; q < sharing_; ++q, ++score)
                *score = *score == kNever ? kNever : *score - most[q];
        isa_.powers(scores, std::size_t(count * sharing_));
        score = scores;
        for (int i = 0; i < count; ++i)
            for (std::int64_t q = 0; q < sharing_; ++q, ++score) to[q][1] += *score;
    }

    float masked(std::int64_t b, std::int64_t position) const {
        const Masked& mask = c_.mask;
        if (mask.kind == Mask::none) return 0;
        const std::int64_t at = b * mask.sequence + position;
        if (mask.kind == Mask::allowed)
            return static_cast<const char*>(mask.data_BS)[at] ? 0 : kNever;
        float added;
        to_floats(element(mask.data_BS, mask.dtype, at), mask.dtype, 1, &added);
        return added;
    }

    const DecoderLayer& l_;
    const NewToken& c_;
    const Isa& isa_;
    const RowKernels& kernels_;
    const std::int64_t sharing_, lines_, padded_, chunk_, chunks_;
    Inputs queries_;
    float* partial_;
};

class Token {
  public:
    Token(const DecoderLayer& layer, const NewToken& call, const Isa& isa, int threads)
        : l_(layer), c_(call), isa_(isa), threads_(threads), w_(work()) {}

    void run() {
        attend();
        if (l_.up) feed_forward();
        if (l_.neurons) run_chosen();
    }

  private:
    void attend() {
        const Attention attention(l_, c_, isa_);
        const LinearPieces o(*l_.o, l_.dtype, isa_, threads_);
        const std::int64_t heads = l_.query_heads * l_.head;
        float *x = sized(w_.x, c_.sequences * heads), *y = sized(w_.y, c_.sequences * l_.width);
        float* h = sized(w_.h, c_.sequences * l_.width);
        const auto attend = [&](int i) { attention.run(i); };
        const auto gather = [&](int) {
            attention.gather(x);
            w_.inputs[0].from(x, c_.sequences, heads, l_.dtype, *l_.o, o.x());
        };
        const auto project = [&](int i) {
            o.run(i, w_.inputs[0].get(), c_.sequences, y, DType::f32);
        };
        const auto finish = [&](int) {
            to_floats(c_.h_BD, l_.dtype, c_.sequences * l_.width, h);
            add(l_.behind_attention, y, h);
            if (!l_.up) from_floats(normed(h), c_.sequences * l_.width, l_.dtype, c_.x_BD);
        };
        in_parallel(threads_, Loop{attention.count(), attend}, Loop{1, gather},
                    Loop{o.count(), project}, Loop{1, finish});
    }

    void feed_forward() {
        const HiddenPieces hidden(l_.gate, *l_.up, l_.act, Activation{}, l_.dtype, isa_, threads_);
        const LinearPieces down(*l_.down, l_.dtype, isa_, threads_);
        const std::int64_t neurons = l_.up->rows;
        float *u = sized(w_.z, c_.sequences * neurons), *g = sized(w_.gate, c_.sequences * neurons);
        float *y = w_.y.data(), *h = w_.h.data();
        w_.inputs[0].from(normed(h), c_.sequences, l_.width, l_.dtype, *l_.up, hidden.x());
        const auto hide = [&](int i) { hidden.run(i, w_.inputs[0].get(), c_.sequences, u, g); };
        const auto prepare = [&](int) {
            w_.inputs[1].from(u, c_.sequences, neurons, l_.dtype, *l_.down, down.x());
        };
        const auto project = [&](int i) {
            down.run(i, w_.inputs[1].get(), c_.sequences, y, DType::f32);
        };
        const auto finish = [&](int) { add(l_.behind_ffn, y, h); };
        in_parallel(threads_, Loop{hidden.count(), hide}, Loop{1, prepare}, Loop{down.count(), project},
                    Loop{1, finish});
    }

    void run_chosen() {
        const std::int64_t numbers = c_.sequences * l_.width;
        const std::int64_t experts = l_.router ? l_.router->weight->rows : l_.neurons->neurons;
        w_.mask.resize(std::size_t(c_.sequences * experts));
        w_.made.resize(std::size_t(numbers) * sizeof(float));
        std::uint8_t* mask = w_.mask.data();
        if (l_.router)
            choose(*l_.router, c_.x_BD, l_.dtype, c_.sequences, c_.knob, mask, isa_, threads_);
        else
            propose(*l_.proposal, c_.x_BD, l_.dtype, c_.sequences, c_.knob, mask, isa_, threads_);
        const Batch batch{c_.x_BD, w_.made.data(), l_.dtype, c_.sequences, mask, experts};
        sparse_ffn(*l_.neurons, batch, isa_, threads_, {kFewest, 1.0, 1.0});
        float* y = w_.y.data();
        to_floats(w_.made.data(), l_.dtype, numbers, y);
        for (std::int64_t i = 0; l_.constant_D && i < numbers; ++i)
            y[i] += l_.constant_D[i % l_.width];
        add(l_.behind_ffn, y, w_.h.data());
    }

    // h += norm(y), rounded to the format of h; writes it to the caller, too.
    void add(const Norm& norm, float* y, float* h) const {
        const std::int64_t numbers = c_.sequences * l_.width;
        for (std::int64_t b = 0; b < c_.sequences; ++b)
            normalize(norm, y + b * l_.width, l_.width, y + b * l_.width);
        for (std::int64_t i = 0; i < numbers; ++i) h[i] += y[i];
        from_floats(h, numbers, l_.dtype, c_.out_BD);
        to_floats(c_.out_BD, l_.dtype, numbers, h);
    }

    // What goes into the FFN.
    const float* normed(const float* h) {
        float* x = sized(w_.x, c_.sequences * l_.width);
        for (std::int64_t b = 0; b < c_.sequences; ++b)
            normalize(l_.before_ffn, h + b * l_.width, l_.width, x + b * l_.width);
        return x;
    }

    const DecoderLayer& l_;
    const NewToken& c_;
    const Isa& isa_;
    const int threads_;
    Work& w_;  // of the thread that calls
};

}  // namespace

void new_heads(const DecoderLayer& layer, const NewHeads& call, const Isa& isa, int threads) {
    threads = useful_threads(std::max(threads, 1), bytes_of({layer.q, layer.k, layer.v}));
    Heads(layer, call, isa, threads).run(threads);
}

void new_token(const DecoderLayer& layer, const NewToken& call, const Isa& isa, int threads) {
    std::int64_t bytes = bytes_of({layer.o, layer.gate, layer.up, layer.down});
    if (layer.proposal) bytes += bytes_of({layer.proposal->up});
    if (layer.router) bytes += bytes_of({layer.router->weight, layer.router->first});
    const std::int64_t heads = layer.key_heads * layer.head * (kLine / per_line(layer.dtype));
    bytes += 2 * call.sequences * call.positions * heads;
    Token(layer, call, isa, useful_threads(std::max(threads, 1), bytes)).run();
}

void run_stack(const DecoderLayer* const* layers, const Stack& call, const Isa& isa, int threads) {
    const DecoderLayer& first = *layers[0];
    const std::int64_t size = kLine / per_line(first.dtype);  // bytes of a number
    const std::int64_t sequences = call.sequences, h_bytes = sequences * first.width * size;
    const std::int64_t head = first.head * size, k_bytes = sequences * first.key_heads * head;
    const std::int64_t q_bytes = sequences * first.query_heads * head;
    thread_local Scratch scratch;
    std::byte* q = scratch.get(std::size_t(q_bytes + 2 * k_bytes + 2 * h_bytes));
    std::byte *k = q + q_bytes, *v = k + k_bytes, *h = v + k_bytes, *x = h + h_bytes;
    // Puts the new position of every head behind those in use.
    const auto append = [&](const std::byte* made, char* cache) {
        for (std::int64_t i = 0; i < sequences * first.key_heads; ++i) {
            const std::int64_t b = i / first.key_heads, of = i % first.key_heads;
            const std::int64_t at = b * call.sequence + of * call.head + call.used * call.position;
            std::memcpy(cache + at * size, made + i * head, std::size_t(head));
        }
    };
    const auto cached = [&](const char* data) {
        return Cached{data, call.sequence, call.head, call.position};
    };
    NewHeads heads{sequences, call.h_BD, call.cos_BW, call.sin_BW, call.positions, q, k, v};
    NewToken token{};
    token.sequences = sequences, token.positions = call.used + 1, token.q_BHW = q;
    token.mask = call.mask, token.x_BD = x;
    for (std::int64_t i = 0; i < call.layers; ++i) {
        char* keys = call.keys_LBKSW + i * call.layer * size;
        char* values = call.values_LBKSW + i * call.layer * size;
        new_heads(*layers[i], heads, isa, threads);
        append(k, keys);
        append(v, values);
        token.h_BD = heads.h_BD;
        token.keys = cached(keys), token.values = cached(values);
        token.knob = float(call.knobs[i]);
        // h is read before it is written: each layer's may take the place of the one before.
        token.out_BD = i + 1 < call.layers ? h : call.out_BD;
        new_token(*layers[i], token, isa, threads);
        heads.h_BD = token.out_BD;
    }
    if (!call.last.weight_D) return;
    const std::int64_t numbers = sequences * first.width;
    float* last = sized(work().h, numbers);
    to_floats(call.out_BD, first.dtype, numbers, last);
    for (std::int64_t b = 0; b < sequences; ++b)
        normalize(call.last, last + b * first.width, first.width, last + b * first.width);
    from_floats(last, numbers, first.dtype, call.out_BD);
}

}  // namespace ffn
