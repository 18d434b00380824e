// Which tokens want each expert. Letters: T tokens, E experts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace ffn {

// A part of a list that is held elsewhere.
struct Tokens {
    const std::int32_t* data;
    std::int64_t count;
};

class Wanted {
  public:
    // Without a mask, one expert that every token wants.
    void find(const std::uint8_t* mask_TE, std::int64_t tokens, std::int64_t experts) {
        begins_.assign(std::size_t(experts) + 1, 0);
        const auto count = [&](std::int64_t, std::int64_t e) { ++begins_[std::size_t(e) + 1]; };
        each(mask_TE, tokens, experts, count);
        for (std::size_t e = 0; e < std::size_t(experts); ++e) begins_[e + 1] += begins_[e];
        tokens_.resize(std::size_t(begins_.back()));
        ends_.assign(begins_.begin(), begins_.end() - 1);
        each(mask_TE, tokens, experts, [&](std::int64_t t, std::int64_t e) {
            tokens_[std::size_t(ends_[std::size_t(e)]++)] = std::int32_t(t);
        });
    }

    // Those of an expert, ascending.
    Tokens of(std::int64_t expert) const {
        const std::int64_t begin = begins_[std::size_t(expert)];
        return {tokens_.data() + begin, begins_[std::size_t(expert) + 1] - begin};
    }

  private:
    template <class Body>
    static void each(const std::uint8_t* mask_TE, std::int64_t tokens, std::int64_t experts,
                     const Body& body) {
        for (std::int64_t t = 0; t < tokens; ++t) {
            const std::uint8_t* mask_E = mask_TE ? mask_TE + t * experts : nullptr;
            for (std::int64_t e = 0; e < experts; ++e) {
                std::uint64_t eight;
                if (mask_E && e + 8 <= experts && (std::memcpy(&eight, mask_E + e, 8), !eight))
                    e += 7;  // most are not wanted: eight of them are passed at once
                else if (!mask_E || mask_E[e])
                    body(t, e);
            }
        }
    }

    std::vector<std::int64_t> begins_, ends_;
    std::vector<std::int32_t> tokens_;
};

}  // namespace ffn
