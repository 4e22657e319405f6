// Low latency: what ranks say of their calls, in every transfer, so that none takes another call
// for its own. A head is the start of a count row: tagged pairs of words.
#pragma once

#include "ll/shares.cuh"

// Only layouts that may find no room have the last two pairs.
constexpr int kHeadPairs = kPadded ? 2 : 4;

// The transfer of the dispatch that a call refers to; 0: a new routing. May be on its way for a
// while.
template <typename Arguments>
__device__ __forceinline__ unsigned load_subject(const Arguments& a) {
    return a.subject == nullptr ? 0u : static_cast<unsigned>(load_fresh(a.subject));
}

// One lane: the head for one rank.
template <typename Arguments>
__device__ __forceinline__ void say_head(const Arguments& a, const Call& call, int peer,
                                         unsigned rows, unsigned subject) {
    const unsigned transfer = call.sending;
    unsigned long long* const words = count_word(call.bases[peer], transfer, a.rank, 0);
    store_tagged_pair(words + kSignatureColumn, transfer, a.signature, rows);
    store_tagged_pair(words + kSubjectColumn, transfer, subject, a.communicator);
    if constexpr (!kPadded) {
        const int* const overflow = reinterpret_cast<const int*>(&a.state->overflow);
        store_tagged_pair(words + kOverflowColumn, transfer, load_fresh(overflow),
                          load_fresh(overflow + 1));
        store_tagged_pair(words + kRoomColumn, transfer, load_fresh(overflow + 2), 0);
    }
}

// One warp: the heads for all ranks, of a call without counts.
template <typename Arguments>
__device__ __forceinline__ void say_heads(const Arguments& a, const Call& call, unsigned subject) {
#pragma unroll 1
    for (int peer = threadIdx.x % 32; peer < kNumRanks; peer += 32)
        if (!is_masked(call, peer)) say_head(a, call, peer, 0, subject);
}

// The latest overflow that heads tell of, and of those in one transfer that of the first rank.
struct Overflow {
    unsigned number = 0, rows, room;
    int rank;

    // All lanes; a lane without news has number 0.
    __device__ __forceinline__ void learn(int of, unsigned its_number, unsigned its_rows,
                                          unsigned its_room) {
        const unsigned latest = __reduce_max_sync(kAll, its_number);
        if (latest <= number) return;
        const int lane = __ffs(__ballot_sync(kAll, its_number == latest)) - 1;
        number = latest;
        rank = __shfl_sync(kAll, of, lane);
        rows = __shfl_sync(kAll, its_rows, lane);
        room = __shfl_sync(kAll, its_room, lane);
    }

    // One lane: for the host, once. All ranks learn the same in the same transfer.
    __device__ __forceinline__ void tell(const Watch& watch) const {
        State* const state = watch.state;
        Control* const control = watch.control;
        if (number == 0 || state->overflow_told == number) return;
        state->overflow_told = number;
        if (load_acquire_system(&control->overflowed) != 0) return;
        control->overflow_rank = static_cast<unsigned>(rank);
        control->overflow_rows = rows;
        control->overflow_capacity = room;
        store_release_system(&control->overflowed, number);
    }
};

// What has been heard.
struct Heard {
    bool fine = true;  // nobody gave up
    bool same = true;  // this lane's ranks are in the call of this rank
    Overflow overflow;
};

