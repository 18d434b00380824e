// Which neurons some tokens want. Letters: T tokens, F neurons, E experts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace ffn {

struct Chosen {
    std::vector<std::int32_t> neurons;  // ascending
    std::vector<std::int32_t> experts;  // of each of these neurons

    // The neurons of experts that at least one of the tokens has on; all where there is no mask.
    void find(const std::uint8_t* mask_TE, std::int64_t tokens, std::int64_t experts_E,
              std::int64_t neurons_F) {
        neurons.clear();
        experts.clear();
        unite(mask_TE, tokens, experts_E);
        const std::int64_t size = neurons_F / experts_E, longer = neurons_F % experts_E;
        const std::uint8_t* wanted = wanted_.data();
        for (std::int64_t e = next(wanted, 0, experts_E); e < experts_E;
             e = next(wanted, e + 1, experts_E)) {
            const std::int64_t begin = e * size + std::min(e, longer);
            const std::int64_t end = begin + size + (e < longer);
            for (std::int64_t n = begin; n < end; ++n) {
                neurons.push_back(std::int32_t(n));
                experts.push_back(std::int32_t(e));
            }
        }
    }

  private:
    void unite(const std::uint8_t* mask_TE, std::int64_t tokens, std::int64_t experts_E) {
        if (!mask_TE) return wanted_.assign(std::size_t(experts_E), 1);
        wanted_.assign(mask_TE, mask_TE + experts_E);
        std::uint8_t* wanted = wanted_.data();
        for (std::int64_t t = 1; t < tokens; ++t)
            for (std::int64_t e = 0; e < experts_E; ++e) wanted[e] |= mask_TE[t * experts_E + e];
    }

    // The first expert from e on that is wanted. Most are not: eight of them are passed at once.
    static std::int64_t next(const std::uint8_t* wanted, std::int64_t e, std::int64_t experts_E) {
        for (std::uint64_t eight; e + 8 <= experts_E; e += 8) {
            std::memcpy(&eight, wanted + e, sizeof eight);
            if (eight) break;
        }
        while (e < experts_E && !wanted[e]) ++e;
        return e;
    }

    std::vector<std::uint8_t> wanted_;  // by any of the tokens
};

}  // namespace ffn
