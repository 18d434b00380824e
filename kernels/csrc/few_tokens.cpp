// Up to sixteen tokens, which share one reading of the rows that any of them wants: what takes the
// time is the reading.
#include <algorithm>
#include <vector>

#include "chosen.h"
#include "numbers.h"
#include "parallel.h"
#include "scratch.h"
#include "sparse_ffn.h"

namespace ffn {
namespace {

constexpr int kBlock = 64;               // neurons whose gates are known before their ups are read
constexpr int kColumns = 512;            // of y that one thread sums up at a time
constexpr int kTileBytes = 32768;        // y of all tokens that stays in the first cache
constexpr int kLeastNeurons = 32;        // of a slice: its sum is one more row to write and to read
constexpr std::int64_t kLeastBytes = 65536;  // of a slice: less is not worth a thread
constexpr int kSlicesAThread = 16;       // so that a thread whose core is busy takes fewer

// How the chosen neurons are shared out: `count` slices of (nearly) equal length.
struct Slices {
    int count;
    std::int64_t neurons;

    Slices(std::int64_t neurons, std::int64_t neuron_bytes, int threads, int tokens)
        : neurons(neurons) {
        const std::int64_t worth_it = kLeastBytes / neuron_bytes;
        const std::int64_t least = std::max<std::int64_t>(kLeastNeurons, worth_it);
        const std::int64_t most = threads == 1 ? 1 : std::max(2, kSlicesAThread / tokens);
        const std::int64_t each = std::clamp<std::int64_t>(neurons / (least * threads), 1, most);
        count = int(std::clamp<std::int64_t>(neurons / least, 1, each * threads));
    }
    std::int64_t begin(int slice) const { return neurons * slice / count; }
};

class Job {
  public:
    Job(const Weights& weights, const Batch& batch, const Isa& isa, const Chosen& chosen)
        : w_(weights),
          batch_(batch),
          chosen_(chosen),
          tokens_(int(batch.tokens)),
          padded_(weights.padded()),
          isa_(isa),
          kernels_(kernels_for(isa, weights.dtype, batch.dtype)),
          screen_(isa.screen),
          whole_(!weights.screen.rows_FD && !gives_zeros(weights.acts[0].kind)) {}

    std::int64_t run(int threads, Scratch& scratch) {
        const std::int64_t neuron_bytes = (w_.inputs + 1) * row_bytes(w_.dtype, w_.lines);
        const Slices slices(std::int64_t(chosen_.neurons.size()), neuron_bytes, threads, tokens_);
        const std::size_t values = std::size_t(tokens_ * padded_);
        const std::size_t inputs = std::size_t(tokens_) * Inputs::stride(padded_ + kLine);
        std::byte* memory = scratch.get(2 * inputs + slices.count * values * sizeof(float));
        prepare(memory, memory + inputs);
        float* sums = reinterpret_cast<float*>(memory + 2 * inputs);
        std::vector<std::int64_t> rows(std::size_t(slices.count));
        const auto slice = [&](int s) {
            rows[s] = run_slice(slices.begin(s), slices.begin(s + 1), sums + s * values);
        };
        const int blocks = int((w_.width + kColumns - 1) / kColumns);
        const auto columns = [&](int b) { finish(sums, slices.count, b); };
        threads = std::min(threads, slices.count);
        in_parallel(threads, Loop{slices.count, slice}, Loop{blocks, columns});
        std::int64_t read = 0;
        for (const std::int64_t count : rows) read += count;
        return read;
    }

  private:
    struct Hidden {
        int live[kBlock];                  // indices into the chosen neurons
        float h[kBlock * kFew];            // of them, T values a neuron
        float z[kBlock * kFew];            // what a part made of x
        const void* rows[kBlock + kAhead];  // of a part
        int count;
    };

    void prepare(std::byte* memory, std::byte* screen_memory) {
        x_.prepare(batch_, w_.width, padded_, kernels_.x, memory);
        if (!w_.screen.rows_FD) return;
        screen_x_.prepare(batch_, w_.width, screen_lines() * kLine, DType::f32, screen_memory);
        for (int t = 0; t < tokens_; ++t)
            reach_[t] = w_.screen.reach * screen_x_.norm(t, w_.width);
    }

