// Which tokens want each expert, and each neuron. Letters: T tokens, E experts, F neurons.
#pragma once

#include <algorithm>
#include <bitset>
#include <cstdint>
#include <cstring>
#include <vector>

#include "sparse_ffn.h"

namespace ffn {

using Tokens = std::bitset<kMany>;

class Wanted {
  public:
    // Without a mask, one expert that every token wants.
    void find(const Batch& batch, std::int64_t neurons) {
        const std::int64_t experts = batch.mask_TE ? batch.experts : 1;
        size_ = neurons / experts;
        longer_ = neurons % experts;
        tokens_E_.assign(std::size_t(experts), Tokens());
        for (std::int64_t t = 0; t < batch.tokens; ++t)
            if (batch.mask_TE)
                mark(batch.mask_TE + t * experts, experts, std::size_t(t));
            else
                tokens_E_[0].set(std::size_t(t));
    }

    const Tokens& of(std::int64_t neuron) const { return tokens_E_[std::size_t(expert(neuron))]; }

    Tokens of_any(std::int64_t neuron, int neurons) const {
        Tokens any = of(neuron);
        for (int i = 1; i < neurons; ++i) any |= of(neuron + i);
        return any;
    }

  private:
    // Eight experts at a time, most of which are not wanted.
    void mark(const std::uint8_t* mask_E, std::int64_t experts, std::size_t token) {
        for (std::int64_t e = 0; e < experts; e += 8) {
            const std::int64_t last = std::min<std::int64_t>(e + 8, experts);
            std::uint64_t eight = 0;
            std::memcpy(&eight, mask_E + e, std::size_t(last - e));
            for (std::int64_t one = e; eight && one < last; ++one)
                if (mask_E[one]) tokens_E_[std::size_t(one)].set(token);
        }
    }

    // The first F mod E experts have a neuron more.
    std::int64_t expert(std::int64_t neuron) const {
        const std::int64_t in_longer = longer_ * (size_ + 1);
        if (neuron < in_longer) return neuron / (size_ + 1);
        return longer_ + (neuron - in_longer) / size_;
    }

    std::int64_t size_ = 1, longer_ = 0;
    std::vector<Tokens> tokens_E_;
};

}  // namespace ffn
