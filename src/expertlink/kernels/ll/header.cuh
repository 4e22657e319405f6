// Headers: what every rank publishes of its call, in every transfer, so that none takes another
// call for its own. A header is the start of a count row: pairs of tagged words.
#pragma once

#include "ll/shares.cuh"

namespace ll {

// Only layouts that may find no room have the last two pairs.
constexpr int kHeaderPairs = kPadded ? 2 : 4;

// Fields of a signature. The last one, the bytes of scales, has all bits from kScalesBit on.
constexpr unsigned kOperationMask = (1u << kFormBit) - 1;
constexpr unsigned kFormMask = (1u << (kRowBit - kFormBit)) - 1;
constexpr unsigned kRowMask = (1u << (kScalesBit - kRowBit)) - 1;

// The transfer of the dispatch that a call refers to; 0: a new routing. The load may take a while.
template <typename Arguments>
__device__ __forceinline__ unsigned load_subject(const Arguments& a) {
    return a.subject == nullptr ? 0u : static_cast<unsigned>(load_fresh(a.subject));
}

// The count row in which a peer says what call it is in.
template <typename Arguments>
__device__ __forceinline__ int header_row(const Arguments& a, int peer) {
    if constexpr (kSpansHosts)
        return source_of(a.host, peer);
    else
        return peer;
}

// Publishes the header to one peer. One lane.
template <typename Arguments>
__device__ __forceinline__ void publish_header(const Arguments& a, const Call& call, int peer,
                                               unsigned rows, unsigned subject) {
    const unsigned transfer = call.sending;
    unsigned long long* const words =
        count_word(call.bases[peer], transfer, header_row(a, a.rank), 0);
    store_tagged_pair(words + kColumnSignature, transfer, a.signature, rows);
    store_tagged_pair(words + kColumnSubject, transfer, subject, a.communicator);
    if constexpr (!kPadded && kSpansHosts) {
        // Only the messages of a dispatch reach all ranks.
        store_tagged_pair(words + kColumnOverflow, transfer, 0, 0);
        store_tagged_pair(words + kColumnRoom, transfer, 0, 0);
    } else if constexpr (!kPadded) {
        State* const state = a.state;
        store_tagged_pair(words + kColumnOverflow, transfer, load_relaxed_system(&state->overflow),
                          load_relaxed_system(&state->overflow_rows));
        store_tagged_pair(words + kColumnRoom, transfer, load_relaxed_system(&state->overflow_room),
                          0);
    }
}

// Publishes the headers of a call without counts to all peers. One warp.
template <typename Arguments>
__device__ __forceinline__ void publish_headers(const Arguments& a, const Call& call,
                                                unsigned subject) {
#pragma unroll 1
    for (int peer = threadIdx.x % 32; peer < kNumPeers; peer += 32)
        if (!is_masked(call, peer)) publish_header(a, call, peer, 0, subject);
}

// The latest overflow that headers name. Of several in one transfer, that of the first rank.
struct Overflow {
    unsigned number = 0, rows, room;
    int rank;

    // All lanes. A lane without an overflow has number 0.
    __device__ __forceinline__ void merge(int of, unsigned its_number, unsigned its_rows,
                                          unsigned its_room) {
        const unsigned latest = __reduce_max_sync(kAll, its_number);
        if (latest <= number) return;
        const int lane = __ffs(__ballot_sync(kAll, its_number == latest)) - 1;
        number = latest;
        rank = __shfl_sync(kAll, of, lane);
        rows = __shfl_sync(kAll, its_rows, lane);
        room = __shfl_sync(kAll, its_room, lane);
    }

