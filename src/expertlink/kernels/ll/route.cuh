// Sending half of a dispatch: where every token goes that this rank sends, and its metadata. Every
// block computes this for itself, from masks with a bit per token for each peer and each expert. A
// position is the count of bits below a token's own, among those of its source: the tokens of each
// source begin with a new word.
#pragma once

#include "common/choices.cuh"
#include "ll/header.cuh"
#include "ll/rows.cuh"

namespace ll {

// Masks in dynamic shared memory.
struct Masks {
    int* locations;     // [E] as a.expert_location
    unsigned* ranks;    // [G, words] tokens that go to each peer
    unsigned* experts;  // [kExpertChunk, words] tokens that choose each of some experts
    int words;          // of 32 tokens
    int source_words;   // of these, of each source
};

template <typename Arguments>
__device__ __forceinline__ Masks masks_in(const Arguments& a, int* memory) {
    constexpr int kMostWords = kNumHosts * ((kMaxTokens + 31) / 32);
    unsigned* const ranks = reinterpret_cast<unsigned*>(memory + kNumExperts);
    unsigned* const experts = ranks + kNumPeers * kMostWords;
    if constexpr (kSpansHosts) {
        const int words = (a.bound + 31) / 32;
        return {memory, ranks, experts, kNumHosts * words, words};
    } else {
        const int words = (a.num_tokens + 31) / 32;
        return {memory, ranks, experts, words, words};
    }
}

// A token's bit in a mask.
__device__ __forceinline__ int bit_of(const Masks& masks, TokenAt at) {
    if constexpr (kSpansHosts)
        return at.message * masks.source_words * 32 + at.index;
    else
        return at.index;
}

// Part of a mask: the bits of the tokens in a message.
__device__ __forceinline__ const unsigned* part_of(const Masks& masks, const unsigned* mask,
                                                   int message) {
    if constexpr (kSpansHosts)
        return mask + message * masks.source_words;
    else
        return mask;
}

__device__ __forceinline__ int bits_in(const unsigned* mask, int words) {
    int bits = 0;
#pragma unroll 1
    for (int word = 0; word < words; ++word) bits += __popc(mask[word]);
    return bits;
}

// Position of a token in a mask: the bits of the tokens before it, of the same source.
__device__ __forceinline__ int place_in(const Masks& masks, const unsigned* whole, TokenAt at) {
    const unsigned* const mask = part_of(masks, whole, at.message);
    return bits_in(mask, at.index / 32) +
           __popc(mask[at.index / 32] & ((1u << at.index % 32) - 1u));
}

// Whether an expert is one of those whose masks are in memory.
__device__ __forceinline__ bool is_in(int chunk, int expert) {
    return kExpertChunk >= kNumExperts || (expert >= chunk && expert < chunk + kExpertChunk);
}

__device__ __forceinline__ bool has_token(const unsigned* mask, int bit) {
    return mask[bit / 32] >> (bit % 32) & 1u;
}

// One of a token's K choices.
struct Choice {
    int token, k;
    long long id;

    __device__ __forceinline__ void locate(int number) {
        token = number / kTopk;
        k = number - token * kTopk;
    }

    template <typename Arguments>
    __device__ __forceinline__ void load(const Arguments& a) {
        const int number = token * kTopk + k;
        id = -1;
        if (token >= a.num_tokens) return;
        if constexpr (kSpansHosts) {
            const long long offset = offset_of(a, token_at(a, token), 4 * kTopk);
            id = reinterpret_cast<const int*>(static_cast<const char*>(a.ids) + offset)[k];
            return;
        }
        id = a.flags & kWideIds ? static_cast<const long long*>(a.ids)[number]
                                : static_cast<const int*>(a.ids)[number];
    }

    __device__ __forceinline__ int expert() const {
        return id >= 0 && id < kNumExperts ? static_cast<int>(id) : -1;
    }
};

// The choices that a thread looks at: its first two are loaded early, those of further tokens when
// it gets there.
struct BlockChoices {
    Choice first, second;

    __device__ __forceinline__ void locate() {
        first.locate(threadIdx.x);
        second.locate(threadIdx.x + blockDim.x);
    }

