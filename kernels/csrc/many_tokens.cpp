// A prompt: neurons by neurons, only the tokens that want them. What takes the time is arithmetic.
//
// First the hidden values of every piece (a few neurons, a list of tokens), then, for some columns
// of y at a time, the sums over all pieces: no two threads write to the same place, and the order
// of the sums is that of the neurons.
#include <algorithm>
#include <atomic>
#include <vector>

#include "numbers.h"
#include "parallel.h"
#include "scratch.h"
#include "sparse_ffn.h"
#include "wanted.h"

namespace ffn {
namespace {

// Neighbouring neurons that are multiplied with the tokens of any of them: one alone would be
// through with a token's x as soon as it is there.
constexpr int kTogether = 4;
constexpr int kChunk = 32;         // neurons that one thread takes at a time
constexpr int kMostColumns = 320;  // of y: those of all tokens stay in the second cache

// Neighbouring neurons and the tokens that at least one of them counts for.
struct Piece {
    std::int64_t neuron = 0;
    int neurons = 0;
    std::vector<std::int32_t> tokens = {};
    std::vector<float> h = {};  // neuron by neuron
};

using Chunk = std::vector<Piece>;

// What one thread needs for a piece.
struct Work {
    std::vector<const void*> x;
    std::vector<float> z;
    std::vector<std::int32_t> live;
};

class Prompt {
  public:
    Prompt(const Weights& weights, const Batch& batch, const Isa& isa, const Wanted& wanted)
        : w_(weights),
          batch_(batch),
          wanted_(wanted),
          isa_(isa),
          kernels_(kernels_for(isa, weights.dtype, batch.dtype)) {}

    // The products to make, as a share of those of every token with every neuron.
    double share() const {
        double products = 0;
        for (std::int64_t n = 0; n < w_.neurons; n += kTogether)
            products += together(n) * double(wanted_.of_any(n, together(n)).count());
        return products / (double(w_.neurons) * double(batch_.tokens));
    }

    std::int64_t run(std::vector<Chunk>& chunks, int threads, Scratch& scratch) {
        chunks.resize(std::size_t((w_.neurons + kChunk - 1) / kChunk));
        const std::size_t inputs = std::size_t(batch_.tokens) * Inputs::stride(w_.padded());
        x_.prepare(batch_, w_.width, w_.padded(), kernels_.x, scratch.get(inputs));
        const int tile = tile_lines(threads);
        const int tiles = int((w_.lines + tile - 1) / tile);
        std::atomic<std::int64_t> read{0};
        const auto chunk = [&](int c) { read += hide(c * std::int64_t(kChunk), chunks[c]); };
        const auto columns = [&](int i) {
            sum_up(chunks, i * tile, std::min<std::int64_t>((i + 1) * tile, w_.lines));
        };
        in_parallel(threads, Loop{int(chunks.size()), chunk}, Loop{tiles, columns});
        return read;
    }

  private:
    int together(std::int64_t neuron) const {
        return int(std::min<std::int64_t>(kTogether, w_.neurons - neuron));
    }

    // The hidden values of the pieces of a chunk; how many rows that and what follows reads.
    std::int64_t hide(std::int64_t neuron, Chunk& chunk) const {
        thread_local Work work;
        chunk.resize(kChunk / kTogether);
        std::int64_t read = 0;
        for (Piece& piece : chunk) {
            piece.neuron = neuron;
            piece.neurons = std::max(0, together(neuron));
            start(piece);
            for (int part = 0; part < w_.inputs; ++part) {
                read += multiply(piece, part, work);
                apply(piece, part, work);
            }
            read += piece.tokens.empty() ? 0 : piece.neurons;
            finish(piece);
            neuron += kTogether;
        }
        return read;
    }

    // h is 1 where a token wants the neuron, else 0.
    void start(Piece& piece) const {
        piece.tokens.clear();
        if (piece.neurons == 0) return;
        const Tokens any = wanted_.of_any(piece.neuron, piece.neurons);
        for (std::int32_t t = 0; t < batch_.tokens; ++t)
            if (any[std::size_t(t)]) piece.tokens.push_back(t);
        piece.h.resize(piece.tokens.size() * std::size_t(piece.neurons));
        float* h = piece.h.data();
        for (int i = 0; i < piece.neurons; ++i) {
            const Tokens& own = wanted_.of(piece.neuron + i);
            for (const std::int32_t t : piece.tokens) *h++ = own[std::size_t(t)] ? 1.0f : 0.0f;
        }
    }

    // z of a part; how many rows that reads.
    std::int64_t multiply(const Piece& piece, int part, Work& work) const {
        if (piece.tokens.empty()) return 0;
        work.z.resize(piece.h.size());
        work.x.clear();
        for (const std::int32_t t : piece.tokens) work.x.push_back(x_[t]);
        const void* rows[kTogether + kAhead];
        const RowList list = rows_of(piece, part, rows);
        kernels_.dot(list, work.x.data(), int(work.x.size()), work.z.data());
        return piece.neurons;
    }