    // Reports it to the host, once. One lane. All ranks learn the same in the same transfer.
    __device__ __forceinline__ void report_to_host(const Watch& watch) const {
        State* const state = watch.state;
        Control* const control = watch.control;
        if (number == 0 || state->overflow_reported == number) return;
        state->overflow_reported = number;
        if (load_acquire_system(&control->overflowed) != 0) return;
        control->overflow_rank = rank;
        control->overflow_rows = rows;
        control->overflow_capacity = room;
        store_release_system(&control->overflowed, number);
    }
};

// What the headers say.
struct Headers {
    bool fine = true;  // no wait was ended
    bool same = true;  // this lane's ranks are in the call of this rank
    Overflow overflow;
};

// Waits for the headers of some sources, one per lane. Returns how many rows the lane's source
// sends. One warp, whose lanes wait together.
template <typename Arguments>
__device__ __forceinline__ int read_header(const Arguments& a, Call& call, int source,
                                           unsigned subject, Headers& headers) {
    const unsigned long long began = a.longest_wait_ns != nullptr ? nanoseconds() : 0;
    const unsigned long long* const words =
        count_word(call.bases[a.rank], call.watch.transfer, min(source, kNumSources - 1), 0);
    const int peer = peer_of(min(source, kNumSources - 1));
    bool here = source >= kNumSources || is_masked(call, peer);
    const bool waits = !here;
    unsigned rows = 0, overflow = 0, overflow_rows = 0, room = 0;
    unsigned long long since = 0;
    for (unsigned spins = 1; !__all_sync(kAll, here); ++spins) {
        if (here) continue;
        // Pairs are stored at once, but only single words are sure to be read so: both tags are
        // checked.
        ulonglong2 pair[kHeaderPairs];
        bool all = true;
#pragma unroll
        for (int i = 0; i < kHeaderPairs; ++i) pair[i] = load_tagged_pair(words + 2 * i);
#pragma unroll
        for (int i = 0; i < kHeaderPairs; ++i)
            all &= is_of(call, pair[i].x) && is_of(call, pair[i].y);
        here = all;
        if (here) {
            rows = static_cast<unsigned>(pair[0].y);
            headers.same &= static_cast<unsigned>(pair[0].x) == a.signature &&
                            static_cast<unsigned>(pair[1].x) == subject &&
                            static_cast<unsigned>(pair[1].y) == a.communicator;
            if constexpr (!kPadded) {
                overflow = static_cast<unsigned>(pair[2].x);
                overflow_rows = static_cast<unsigned>(pair[2].y);
                room = static_cast<unsigned>(pair[3].x);
            }
        } else if (spins % kSpinsBetweenPolls == 0) {
            const WaitResult found = poll(call, kPhaseReady, peer, call.watch.transfer,
                                          static_cast<unsigned>(pair[0].y >> 32), 0, since);
            here = found != kArrived;
            headers.fine &= found != kAbort;
            if (found == kPeerMasked) atomicOr(&call.masked[peer / 32], 1u << peer % 32);
        }
    }
    if (waits && began && blockIdx.x == 0)
        atomicMax(&a.longest_wait_ns[peer], static_cast<long long>(nanoseconds() - began));
    if constexpr (!kPadded)
        if (blockIdx.x == 0) headers.overflow.merge(source, overflow, overflow_rows, room);
    // Counts become addresses, so a peer's word is clamped to what is possible.
    return static_cast<int>(min(rows, static_cast<unsigned>(kMaxTokens)));
}

// Whose header stands for that of a rank: in a combine only peers say where they are.
__device__ __forceinline__ int heard(const DispatchArguments&, int source) { return source; }

__device__ __forceinline__ int heard(const CombineArguments& a, int source) {
    return !kSpansHosts || host_of(source) == host_at(a, kNumHosts - 1) ? source : own_source(a);
}

// A word of a rank's header as `ht` has it, for reports, from those of `ll`.
__device__ __forceinline__ int report_word(unsigned signature, unsigned communicator,
                                           unsigned transfer, unsigned subject, int word) {
    const bool refused = signature == kRefused;
    switch (word) {
        case kOperation:
            return refused ? static_cast<int>(kOperationDispatch) : signature & kOperationMask;
        case kCommunicator: return static_cast<int>(communicator);
        case kCall: return static_cast<int>(transfer);
        case kStatus: return refused;
        case kCapacity: return kUnbounded;
        case kRowBytes: return refused ? 0 : (signature >> kRowBit & kRowMask) * 16;
        case kMetadataBytes: return refused ? 0 : signature >> kScalesBit;
        case kSubject: return static_cast<int>(subject);
        case kForm: return refused ? 0 : signature >> kFormBit & kFormMask;
        default: return 0;
    }
}

// The same of what a rank has published. Masked ranks count as being where this one is.
template <typename Arguments>
__device__ __forceinline__ int header_word(const Arguments& a, const Call& call, int rank,
                                           int word) {
    const unsigned long long* const words =
        count_word(call.bases[a.rank], call.watch.transfer,
                   is_masked(call, peer_of(rank)) ? own_source(a) : heard(a, rank), 0);
    return report_word(static_cast<unsigned>(load_tagged(words + kColumnSignature)),
                       static_cast<unsigned>(load_tagged(words + kColumnCommunicator)),
                       call.watch.transfer,
                       static_cast<unsigned>(load_tagged(words + kColumnSubject)), word);
}

// Reports what the headers say, if the host has to know. One warp, which has read all of them.
// False: the call must end.
template <typename Arguments>
__device__ __forceinline__ bool judge_headers(const Arguments& a, const Call& call,
                                              const Headers& headers) {
    if (!__all_sync(kAll, headers.fine)) return false;
    const bool is_first = threadIdx.x % 32 == 0;
    if (!kPadded && blockIdx.x == 0 && is_first) headers.overflow.report_to_host(call.watch);
    if (__all_sync(kAll, headers.same)) return true;
    if (is_first)
        report_headers(call.watch, own_source(a),
                       [&](int rank, int word) { return header_word(a, call, rank, word); });
    return false;
}

// Reads and judges the headers in a combine. One warp of block 0, beside those that sum.
template <typename Arguments>
__device__ __forceinline__ void read_headers(const Arguments& a, Call& call, unsigned subject) {
    Headers headers;
#pragma unroll 1
    for (int first = 0; first < kNumPeers; first += 32) {
        const int peer = first + static_cast<int>(threadIdx.x % 32);
        const bool exists = !kSpansHosts || peer < kNumPeers;
        read_header(a, call, exists ? header_row(a, peer) : kNumSources, subject, headers);
    }
    judge_headers(a, call, headers);
}

}  // namespace ll
