// Bounded waits for what peers write, and which rank is lost when one expires.
#pragma once

#include "ll/protocol.cuh"

namespace ll {

enum WaitResult { kArrived, kPeerMasked, kAbort };  // the last one: the wait was ended

// Functions that are not inlined take the block's `Call` by address and return one word: results by
// reference would need a stack.
constexpr unsigned long long kPollMasked = 1, kPollAbort = 2;

// Shows peers that this rank is alive, and returns when the awaited one last did: a rank that is
// only waiting itself must not be taken for lost. Masked ranks are told nothing: one that comes
// back would wait for ever for what nobody sends it any more.
__device__ __noinline__ unsigned long long exchange_alive(const Call* call, int peer,
                                                          unsigned long long now) {
    const int rank = call->watch.rank;
    Counters* const counters = call->policy.counters;
    for (int r = 0; r < kNumPeers; ++r)
        if (load_relaxed_system(&counters->masked[r]) == 0)
            store_relaxed_system(alive_word(call->bases[r], rank), static_cast<unsigned>(now));
    const unsigned said = load_relaxed_system(alive_word(call->bases[rank], peer));
    // Several warps may do this at once, with the same outcome.
    if (said != load_relaxed_system(&counters->alive_word[peer])) {
        store_relaxed_system(&counters->alive_word[peer], said);
        atomicExch(&counters->alive_at[peer], now);
    }
    return load_tagged(&counters->alive_at[peer]);
}

// The slow path of a wait, by one lane or by several alike. Returns when the wait began, or that it
// is over.
__device__ __noinline__ unsigned long long poll_slow(const Call* call, Phase phase, int peer,
                                                     unsigned expected, unsigned seen, int index,
                                                     unsigned long long since) {
    const Watch& watch = call->watch;
    const WaitPolicy& policy = call->policy;
    if (load_relaxed_system(&watch.masked[peer]) != 0) return kPollMasked;
    if (has_failed(watch)) return kPollAbort;
    const int aborter = !kMaskLost                       ? aborted_by(watch)
                        : has_aborted(watch, watch.rank) ? watch.rank
                                                         : -1;
    if (aborter >= 0) {
        report(watch, kPhaseAborted, aborter, 0, 0, 0, 0);
        return kPollAbort;
    }
    // Where lost ranks are masked: the abort may have come since the words were read above.
    if (kMaskLost && has_aborted(watch, peer)) {
        atomicExch(&policy.counters->masked[peer], 1u);
        return kPollMasked;
    }
    const unsigned long long now = nanoseconds();
    if (since == 0) since = now;
    // Volatile: the host may change it at any time.
    const unsigned long long limit =
        *reinterpret_cast<volatile unsigned long long*>(&watch.control->timeout_ns);
    unsigned long long quiet_since = since;
    if (kMaskLost) quiet_since = max(since, exchange_alive(call, peer, now));
    const bool quiet = now - min(now, quiet_since) >= limit;
    // Each peer may have waited in vain for all others, one after the other. After that time they
    // wait for each other, as in different calls.
    if (!quiet && now - since < kNumPeers * limit) return since;
    if (quiet && kMaskLost && peer != watch.rank) {
        // Whoever waits for this rank learns it at the next poll.
        atomicExch(&policy.counters->masked[peer], 1u);
        return kPollMasked;
    }
    report(watch, phase, peer, expected, seen, index, now - since);
    return kPollAbort;
}

__device__ __forceinline__ WaitResult poll(const Call& call, Phase phase, int peer,
                                           unsigned expected, unsigned seen, int index,
                                           unsigned long long& since) {
    since = poll_slow(&call, phase, peer, expected, seen, index, since);
    return since == kPollMasked ? kPeerMasked : since == kPollAbort ? kAbort : kArrived;
}

// Whether a tagged word is of the awaited transfer.
__device__ __forceinline__ bool is_of(const Call& call, unsigned long long word) {
    return static_cast<unsigned>(word >> 32) == call.watch.transfer;
}

// Waits for a tagged word. Returns what it carries, with the WaitResult above that.
__device__ __noinline__ unsigned long long wait_slowly(const Call* call,
                                                       const unsigned long long* word, int peer,
                                                       Phase phase) {
    const unsigned transfer = call->watch.transfer;
    long long* const longest = call->policy.longest_wait_ns;
    const unsigned long long began = nanoseconds();
    unsigned long long since = 0, result = 0;
    for (unsigned spins = 1;; ++spins) {
        const unsigned long long now = load_tagged(word);
        if (static_cast<unsigned>(now >> 32) == transfer) {
            result = tagged(kArrived, static_cast<unsigned>(now));
            break;
        }
        if (spins % kSpinsBetweenPolls != 0) continue;
        since = poll_slow(call, phase, peer, transfer, static_cast<unsigned>(now >> 32), 0, since);
        if (since == kPollMasked || since == kPollAbort) {
            result = tagged(since == kPollMasked ? kPeerMasked : kAbort, 0);
            break;
        }
    }
    if (longest != nullptr)
        atomicMax(&longest[peer], static_cast<long long>(nanoseconds() - began));
    return result;
}

// Waits for a tagged word. Each lane for itself.
__device__ __forceinline__ WaitResult wait_tagged(const Call& call, const unsigned long long* word,
                                                  int peer, Phase phase, unsigned& value) {
    unsigned long long now = load_tagged(word);
    WaitResult found = kArrived;
    if (!is_of(call, now)) {
        now = wait_slowly(&call, word, peer, phase);
        found = static_cast<WaitResult>(now >> 32);
    }
    value = static_cast<unsigned>(now);
    return found;
}

// Waits until peers have read what this rank sent kSets transfers ago, up to number `needed`. One
// warp. False: the wait was ended.
__device__ __noinline__ bool peers_have_room(const Call& call, unsigned needed) {
    bool fine = true;
    __syncwarp();  // all that is read of `call` was written by this warp
#pragma unroll 1
    for (int peer = threadIdx.x % 32; peer < kNumPeers; peer += 32) {
        const unsigned* const word = credit_word(call.bases[call.watch.rank], peer);
        unsigned long long since = 0;
        for (unsigned spins = 0;; ++spins) {
            const unsigned now = load_acquire_system(word);
            if (reached(now, needed)) break;
            // Also at the first poll: the peer may be masked.
            if (spins % kSpinsBetweenPolls != 0) continue;
            const WaitResult found = poll(call, kPhaseCredit, peer, needed, now, 0, since);
            if (found == kAbort) fine = false;
            if (found != kArrived) break;
        }
    }
    return __all_sync(kAll, fine);
}

}  // namespace ll
