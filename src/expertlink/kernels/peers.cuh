// What every call tells the peers, and what it may have to wait for before it sends.
//
// `Arguments` are those of dispatch or of combine; both begin with the same fields.
#pragma once

#include "choices.cuh"
#include "common/sync.cuh"
#include "words.cuh"

constexpr int kColumns = kNumRanks + kNumExperts;  // ranks first
constexpr int kHeadWords = 8;                      // words of a count row before the counts
constexpr int kCountWords = kHeadWords + kColumns;

// Words of a count row's head, as engines/header.py names them.
enum Head { kOperation, kCommunicator, kCall, kStatus, kCapacity, kRowBytes, kExtraBytes, kWeighted };

// What this rank says of its call to every peer.
template <typename Arguments>
__device__ __forceinline__ int head_word(const Arguments& a, int word) {
    switch (word) {
        case kOperation: return a.operation;
        case kCommunicator: return a.communicator;
        case kCall: return a.call;
        case kStatus: return a.status;
        case kCapacity: return a.capacity;
        case kRowBytes: return a.row_bytes;
        case kExtraBytes: return a.extra_bytes;
        case kWeighted: return (a.flags & kNewWeights) != 0;
        default: return 0;
    }
}

__device__ __forceinline__ int* count_row(char* base, int rank) {
    return reinterpret_cast<int*>(base + kCountsAt) + rank * kCountWords;
}

// Calls that count nothing tell the peers only that this rank is here, and in which call. One warp.
template <typename Arguments>
__device__ __forceinline__ void say_ready(const Arguments& a, const Watch& watch) {
    if (blockIdx.x != 0 || threadIdx.x >= 32) return;
    for (int step = threadIdx.x; step < kNumRanks; step += 32) {
        const int peer = (a.rank + step) % kNumRanks;
        // The peer may still be reading what this rank said of the call before.
        if (!wait_until(credit_word(a.bases[a.rank], peer), watch.transfer - 1, watch,
                        kPhaseCredit, peer))
            return;
        for (int word = 0; word < kHeadWords; ++word)
            count_row(a.bases[peer], a.rank)[word] = head_word(a, word);
        store_release_system(ready_word(a.bases[peer], a.rank), watch.transfer);
    }
}

// Tells the peers that this rank has consumed the transfer and they may send the next.
template <typename Arguments>
__device__ __forceinline__ void grant_credit(const Arguments& a, const Watch& watch) {
    for (int r = threadIdx.x; r < kNumRanks; r += blockDim.x)
        store_release_system(credit_word(a.bases[r], a.rank), watch.transfer);
}

// All peers have consumed the transfer before this one. With `rows_in_place` they have also come to
// this transfer, hence let go of the rows in the pool that is about to be written.
template <typename Arguments>
__device__ __forceinline__ bool peers_have_room(const Arguments& a, const Watch& watch,
                                                bool rows_in_place) {
    char* const base = a.bases[a.rank];
    bool room = true;
    for (int r = threadIdx.x; r < kNumRanks; r += blockDim.x) {
        room &= wait_until(credit_word(base, r), watch.transfer - 1, watch, kPhaseCredit, r);
        if (rows_in_place)
            room &= wait_until(ready_word(base, r), watch.transfer, watch, kPhaseReady, r);
    }
    return __syncthreads_and(room);
}
