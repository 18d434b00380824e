#include "sparse_ffn.h"

#include <algorithm>
#include <vector>

#include "chosen.h"
#include "parallel.h"
#include "scratch.h"

namespace ffn {
namespace {

constexpr int kTokens = 16;              // that share one reading of the weights
constexpr int kBlock = 64;               // neurons whose gates are known before their ups are read
constexpr int kColumns = 512;            // of y that one thread sums up at a time
constexpr int kLeastNeurons = 32;        // of a slice: its sum is one more row to write and to read
constexpr std::int64_t kLeastBytes = 65536;  // of a slice: less is not worth a thread
constexpr int kSlicesAThread = 16;       // so that a thread whose core is busy takes fewer

const char* element(const void* data, DType dtype, std::int64_t index) {
    constexpr int sizes[] = {4, 2, 2, 1};
    return static_cast<const char*>(data) + index * sizes[int(dtype)];
}

template <class From, class To>
void convert(const void* from, std::int64_t count, void* to) {
    const auto* source = static_cast<const From*>(from);
    auto* target = static_cast<To*>(to);
    for (std::int64_t i = 0; i < count; ++i) from_float(to_float(source[i]), target[i]);
}

void to_floats(const void* from, DType dtype, std::int64_t count, float* to) {
    if (dtype == DType::f32) convert<float, float>(from, count, to);
    if (dtype == DType::bf16) convert<Bf16, float>(from, count, to);
    if (dtype == DType::f16) convert<Half, float>(from, count, to);
}

void from_floats(const float* from, std::int64_t count, DType dtype, void* to) {
    if (dtype == DType::f32) convert<float, float>(from, count, to);
    if (dtype == DType::bf16) convert<float, Bf16>(from, count, to);
    if (dtype == DType::f16) convert<float, Half>(from, count, to);
}

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

// One call for up to kTokens tokens.
class Job {
  public:
    Job(const Weights& weights, const Batch& batch, const Isa& isa)
        : w_(weights), batch_(batch), tokens_(int(batch.tokens)) {
        const RowKernels* found = &isa.of[int(w_.dtype)];
        if (found->x != DType::f32 && found->x != batch.dtype)
            found = &isa.widened->of[int(w_.dtype)];
        kernels_ = *found;
    }

    std::int64_t run(const Chosen& chosen, int threads, Scratch& scratch) {
        const std::int64_t neuron_bytes = (w_.inputs + 1) * row_bytes();
        const Slices slices(std::int64_t(chosen.neurons.size()), neuron_bytes, threads, tokens_);
        const std::size_t values = std::size_t(tokens_ * w_.padded);
        auto* floats =
            reinterpret_cast<float*>(scratch.get((slices.count + 1) * values * sizeof(float)));
        prepare_x(floats);
        float* sums = floats + values;
        std::vector<std::int64_t> rows(std::size_t(slices.count));
        const auto slice = [&](int s) {
            rows[s] = run_slice(chosen, slices.begin(s), slices.begin(s + 1), sums + s * values);
        };
        const int blocks = int((w_.width + kColumns - 1) / kColumns);
        const auto columns = [&](int b) { finish(sums, slices.count, b); };
        in_parallel(std::min(threads, slices.count), slices.count, slice, blocks, columns);
        std::int64_t read = 0;
        for (const std::int64_t count : rows) read += count;
        return read;
    }

  private:
    struct Hidden {
        int live[kBlock];                  // indices into the chosen neurons
        float h[kBlock * kTokens];         // of them, T values a neuron
        float z[kBlock * kTokens];         // what a part made of x
        const void* rows[kBlock + kAhead];  // of a part
        int count;
    };

    std::int64_t row_bytes() const {
        return element(nullptr, w_.dtype, w_.padded) - element(nullptr, w_.dtype, 0);
    }

    // x as the kernels want it, with zeros behind the last column.
    void prepare_x(float* floats) {
        x_ = floats;
        for (std::int64_t t = 0; t < tokens_; ++t) {
            const char* from = element(batch_.x_TD, batch_.dtype, t * w_.width);
            if (kernels_.x == DType::f32) {
                float* to = floats + t * w_.padded;
                to_floats(from, batch_.dtype, w_.width, to);
                std::fill(to + w_.width, to + w_.padded, 0.0f);
            } else {
                auto* to = reinterpret_cast<Bf16*>(floats) + t * w_.padded;
                std::memcpy(to, from, std::size_t(w_.width) * sizeof(Bf16));
                std::fill(to + w_.width, to + w_.padded, Bf16{0});
            }
        }
    }

    std::int64_t run_slice(const Chosen& chosen, std::int64_t begin, std::int64_t end, float* y) {
        std::fill(y, y + tokens_ * w_.padded, 0.0f);
        std::int64_t read = 0;
        for (std::int64_t i = begin; i < end; i += kBlock)
            read += run_block(chosen, i, int(std::min<std::int64_t>(kBlock, end - i)), y);
        return read;
    }

