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

constexpr int kTogether = 4;      // neurons, neighbours, that the kernels read together
constexpr int kChunk = 32;        // neurons that one thread takes at a time
constexpr int kMostColumns = 256;  // of y: those of all tokens stay in the second cache
constexpr double kApart = 2.5;    // what a product costs whose neuron is alone, of one of four

// Neighbouring neurons and the tokens that at least one of them has to be multiplied with.
struct Piece {
    std::int64_t neuron;
    int neurons;
    std::vector<std::int32_t> tokens;
    std::vector<float> h;  // neuron by neuron
};

struct Pieces {
    std::vector<Piece> all;
    std::size_t count = 0;

    // An empty one, in the memory of an earlier call.
    Piece& next(std::int64_t neuron, int neurons) {
        if (count == all.size()) all.emplace_back();
        Piece& piece = all[count++];
        piece.neuron = neuron;
        piece.neurons = neurons;
        piece.tokens.clear();
        return piece;
    }
};

class Prompt {
  public:
    Prompt(const Weights& weights, const Batch& batch, const Isa& isa, const Wanted& wanted)
        : w_(weights),
          batch_(batch),
          wanted_(wanted),
          kernels_(kernels_for(isa, weights.dtype, batch.dtype)) {}

    // Lists the tokens of every piece; the share of all products that they are.
    double plan(std::vector<Pieces>& chunks) const {
        chunks.resize(std::size_t((w_.neurons + kChunk - 1) / kChunk));
        double products = 0;
        std::int64_t n = 0;
        for (Pieces& chunk : chunks) {
            chunk.count = 0;
            const std::int64_t end = std::min(n + kChunk, w_.neurons);
            for (; n < end; n += kTogether)
                products += plan_some(n, int(std::min<std::int64_t>(kTogether, end - n)), chunk);
        }
        return products / (double(w_.neurons) * double(batch_.tokens));
    }

    std::int64_t run(std::vector<Pieces>& chunks, int threads, Scratch& scratch) {
        const std::size_t inputs = std::size_t(batch_.tokens) * Inputs::stride(w_.padded());
        x_.prepare(batch_, w_.width, w_.padded(), kernels_.x, scratch.get(inputs));
        const int tile = tile_lines(threads);
        const int tiles = int((w_.lines + tile - 1) / tile);
        std::atomic<std::int64_t> read{0};
        const auto chunk = [&](int c) { read += hide(chunks[std::size_t(c)]); };
        const auto columns = [&](int i) {
            sum_up(chunks, i * tile, std::min<std::int64_t>((i + 1) * tile, w_.lines));
        };
        in_parallel(threads, int(chunks.size()), chunk, tiles, columns);
        return read;
    }

  private:
    // Together where that is less work than one neuron after the other, each with its own tokens.
    double plan_some(std::int64_t neuron, int neurons, Pieces& chunk) const {
        std::int64_t apart = 0;
        for (int i = 0; i < neurons; ++i) apart += wanted_.of(expert(neuron + i)).count;
        if (apart == 0) return 0;
        Piece& piece = chunk.next(neuron, neurons);
        for (int i = 0; i < neurons; ++i)
            if (i == 0 || expert(neuron + i) != expert(neuron + i - 1)) unite(piece, neuron + i);
        const double together = double(neurons) * double(piece.tokens.size());
        if (together <= kApart * double(apart)) return together;
        --chunk.count;
        for (int i = 0; i < neurons; ++i) unite(chunk.next(neuron + i, 1), neuron + i);
        return kApart * double(apart);
    }

    void unite(Piece& piece, std::int64_t neuron) const {
        const Tokens more = wanted_.of(expert(neuron));
        const auto middle = std::ptrdiff_t(piece.tokens.size());
        piece.tokens.insert(piece.tokens.end(), more.data, more.data + more.count);
        auto& all = piece.tokens;
        std::inplace_merge(all.begin(), all.begin() + middle, all.end());
        all.erase(std::unique(all.begin(), all.end()), all.end());
    }

    std::int64_t expert(std::int64_t neuron) const {
        const std::int64_t experts = batch_.mask_TE ? batch_.experts : 1;
        const std::int64_t size = w_.neurons / experts, longer = w_.neurons % experts;
        const std::int64_t in_longer = longer * (size + 1);
        return neuron < in_longer ? neuron / (size + 1) : longer + (neuron - in_longer) / size;
    }

    std::int64_t hide(Pieces& chunk) const {
        std::vector<const void*> x(std::size_t(batch_.tokens));
        std::vector<float> z;
        std::int64_t read = 0;
        for (std::size_t i = 0; i < chunk.count; ++i) {
            Piece& piece = chunk.all[i];
            start(piece);
            for (int part = 0; part < w_.inputs && !piece.tokens.empty(); ++part) {
                read += piece.neurons;
                multiply(piece, part, x, z);
                apply(piece, part, z);
            }
            if (!piece.tokens.empty()) read += piece.neurons;
            scale(piece);
        }
        return read;
    }

