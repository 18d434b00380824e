// Which tokens want each expert, and each neuron. Letters: T tokens, E experts, F neurons.
#pragma once

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
    void mark(const std::uint8_t* mask_E, std::int64_t experts, std::size_t token) {
        for (std::int64_t e = 0; e < experts; ++e) {
            std::uint64_t eight;
            if (e + 8 <= experts && (std::memcpy(&eight, mask_E + e, 8), !eight))
                e += 7;  // most are not wanted: eight of them are passed at once
            else if (mask_E[e])
                tokens_E_[std::size_t(e)].set(token);
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
