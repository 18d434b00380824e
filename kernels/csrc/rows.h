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

// Lines of scales in front of a row of so many lines of numbers.
template <class W>
constexpr std::int64_t lines_before(std::int64_t) {
    return 0;
}
template <>
constexpr std::int64_t lines_before<Int8>(std::int64_t lines) {
    return scale_lines(DType::i8, lines);
}
template <>
constexpr std::int64_t lines_before<Int4>(std::int64_t lines) {
    return scale_lines(DType::i4, lines);
}

// Numbers k and on of a line, as floats.
template <class V, class W>
struct Line {
    const W* p;

    explicit Line(const char* line) : p(reinterpret_cast<const W*>(line)) {}
    typename V::F operator()(int k) const { return V::load(p + k); }
};

// Of a row of W_down.
template <class V>
struct Line<V, Int4> {
    const Int4* p;

    explicit Line(const char* line) : p(reinterpret_cast<const Int4*>(line)) {}
    typename V::F operator()(int k) const { return V::nibbles(p + k % 16, k / 16); }
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

constexpr int kTogether = 4;  // rows that are read side by side: streams that memory serves well

// Fetches lines ahead of the four rows that are read side by side: the processor itself does not
// see the next row coming. Rows that lie one behind the other, and short ones, are fetched one after
// the other, so far ahead that all four are there; long ones four side by side, as they are read.
// The first lines are fetched already, by who read the rows before.
//
// Into the second cache, not the first: of lines on their way to the first, a core waits for two
// dozen at most, which is half of what the memory gives (11 against 18 GB/s of one thread).
class Ahead {
  public:
    Ahead(const RowList& list, std::int64_t lines_of_a_row)
        : rows_(list.data),
          lines_(lines_of_a_row * list.fetched),
          together_(list.fetched),
          side_(list.in_a_row || together_ > 1 || lines_ <= kShort ? 1 : kTogether),
          last_(list.count + kAhead - side_) {
        if (together_ == 0) return;
        const std::int64_t lead = side_ == 1 ? kFar + (kTogether - 1) * lines_ : kFar / kTogether;
        const std::int64_t rows = lead / lines_ * side_;
        row_ = int(rows < last_ ? rows : last_);
        line_ = lead % lines_;
    }

    // A line for each of the four, and of what is fetched together with it.
    void fetch() {
        if (side_ == 1) {
            for (int i = 0; i < kTogether * together_; ++i) step<1>();
        } else {
            step<kTogether>();
        }
    }

  private:
    template <int side>
    void step() {
        if (row_ > last_) return;
        for (int r = 0; r < side; ++r)
            __builtin_prefetch(static_cast<const char*>(rows_[row_ + r]) + line_ * kLine, 0, 2);
        if (++line_ == lines_) line_ = 0, row_ += side;
    }

    static constexpr std::int64_t kShort = 1024 / kLine, kFar = 4096 / kLine;  // in lines

    const void* const* rows_;
    const std::int64_t lines_;
    const int together_, side_, last_;
    int row_ = 0;
    std::int64_t line_ = 0;
};

// R rows that are read together, and R that are likely to follow: where their numbers begin, behind
// so many lines of scales.
template <int R>
struct Streams {
    const char* now[R];
    const char* next[R];