    template <typename Arguments>
    __device__ __forceinline__ void load(const Arguments& a) {
        first.load(a);
        second.load(a);
    }

    template <typename Arguments, typename Act>
    __device__ __forceinline__ void for_all(const Arguments& a, const Act& act) const {
        if (first.token >= a.num_tokens) return;
        act(first);
        if (second.token >= a.num_tokens) return;
        act(second);
        Choice choice = second;
        int number = threadIdx.x + blockDim.x;
#pragma unroll 1
        while (true) {
            number += blockDim.x;
            choice.locate(number);
            if (choice.token >= a.num_tokens) return;
            choice.load(a);
            act(choice);
        }
    }
};

// The weights of a token's choices.
__device__ __forceinline__ const float* weights_of(const DispatchArguments& a, int token) {
    const char* const first = reinterpret_cast<const char*>(a.weights);
    if constexpr (kSpansHosts)
        return reinterpret_cast<const float*>(first + offset_of(a, token_at(a, token), 4 * kTopk));
    else
        return a.weights + static_cast<long long>(token) * kTopk;
}

// A choice whose metadata are published to one peer. Blocks share out the tokens; in a block, the
// threads that do not send share out choices and peers.
struct MetadataItem : Choice {
    int number;       // among what the block publishes
    int peer;         // to which it goes
    unsigned weight;  // bits of a float

    __device__ __forceinline__ void locate(int which) {
        constexpr int kEach = kTopk * kNumPeers;  // of a token
        number = which;
        const int nth = number / kEach, rest = number - nth * kEach;
        peer = rest / kTopk;
        Choice::locate((nth * gridDim.x + blockIdx.x) * kTopk + rest - peer * kTopk);
    }

    template <typename Arguments>
    __device__ __forceinline__ void load(const Arguments& a) {
        Choice::load(a);
        weight = 0;
        if (token < a.num_tokens && a.flags & kNewWeights)
            weight = __float_as_uint(weights_of(a, token)[k]);
    }
};

__device__ __forceinline__ void clear_masks(const Masks& masks) {
    const int experts = kExpertChunk * masks.words;
#pragma unroll 1
    for (int i = threadIdx.x; i < experts; i += blockDim.x) masks.experts[i] = 0;
}

// Clears all masks. Whole block, before the first ones are set.
template <typename Arguments>
__device__ __forceinline__ void prepare_masks(const Arguments& a, const Masks& masks) {
    clear_masks(masks);
    const int ranks = kNumPeers * masks.words;
#pragma unroll 1
    for (int i = threadIdx.x; i < ranks; i += blockDim.x) masks.ranks[i] = 0;
#pragma unroll 1
    for (int e = threadIdx.x; e < kNumExperts; e += blockDim.x)
        masks.locations[e] = a.expert_location[e];
}

// Sets the masks of the experts from `chunk` on, and with the first chunk those of the ranks. Whole
// block.
template <typename Arguments>
__device__ __forceinline__ void fill_masks(const Arguments& a, const Masks& masks, int chunk,
                                           const BlockChoices& choices) {
    if (chunk != 0) {
        clear_masks(masks);
        __syncthreads();
    }
    choices.for_all(a, [&](const Choice& choice) {
        const int expert = choice.expert();
        if (expert < 0) return;
        const int number = bit_of(masks, token_at(a, choice.token)), word = number / 32;
        const unsigned bit = 1u << number % 32;
        if (chunk == 0)
            atomicOr(&masks.ranks[rank_of(masks.locations[expert]) * masks.words + word], bit);
        if (is_in(chunk, expert))
            atomicOr(&masks.experts[(expert - chunk) * masks.words + word], bit);
    });
    __syncthreads();
}

// Hands on what the ranks of the other hosts say of their call, beside their rows. One lane.
__device__ __forceinline__ void forward_header(const DispatchArguments& a, const Call& call,
                                               int peer, int message, unsigned rows) {
    const unsigned* const said =
        reinterpret_cast<const unsigned*>(a.messages + message * a.message_bytes);
    unsigned long long* const words =
        count_word(call.bases[peer], call.sending, source_at(a, message), 0);
    const unsigned transfer = call.sending;
    store_tagged_pair(words + kColumnSignature, transfer, said[kMessageSignature], rows);
    store_tagged_pair(words + kColumnSubject, transfer, said[kMessageSubject],
                      said[kMessageCommunicator]);
    if constexpr (!kPadded) {
        store_tagged_pair(words + kColumnOverflow, transfer, said[kMessageOverflow],
                          said[kMessageOverflowRows]);
        store_tagged_pair(words + kColumnRoom, transfer, said[kMessageRoom], 0);
    }
}

// The same for several hosts: how many rows and choices come from each source of the rail.
__device__ __forceinline__ void publish_rail_counts(const DispatchArguments& a, const Call& call,
                                                    const Masks& masks, int chunk, int warp,
                                                    int warps) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = (warp * gridDim.x + gridDim.x - 1 - blockIdx.x) * 32;
         chunk == 0 && first < kNumSources; first += warps * gridDim.x * 32) {
        if (first + lane >= kNumSources) continue;
        const int message = (first + lane) / kNumPeers, peer = first + lane - message * kNumPeers;
        if (is_masked(call, peer)) continue;
        const unsigned* const mask = masks.ranks + peer * masks.words;
        forward_header(a, call, peer, message,
                       bits_in(part_of(masks, mask, message), masks.source_words));
    }
