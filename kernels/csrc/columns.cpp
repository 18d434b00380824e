#include "columns.h"

#include <algorithm>
#include <vector>

#include "numbers.h"
#include "parallel.h"
#include "sparse_ffn.h"

namespace ffn {
namespace {

constexpr std::int64_t kTokens = 16;  // that share one reading
constexpr std::int64_t kLines = 16;   // of a column that a thread adds at a time, at least

// The columns that some tokens want, and what they are multiplied by.
struct Wanted {
    std::vector<float> x, h;
    std::vector<const void*> list;

    void find(const Columns& w, const Product& product) {
        const std::int64_t tokens = product.tokens;
        x.resize(std::size_t(tokens * w.columns));
        to_floats(product.x_TD, product.dtype, tokens * w.columns, x.data());
        h.clear(), list.clear();
        const std::int64_t bytes = row_bytes(w.dtype, w.lines);
        for (std::int64_t d = 0; d < w.columns; ++d) {
            bool any = false;
            for (std::int64_t t = 0; t < tokens; ++t) any |= !(x[std::size_t(t * w.columns + d)] == 0);
            if (!any) continue;
            list.push_back(w.columns_DN + d * bytes);
            for (std::int64_t t = 0; t < tokens; ++t)
                h.push_back(x[std::size_t(t * w.columns + d)]);
        }
    }
};

void some_tokens(const Columns& w, const Product& product, const Isa& isa, int threads) {
    thread_local Wanted wanted;
    thread_local std::vector<float> sums;
    wanted.find(w, product);
    const int count = int(wanted.list.size());
    for (int i = 0; i < kAhead; ++i)
        wanted.list.push_back(count ? wanted.list[std::size_t(count - 1)] : w.columns_DN);
    const RowKernels& kernels = kernels_for(isa, w.dtype, product.dtype);
    const std::int64_t numbers = per_line(w.dtype), tokens = product.tokens;
    threads = useful_threads(threads, count * row_bytes(w.dtype, w.lines));
    const std::int64_t each = std::max(kLines, (w.lines + 4 * threads - 1) / (4 * threads));
    sums.assign(std::size_t(tokens * w.lines * numbers), 0.0f);
    float *y = sums.data(), *h = wanted.h.data();
    const void* const* list = wanted.list.data();
    const auto part = [&, y, h, list](int i) {
        const std::int64_t begin = i * each, end = std::min(begin + each, w.lines);
        float* y_T[kTokens];
        for (std::int64_t t = 0; t < tokens; ++t) y_T[t] = y + (t * w.lines + begin) * numbers;
        if (count) kernels.add({list, count, w.lines}, h, y_T, int(tokens), begin, end);
        const std::int64_t first = begin * numbers, last = std::min(end * numbers, w.rows);
        for (std::int64_t t = 0; t < tokens; ++t) {
            for (std::int64_t n = first; w.bias_N && n < last; ++n) y_T[t][n - first] += w.bias_N[n];
            const char* to = element(product.y_TN, product.dtype, t * w.rows + first);
            from_floats(y_T[t], last - first, product.dtype, const_cast<char*>(to));
        }
    };
    in_parallel(threads, Loop{int((w.lines + each - 1) / each), part});
}

}  // namespace

void columns(const Columns& weights, const Product& product, const Isa& isa, int threads) {
    for (std::int64_t t = 0; t < product.tokens; t += kTokens) {
        Product part = product;
        part.x_TD = element(product.x_TD, product.dtype, t * weights.columns);
        part.y_TN = const_cast<char*>(element(product.y_TN, product.dtype, t * weights.rows));
        part.tokens = std::min(kTokens, product.tokens - t);
        some_tokens(weights, part, isa, std::max(threads, 1));
    }
}

}  // namespace ffn
