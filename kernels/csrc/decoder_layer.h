// A decoder layer for the next token of a few sequences: all that stands around the key-value
// cache, which stays with the caller, in two calls. What a layer of PyTorch spends a dozen small
// operations on is done by one team of threads, between the products that it waits for.
//
// h += attention(norm h); h += ffn(norm h), with root mean square norms, rotary positions and heads
// of keys that several heads of queries may share.
//
// Letters: B sequences, D width, H heads of queries, K heads of keys and values, W numbers of a
// head, S positions in the cache, F neurons.
#pragma once

#include "activation.h"
#include "linear.h"
#include "proposal.h"
#include "router.h"
#include "sparse_ffn.h"

namespace ffn {

// x / sqrt(mean x^2 + eps) * (weight + offset)
struct Norm {
    const void* weight_D = nullptr;  // null: there is no norm, x stays
    DType dtype = DType::f32;        // of the weight
    float eps = 0, offset = 0;
};

struct DecoderLayer {
    std::int64_t width, query_heads, key_heads, head;
    DType dtype;  // of h, of the heads and of the cache
    float scale;  // of queries times keys
    const Linear *q, *k, *v, *o;
    // One of three: a dense FFN; one of whose neurons a proposal or a router chooses; or nothing:
    // the caller computes it.
    const Linear *gate, *up, *down;
    Activation act;  // of the gate, or of up where there is none
    const Proposal* proposal;
    const Router* router;
    const Weights* neurons;
    const float* constant_D;  // added to what the chosen neurons give; null: 0
    Norm before_attention, of_queries, of_keys, behind_attention, before_ffn, behind_ffn;
};

// The first half: the heads of the new tokens.
struct NewHeads {
    std::int64_t sequences;
    const void* h_BD;
    const void *cos_BW, *sin_BW;  // of their positions
    std::int64_t positions;       // rows of these: B, or 1 for all
    void *q_BHW, *k_BKW, *v_BKW;  // written
};

void new_heads(const DecoderLayer& layer, const NewHeads& call, const Isa& isa, int threads);

// Keys or values, with the numbers of a position side by side.
struct Cached {
    const char* data_BKSW;
    std::int64_t sequence, head, position;  // from one to the next, in numbers
};

enum class Mask : int { none, allowed, added };  // bytes that are 0 or 1, or numbers to be added

struct Masked {
    Mask kind;
    DType dtype;  // of numbers
    const void* data_BS;
    std::int64_t sequence;  // from one sequence's row to the next, in numbers
};

// The second half. The result depends neither on the number of threads nor on their timing.
struct NewToken {
    std::int64_t sequences, positions;
    const void *h_BD, *q_BHW;
    Cached keys, values;
    Masked mask;
    float knob;    // of the proposal or the router: a threshold, or how many
    void* out_BD;  // written: h behind the layer; without an FFN behind attention
    void* x_BD;    // written, without an FFN: what goes into it
};

void new_token(const DecoderLayer& layer, const NewToken& call, const Isa& isa, int threads);

// Several layers, one behind the other, with what their caches are given of the new tokens.
struct Stack {
    std::int64_t layers, sequences;
    std::int64_t used;  // positions in the caches; the new one is written behind them
    const void* h_BD;
    const void *cos_BW, *sin_BW;
    std::int64_t positions;  // rows of these
    char *keys_LBKSW, *values_LBKSW;
    std::int64_t layer, sequence, head, position;  // from one to the next, in numbers
    Masked mask;
    const double* knobs;
    Norm last;     // behind the last layer
    void* out_BD;  // written
};

void run_stack(const DecoderLayer* const* layers, const Stack& call, const Isa& isa, int threads);

}  // namespace ffn