#pragma unroll 1
    for (int first = (warp * gridDim.x + blockIdx.x) * 32; first < kExpertChunk;
         first += warps * gridDim.x * 32) {
        const int expert = chunk + first + lane;
        if (first + lane >= kExpertChunk || expert >= kNumExperts) continue;
        const int location = masks.locations[expert], peer = rank_of(location);
        if (location < 0 || is_masked(call, peer)) continue;
        const unsigned* const mask = masks.experts + (first + lane) * masks.words;
#pragma unroll 1
        for (int message = 0; message < kNumHosts; ++message)
            store_tagged(count_word(call.bases[peer], call.sending, source_at(a, message),
                                    kColumnFirstCount + local_of(location)),
                         call.sending, bits_in(part_of(masks, mask, message), masks.source_words));
    }
}

// Publishes to every peer how many rows it gets, and how many choices each of its experts. Blocks
// share the peers and experts.
template <typename Arguments>
__device__ __forceinline__ void publish_counts(const Arguments& a, const Call& call,
                                               const Masks& masks, int chunk, int warp, int warps,
                                               unsigned subject) {
    if constexpr (kSpansHosts) {
        publish_rail_counts(a, call, masks, chunk, warp, warps);
        return;
    }
    const int lane = threadIdx.x % 32;
    // Another block than the one with the first experts, where there are several.
    for (int first = (warp * gridDim.x + gridDim.x - 1 - blockIdx.x) * 32;
         chunk == 0 && first < kNumPeers; first += warps * gridDim.x * 32) {
        const int peer = first + lane;
        if (peer >= kNumPeers) continue;
        const bool masked = is_masked(call, peer);
        const int count = masked ? 0 : bits_in(masks.ranks + peer * masks.words, masks.words);
        a.rows_to[peer] = count;
        if (masked) continue;
        publish_header(a, call, peer, count, subject);
        if (a.rows_sent != nullptr) {
            a.rows_sent[peer] += count;
            if (peer != a.rank)
                a.bytes_sent[peer] += static_cast<long long>(count) * (a.row_bytes + a.scale_bytes);
        }
    }
    for (int first = (warp * gridDim.x + blockIdx.x) * 32; first < kExpertChunk;
         first += warps * gridDim.x * 32) {
        const int expert = chunk + first + lane;
        if (first + lane >= kExpertChunk || expert >= kNumExperts) continue;
        const int location = masks.locations[expert], peer = rank_of(location);
        if (is_masked(call, peer)) continue;
        const int count = bits_in(masks.experts + (first + lane) * masks.words, masks.words);
        store_tagged(count_word(call.bases[peer], call.sending, a.rank,
                                kColumnFirstCount + local_of(location)),
                     call.sending, count);
    }
}

