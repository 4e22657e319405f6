// Counting, the first step of an uncached dispatch. It finds the slot of every token at each
// destination, and for every choice its place among this rank's choices of that expert.
//
// Every block takes a range of tokens. 32 tokens, one per lane, set one bit each in a mask per
// column. A column is a destination rank, an expert, or across hosts a host. A position is the
// count of bits below a token's own. Bits do not depend on the order in which they are set, so the
// result is always the same.
#pragma once

#include "common/choices.cuh"
#include "ht/chunk.cuh"

namespace ht {

// Tokens of this block; all ranges but the last are multiples of 32.
__device__ __forceinline__ TokenRange token_range(const DispatchArguments& a) {
    const int share = (a.num_tokens + gridDim.x - 1) / gridDim.x;
    const int size = (share + 31) / 32 * 32;
    const int begin = min(static_cast<int>(blockIdx.x) * size, a.num_tokens);
    return {begin, min(begin + size, a.num_tokens)};
}

constexpr int kHostsAt = kNumSources + kNumExperts;  // column of host 0

// Across hosts: the bit of a token that goes to a rank, in the column of that rank's host.
template <typename Arguments>
__device__ __forceinline__ void mark_host(const Arguments& a, unsigned* row, int rank,
                                          unsigned bit) {
    if constexpr (kSpansHosts) atomicOr(&row[kHostsAt + seat_of(a, rank) / kNumPeers], bit);
}

// Sets the bits of up to `groups` * 32 tokens from `first` on. Returns whether ids were faulty.
__device__ __forceinline__ bool fill_masks(const DispatchArguments& a, unsigned* masks, int first,
                                           int end) {
    const int groups = min(a.groups, (end - first + 31) / 32);
    for (int i = threadIdx.x; i < groups * kColumns; i += blockDim.x) masks[i] = 0;
    __syncthreads();
    bool faulty = false;
    for (int i = threadIdx.x; i < groups * 32 && first + i < end; i += blockDim.x) {
        unsigned* const row = masks + i / 32 * kColumns;
        const unsigned bit = 1u << (i % 32);
#pragma unroll 1
        for (int begin = 0; begin < kTopk; begin += kChunk) {
            const Choices choices = choices_of(a, first + i, begin, true);
            faulty |= choices.faulty;
            int locations[kChunk];
#pragma unroll
            for (int k = 0; k < kChunk; ++k)
                locations[k] = choices.expert[k] >= 0 ? a.expert_location[choices.expert[k]] : 0;
#pragma unroll
            for (int k = 0; k < kChunk; ++k) {
                if (choices.expert[k] < 0) continue;
                atomicOr(&row[rank_of(locations[k])], bit);
                mark_host(a, row, rank_of(locations[k]), bit);
                const unsigned before = atomicOr(&row[kNumSources + choices.expert[k]], bit);
                faulty |= (before & bit) != 0;  // chosen twice
            }
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

// Writes the slots of one token, in ascending rank, and the places of its choices.
__device__ __forceinline__ void place_token(const DispatchArguments& a, const unsigned* masks,
                                            const int* running, int token, int group, int lane) {
    const unsigned* const row = masks + group * kColumns;
    const unsigned below = (1u << lane) - 1u;
    const auto place = [&](int column) {
        return running[column] + bits_before(masks, group, column) + __popc(row[column] & below);
    };
    int found = 0;
    for (int rank = 0; rank < kNumSources; ++rank) {
        if (!(row[rank] >> lane & 1u)) continue;
        const int position = place(rank);
        a.slots_of_token[token * kCopies + found++] = rank * kMaxTokens + position;
        if (rank == a.rank) a.own_tokens[position] = token;
    }
    for (; found < kCopies; ++found) a.slots_of_token[token * kCopies + found] = -1;
    if constexpr (kExpanded) {
#pragma unroll 1
        for (int begin = 0; begin < kTopk; begin += kChunk) {
            const Choices choices = choices_of(a, token, begin, false);
#pragma unroll
            for (int k = 0; k < kChunk; ++k) {
                if (begin + k >= kTopk) break;
                a.ordinals[static_cast<long long>(token) * kTopk + begin + k] =
                    choices.expert[k] < 0 ? -1 : place(kNumSources + choices.expert[k]);
            }
        }
    }
}

// Publishes this rank's count row: one block for each peer.
__device__ __forceinline__ bool publish_counts(const DispatchArguments& a, const Watch& watch,
                                               const int* totals) {
    for (int step = blockIdx.x; step < kNumPeers; step += gridDim.x) {
        const int peer = (a.rank + step) % kNumPeers;
        __shared__ bool has_room;
        // The peer may still be reading the count row of the last transfer.
        if (threadIdx.x == 0)
            has_room = wait_until(credit_word(a.bases[a.rank], peer), watch.transfer - 1, watch,
                                  kPhaseCredit, peer);
        __syncthreads();
        if (!has_room) return false;
        int* const row = count_row(a.bases[peer], a.rank);
        for (int i = threadIdx.x; i < kColumns; i += blockDim.x) row[kHeaderWords + i] = totals[i];
        if (threadIdx.x < kHeaderWords) {
            int word = header_word(a, watch, threadIdx.x);
            // Every block has added its findings before the grid barrier.
            if (threadIdx.x == kStatus) word |= load_fresh(a.faulty);
            row[threadIdx.x] = word;
        }
        __syncthreads();  // the release below covers what all threads wrote
        if (threadIdx.x == 0)
            store_release_system(ready_word(a.bases[peer], a.rank), watch.transfer);
    }
    return true;
}

// Column sums of the blocks before this one, and of all blocks.
__device__ __forceinline__ void add_blocks(const DispatchArguments& a, int* running, int* totals) {
    constexpr int kAtOnce = 8;  // loads in flight
    const int blocks = gridDim.x, own = blockIdx.x;
    for (int c = threadIdx.x; c < kColumns; c += blockDim.x) {
        int before = 0, all = 0;
        for (int first = 0; first < blocks; first += kAtOnce) {
            int counts[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                counts[i] =
                    first + i < blocks ? load_fresh(&a.histogram[(first + i) * kColumns + c]) : 0;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                if (first + i < own) before += counts[i];
                all += counts[i];
            }
        }
        running[c] = before;
        totals[c] = all;
    }
    __syncthreads();
}

// All blocks of the grid. Shared memory: (groups + 2) * kColumns words. `publish(totals)` says how
// many rows and choices there are, `place(masks, running, token, group, lane)` writes the positions
// of a token: its place in a column is the number of tokens of the blocks and groups before it, in
// `running`, and of the bits before its own in the masks.
template <typename Publish, typename Place>
__device__ __forceinline__ bool count_tokens(const DispatchArguments& a, const Watch& watch,
                                             unsigned* shared, const Publish& publish,
                                             const Place& place) {
    unsigned* const masks = shared;
    int* const running = reinterpret_cast<int*>(shared + a.groups * kColumns);
    int* const totals = running + kColumns;
    const TokenRange range = token_range(a);
    const int step = a.groups * 32;

    // First pass: how many tokens of this block go where.
    for (int c = threadIdx.x; c < kColumns; c += blockDim.x) running[c] = 0;
    bool faulty = false;
    for (int first = range.begin; first < range.end; first += step) {
        faulty |= fill_masks(a, masks, first, range.end);
        const int groups = min(a.groups, (range.end - first + 31) / 32);
        for (int c = threadIdx.x; c < kColumns; c += blockDim.x)
            running[c] += bits_before(masks, groups, c);
        __syncthreads();
    }
    for (int c = threadIdx.x; c < kColumns; c += blockDim.x)
        a.histogram[blockIdx.x * kColumns + c] = running[c];
    if (kCheckInputs && faulty) atomicOr(a.faulty, 1);
    if (!grid_barrier(watch)) return false;
    add_blocks(a, running, totals);
    if (!publish(totals)) return false;

    // Second pass: positions.
    for (int first = range.begin; first < range.end; first += step) {
        // If one pass was enough, the masks are still those of the first loop.
        if (range.end - range.begin > step) fill_masks(a, masks, first, range.end);
        for (int i = threadIdx.x; i < step && first + i < range.end; i += blockDim.x)
            place(masks, running, first + i, i / 32, i % 32);
        __syncthreads();
        if (first + step >= range.end) break;
        for (int c = threadIdx.x; c < kColumns; c += blockDim.x)
            running[c] += bits_before(masks, a.groups, c);
        __syncthreads();
    }
    return grid_barrier(watch);
}

}  // namespace ht
