// Which neurons some tokens want. Letters: T tokens, F neurons, E experts.
#pragma once

#include <cstdint>
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
        wanted_.assign(std::size_t(experts_E), mask_TE ? 0 : 1);
        if (mask_TE)
            for (std::int64_t t = 0; t < tokens; ++t)
                for (std::int64_t e = 0; e < experts_E; ++e) wanted_[e] |= mask_TE[t * experts_E + e];
        const std::int64_t size = neurons_F / experts_E, longer = neurons_F % experts_E;
        for (std::int64_t e = 0; e < experts_E; ++e) {
            if (!wanted_[e]) continue;
            const std::int64_t begin = e * size + (e < longer ? e : longer);
            const std::int64_t end = begin + size + (e < longer);
            for (std::int64_t n = begin; n < end; ++n) {
                neurons.push_back(std::int32_t(n));
                experts.push_back(std::int32_t(e));
            }
        }
    }

  private:
    std::vector<std::uint8_t> wanted_;  // by any of the tokens
};

}  // namespace ffn
