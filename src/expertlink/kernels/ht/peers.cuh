// What every call publishes to the peers, and what it waits for before it sends.
//
// `Arguments` are those of dispatch or of combine; both begin with the same fields.
#pragma once

#include "common/choices.cuh"
#include "common/sync.cuh"
#include "common/words.cuh"

namespace ht {

constexpr int kCountWords = kHeaderWords + kColumns;  // of this communicator's count rows
static_assert(kCountWords <= kCountStride, "the arena has room for fewer experts");

// A word of this rank's header, which goes to every peer.
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
        case kMaker: return a.maker;
        case kForm:
            return (a.flags & kNewWeights ? kFormWeights : 0) |
                   (kWantsMail && a.flags & kCount ? kFormMail : 0);
        case kPool: return a.pool;
        default: return 0;
    }
}

// The count row of a rank, which that rank alone writes, whatever communicator it is in. So the
// stride is that of the arena: communicators that share it use the same rows.
__device__ __forceinline__ int* count_row(char* base, int rank) {
    return reinterpret_cast<int*>(base + kCountsAt) + rank * kCountStride;
}

// Whether a rank is in the same call as this one and takes part in it. `word(index)` gives its
// header.
template <typename Arguments, typename Word>
__device__ __forceinline__ bool is_same_call(const Arguments& a, const Watch& watch,
                                             const Word& word) {
    bool same = word(kStatus) == 0;
    for (int i :
         {kOperation, kCommunicator, kCall, kRowBytes, kMetadataBytes, kSubject, kMaker, kForm})
        same &= word(i) == header_word(a, watch, i);
    return same;
}

// Calls without counts publish only the header. One warp.
template <typename Arguments>
__device__ __forceinline__ void publish_ready(const Arguments& a, const Watch& watch) {
    if (blockIdx.x != 0 || threadIdx.x >= 32) return;
    for (int step = threadIdx.x; step < kNumRanks; step += 32) {
        const int peer = (a.rank + step) % kNumRanks;
        // The peer may still be reading the header of the call before.
        if (!wait_until(credit_word(a.bases[a.rank], peer), watch.transfer - 1, watch, kPhaseCredit,
                        peer))
            return;
        for (int word = 0; word < kHeaderWords; ++word)
            count_row(a.bases[peer], a.rank)[word] = header_word(a, watch, word);
        store_release_system(ready_word(a.bases[peer], a.rank), watch.transfer);
    }
}

// Calls without counts: waits until all ranks are in this very call. One warp of the grid, which
// has nothing else to do. The kernel does not end before this warp, so headers stay until they are
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

// Tells the peers that this rank has consumed the transfer, so they may send the next one. Release:
// rows were read before.
template <typename Arguments>
__device__ __forceinline__ void grant_credit(const Arguments& a, const Watch& watch) {
    for (int r = threadIdx.x; r < kNumRanks; r += blockDim.x)
        store_release_system(credit_word(a.bases[r], a.rank), watch.transfer);
}

// Waits until all peers have consumed the transfer before this one. With `rows_in_place` also until
// they have come to this transfer: then they have let go of the pool that is about to be written.
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
