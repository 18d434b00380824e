// The loops over rows, once for every instruction set. V is the set's vector of floats; Product
// says how a row meets x.
//
// Included behind a `target` pragma: only what is inlined for sure may be called from here, since a
// shared inline function that was compiled for a newer CPU would be linked into older ones' paths.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace ffn {

constexpr int kLine = 64;         // bytes of a cache line, to which rows are padded
constexpr int kInFlight = 2048;   // bytes prefetched ahead, over all rows that are read at once
constexpr int kTileBytes = 32768; // y of all tokens that stays in the first cache

// Both as floats.
template <class V, class W>
struct Widened {
    using X = float;
    using Row = typename V::F;
    static constexpr int step = V::lanes;
    static Row row(const W* p) { return V::load(p); }
    static Row x(const float* p) { return V::load(p); }
    static typename V::F add(typename V::F sum, Row w, Row x) { return V::fma(w, x, sum); }
};

// R rows that are read together, and R that are likely to follow.
template <class W, int R>
struct Streams {
    const W* now[R];
    const W* next[R];

    explicit Streams(const void* const* rows) {
        for (int r = 0; r < R; ++r) {
            now[r] = static_cast<const W*>(rows[r]);
            next[r] = static_cast<const W*>(rows[R + r]);
        }
    }

    // Calls body(d) for the columns d at which a cache line begins, and fetches lines ahead: of
    // these rows, then of the next.
    template <class Body>
    void each_line(std::int64_t begin, std::int64_t end, Body body) const {
        constexpr std::int64_t line = kLine / sizeof(W), far = kInFlight / R / sizeof(W);
        const std::int64_t width = end - begin, reach = far < width ? far : width;
        std::int64_t d = begin;
        for (; d < end - reach; d += line) {
            for (int r = 0; r < R; ++r) __builtin_prefetch(now[r] + d + reach);
            body(d);
        }
        for (; d < end; d += line) {
            for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + d + reach - width);
            body(d);
        }
    }
};

template <class V, class W, class Product, int R, int T>
inline void dot_block(const void* const* rows, const typename Product::X* x, std::int64_t padded,
                      float* z, int stride) {
    typename V::F sum[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) sum[r][t] = V::zero();
    const Streams<W, R> streams(rows);
    streams.each_line(0, padded, [&](std::int64_t d) {
        for (int k = 0; k < int(kLine / sizeof(W)); k += Product::step) {
            typename Product::Row w[R];
            for (int r = 0; r < R; ++r) w[r] = Product::row(streams.now[r] + d + k);
            for (int t = 0; t < T; ++t) {
                const typename Product::Row x_t = Product::x(x + t * padded + d + k);
                for (int r = 0; r < R; ++r) sum[r][t] = Product::add(sum[r][t], w[r], x_t);
            }
        }
    });
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) z[r * stride + t] = V::sum(sum[r][t]);
}

template <class V, class W, int R, int T>
inline void add_block(const void* const* rows, const float* h, int stride, std::int64_t begin,
                      std::int64_t end, float* y, std::int64_t padded) {
    typename V::F h_RT[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) h_RT[r][t] = V::set(h[r * stride + t]);
    const Streams<W, R> streams(rows);
    streams.each_line(begin, end, [&](std::int64_t d) {
        for (int k = 0; k < int(kLine / sizeof(W)); k += V::lanes) {
            typename V::F w[R];
            for (int r = 0; r < R; ++r) w[r] = V::load(streams.now[r] + d + k);
            for (int t = 0; t < T; ++t) {
                float* y_t = y + t * padded + d + k;
                typename V::F sum = V::load(y_t);
                for (int r = 0; r < R; ++r) sum = V::fma(w[r], h_RT[r][t], sum);
                V::store(y_t, sum);
            }
        }
    });
}

template <class V, class W, class Product, int R>
inline void dot_tokens(const void* const* rows, const typename Product::X* x, std::int64_t padded,
                       int tokens, float* z) {
    int t = 0;
    for (; t + V::tokens <= tokens; t += V::tokens)
        dot_block<V, W, Product, R, V::tokens>(rows, x + t * padded, padded, z + t, tokens);
    for (; t < tokens; ++t)
        dot_block<V, W, Product, R, 1>(rows, x + t * padded, padded, z + t, tokens);
}

template <class V, class W, int R>
inline void add_tokens(const void* const* rows, const float* h, int tokens, std::int64_t begin,
                       std::int64_t end, float* y, std::int64_t padded) {
    int t = 0;
    for (; t + V::tokens <= tokens; t += V::tokens)
        add_block<V, W, R, V::tokens>(rows, h + t, tokens, begin, end, y + t * padded, padded);
    for (; t < tokens; ++t)
        add_block<V, W, R, 1>(rows, h + t, tokens, begin, end, y + t * padded, padded);
}

// Four rows at a time, then one: as many streams as the memory serves well.
template <class V, class W, class Product = Widened<V, W>>
void dot(const Rows& list, const void* x_TD, int tokens, float* z) {
    const auto* x = static_cast<const typename Product::X*>(x_TD);
    int i = 0;
    for (; i + 4 <= list.count; i += 4)
        dot_tokens<V, W, Product, 4>(list.data + i, x, list.padded, tokens, z + i * tokens);
    for (; i < list.count; ++i)
        dot_tokens<V, W, Product, 1>(list.data + i, x, list.padded, tokens, z + i * tokens);
}

template <class V, class W>
void add(const Rows& list, const float* h, int tokens, float* y) {
    constexpr std::int64_t line = kLine / sizeof(W);
    const std::int64_t lines = kTileBytes / std::int64_t(sizeof(float)) / tokens / line;
    const std::int64_t tile = lines < 1 ? line : lines * line;
    for (std::int64_t d = 0; d < list.padded; d += tile) {
        const std::int64_t end = d + tile < list.padded ? d + tile : list.padded;
        int i = 0;
        for (; i + 4 <= list.count; i += 4)
            add_tokens<V, W, 4>(list.data + i, h + i * tokens, tokens, d, end, y, list.padded);
        for (; i < list.count; ++i)
            add_tokens<V, W, 1>(list.data + i, h + i * tokens, tokens, d, end, y, list.padded);
    }
}

template <class V, class W, class Product = Widened<V, W>>
constexpr RowKernels row_kernels(DType x = DType::f32) {
    return {dot<V, W, Product>, add<V, W>, x};
}

}  // namespace ffn
