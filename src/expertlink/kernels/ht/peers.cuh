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

// Rows come from all ranks of the group, the sources. A rank addresses the memory of the ranks of
// its own host, its peers. A rank's *seat* is host * kNumPeers + its number among the peers there.
// On one host seat, peer and rank are the same number.
template <typename Arguments>
__device__ __forceinline__ int own_seat(const Arguments& a) {
    if constexpr (kSpansHosts) return a.seat;
    return a.rank;
}

template <typename Arguments>
__device__ __forceinline__ int own_peer(const Arguments& a) {
    return kSpansHosts ? own_seat(a) % kNumPeers : own_seat(a);
}

template <typename Arguments>
__device__ __forceinline__ int seat_of(const Arguments& a, int rank) {
    if constexpr (kSpansHosts) return a.seats[rank];
    return rank;
}

template <typename Arguments>
__device__ __forceinline__ int rank_at(const Arguments& a, int seat) {
    if constexpr (kSpansHosts) return a.ranks[seat];
    return seat;
}

// The seat of a peer of this rank.
template <typename Arguments>
__device__ __forceinline__ int seat_of_peer(const Arguments& a, int peer) {
    return kSpansHosts ? own_seat(a) - own_peer(a) + peer : peer;
}

// What waits of the transfer after `last` have to know.
template <typename Arguments>
__device__ __forceinline__ Watch watch_after(const Arguments& a, unsigned last) {
    return {a.state,
            a.control,
            last + 1,
            static_cast<unsigned>(a.operation),
            ready_word(a.bases[own_peer(a)], 0),
            own_peer(a),
            nullptr};
}

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

// The count row of the rank at a seat. One peer alone writes it, whatever communicator it is in:
// the one with the seat's number. So the stride is that of the arena: communicators that share it
// use the same rows.
__device__ __forceinline__ int* count_row(char* base, int seat) {
    return reinterpret_cast<int*>(base + kCountsAt) + seat * kCountStride;
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
    const int own = own_peer(a);
    for (int step = threadIdx.x; step < kNumPeers; step += 32) {
        const int peer = (own + step) % kNumPeers;
        // The peer may still be reading the header of the call before.
        if (!wait_until(credit_word(a.bases[own], peer), watch.transfer - 1, watch, kPhaseCredit,
                        peer))
            return;
        for (int word = 0; word < kHeaderWords; ++word)
            count_row(a.bases[peer], own_seat(a))[word] = header_word(a, watch, word);
        store_release_system(ready_word(a.bases[peer], own), watch.transfer);
    }
}

// Calls without counts: waits until all peers are in this very call. One warp of the grid, which
// has nothing else to do. The kernel does not end before this warp, so headers stay until they are
// read.
template <typename Arguments>
__device__ __forceinline__ bool check_headers(const Arguments& a, const Watch& watch) {
    const int lane = threadIdx.x % 32;
    char* const base = a.bases[own_peer(a)];
    bool here = true;
    int other = kNumPeers;
    for (int p = lane; p < kNumPeers && here; p += 32) {
        here = wait_until(ready_word(base, p), watch.transfer, watch, kPhaseReady, p);
        const int* const header = count_row(base, seat_of_peer(a, p));
        if (here && !is_same_call(a, watch, [&](int word) { return load_fresh(&header[word]); }))
            other = min(other, p);
    }
    if (!__all_sync(0xffffffffu, here)) return false;
    other = __reduce_min_sync(0xffffffffu, other);
    if (other == kNumPeers) return true;
    if (lane == 0)
        report_headers(watch, other, [&](int rank, int word) {
            const int seat = seat_of(a, rank);
            // What other hosts say is not known here.
            if (kSpansHosts && seat / kNumPeers != own_seat(a) / kNumPeers)
                return header_word(a, watch, word);
            return load_fresh(&count_row(base, seat)[word]);
        });
    return false;
}

// Tells the peers that this rank has consumed the transfer, so they may send the next one. Release:
// rows were read before.
template <typename Arguments>
__device__ __forceinline__ void grant_credit(const Arguments& a, const Watch& watch) {
    for (int p = threadIdx.x; p < kNumPeers; p += blockDim.x)
        store_release_system(credit_word(a.bases[p], own_peer(a)), watch.transfer);
}

// Ends a transfer that one kernel has both sent and received: for the last block to leave it.
template <typename Arguments>
__device__ __forceinline__ void end_transfer(const Arguments& a, const Watch& watch) {
    grant_credit(a, watch);
    if (threadIdx.x == 0) {
        a.state->sent = a.state->received = watch.transfer;
        a.state->next_send = a.state->next_place = 0;
    }
}

// Waits until all peers have consumed the transfer before this one. With `rows_in_place` also until
// they have come to this transfer: then they have let go of the pool that is about to be written.
template <typename Arguments>
__device__ __forceinline__ bool peers_have_room(const Arguments& a, const Watch& watch,
                                                bool rows_in_place) {
    char* const base = a.bases[own_peer(a)];
    bool room = true;
    for (int p = threadIdx.x; p < kNumPeers; p += blockDim.x) {
        room &= wait_until(credit_word(base, p), watch.transfer - 1, watch, kPhaseCredit, p);
        if (rows_in_place)
            room &= wait_until(ready_word(base, p), watch.transfer, watch, kPhaseReady, p);
    }
    return __syncthreads_and(room);
}

}  // namespace ht