// One warp, each lane for a rank: waits for its head; how many rows it sends. Lanes wait together.
template <typename Arguments>
__device__ __forceinline__ int hear_head(const Arguments& a, Call& call, int rank, unsigned subject,
                                         Heard& heard) {
    const unsigned long long began = a.longest_wait_ns != nullptr ? nanoseconds() : 0;
    const unsigned long long* const words =
        count_word(call.bases[a.rank], call.watch.transfer, min(rank, kNumRanks - 1), 0);
    bool here = rank >= kNumRanks || is_masked(call, rank);
    const bool waits = !here;
    unsigned rows = 0, overflow = 0, overflow_rows = 0, room = 0;
    unsigned long long since = 0;
    for (unsigned spins = 1; !__all_sync(kAll, here); ++spins) {
        if (here) continue;
        // Pairs are stored at once, but only single words are sure to be read so.
        ulonglong2 pair[kHeadPairs];
        bool all = true;
#pragma unroll
        for (int i = 0; i < kHeadPairs; ++i) pair[i] = load_tagged_pair(words + 2 * i);
#pragma unroll
        for (int i = 0; i < kHeadPairs; ++i)
            all &= is_of(call, pair[i].x) && is_of(call, pair[i].y);
        here = all;
        if (here) {
            rows = static_cast<unsigned>(pair[0].y);
            heard.same &= static_cast<unsigned>(pair[0].x) == a.signature &&
                          static_cast<unsigned>(pair[1].x) == subject &&
                          static_cast<unsigned>(pair[1].y) == a.communicator;
            if constexpr (!kPadded) {
                overflow = static_cast<unsigned>(pair[2].x);
                overflow_rows = static_cast<unsigned>(pair[2].y);
                room = static_cast<unsigned>(pair[3].x);
            }
        } else if (spins % kSpinsBetweenLooks == 0) {
            const Found found = look(call, kPhaseReady, rank, call.watch.transfer,
                                     static_cast<unsigned>(pair[0].y >> 32), 0, since);
            here = found != kHere;
            heard.fine &= found != kStop;
            if (found == kGone) atomicOr(&call.masked[rank / 32], 1u << rank % 32);
        }
    }
    if (waits && began && blockIdx.x == 0)
        atomicMax(&a.longest_wait_ns[rank], static_cast<long long>(nanoseconds() - began));
    if constexpr (!kPadded)
        if (blockIdx.x == 0) heard.overflow.learn(rank, overflow, overflow_rows, room);
    // Counts become addresses, so no peer's word is taken for more than there can be.
    return static_cast<int>(min(rows, static_cast<unsigned>(kMaxTokens)));
}

// A word of a rank's head as other calls have them. Masked ranks count as being where this one is.
template <typename Arguments>
__device__ __forceinline__ int head_word(const Arguments& a, const Call& call, int rank, int word) {
    const unsigned long long* const words = count_word(call.bases[a.rank], call.watch.transfer,
                                                       is_masked(call, rank) ? a.rank : rank, 0);
    const unsigned signature = static_cast<unsigned>(load_tagged(words + kSignatureColumn));
    const bool refused = signature == kRefused;
    switch (word) {
        case kOperation: return refused ? kDispatchOperation : signature & 7;
        case kCommunicator: return static_cast<int>(load_tagged(words + kCommunicatorColumn));
        case kCall: return static_cast<int>(call.watch.transfer);
        case kStatus: return refused;
        case kCapacity: return -1;
        case kRowBytes: return refused ? 0 : (signature >> 6 & 0x1fff) * 16;
        case kMetadataBytes: return refused ? 0 : signature >> 19;
        case kSubject: return static_cast<int>(load_tagged(words + kSubjectColumn));
        case kForm: return refused ? 0 : signature >> 3 & 7;
        default: return 0;
    }
}

// One warp, after it has heard all ranks: what there is to tell the host. False: give up.
template <typename Arguments>
__device__ __forceinline__ bool judge_heads(const Arguments& a, const Call& call,
                                            const Heard& heard) {
    if (!__all_sync(kAll, heard.fine)) return false;
    const bool is_first = threadIdx.x % 32 == 0;
    if (!kPadded && blockIdx.x == 0 && is_first) heard.overflow.tell(call.watch);
    if (__all_sync(kAll, heard.same)) return true;
    if (is_first)
        report_heads(call.watch, a.rank,
                     [&](int rank, int word) { return head_word(a, call, rank, word); });
    return false;
}

// One warp of block 0 in a combine, beside those that add up.
template <typename Arguments>
__device__ __forceinline__ void hear_heads(const Arguments& a, Call& call, unsigned subject) {
    Heard heard;
#pragma unroll 1
    for (int first = 0; first < kNumRanks; first += 32)
        hear_head(a, call, first + static_cast<int>(threadIdx.x % 32), subject, heard);
    judge_heads(a, call, heard);
}