    std::int64_t run_slice(std::int64_t begin, std::int64_t end, float* y) const {
        std::fill(y, y + tokens_ * padded_, 0.0f);
        std::int64_t read = 0;
        for (std::int64_t i = begin; i < end; i += kBlock)
            read += run_block(i, int(std::min<std::int64_t>(kBlock, end - i)), y);
        return read;
    }

    std::int64_t run_block(std::int64_t begin, int count, float* y) const {
        Hidden hidden;
        start(begin, count, hidden);
        if (w_.screen.rows_FD) screen(hidden);
        std::int64_t read = 0;
        for (int part = 0; part < w_.inputs && hidden.count; ++part) {
            read += hidden.count;
            kernels_.dot(rows_of(part, hidden), x_.data(), tokens_, hidden.z);
            apply(part, hidden);
        }
        if (!hidden.count) return read;
        add(hidden, y);
        return read + hidden.count;
    }

    // h is 1 where a token wants the neuron, else 0.
    void start(std::int64_t begin, int count, Hidden& hidden) const {
        hidden.count = count;
        for (int i = 0; i < count; ++i) {
            hidden.live[i] = int(begin) + i;
            for (int t = 0; t < tokens_; ++t)
                hidden.h[i * tokens_ + t] = wants(t, hidden.live[i]) ? 1.0f : 0.0f;
        }
    }

    bool wants(int token, int live) const {
        return !batch_.mask_TE || batch_.mask_TE[token * batch_.experts + chosen_.experts[live]];
    }

    // h *= act(z), and neurons whose h is zero for every token leave.
    void apply(int part, Hidden& hidden) const {
        for (int i = 0; i < hidden.count; ++i) {
            const std::int64_t n = chosen_.neurons[hidden.live[i]];
            float* z = hidden.z + i * tokens_;
            isa_.activate(w_.acts[part], z, std::size_t(tokens_), w_.bias(n, part));
        }
        keep(hidden);
    }

    // 1 where the activation's threshold may be reached. Not `< : 0`: NaN stays in.
    void screen(Hidden& hidden) const {
        const std::int64_t bytes = screen_lines() * kLine;
        list(hidden, hidden.count, [&](std::int64_t n) { return w_.screen.rows_FD + n * bytes; });
        screen_({hidden.rows, hidden.count, screen_lines()}, screen_x_.data(), tokens_,
                    hidden.z);
        for (int i = 0; i < hidden.count; ++i) {
            const std::int64_t n = chosen_.neurons[hidden.live[i]];
            for (int t = 0; t < tokens_; ++t) {
                float& z = hidden.z[i * tokens_ + t];
                const float most = z * w_.screen.scales_F[n] + w_.bias(n, 0);
                const float may_be = most + reach_[t] * w_.screen.errors_F[n];
                z = may_be < w_.acts[0].threshold ? 0.0f : 1.0f;
            }
        }
        keep(hidden);
    }

    // h *= z, and neurons whose h is zero for every token leave, unless something is taken from it.
    void keep(Hidden& hidden) const {
        multiply(hidden.h, hidden.z, std::size_t(hidden.count) * std::size_t(tokens_));
        if (w_.off_F) return;
        int kept = 0;
        for (int i = 0; i < hidden.count; ++i) {
            bool any = false;
            for (int t = 0; t < tokens_; ++t) {
                const float h = hidden.h[i * tokens_ + t];
                hidden.h[kept * tokens_ + t] = h;
                any |= h != 0;
            }
            hidden.live[kept] = hidden.live[i];
            kept += any;
        }
        hidden.count = kept;
    }

    std::int64_t screen_lines() const { return (w_.width + kLine - 1) / kLine; }

