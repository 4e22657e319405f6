// How a launch begins, and how it publishes its progress.
#pragma once

#include "ll/waits.cuh"

namespace ll {

constexpr int kReceivedLane = 30, kSentLane = 31;

// Every thread. Reads which transfer this launch is, and waits until peers have room for what it
// sends. `prepare` reads nothing that an earlier launch has written, so it may run beside the end
// of that one. `loads` are issued right after it. False: a wait has expired, now or earlier.
template <typename Arguments, typename Prepare, typename Loads>
__device__ __forceinline__ bool begin_call(const Arguments& a, Call& call, const Prepare& prepare,
                                           const Loads& loads) {
    const int lane = threadIdx.x % 32;
    const bool in_last = threadIdx.x / 32 == blockDim.x / 32 - 1, is_last = in_last && lane == 31;
    const bool sends = a.flags & kSend;
    char* const base = in_last ? a.bases[a.rank] : nullptr;
    if (in_last)
#pragma unroll 1
        for (int rank = lane; rank < kNumPeers; rank += 32) call.bases[rank] = a.bases[rank];
    if (is_last) {
        call.watch = {
            a.state, a.control,         0, static_cast<unsigned>(a.operation), ready_word(base, 0),
            a.rank,  a.counters->masked};
        call.policy = {a.counters, a.longest_wait_ns};
    }
    prepare();
    wait_for_predecessor();
    // Two lanes of the last warp read how many launches there have been.
    const bool counts = in_last && lane >= kReceivedLane;
    unsigned long long* const counter =
        lane == kSentLane ? &a.counters->sent : &a.counters->received;
    unsigned long long launches = 0;
    unsigned credit[kRankWords];
    int masked[kRankWords];
    if (counts) launches = load_tagged(counter);
    if (is_last) call.stopped = load_fresh(reinterpret_cast<const int*>(&a.state->failed)) != 0;
    if (threadIdx.x < 32)
#pragma unroll
        for (int word = 0; word < kRankWords; ++word)
            masked[word] = load_fresh(reinterpret_cast<const int*>(
                &a.counters->masked[min(word * 32 + lane, kNumPeers - 1)]));
    if (in_last && sends)
#pragma unroll
        for (int word = 0; word < kRankWords; ++word)
            credit[word] =
                load_acquire_system(credit_word(base, min(word * 32 + lane, kNumPeers - 1)));
    loads();
    if (threadIdx.x < 32)
#pragma unroll
        for (int word = 0; word < kRankWords; ++word) {
            const bool exists = word * 32 + lane < kNumPeers;
            const unsigned bits = __ballot_sync(kAll, exists && masked[word] != 0);
            if (lane == 0) call.masked[word] = bits;
        }
    if (in_last) {
        __syncwarp();  // the last lane has written `watch`, another one may add the transfer
        launches >>= kUnitBits;
        const unsigned number = number_of(launches + 1);
        // The transfer that peers must have received before this one is sent, and the last one
        // received.
        constexpr unsigned long long kBack = kSets - 1;
        const unsigned before =
            number_of(lane == kSentLane ? max(launches, kBack) - kBack : launches);
        if (counts) {
            (lane == kSentLane ? call.sending : call.receiving) = number;
            if (lane == kReceivedLane) call.received = before;
            if (sends == (lane == kSentLane)) call.watch.transfer = number;
        }
        if (sends) {
            const unsigned needed = __shfl_sync(kAll, before, kSentLane);
            bool room = true;
#pragma unroll
            for (int word = 0; word < kRankWords; ++word) room &= reached(credit[word], needed);
            if (!__all_sync(kAll, room) && !peers_have_room(call, needed)) call.stopped = 1;
        }
    }
    __syncthreads();
    // The next launch may take its place on the GPU; it waits for the end of this one. Where calls
    // of another arena need SMs too, it starts when this one leaves.
    if (!(a.flags & kAlone)) let_follower_start();
    // After the loads, so that no block of this launch can read the next number.
    if (counts && (lane == kSentLane ? sends : a.flags & kReceive))
        atomicAdd(counter, blockIdx.x == 0 ? kUnits - (gridDim.x - 1) : 1ull);
    if (is_last && sends && blockIdx.x == 0)
        a.counters->drawn[(set_of(call.sending) + 1) % kSets] = 0;
    // A whole call begins where no half of another one is left, and a receiving half where a
    // sending one has been. What this launch does otherwise is wrong, but reported.
    if (is_last && blockIdx.x == 0 && (a.flags & kReceive) &&
        sends != (call.sending == call.receiving))
        report(call.watch, kPhaseHalves, -1, call.sending, call.receiving, 0, 0);
    return !call.stopped;
}

// Publishes to all peers where this rank is. One warp. The launches before are over, so the rows of
// all transfers before `receiving` have been read and kSentinel has been put back. The release
// waits for what the warp has stored, so it should be one that has not stored yet.
template <typename Arguments>
__device__ __forceinline__ void publish_progress(const Arguments& a, const Call& call) {
#pragma unroll 1
    for (int step = threadIdx.x % 32; step < kNumPeers; step += 32) {
        const int peer = (a.rank + step) % kNumPeers;
        if (is_masked(call, peer)) continue;
        store_release_system(credit_word(call.bases[peer], a.rank), call.received);
        if (a.flags & kSend)
            store_relaxed_system(ready_word(call.bases[peer], a.rank), call.sending);
    }
}

}  // namespace ll