    std::int64_t run_block(const Chosen& chosen, std::int64_t begin, int count, float* y) {
        Hidden hidden;
        start(chosen, begin, count, hidden);
        std::int64_t read = 0;
        for (int part = 0; part < w_.inputs && hidden.count; ++part) {
            read += hidden.count;
            kernels_.dot(rows_of(chosen, part, hidden), x_, tokens_, hidden.z);
            apply(chosen, part, hidden);
        }
        if (!hidden.count) return read;
        scale(chosen, w_.inputs, hidden.h, hidden);
        kernels_.add(rows_of(chosen, w_.inputs, hidden), hidden.h, tokens_, y);
        return read + hidden.count;
    }

    // h is 1 where a token wants the neuron, else 0.
    void start(const Chosen& chosen, std::int64_t begin, int count, Hidden& hidden) const {
        hidden.count = count;
        for (int i = 0; i < count; ++i) {
            hidden.live[i] = int(begin) + i;
            const std::int64_t e = chosen.experts[begin + i];
            for (int t = 0; t < tokens_; ++t)
                hidden.h[i * tokens_ + t] =
                    !batch_.mask_TE || batch_.mask_TE[t * batch_.experts + e] ? 1.0f : 0.0f;
        }
    }

    // h *= act(z), and neurons whose h is zero for every token leave.
    void apply(const Chosen& chosen, int part, Hidden& hidden) const {
        scale(chosen, part, hidden.z, hidden);
        int kept = 0;
        for (int i = 0; i < hidden.count; ++i) {
            const std::int64_t n = chosen.neurons[hidden.live[i]];
            const float bias = w_.biases_FP ? w_.biases_FP[n * w_.inputs + part] : 0;
            bool any = false;
            for (int t = 0; t < tokens_; ++t) {
                float h = hidden.h[i * tokens_ + t];
                if (h != 0) h *= w_.acts[part](hidden.z[i * tokens_ + t] + bias);
                hidden.h[kept * tokens_ + t] = h;
                any |= h != 0;
            }
            hidden.live[kept] = hidden.live[i];
            kept += any;
        }
        hidden.count = kept;
    }

    void scale(const Chosen& chosen, int part, float* values, const Hidden& hidden) const {
        if (!w_.scales_FP) return;
        for (int i = 0; i < hidden.count; ++i) {
            const std::int64_t n = chosen.neurons[hidden.live[i]];
            const float by = w_.scales_FP[n * (w_.inputs + 1) + part];
            for (int t = 0; t < tokens_; ++t) values[i * tokens_ + t] *= by;
        }
    }

    // The rows of a part; behind them, the first rows of the next.
    Rows rows_of(const Chosen& chosen, int part, Hidden& hidden) const {
        const auto row = [&](int i, int of_part) {
            const std::int64_t n = chosen.neurons[hidden.live[i]];
            return w_.rows_FPD + (n * (w_.inputs + 1) + of_part) * row_bytes();
        };
        for (int i = 0; i < hidden.count; ++i) hidden.rows[i] = row(i, part);
        const int next = std::min(part + 1, w_.inputs);
        for (int i = 0; i < kAhead; ++i)
            hidden.rows[hidden.count + i] = row(std::min(i, hidden.count - 1), next);
        return {hidden.rows, hidden.count, w_.padded};
    }

    // Adds up the slices, always in the same order, and writes y.
    void finish(const float* sums, int slices, int block) const {
        const std::int64_t begin = std::int64_t(block) * kColumns;
        const std::int64_t count = std::min<std::int64_t>(kColumns, w_.width - begin);
        float y[kColumns];
        for (std::int64_t t = 0; t < tokens_; ++t) {
            for (std::int64_t d = 0; d < count; ++d) y[d] = w_.down_D ? w_.down_D[begin + d] : 0;
            for (int s = 0; s < slices; ++s) {
                const float* sum = sums + (s * tokens_ + t) * w_.padded + begin;
                for (std::int64_t d = 0; d < count; ++d) y[d] += sum[d];
            }
            void* to = const_cast<char*>(element(batch_.y_TD, batch_.dtype, t * w_.width + begin));
            from_floats(y, count, batch_.dtype, to);
        }
    }

    const Weights& w_;
    const Batch& batch_;
    const int tokens_;
    RowKernels kernels_;
    const void* x_ = nullptr;
};

Batch some_tokens(const Batch& batch, std::int64_t width, std::int64_t begin, std::int64_t count) {
    Batch part = batch;
    part.x_TD = element(batch.x_TD, batch.dtype, begin * width);
    part.y_TD = const_cast<char*>(element(batch.y_TD, batch.dtype, begin * width));
    part.tokens = count;
    if (batch.mask_TE) part.mask_TE += begin * batch.experts;
    return part;
}

}  // namespace

std::int64_t sparse_ffn(const Weights& weights, const Batch& batch, const Isa& isa, int threads,
                        double most) {
    thread_local Scratch scratch;
    thread_local Chosen chosen;
    const std::int64_t experts = batch.mask_TE ? batch.experts : 1;
    std::int64_t read = 0;
    for (std::int64_t t = 0; t < batch.tokens; t += kTokens) {
        const std::int64_t count = std::min<std::int64_t>(kTokens, batch.tokens - t);
        const Batch part = some_tokens(batch, weights.width, t, count);
        chosen.find(part.mask_TE, count, experts, weights.neurons);
        if (t == 0 && double(chosen.neurons.size()) > most * double(weights.neurons)) return -1;
        read += Job(weights, part, isa).run(chosen, std::max(threads, 1), scratch);
    }
    return read;
}

}  // namespace ffn
