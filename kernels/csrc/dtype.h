// The number formats of weights and activations, and their way to and from float.
#pragma once

#include <cstdint>
#include <cstring>

namespace ffn {

enum class DType : int { f32, bf16, f16, i8, i4 };
constexpr int kDTypes = 5;

constexpr int kLine = 64;  // bytes of a cache line, to which rows are padded
constexpr int kGroup = 32; // numbers of int8 and int4 that share a scale

// Numbers in a line of a row. These are static for the files that are compiled for one instruction
// set: see rows.h.
static inline constexpr int per_line(DType dtype) {
    constexpr int numbers[] = {16, 32, 32, 64, 128};
    return numbers[int(dtype)];
}

static inline constexpr bool grouped(DType dtype) { return dtype == DType::i8 || dtype == DType::i4; }

// Lines of scales in front of a row's numbers: in int8 and int4 a bf16 for each group.
static inline constexpr std::int64_t scale_lines(DType dtype, std::int64_t lines) {
    if (!grouped(dtype)) return 0;
    return (lines * per_line(dtype) / kGroup * 2 + kLine - 1) / kLine;
}

// Bytes of a row of so many lines of numbers.
static inline constexpr std::int64_t row_bytes(DType dtype, std::int64_t lines) {
    return (scale_lines(dtype, lines) + lines) * kLine;
}

// A line of 128 numbers of four bits, each plus 8, in one of two orders. As a row that meets x:
// number i is the low half of byte i, number 64 + i the high half. As a row of W_down, which is
// added to y: sixteen words of eight nibbles, number i being nibble i / 16 of word i % 16.
struct Int4 {
    std::uint32_t nibbles;
};
struct Int8 {
    std::int8_t code;
};
struct Bf16 {
    std::uint16_t bits;
};
struct Half {
    std::uint16_t bits;
};

static inline float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline std::uint32_t to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float to_float(float value) { return value; }
static inline float to_float(std::int8_t value) { return value; }
static inline float to_float(Bf16 value) { return from_bits(std::uint32_t{value.bits} << 16); }

static inline float to_float(Half value) {
    const std::uint32_t sign = std::uint32_t(value.bits & 0x8000) << 16;
    const std::uint32_t rest = std::uint32_t(value.bits & 0x7fff) << 13;
    if (rest >= 0x7c00u << 13) return from_bits(sign | rest | 0x7f800000);  // infinity, NaN
    // 2^112 moves the exponent from half's bias to float's, and makes subnormals normal.
    return from_bits(sign | to_bits(from_bits(rest) * 0x1p112f));
}

// All of them round to nearest, ties to even.
static inline void from_float(float value, float& out) { out = value; }

static inline void from_float(float value, Bf16& out) {
    const std::uint32_t bits = to_bits(value);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    const std::uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    out.bits = nan ? 0x7fc0 : std::uint16_t(rounded >> 16);
}

static inline void from_float(float value, Half& out) {
    const std::uint32_t bits = to_bits(value), size = bits & 0x7fffffff;
    std::uint32_t half;
    if (size > 0x7f800000) {
        half = 0x7e00;  // NaN
    } else if (size >= 0x477ff000) {
        half = 0x7c00;  // 65520 and above round to infinity
    } else if (size >= 0x38800000) {
        half = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
    } else {
        // Below 2^-14 half's last place is 2^-24, which is float's last place at 0.5.
        half = to_bits(from_bits(size) + 0.5f) - 0x3f000000;
    }
    out.bits = std::uint16_t((bits >> 16 & 0x8000) | half);
}

}  // namespace ffn
