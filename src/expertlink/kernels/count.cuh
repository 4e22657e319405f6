// Counting, first step of an uncached dispatch: for every token its slot at each destination, for
// every choice its place among this rank's choices of that expert.
//
// Every block takes a span of tokens. Tokens of 32 (a warp's lanes) set one bit each in a mask per
// column, a column being a destination rank or an expert; positions are counts of bits below one's
// own. Bits do not depend on the order in which they are set, so the result is the same every time.
#pragma once

#include "peers.cuh"

__device__ __forceinline__ int expert_of(const DispatchArguments& a, int token, int k) {
    const long long at = static_cast<long long>(token) * kTopk + k;
    const long long id = a.flags & kWideIds ? static_cast<const long long*>(a.ids)[at]
                                            : static_cast<const int*>(a.ids)[at];
    return id >= 0 && id < kNumExperts ? static_cast<int>(id) : -1;
}

__device__ __forceinline__ bool is_faulty(const DispatchArguments& a, int token, int k) {
    const long long at = static_cast<long long>(token) * kTopk + k;
    const long long id = a.flags & kWideIds ? static_cast<const long long*>(a.ids)[at]
                                            : static_cast<const int*>(a.ids)[at];
    return id < -1 || id >= kNumExperts;
}

struct Span {
    int begin, end;
};

// Tokens of this block; spans are multiples of 32 but for the last.
__device__ __forceinline__ Span token_span(const DispatchArguments& a) {
    const int share = (a.num_tokens + gridDim.x - 1) / gridDim.x;
    const int size = (share + 31) / 32 * 32;
    const int begin = min(static_cast<int>(blockIdx.x) * size, a.num_tokens);
    return {begin, min(begin + size, a.num_tokens)};
}

// Sets the bits of up to `groups` * 32 tokens from `first` on. Returns whether ids were faulty.
__device__ __forceinline__ bool fill_masks(const DispatchArguments& a, unsigned* masks, int first,
                                           int end) {
    for (int i = threadIdx.x; i < a.groups * kColumns; i += blockDim.x) masks[i] = 0;
    __syncthreads();
    bool faulty = false;
    for (int i = threadIdx.x; i < a.groups * 32 && first + i < end; i += blockDim.x) {
        unsigned* row = masks + i / 32 * kColumns;
        const unsigned bit = 1u << (i % 32);
        for (int k = 0; k < kTopk; ++k) {
            const int expert = expert_of(a, first + i, k);
            if (expert < 0) {
                faulty |= is_faulty(a, first + i, k);
                continue;
            }
            atomicOr(&row[a.rank_of[expert]], bit);
            faulty |= (atomicOr(&row[kNumRanks + expert], bit) & bit) != 0;  // chosen twice
        }
    }
    __syncthreads();
    return faulty;
}

// Bits of a column in the groups before `group`.
__device__ __forceinline__ int bits_before(const unsigned* masks, int group, int column) {
    int bits = 0;
    for (int g = 0; g < group; ++g) bits += __popc(masks[g * kColumns + column]);
    return bits;
}

// Writes what is known of one token: its slots in ascending rank, its choices' places, its ids.
__device__ __forceinline__ void place_token(const DispatchArguments& a, const unsigned* masks,
                                            const int* running, int token, int group, int lane) {
    const unsigned* row = masks + group * kColumns;
    const unsigned below = (1u << lane) - 1u;
    int found = 0;
    for (int rank = 0; rank < kNumRanks; ++rank) {
        if (!(row[rank] >> lane & 1u)) continue;
        const int position =
            running[rank] + bits_before(masks, group, rank) + __popc(row[rank] & below);
        a.slots_of_token[token * kCopies + found++] = rank * kMaxTokens + position;
        if (rank == a.rank) a.own_tokens[position] = token;
    }
    for (; found < kCopies; ++found) a.slots_of_token[token * kCopies + found] = -1;
    for (int k = 0; k < kTopk; ++k) {
        const long long at = static_cast<long long>(token) * kTopk + k;
        const int expert = expert_of(a, token, k);
        const int column = kNumRanks + expert;
        a.ordinals[at] = expert < 0 ? -1
                                    : running[column] + bits_before(masks, group, column) +
                                          __popc(row[column] & below);
        if (a.flags & kWideIds)
            static_cast<long long*>(a.ids_copy)[at] = static_cast<const long long*>(a.ids)[at];
        else
            static_cast<int*>(a.ids_copy)[at] = static_cast<const int*>(a.ids)[at];
    }
}