    // h *= act(z), and tokens for which every h is zero leave.
    void apply(Piece& piece, int part, Work& work) const {
        const std::size_t count = piece.tokens.size();
        for (int i = 0; i < piece.neurons; ++i) {
            const std::int64_t n = piece.neuron + i;
            float* z = work.z.data() + i * count;
            isa_.activate(w_.acts[part], z, count, w_.bias(n, part));
            ffn::multiply(piece.h.data() + i * count, z, count);
        }
        if (!w_.off_F) compact(piece, work.live);
    }

    static void compact(Piece& piece, std::vector<std::int32_t>& live) {
        const std::size_t count = piece.tokens.size();
        live.clear();
        for (std::size_t t = 0; t < count; ++t) {
            bool any = false;
            for (int i = 0; i < piece.neurons; ++i) any |= piece.h[i * count + t] != 0;
            if (any) live.push_back(std::int32_t(t));
        }
        if (live.size() == count) return;
        float* to = piece.h.data();  // never ahead of what is still to be read
        for (int i = 0; i < piece.neurons; ++i)
            for (const std::int32_t t : live) *to++ = piece.h[i * count + std::size_t(t)];
        for (std::size_t k = 0; k < live.size(); ++k) piece.tokens[k] = piece.tokens[live[k]];
        piece.tokens.resize(live.size());
        piece.h.resize(live.size() * std::size_t(piece.neurons));
    }

    // What the way down takes in place of h.
    void finish(Piece& piece) const {
        const std::size_t count = piece.tokens.size();
        for (int i = 0; i < piece.neurons && w_.off_F; ++i) {
            const std::int64_t n = piece.neuron + i;
            const Tokens& own = wanted_.of(n);
            for (std::size_t t = 0; t < count; ++t) {
                float& h = piece.h[i * count + t];
                const bool on = own[std::size_t(piece.tokens[t])];
                h -= on ? w_.off(n) : 0;
            }
        }
    }

    // The rows of a part; behind them, those of the neurons that come next.
    RowList rows_of(const Piece& piece, int part, const void** rows) const {
        for (int i = 0; i < piece.neurons + kAhead; ++i)
            rows[i] = w_.row(std::min(piece.neuron + i, w_.neurons - 1), part);
        return {rows, piece.neurons, w_.lines};
    }

    // The widest that gives every thread as many tiles.
    int tile_lines(int threads) const {
        const std::int64_t most = std::max(1, kMostColumns / per_line(w_.dtype));
        const std::int64_t each = (w_.lines + threads * most - 1) / (threads * most);
        return int((w_.lines + threads * each - 1) / (threads * each));
    }

    // y in the columns of some lines.
    void sum_up(const std::vector<Chunk>& chunks, std::int64_t begin, std::int64_t end) const {
        thread_local Scratch scratch;
        const std::int64_t first = begin * per_line(w_.dtype), last = end * per_line(w_.dtype);
        const std::int64_t stride = last - first + kLine;  // see Inputs::stride
        const std::int64_t values = batch_.tokens * stride;
        auto* y = reinterpret_cast<float*>(scratch.get(std::size_t(values) * sizeof(float)));
        std::fill(y, y + values, 0.0f);
        std::vector<float*> y_T(std::size_t(batch_.tokens));
        for (const Chunk& chunk : chunks)
            for (const Piece& piece : chunk) {
                for (std::size_t t = 0; t < piece.tokens.size(); ++t)
                    y_T[t] = y + piece.tokens[t] * stride;
                const void* rows[kTogether + kAhead];
                const RowList list = rows_of(piece, w_.inputs, rows);
                const int tokens = int(piece.tokens.size());
                kernels_.add_rounded(list, piece.h.data(), y_T.data(), tokens, begin, end);
            }
        write(y, stride, first, std::min(last, w_.width));
    }

    void write(float* y, std::int64_t stride, std::int64_t first, std::int64_t last) const {
        for (std::int64_t t = 0; t < batch_.tokens && first < last; ++t) {
            float* y_D = y + t * stride;
            for (std::int64_t d = first; w_.down_D && d < last; ++d) y_D[d - first] += w_.down_D[d];
            void* to = const_cast<char*>(element(batch_.y_TD, batch_.dtype, t * w_.width + first));
            from_floats(y_D, last - first, batch_.dtype, to);
        }
    }

    const Weights& w_;
    const Batch& batch_;
    const Wanted& wanted_;
    const Isa& isa_;
    const RowKernels& kernels_;
    Inputs x_;
};

// The share of pairs of a token and an expert that it wants: of the products, at least so many.
double wanted_share(const Batch& batch) {
    if (!batch.mask_TE) return 1;
    const std::int64_t pairs = batch.tokens * batch.experts;
    std::int64_t on = 0;
    for (std::int64_t i = 0; i < pairs; ++i) on += batch.mask_TE[i] != 0;
    return double(on) / double(pairs);
}

}  // namespace

std::int64_t many_tokens(const Weights& weights, const Batch& batch, const Isa& isa, int threads,
                         double most) {
    thread_local Scratch scratch;
    thread_local Wanted wanted;
    thread_local std::vector<Chunk> chunks;
    if (wanted_share(batch) > most) return -1;  // what is exact takes a millisecond to find
    wanted.find(batch, weights.neurons);
    Prompt prompt(weights, batch, isa, wanted);
    if (prompt.share() > most) return -1;
    return prompt.run(chunks, threads, scratch);
}

}  // namespace ffn