    explicit Streams(const void* const* rows, std::int64_t scales = 0) {
        for (int r = 0; r < R; ++r) {
            now[r] = static_cast<const char*>(rows[r]) + scales * kLine;
            next[r] = static_cast<const char*>(rows[R + r]) + scales * kLine;
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

// `ahead` is null where the rows have been read before.
template <class V, class W, class Product, int R, int T>
inline void dot_block(const void* const* rows, const void* const* x, std::int64_t lines,
                      Ahead* ahead, float* z, int stride) {
    using X = typename Product::X;
    constexpr int numbers = numbers_of_a_line<W>;
    typename V::F sum[R][T];
    const X* x_T[T];
    for (int t = 0; t < T; ++t) x_T[t] = static_cast<const X*>(x[t]);
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) sum[r][t] = V::zero();
    const char* now[R];
    for (int r = 0; r < R; ++r) now[r] = static_cast<const char*>(rows[r]);
    for (std::int64_t line = 0; line < lines; ++line) {
        if (ahead) ahead->fetch();
        for (int k = 0; k < numbers; k += Product::step) {
            typename Product::Row w[R];
            for (int r = 0; r < R; ++r) w[r] = Product(now[r] + line * kLine)(k);
            for (int t = 0; t < T; ++t) {
                const typename Product::Row x_t = Product::x(x_T[t] + line * numbers + k);
                for (int r = 0; r < R; ++r) sum[r][t] = Product::add(sum[r][t], w[r], x_t);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) z[r * stride + t] = V::sum(sum[r][t]);
}

// Numbers of a line with one factor: those of a group, or all.
template <class W>
constexpr int span_of = numbers_of_a_line<W>;
template <>
constexpr int span_of<Int8> = kGroup;
template <>
constexpr int span_of<Int4> = kGroup;

// The scales of a row, which stand in so many lines before its numbers.
inline const Bf16* scales_of(const char* numbers, std::int64_t before) {
    return reinterpret_cast<const Bf16*>(numbers - before * kLine);
}

template <class V, class W, int R, int T>
inline void add_block(const void* const* rows, const float* h, int stride, float* const* y,
                      std::int64_t lines, std::int64_t begin, std::int64_t end) {
    constexpr int numbers = numbers_of_a_line<W>, span = span_of<W>, spans = numbers / span;
    typename V::F h_RT[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) h_RT[r][t] = V::set(h[r * stride + t]);
    const std::int64_t scales = lines_before<W>(lines);
    const Streams<R> streams(rows, scales);
    streams.each_line(begin, end, [&](std::int64_t line) {
        for (int s = 0; s < spans; ++s) {
            typename V::F f_RT[R][T];
            for (int r = 0; r < R; ++r)
                for (int t = 0; t < T; ++t) {
                    f_RT[r][t] = h_RT[r][t];
                    if constexpr (span == numbers) continue;
                    const Bf16 scale = scales_of(streams.now[r], scales)[line * spans + s];
                    f_RT[r][t] = V::mul(h_RT[r][t], V::set(scale));
                }
            for (int k = s * span; k < (s + 1) * span; k += V::lanes) {
                typename V::F w[R];
                for (int r = 0; r < R; ++r) w[r] = Line<V, W>(streams.now[r] + line * kLine)(k);
                for (int t = 0; t < T; ++t) {
                    float* y_t = y[t] + (line - begin) * numbers + k;
                    typename V::F sum = V::load(y_t);
                    for (int r = 0; r < R; ++r) sum = V::fma(w[r], f_RT[r][t], sum);
                    V::store(y_t, sum);
                }
            }
        }
    });
}

// T tokens at a time, then those that are left: two fewer at a time, at last one by one.
template <class V, class W, class Product, int R, int T>
inline void dot_tokens(const void* const* rows, const void* const* x, std::int64_t lines,
                       Ahead* ahead, int left, float* z, int stride) {
    for (; left >= T; left -= T, x += T, z += T, ahead = nullptr)
        dot_block<V, W, Product, R, T>(rows, x, lines, ahead, z, stride);
    if constexpr (T > 1)
        dot_tokens<V, W, Product, R, (T > 2 ? T - 2 : 1)>(rows, x, lines, ahead, left, z, stride);
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
    Ahead ahead(list, list.lines);
    int i = 0;
    for (; i + kTogether <= list.count; i += kTogether)
        dot_tokens<V, W, Product, kTogether, T>(list.data + i, x_T, list.lines, &ahead, tokens,
                                        z + i * tokens, tokens);
    for (; i < list.count; ++i)
        dot_tokens<V, W, Product, 1, T>(list.data + i, x_T, list.lines, &ahead, tokens,
                                        z + i * tokens, tokens);
}

template <class V, class W>
void add(const RowList& list, const float* h, float* const* y, int tokens, std::int64_t begin,
         std::int64_t end) {
    constexpr int T = V::tokens < 4 ? V::tokens : 4;
    int i = 0;
    for (; i + kTogether <= list.count; i += kTogether)
        add_tokens<V, W, kTogether, T>(list.data + i, h + i * tokens, tokens, tokens, y, list.lines, begin,
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