// Sends this rank's count row to the peers of this block: one block for each peer.
__device__ __forceinline__ bool publish_counts(const DispatchArguments& a, const Watch& watch,
                                               const int* totals) {
    for (int step = blockIdx.x; step < kNumRanks; step += gridDim.x) {
        const int peer = (a.rank + step) % kNumRanks;
        __shared__ bool has_room;
        // The peer may still be reading the count row of the last transfer.
        if (threadIdx.x == 0)
            has_room = wait_until(credit_word(a.bases[a.rank], peer), watch.transfer - 1, watch,
                                  kPhaseCredit, peer);
        __syncthreads();
        if (!has_room) return false;
        int* const row = count_row(a.bases[peer], a.rank);
        for (int i = threadIdx.x; i < kColumns; i += blockDim.x) row[kHeadWords + i] = totals[i];
        if (threadIdx.x < kHeadWords) {
            int word = head_word(a, threadIdx.x);
            // Every block has added its findings before the blocks met.
            if (threadIdx.x == kStatus) word |= load_fresh(a.faulty);
            row[threadIdx.x] = word;
        }
        __syncthreads();  // the release below covers what all threads wrote
        if (threadIdx.x == 0)
            store_release_system(ready_word(a.bases[peer], a.rank), watch.transfer);
    }
    return true;
}

// All blocks of the grid. Shared memory: (groups + 2) * kColumns words.
__device__ __forceinline__ bool count_tokens(const DispatchArguments& a, const Watch& watch,
                                             unsigned* shared) {
    unsigned* const masks = shared;
    int* const running = reinterpret_cast<int*>(shared + a.groups * kColumns);
    int* const totals = running + kColumns;
    const Span span = token_span(a);
    const int step = a.groups * 32;

    // First pass: how many of this block's tokens go where.
    for (int c = threadIdx.x; c < kColumns; c += blockDim.x) running[c] = 0;
    bool faulty = false;
    for (int first = span.begin; first < span.end; first += step) {
        faulty |= fill_masks(a, masks, first, span.end);
        for (int c = threadIdx.x; c < kColumns; c += blockDim.x)
            running[c] += bits_before(masks, a.groups, c);
        __syncthreads();
    }
    for (int c = threadIdx.x; c < kColumns; c += blockDim.x)
        a.histogram[blockIdx.x * kColumns + c] = running[c];
    if (a.flags & kCheckIds && faulty) atomicOr(a.faulty, 1);
    if (!meet_blocks(watch)) return false;

    // Prefix over the blocks before this one, and totals for those who send them out.
    for (int c = threadIdx.x; c < kColumns; c += blockDim.x) {
        int before = 0, all = 0;
        for (int b = 0; b < gridDim.x; ++b) {
            const int count = load_fresh(&a.histogram[b * kColumns + c]);
            if (b < blockIdx.x) before += count;
            all += count;
        }
        running[c] = before;
        totals[c] = all;
    }
    __syncthreads();
    if (!publish_counts(a, watch, totals)) return false;

    // Second pass: positions.
    for (int first = span.begin; first < span.end; first += step) {
        // A single pass finds its masks as the first loop left them.
        if (span.end - span.begin > step) fill_masks(a, masks, first, span.end);
        for (int i = threadIdx.x; i < step && first + i < span.end; i += blockDim.x)
            place_token(a, masks, running, first + i, i / 32, i % 32);
        __syncthreads();
        for (int c = threadIdx.x; c < kColumns; c += blockDim.x)
            running[c] += bits_before(masks, a.groups, c);
        __syncthreads();
    }
    return meet_blocks(watch);
}