    void add(Hidden& hidden, float* y) const {
        const RowList rows = rows_of(w_.inputs, hidden);
        for (int i = 0; i < hidden.count && w_.off_F; ++i) {
            const int live = hidden.live[i];
            const std::int64_t n = chosen_.neurons[live];
            for (int t = 0; t < tokens_; ++t) {
                float& h = hidden.h[i * tokens_ + t];
                h -= wants(t, live) ? w_.off(n) : 0;
            }
        }
        const int numbers = per_line(w_.dtype);
        const std::int64_t tile = std::max(1, kTileBytes / int(sizeof(float)) / tokens_ / numbers);
        for (std::int64_t line = 0; line < w_.lines; line += tile) {
            float* y_T[kFew];
            for (int t = 0; t < tokens_; ++t) y_T[t] = y + t * padded_ + line * numbers;
            const std::int64_t end = std::min(line + tile, w_.lines);
            kernels_.add(rows, hidden.h, y_T, tokens_, line, end);
        }
    }

    // The rows of a part; behind them, the first rows of the next.
    RowList rows_of(int part, Hidden& hidden) const {
        if (whole_) return rows_of_whole(part, hidden);
        const int next = std::min(part + 1, w_.inputs);
        list(hidden, hidden.count, [&](std::int64_t n) { return w_.row(n, part); });
        for (int i = 0; i < kAhead; ++i) {
            const int index = std::min(i, hidden.count - 1);
            hidden.rows[hidden.count + i] = w_.row(chosen_.neurons[hidden.live[index]], next);
        }
        return {hidden.rows, hidden.count, w_.lines};
    }

    // The same where every row of a neuron is read: they lie one behind the other, and are fetched
    // together with the first. Behind the list, the neurons of the next block.
    RowList rows_of_whole(int part, Hidden& hidden) const {
        const auto& neurons = chosen_.neurons;
        list(hidden, hidden.count, [&](std::int64_t n) { return w_.row(n, part); });
        for (std::size_t i = 0; part == 0 && i < kAhead; ++i) {
            const std::size_t next = std::size_t(hidden.live[hidden.count - 1]) + 1 + i;
            if (next >= neurons.size()) break;
            hidden.rows[std::size_t(hidden.count) + i] = w_.row(neurons[next], part);
        }
        RowList made{hidden.rows, hidden.count, w_.lines};
        made.fetched = part == 0 ? w_.inputs + 1 : 0;
        return made;
    }

    // Row by row, and the last one again where the kernels look ahead.
    template <class Row>
    void list(Hidden& hidden, int count, const Row& row) const {
        for (int i = 0; i < count; ++i) hidden.rows[i] = row(chosen_.neurons[hidden.live[i]]);
        std::fill(hidden.rows + count, hidden.rows + count + kAhead, hidden.rows[count - 1]);
    }

    // Adds up the slices, always in the same order, and writes y.
    void finish(const float* sums, int slices, int block) const {
        const std::int64_t begin = std::int64_t(block) * kColumns;
        const std::int64_t count = std::min<std::int64_t>(kColumns, w_.width - begin);
        float y[kColumns];
        for (std::int64_t t = 0; t < tokens_; ++t) {
            for (std::int64_t d = 0; d < count; ++d) y[d] = w_.down_D ? w_.down_D[begin + d] : 0;
            for (int s = 0; s < slices; ++s) {
                const float* sum = sums + (s * tokens_ + t) * padded_ + begin;
                for (std::int64_t d = 0; d < count; ++d) y[d] += sum[d];
            }
            void* to = const_cast<char*>(element(batch_.y_TD, batch_.dtype, t * w_.width + begin));
            from_floats(y, count, batch_.dtype, to);
        }
    }

    const Weights& w_;
    const Batch& batch_;
    const Chosen& chosen_;
    const int tokens_;
    const std::int64_t padded_;
    const Isa& isa_;
    const RowKernels& kernels_;
    const Dot screen_;
    const bool whole_;  // no product can be left out
    Inputs x_, screen_x_;
    float reach_[kFew];  // times a row's error: how far its product may be off
};

}  // namespace

std::int64_t few_tokens(const Weights& weights, const Batch& batch, const Isa& isa, int threads,
                        double most) {
    thread_local Scratch scratch;
    thread_local Chosen chosen;
    const std::int64_t experts = batch.mask_TE ? batch.experts : 1;
    chosen.find(batch.mask_TE, batch.tokens, experts, weights.neurons);
    if (double(chosen.neurons.size()) > most * double(weights.neurons)) return -1;
    return Job(weights, batch, isa, chosen).run(threads, scratch);
}

}  // namespace ffn
