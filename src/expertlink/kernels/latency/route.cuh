// Low latency, sending half: where every token of this rank goes. Every block finds it out for itself, from
// masks with a bit per token for each rank and each expert: positions are counts of bits below one's own.
#pragma once

#include "choices.cuh"
#include "latency/protocol.cuh"

// Dynamic shared memory of the sending half, in words.
struct Masks {
    int* homes;         // [E] as a.home_of
    unsigned* ranks;    // [R, words] tokens that go to each rank
    unsigned* experts;  // [kExpertChunk, words] tokens that choose each of some experts
    int words;          // of 32 tokens
};

__device__ __forceinline__ Masks masks_in(int* memory, int num_tokens) {
    constexpr int kMostWords = (kMaxTokens + 31) / 32;
    unsigned* const ranks = reinterpret_cast<unsigned*>(memory + kNumExperts);
    return {memory, ranks, ranks + kNumRanks * kMostWords, (num_tokens + 31) / 32};
}

__device__ __forceinline__ int bits_in(const unsigned* mask, int words) {
    int bits = 0;
#pragma unroll 1
    for (int word = 0; word < words; ++word) bits += __popc(mask[word]);
    return bits;
}

// Bits of the tokens before this one.
__device__ __forceinline__ int place_in(const unsigned* mask, int token) {
    return bits_in(mask, token / 32) + __popc(mask[token / 32] & ((1u << token % 32) - 1u));
}

__device__ __forceinline__ bool has_token(const unsigned* mask, int token) {
    return mask[token / 32] >> (token % 32) & 1u;
}

// Whole block: sets the masks for the experts from `chunk` on, and those of the ranks in the first chunk.
template <typename Arguments>
__device__ __forceinline__ void fill_masks(const Arguments& a, const Masks& masks, int chunk) {
    const int lane = threadIdx.x % 32;
    const int bits = kExpertChunk * masks.words;
#pragma unroll 1
    for (int i = threadIdx.x; i < bits; i += blockDim.x) masks.experts[i] = 0;
    if (chunk == 0)
#pragma unroll 1
        for (int e = threadIdx.x; e < kNumExperts; e += blockDim.x) masks.homes[e] = a.home_of[e];
    bool filled = false;
#pragma unroll 1
    for (int word = threadIdx.x / 32; word < masks.words; word += blockDim.x / 32) {
        const int token = word * 32 + lane;
        unsigned goes_to[kRankWords] = {};
#pragma unroll 1
        for (int begin = 0; begin < kTopk; begin += kChunk) {
            Choices choices;
#pragma unroll
            for (int k = 0; k < kChunk; ++k) choices.expert[k] = -1;
            if (token < a.num_tokens)
                choices = choices_of(a, token, begin, blockIdx.x == 0 && chunk == 0);
            if (!filled) __syncthreads();  // the ids are on their way while the memory is cleared
            filled = true;
#pragma unroll
            for (int k = 0; k < kChunk; ++k) {
                const int expert = choices.expert[k];
                if (expert < 0) continue;
                const int rank = rank_of(masks.homes[expert]);
#pragma unroll
                for (int i = 0; i < kRankWords; ++i)
                    if (rank / 32 == i) goes_to[i] |= 1u << rank % 32;
                if (expert >= chunk && expert < chunk + kExpertChunk)
                    atomicOr(&masks.experts[(expert - chunk) * masks.words + word],
                             1u << lane);
            }
        }
        if (chunk == 0)
#pragma unroll 4
            for (int rank = 0; rank < kNumRanks; ++rank) {
                unsigned own = 0;
#pragma unroll
                for (int i = 0; i < kRankWords; ++i)
                    if (rank / 32 == i) own = goes_to[i];
                const unsigned tokens = __ballot_sync(kAll, own >> rank % 32 & 1u);
                if (lane == 0) masks.ranks[rank * masks.words + word] = tokens;
            }
    }
    if (!filled) __syncthreads();
    __syncthreads();
}

