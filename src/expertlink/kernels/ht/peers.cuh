// What every call tells the peers, and what it may have to wait for before it sends.
//
// `Arguments` are those of dispatch or of combine; both begin with the same fields.
#pragma once

#include "common/choices.cuh"
#include "common/sync.cuh"
#include "common/words.cuh"

namespace ht {

constexpr int kCountWords = kHeaderWords + kColumns;  // of this communicator's count rows
static_assert(kCountWords <= kCountStride, "the arena has room for fewer experts");

// What this rank says of its call to every peer.
template <typename Arguments>
__device__ __forceinline__ int header_word(const Arguments& a, const Watch& watch, int word) {
    switch (word) {
        case kOperation: return a.operation;
        case kCommunicator: return a.communicator;
        case kCall: return static_cast<int>(watch.transfer);
        case kStatus: return a.status;
        case kCapacity: return a.capacity;
        case kRowBytes: return a.row_bytes;
        case kMetadataBytes: return a.header_metadata_bytes;
        case kSubject: return a.subject == nullptr ? 0 : load_fresh(a.subject);
        case kForm:
            return (a.flags & kNewWeights ? kFormWeights : 0) |
                   (kWantsMail && a.flags & kCount ? kFormMail : 0);
        case kPool: return a.pool;
        default: return 0;
    }
}

// Row `rank` is written by that rank alone, whatever communicator it is in: so the stride is that
// of the arena, and communicators that share it write to the same row.
__device__ __forceinline__ int* count_row(char* base, int rank) {
    return reinterpret_cast<int*>(base + kCountsAt) + rank * kCountStride;
}

// Whether a rank's head, as `word(index)` gives it, says that it is in the call of this rank and
// takes part in it.
template <typename Arguments, typename Word>
__device__ __forceinline__ bool is_same_call(const Arguments& a, const Watch& watch,
                                             const Word& word) {
    bool same = word(kStatus) == 0;
    for (int i : {kOperation, kCommunicator, kCall, kRowBytes, kMetadataBytes, kSubject, kForm})
        same &= word(i) == header_word(a, watch, i);
    return same;
}

// Calls that count nothing tell the peers only that this rank is here, and in which call. One warp.
template <typename Arguments>
__device__ __forceinline__ void publish_ready(const Arguments& a, const Watch& watch) {
    if (blockIdx.x != 0 || threadIdx.x >= 32) return;
    for (int step = threadIdx.x; step < kNumRanks; step += 32) {
        const int peer = (a.rank + step) % kNumRanks;
        // The peer may still be reading what this rank said of the call before.
        if (!wait_until(credit_word(a.bases[a.rank], peer), watch.transfer - 1, watch, kPhaseCredit,
                        peer))
            return;
        for (int word = 0; word < kHeaderWords; ++word)
            count_row(a.bases[peer], a.rank)[word] = header_word(a, watch, word);
        store_release_system(ready_word(a.bases[peer], a.rank), watch.transfer);
    }
}

// Calls that count nothing: all ranks are in this very call. One warp of the grid, which has
// nothing else to do; the kernel does not end before it is done, so heads stay until they have been
// read.
template <typename Arguments>
__device__ __forceinline__ bool check_headers(const Arguments& a, const Watch& watch) {
    const int lane = threadIdx.x % 32;
    char* const base = a.bases[a.rank];
    bool here = true;
    int other = kNumRanks;
    for (int r = lane; r < kNumRanks && here; r += 32) {
        here = wait_until(ready_word(base, r), watch.transfer, watch, kPhaseReady, r);
        const int* const header = count_row(base, r);
        if (here && !is_same_call(a, watch, [&](int word) { return load_fresh(&header[word]); }))
            other = min(other, r);
    }
    if (!__all_sync(0xffffffffu, here)) return false;
    other = __reduce_min_sync(0xffffffffu, other);
    if (other == kNumRanks) return true;
    if (lane == 0)
        report_headers(watch, other, [&](int rank, int word) {
            return load_fresh(&count_row(base, rank)[word]);
        });
    return false;
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

}  // namespace ht
