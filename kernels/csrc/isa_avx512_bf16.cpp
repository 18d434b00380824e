// AVX-512 with products of bf16 pairs and of integers: exact products, sums in fp32 and int32.
#include "isa.h"

#ifdef FFN_X86
#include <immintrin.h>

#include "target.h"

namespace ffn {
namespace {

// Every CPU runs this one: it stands before the pragma.
bool runs_here() {
    return kAvx512.runs_here() && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vnni");
}

}  // namespace
}  // namespace ffn

FFN_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")
#include "avx512.h"
#include "rows.h"
#include "acts.h"
#include "added.h"
#include "grouped.h"
#include "read_row.h"
#include "tiles.h"

namespace ffn {
namespace {

struct Bf16Pairs {
    using X = Bf16;
    using Row = __m512bh;
    static constexpr int step = 32;

    explicit Bf16Pairs(const char* line) : row_((__m512bh)_mm512_loadu_si512(line)) {}
    Row operator()(int) const { return row_; }
    static Row x(const Bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static __m512 add(__m512 sum, Row w, Row x) { return _mm512_dpbf16_ps(sum, w, x); }

  private:
    Row row_;
};

// Integers, 64 at a time: two groups. One of the factors has to be unsigned: codes of int8 are
// multiplied as code + 128.
struct Vnni : Avx512 {
    static constexpr int unit = 64;
    static constexpr float shift = 128;
    using Codes = __m512i;
    using Scales = __m512;

    static Codes shifted(const char* p) {
        return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(char(0x80)));
    }
    static Codes low(const char* p) {
        return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(15));
    }
    static Codes high(const char* p) {
        const Codes moved = _mm512_srli_epi16(_mm512_loadu_si512(p), 4);
        return _mm512_and_si512(moved, _mm512_set1_epi8(15));
    }
    static F product(Codes w, const std::int8_t* x) {
        const __m512i zero = _mm512_setzero_si512();
        return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(zero, w, _mm512_loadu_si512(x)));
    }
    static F small_product(Codes w, const std::int8_t* x) { return product(w, x); }
    static Scales scales(const Bf16* w, const float* x) { return mul(load(w), load(x)); }
    static F spread(Scales scales, int unit) {
        alignas(64) static constexpr std::int32_t order[8][16] = {
            {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1},
            {2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3},
            {4, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5},
            {6, 6, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7},
            {8, 8, 8, 8, 8, 8, 8, 8, 9, 9, 9, 9, 9, 9, 9, 9},
            {10, 10, 10, 10, 10, 10, 10, 10, 11, 11, 11, 11, 11, 11, 11, 11},
            {12, 12, 12, 12, 12, 12, 12, 12, 13, 13, 13, 13, 13, 13, 13, 13},
            {14, 14, 14, 14, 14, 14, 14, 14, 15, 15, 15, 15, 15, 15, 15, 15}};
        return _mm512_permutexvar_ps(_mm512_load_si512(order[unit]), scales);
    }
};

// The numbers of two rows in turn, for sixteen columns from `first` on.
__m512bh zip(__m512i a, __m512i b, int first) {
    alignas(64) static constexpr std::uint16_t order[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i at = _mm512_add_epi16(_mm512_load_si512(order), _mm512_set1_epi16(short(first)));
    return (__m512bh)_mm512_permutex2var_epi16(a, at, b);
}

// h of two rows for four tokens, in bf16 and in turn.
__m128i zip_h(const float* a, const float* b) {
    const __m128i h = (__m128i)_mm_cvtne2ps_pbh(_mm_loadu_ps(b), _mm_loadu_ps(a));
    return _mm_unpacklo_epi16(h, _mm_unpackhi_epi64(h, h));
}

// Four rows for four tokens: the pairs are pairs of rows.
void add_pairs(const void* const* rows, const float* h, int tokens, float* const* y,
               std::int64_t begin, std::int64_t end) {
    __m512bh h_PT[2][4];
    for (int p = 0; p < 2; ++p) {
        const __m128i pairs = zip_h(h + 2 * p * tokens, h + (2 * p + 1) * tokens);
        alignas(16) std::uint32_t each[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(each), pairs);
        for (int t = 0; t < 4; ++t) h_PT[p][t] = (__m512bh)_mm512_set1_epi32(int(each[t]));
    }
    const Streams<4> streams(rows);
    streams.each_line(begin, end, [&](std::int64_t line) {
        __m512i w[4];
        for (int r = 0; r < 4; ++r) w[r] = _mm512_loadu_si512(streams.now[r] + line * kLine);
        for (int half = 0; half < 2; ++half) {
            const __m512bh w_P[2] = {zip(w[0], w[1], 16 * half), zip(w[2], w[3], 16 * half)};
            for (int t = 0; t < 4; ++t) {
                float* y_t = y[t] + (line - begin) * 32 + 16 * half;
                __m512 sum = _mm512_loadu_ps(y_t);
                for (int p = 0; p < 2; ++p) sum = _mm512_dpbf16_ps(sum, w_P[p], h_PT[p][t]);
                _mm512_storeu_ps(y_t, sum);
            }
        }
    });
}

void add_rounded(const RowList& list, const float* h, float* const* y, int tokens,
                 std::int64_t begin, std::int64_t end) {
    constexpr auto add_exact = add<Avx512, Bf16>;
    int i = 0;
    for (; i + 4 <= list.count; i += 4) {
        int t = 0;
        for (; t + 4 <= tokens; t += 4)
            add_pairs(list.data + i, h + i * tokens + t, tokens, y + t, begin, end);
        add_tokens<Avx512, Bf16, 4, 3>(list.data + i, h + i * tokens + t, tokens, tokens - t, y + t,
                                       list.lines, begin, end);
    }
    const RowList rest{list.data + i, list.count - i, list.lines};
    if (rest.count) add_exact(rest, h + i * tokens, y, tokens, begin, end);
}

constexpr Add add_int8 = add_groups<AddInt8, Int8>, add_int4 = add_groups<AddInt4, Int4>;
constexpr RowKernels kInt8 = {dot_grouped<Vnni, Int8Units<Vnni>>, add_int8, add_int8, DType::i8,
                              tiles<Vnni, Int8Units<Vnni>>};
constexpr RowKernels kInt4 = {dot_grouped<Vnni, Int4Units<Vnni>>, add_int4, add_int4, DType::i8,
                              tiles<Vnni, Int4Units<Vnni>>};
constexpr RowKernels kBf16Pairs = {dot<Avx512, Bf16, Bf16Pairs>, add<Avx512, Bf16>, add_rounded,
                                   DType::bf16};

}  // namespace

extern const Isa kAvx512Bf16 = {
    "avx512_bf16",
    runs_here,
    {row_kernels<Avx512, float>(), kBf16Pairs, row_kernels<Avx512, Half>(),
     kInt8, kInt4},
    dot<Avx512, std::int8_t>,
    activate,
    powers,
    read_row<Avx512>,
    &kAvx512,
};

}  // namespace ffn
FFN_TARGET_END
#endif