// Tells every rank how many rows it gets and how many choices each of its experts: blocks share this.
template <typename Arguments>
__device__ __forceinline__ void publish_counts(const Arguments& a, const Call& call,
                                               const Masks& masks, int chunk, int warp, int warps) {
    const int lane = threadIdx.x % 32;
    for (int first = (warp * gridDim.x + blockIdx.x) * 32; first < kExpertChunk;
         first += warps * gridDim.x * 32) {
        const int expert = chunk + first + lane;
        if (first + lane >= kExpertChunk || expert >= kNumExperts) continue;
        const int home = masks.homes[expert], peer = rank_of(home);
        if (is_masked(call, peer)) continue;
        const int count = bits_in(masks.experts + (first + lane) * masks.words, masks.words);
        store_tagged(count_word(call.bases[peer], call.sending, a.rank,
                                kFirstCountColumn + local_of(home)),
                     call.sending, count);
    }
    if (chunk != 0) return;
    // Another block than the one with the first experts, where there are several.
    for (int first = (warp * gridDim.x + gridDim.x - 1 - blockIdx.x) * 32; first < kNumRanks;
         first += warps * gridDim.x * 32) {
        const int peer = first + lane;
        if (peer >= kNumRanks || is_masked(call, peer)) continue;
        unsigned long long* const row = count_word(call.bases[peer], call.sending, a.rank, 0);
        const int count = bits_in(masks.ranks + peer * masks.words, masks.words);
        store_tagged_pair(row, call.sending, a.signature, count);
        a.rows_to[peer] = count;
        if (a.rows_sent != nullptr) {
            a.rows_sent[peer] += count;
            if (peer != a.rank)
                a.bytes_sent[peer] += static_cast<long long>(count) * (a.row_bytes + a.scale_bytes);
        }
    }
}

// Lane i: whether the token goes to the i-th rank from `first` on, and its position there, or -1.
__device__ __forceinline__ int position_at(const Call& call, const Masks& masks, int token, int first) {
    const int rank = first + threadIdx.x % 32;
    if (rank >= kNumRanks) return -1;
    const unsigned* const mask = masks.ranks + rank * masks.words;
    return has_token(mask, token) ? place_in(mask, token) : -1;
}

// What belongs to a token's choices; lane k has that of choice k.
struct Beside {
    int expert;       // global, -1: none
    unsigned weight;  // bits of a float

    template <typename Arguments>
    __device__ __forceinline__ void load(const Arguments& a, int token) {
        const int lane = threadIdx.x % 32;
        expert = -1;
        weight = 0;
        if (lane >= kTopk) return;
        expert = expert_of(a, token, lane);
        if (a.flags & kNewWeights)
            weight = __float_as_uint(a.weights[static_cast<long long>(token) * kTopk + lane]);
    }
};

// Tells a token's ranks, for each choice, its local expert, place and weight; and which token it is. One
// warp; chunks of experts fill in the choices that they know.
template <typename Arguments>
__device__ __forceinline__ void send_beside(const Arguments& a, const Call& call, const Masks& masks,
                                            const Beside& beside, int token, int chunk) {
    const int lane = threadIdx.x % 32;
    const int expert = beside.expert;
    const int home = expert >= 0 ? masks.homes[expert] : -1;
    const bool in_chunk = expert >= chunk && expert < chunk + kExpertChunk && expert >= 0;
    const int place =
        in_chunk ? place_in(masks.experts + (expert - chunk) * masks.words, token) : 0;
    int found = 0;
#pragma unroll 1
    for (int first = 0; first < kNumRanks; first += 32) {
        const int position = position_at(call, masks, token, first);
        const unsigned there = __ballot_sync(kAll, position >= 0);
        for (unsigned left = there; left; left &= left - 1) {
            const int peer = first + __ffs(left) - 1;
            const int slot =
                a.rank * kMaxTokens + __shfl_sync(kAll, position, __ffs(left) - 1);
            if (is_masked(call, peer)) continue;
            const bool local = home >= 0 && rank_of(home) == peer;
            // Other ranks' choices are absent there; that is said once.
            if (lane < kTopk && (local ? in_chunk : chunk == 0))
                store_tagged_pair(
                    beside_words(call.bases[peer], call.sending, slot, lane), call.sending,
                    local ? static_cast<unsigned>(place) << 16 | (local_of(home) + 1) : 0u,
                    beside.weight);
            if (lane == kTopk % 32 && chunk == 0)
                store_tagged_pair(beside_words(call.bases[peer], call.sending, slot, kTopk),
                                  call.sending, token, 0u);
        }
        if (position >= 0)
            a.slots_of_token[token * kCopies + found + __popc(there & ((1u << lane) - 1u))] =
                (first + lane) * kMaxTokens + position;
        found += __popc(there);
    }
#pragma unroll 1
    for (int i = found + lane; i < kCopies; i += 32) a.slots_of_token[token * kCopies + i] = -1;
    if (lane < kTopk && chunk == 0 && a.flags & kNewWeights)
        a.weights_copy[static_cast<long long>(token) * kTopk + lane] = __uint_as_float(beside.weight);
}