// Lane i: position of the token among the rows for peer `first` + i, or -1 if it does not go there.
__device__ __forceinline__ int position_at(const Masks& masks, TokenAt at, int first) {
    const int peer = first + threadIdx.x % 32;
    if (peer >= kNumPeers) return -1;
    const unsigned* const mask = masks.ranks + peer * masks.words;
    return has_token(mask, bit_of(masks, at)) ? place_in(masks, mask, at) : -1;
}

// The same, with -1 also for masked peers.
__device__ __forceinline__ int target_at(const Call& call, const Masks& masks, TokenAt at,
                                         int first) {
    const int peer = first + threadIdx.x % 32;
    return peer < kNumPeers && is_masked(call, peer) ? -1 : position_at(masks, at, first);
}

// How many of the peers before `peer` a token goes to, by its bit.
__device__ __forceinline__ int ranks_before(const Masks& masks, int bit, int peer) {
    constexpr int kAtOnce = kNumPeers < 8 ? kNumPeers : 8;  // loads in flight
    int ranks = 0;
#pragma unroll 1
    for (int first = 0; first < peer; first += kAtOnce)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int rank = first + i;
            const unsigned* const mask = masks.ranks + min(rank, kNumPeers - 1) * masks.words;
            ranks += has_token(mask, bit) && rank < peer;
        }
    return ranks;
}

// Publishes the metadata of one choice to one peer to which its token goes: local expert, place and
// weight, or that the expert is another rank's. Also which token it is. A chunk of experts fills in
// the choices that it knows. The handle's copy likewise. One thread for each choice and peer.
template <typename Arguments>
__device__ __forceinline__ void publish_item(const Arguments& a, const Call& call,
                                             const Masks& masks, int chunk,
                                             const MetadataItem& item) {
    const int token = item.token, k = item.k, peer = item.peer, expert = item.expert();
    const int location = expert >= 0 ? masks.locations[expert] : -1;
    const unsigned* const mask = masks.ranks + peer * masks.words;
    const TokenAt at = token_at(a, token);
    const int bit = bit_of(masks, at), source = source_at(a, at.message);
    const bool goes = has_token(mask, bit), sent = goes && !is_masked(call, peer);
    const bool local = location >= 0 && rank_of(location) == peer;
    const bool known = local && is_in(chunk, expert);
    const int position = goes ? place_in(masks, mask, at) : 0;
    const int place =
        known ? place_in(masks, masks.experts + (expert - chunk) * masks.words, at) : 0;
    unsigned long long* const words =
        metadata_words(call.bases[peer], call.sending, staging_slot(source, position), 0);
    // With the first chunk only: choices of other ranks, and which token it is.
    if (sent && (known || (!local && chunk == 0)))
        store_tagged_pair(
            words + 2 * k, call.sending,
            known ? static_cast<unsigned>(place) << 16 | (local_of(location) + 1) : 0u,
            item.weight);
    if (chunk != 0) return;
    if (sent && k == 0) store_tagged_pair(words + 2 * kTopk, call.sending, at.index, 0u);
    if (k == 0) {
        int* const slots = a.slots_of_token + token * kCopies;
        int before = ranks_before(masks, bit, peer);
        if (goes) slots[before++] = returning_source(source, peer) * kMaxTokens + position;
        if (peer == kNumPeers - 1)
            for (; before < kCopies; ++before) slots[before] = -1;
    }
    if (peer != 0) return;
    const long long to = static_cast<long long>(token) * kTopk + k;
    if (!kSpansHosts && a.flags & kNewWeights) a.weights_copy[to] = __uint_as_float(item.weight);
    if (!kSpansHosts && a.flags & kWideIds)
        static_cast<long long*>(a.ids_copy)[to] = item.id;
    else
        static_cast<int*>(a.ids_copy)[to] = static_cast<int>(item.id);
}

// Publishes all that is this block's share, by `threads` threads.
template <typename Arguments>
__device__ __forceinline__ void publish_metadata(const Arguments& a, const Call& call,
                                                 const Masks& masks, int chunk, MetadataItem item,
                                                 int threads) {
#pragma unroll 1
    while (item.token < a.num_tokens) {
        publish_item(a, call, masks, chunk, item);
        item.locate(item.number + threads);
        item.load(a);
    }
}

}  // namespace ll