    // h is 1 where a token wants the neuron, else 0.
    void start(Piece& piece) const {
        const std::size_t count = piece.tokens.size();
        piece.h.assign(std::size_t(piece.neurons) * count, 1.0f);
        for (int i = 0; i < piece.neurons && batch_.mask_TE; ++i) {
            const std::int64_t e = expert(piece.neuron + i);
            for (std::size_t t = 0; t < count; ++t)
                piece.h[i * count + t] = batch_.mask_TE[piece.tokens[t] * batch_.experts + e];
        }
    }

    void multiply(const Piece& piece, int part, std::vector<const void*>& x,
                  std::vector<float>& z) const {
        for (std::size_t t = 0; t < piece.tokens.size(); ++t) x[t] = x_[piece.tokens[t]];
        const void* rows[kTogether + kAhead];
        z.resize(piece.h.size());
        kernels_.dot(rows_of(piece, part, rows), x.data(), int(piece.tokens.size()), z.data());
    }

    // h *= act(z), and tokens for which every h is zero leave.
    void apply(Piece& piece, int part, const std::vector<float>& z) const {
        const std::size_t count = piece.tokens.size();
        for (int i = 0; i < piece.neurons; ++i) {
            const std::int64_t n = piece.neuron + i;
            const float by = w_.scale(n, part), bias = w_.bias(n, part);
            for (std::size_t t = 0; t < count; ++t) {
                float& h = piece.h[i * count + t];
                if (h != 0) h *= w_.acts[part](z[i * count + t] * by + bias);
            }
        }
        compact(piece);
    }

    static void compact(Piece& piece) {
        const std::size_t count = piece.tokens.size();
        std::vector<std::int32_t> kept;
        for (std::size_t t = 0; t < count; ++t) {
            bool any = false;
            for (int i = 0; i < piece.neurons; ++i) any |= piece.h[i * count + t] != 0;
            if (any) kept.push_back(std::int32_t(t));
        }
        if (kept.size() == count) return;
        for (int i = 0; i < piece.neurons; ++i)
            for (std::size_t k = 0; k < kept.size(); ++k)
                piece.h[i * kept.size() + k] = piece.h[i * count + std::size_t(kept[k])];
        for (std::size_t k = 0; k < kept.size(); ++k)
            piece.tokens[k] = piece.tokens[std::size_t(kept[k])];
        piece.tokens.resize(kept.size());
        piece.h.resize(kept.size() * std::size_t(piece.neurons));
    }

    void scale(Piece& piece) const {
        const std::size_t count = piece.tokens.size();
        for (int i = 0; i < piece.neurons && w_.scales_FP; ++i)
            for (std::size_t t = 0; t < count; ++t)
                piece.h[i * count + t] *= w_.scale(piece.neuron + i, w_.inputs);
    }

    // The rows of a part; behind them, those of the neurons that come next.
    Rows rows_of(const Piece& piece, int part, const void** rows) const {
        for (int i = 0; i < piece.neurons + kAhead; ++i)
            rows[i] = w_.row(std::min(piece.neuron + i, w_.neurons - 1), part);
        return {rows, piece.neurons, w_.lines};
    }

    // Few enough that the threads share the work evenly.
    int tile_lines(int threads) const {
        const std::int64_t even = w_.lines / (4 * threads);
        const std::int64_t most = std::max(1, kMostColumns / per_line(w_.dtype));
        return int(std::clamp<std::int64_t>(even, 1, most));
    }

    // y in the columns of some lines.
    void sum_up(const std::vector<Pieces>& chunks, std::int64_t begin, std::int64_t end) const {
        thread_local Scratch scratch;
        const std::int64_t first = begin * per_line(w_.dtype), last = end * per_line(w_.dtype);
        const std::int64_t stride = last - first + kLine;  // see Inputs::stride
        const std::int64_t values = batch_.tokens * stride;
        auto* y = reinterpret_cast<float*>(scratch.get(std::size_t(values) * sizeof(float)));
        std::fill(y, y + values, 0.0f);
        std::vector<float*> y_T(std::size_t(batch_.tokens));
        for (const Pieces& chunk : chunks)
            for (std::size_t i = 0; i < chunk.count; ++i) {
                const Piece& piece = chunk.all[i];
                for (std::size_t t = 0; t < piece.tokens.size(); ++t)
                    y_T[t] = y + piece.tokens[t] * stride;
                const void* rows[kTogether + kAhead];
                const Rows list = rows_of(piece, w_.inputs, rows);
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
    const RowKernels& kernels_;
    Inputs x_;
};

}  // namespace

std::int64_t many_tokens(const Weights& weights, const Batch& batch, const Isa& isa, int threads,
                         double most) {
    thread_local Scratch scratch;
    thread_local Wanted wanted;
    thread_local std::vector<Pieces> chunks;
    wanted.find(batch.mask_TE, batch.tokens, batch.mask_TE ? batch.experts : 1);
    Prompt prompt(weights, batch, isa, wanted);
    if (prompt.plan(chunks) > most) return -1;
    return prompt.run(chunks, threads, scratch);
}

}  // namespace ffn
