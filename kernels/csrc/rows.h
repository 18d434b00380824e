// The loops over rows, once for every instruction set. V is the set's vector of floats; Product
// says how a line of a row meets x.
//
// Included behind a `target` pragma. So everything here is in an unnamed namespace, what does not
// depend on V too: of an inline function or a template that several files compile under one name,
// the linker keeps one copy, and that for AVX-512 would then run on every CPU. No header may be
// included behind the pragma for the first time, but for this one and avx512.h.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace ffn {
namespace {

constexpr int kInFlight = 2048;    // bytes prefetched ahead, over all rows that are read at once

template <class W>
constexpr int numbers_of_a_line = int(kLine / sizeof(W));
template <>
constexpr int numbers_of_a_line<Int4> = per_line(DType::i4);

// Numbers k * lanes and on of a line, as floats.
template <class V, class W>
struct Line {
    const W* p;

    Line(const void* row, std::int64_t line, std::int64_t)
        : p(static_cast<const W*>(row) + line * numbers_of_a_line<W>) {}
    typename V::F operator()(int k) const { return V::load(p + k); }
};

template <class V>
struct Line<V, Int4> {
    const Int4* p;
    const Bf16* scales;

    Line(const void* row, std::int64_t line, std::int64_t lines) {
        const char* bytes = static_cast<const char*>(row);
        p = reinterpret_cast<const Int4*>(bytes + line * kLine);
        const std::int64_t first = line * numbers_of_a_line<Int4> / kGroup;
        scales = reinterpret_cast<const Bf16*>(bytes + lines * kLine) + first;
    }
    typename V::F operator()(int k) const {
        return V::mul(V::nibbles(p + k % 16, k / 16), V::set(scales[k / kGroup]));
    }
};

// Both as floats.
template <class V, class W>
struct Widened : Line<V, W> {
    using X = float;
    using Row = typename V::F;
    static constexpr int step = V::lanes;
    using Line<V, W>::Line;
    static Row x(const float* p) { return V::load(p); }
    static typename V::F add(typename V::F sum, Row w, Row x) { return V::fma(w, x, sum); }
};

// R rows that are read together, and R that are likely to follow.
template <int R>
struct Streams {
    const char* now[R];
    const char* next[R];

    explicit Streams(const void* const* rows) {
        for (int r = 0; r < R; ++r) {
            now[r] = static_cast<const char*>(rows[r]);
            next[r] = static_cast<const char*>(rows[R + r]);
        }
    }

    // Calls body(line), and fetches lines ahead: of these rows, then of the next.
    template <class Body>
    void each_line(std::int64_t begin, std::int64_t end, Body body) const {
        constexpr std::int64_t far = kInFlight / R / kLine;
        const std::int64_t count = end - begin, reach = far < count ? far : count;
        std::int64_t line = begin;
        for (; line < end - reach; ++line) {
            for (int r = 0; r < R; ++r) __builtin_prefetch(now[r] + (line + reach) * kLine);
            body(line);
        }
        for (; line < end; ++line) {
            for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + (line + reach - count) * kLine);
            body(line);
        }
    }
};

template <class V, class W, class Product, int R, int T>
inline void dot_block(const void* const* rows, const void* const* x, std::int64_t lines, float* z,
                      int stride) {
    using X = typename Product::X;
    constexpr int numbers = numbers_of_a_line<W>;
    typename V::F sum[R][T];
    const X* x_T[T];
    for (int t = 0; t < T; ++t) x_T[t] = static_cast<const X*>(x[t]);
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) sum[r][t] = V::zero();
    const Streams<R> streams(rows);
    streams.each_line(0, lines, [&](std::int64_t line) {
        for (int k = 0; k < numbers; k += Product::step) {
            typename Product::Row w[R];
            for (int r = 0; r < R; ++r) w[r] = Product(streams.now[r], line, lines)(k);
            for (int t = 0; t < T; ++t) {
                const typename Product::Row x_t = Product::x(x_T[t] + line * numbers + k);
                for (int r = 0; r < R; ++r) sum[r][t] = Product::add(sum[r][t], w[r], x_t);
            }
        }
    });
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) z[r * stride + t] = V::sum(sum[r][t]);
}

template <class V, class W, int R, int T>
inline void add_block(const void* const* rows, const float* h, int stride, float* const* y,
                      std::int64_t lines, std::int64_t begin, std::int64_t end) {
    constexpr int numbers = numbers_of_a_line<W>;
    typename V::F h_RT[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) h_RT[r][t] = V::set(h[r * stride + t]);
    const Streams<R> streams(rows);
    streams.each_line(begin, end, [&](std::int64_t line) {
        for (int k = 0; k < numbers; k += V::lanes) {
            typename V::F w[R];
            for (int r = 0; r < R; ++r) w[r] = Line<V, W>(streams.now[r], line, lines)(k);
            for (int t = 0; t < T; ++t) {
                float* y_t = y[t] + (line - begin) * numbers + k;
                typename V::F sum = V::load(y_t);
                for (int r = 0; r < R; ++r) sum = V::fma(w[r], h_RT[r][t], sum);
                V::store(y_t, sum);
            }
        }
    });
}

// T tokens at a time, then those that are left: two fewer at a time, at last one by one.
template <class V, class W, class Product, int R, int T>
inline void dot_tokens(const void* const* rows, const void* const* x, std::int64_t lines, int left,
                       float* z, int stride) {
    for (; left >= T; left -= T, x += T, z += T)
        dot_block<V, W, Product, R, T>(rows, x, lines, z, stride);
    if constexpr (T > 1)
        dot_tokens<V, W, Product, R, (T > 2 ? T - 2 : 1)>(rows, x, lines, left, z, stride);
}

template <class V, class W, int R, int T>
inline void add_tokens(const void* const* rows, const float* h, int stride, int left,
                       float* const* y, std::int64_t lines, std::int64_t begin, std::int64_t end) {
    for (; left >= T; left -= T, h += T, y += T)
        add_block<V, W, R, T>(rows, h, stride, y, lines, begin, end);
    if constexpr (T > 1)
        add_tokens<V, W, R, (T > 2 ? T - 2 : 1)>(rows, h, stride, left, y, lines, begin, end);
}

// Four rows at a time, then one: as many streams as the memory serves well.
template <class V, class W, class Product = Widened<V, W>>
void dot(const RowList& list, const void* const* x_T, int tokens, float* z) {
    constexpr int T = V::tokens;
    int i = 0;
    for (; i + 4 <= list.count; i += 4)
        dot_tokens<V, W, Product, 4, T>(list.data + i, x_T, list.lines, tokens, z + i * tokens,
                                        tokens);
    for (; i < list.count; ++i)
        dot_tokens<V, W, Product, 1, T>(list.data + i, x_T, list.lines, tokens, z + i * tokens,
                                        tokens);
}

template <class V, class W>
void add(const RowList& list, const float* h, float* const* y, int tokens, std::int64_t begin,
         std::int64_t end) {
    constexpr int T = V::tokens < 4 ? V::tokens : 4;
    int i = 0;
    for (; i + 4 <= list.count; i += 4)
        add_tokens<V, W, 4, T>(list.data + i, h + i * tokens, tokens, tokens, y, list.lines, begin,
                               end);
    for (; i < list.count; ++i)
        add_tokens<V, W, 1, T>(list.data + i, h + i * tokens, tokens, tokens, y, list.lines, begin,
                               end);
}

template <class V, class W>
constexpr RowKernels row_kernels() {
    return {dot<V, W>, add<V, W>, add<V, W>, DType::f32};
}

}  // namespace
}  // namespace ffn
