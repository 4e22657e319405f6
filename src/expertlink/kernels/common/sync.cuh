// Bounded waits: the words that ranks or blocks wait for, and the report of a wait that expires.
// docs/protocol/ht.md, "Words", says who writes what and when.
#pragma once

#include "common/ptx.cuh"

// Warps take work from a counter: some multiprocessors reach the wire much faster than others, so a
// fixed share would leave them idle. `take` returns at once, `taken` waits for the number.
__device__ __forceinline__ int take(unsigned* counter, int count = 1) {
    return threadIdx.x % 32 == 0 ? static_cast<int>(atomicAdd(counter, count)) : 0;
}

__device__ __forceinline__ int taken(int ticket) { return __shfl_sync(0xffffffffu, ticket, 0); }

// What a wait has to know of its rank.
struct Watch {
    State* state;
    Control* control;
    unsigned transfer;
    unsigned operation;
    const unsigned* ready;   // [kNumPeers] last transfer that each peer has begun
    int rank;                // this one, among the peers of its host
    const unsigned* masked;  // [kNumPeers] not 0: nobody waits for that peer; or null
};

constexpr unsigned kEagerSpins = 8;
constexpr unsigned kSpinsBetweenPolls = 256;

// Whether `now` is at least `wanted`. Counters may wrap around.
__device__ __forceinline__ bool reached(unsigned now, unsigned wanted) {
    return static_cast<int>(now - wanted) >= 0;
}

// Writes the report of the first wait that expires. `watch` is passed by value: this is not
// inlined, and a reference would put the struct on the caller's stack.
__device__ __noinline__ void report(const Watch watch, Phase phase, int peer, unsigned expected,
                                    unsigned seen, int index, unsigned long long waited_ns) {
    if (atomicCAS(&watch.state->failed, 0u, 1u) != 0u) return;  // only the first one reports
    // Blames the peer that is furthest behind: one that has not begun this transfer keeps the
    // others from going on.
    for (int other = 0; other < kNumPeers && phase < kPhaseAgreement; ++other) {
        if (other == watch.rank) continue;
        if (watch.masked != nullptr && load_relaxed_system(&watch.masked[other]) != 0) continue;
        const unsigned begun = load_relaxed_system(&watch.ready[other]);
        if (reached(begun, watch.transfer) ||
            (phase == kPhaseReady && reached(begun, seen) && peer >= 0))
            continue;
        phase = kPhaseReady;
        peer = other;
        expected = watch.transfer;
        seen = begun;
    }
    Control* control = watch.control;
    control->phase = phase;
    control->peer = peer;
    control->expected = expected;
    control->seen = seen;
    control->index = static_cast<unsigned>(index);
    control->waited_ms = static_cast<unsigned>(waited_ns / 1000000ull);
    control->operation = watch.operation;
    store_release_system(&control->reported, watch.transfer ? watch.transfer : 1u);
}

// Reports that the ranks are not in the same call. `header(rank, word)` is what they said. One
// thread.
template <typename HeaderOf>
__device__ __forceinline__ void report_headers(const Watch& watch, int peer,
                                               const HeaderOf& header) {
#pragma unroll 1
    for (int rank = 0; rank < kNumSources; ++rank)
#pragma unroll 1
        for (int word = 0; word < kHeaderWords; ++word)
            watch.control->headers[rank * kHeaderWords + word] = header(rank, word);
    report(watch, kPhaseAgreement, peer, 0, 0, 0, 0);
}

// Whether the process of a peer has called abort(). Each has a word of its own at every peer.
__device__ __forceinline__ bool has_aborted(const Watch& watch, int peer) {
    return load_relaxed_system(watch.ready + (kAbortsAt - kReadyAt) / 4 + peer) != 0;
}

// The first peer that has called abort(), or -1.
__device__ __forceinline__ int aborted_by(const Watch& watch) {
#pragma unroll 1
    for (int peer = 0; peer < kNumPeers; ++peer)
        if (has_aborted(watch, peer)) return peer;
    return -1;
}

__device__ __forceinline__ bool has_failed(const Watch& watch) {
    return load_acquire_device(&watch.state->failed) != 0u;
}

// The slow path of a wait: abort, failure and time-out. Returns when the wait began, or 0 if it
// must end.
__device__ __noinline__ unsigned long long check_deadline(const Watch watch, Phase phase, int peer,
                                                          unsigned expected, unsigned seen,
                                                          int index, unsigned long long since) {
    if (has_failed(watch)) return 0;
    const int aborter = aborted_by(watch);
    if (aborter >= 0) {
        report(watch, kPhaseAborted, aborter, 0, 0, 0, 0);
        return 0;
    }
    const unsigned long long now = nanoseconds();
    if (since == 0) return now;
    // Volatile: the host may change it at any time.
    const unsigned long long limit =
        *reinterpret_cast<volatile unsigned long long*>(&watch.control->timeout_ns);
    // Own blocks are late because of a peer. The wait for that peer expires first and reports it.
    if (now - since < (peer < 0 ? 2 * limit : limit)) return since;
    report(watch, phase, peer, expected, seen, index, now - since);
    return 0;
}

// Waits until `word`, which a peer or this GPU writes, has reached `wanted`. False: the wait was
// ended. Acquire: what was written before the word is read after it.
__device__ __forceinline__ bool wait_until(const unsigned* word, unsigned wanted,
                                           const Watch& watch, Phase phase, int peer,
                                           int index = 0) {
    unsigned long long since = 0;
    for (unsigned spins = 1;; ++spins) {
        const unsigned now = load_acquire_system(word);
        if (reached(now, wanted)) return true;
        if (spins > kEagerSpins) __nanosleep(40);  // polling slows down what is awaited
        if (spins % kSpinsBetweenPolls != 0) continue;
        since = check_deadline(watch, phase, peer, wanted, now, index, since);
        // Once more: a rank that fails because others are in another call has still to tell them.
        if (since == 0) return reached(load_acquire_system(word), wanted);
    }
}

// Barrier of all blocks in this row of the grid. What they wrote before is visible after. All of
// them are resident: a grid has no more blocks than the GPU has multiprocessors.
__device__ __forceinline__ bool grid_barrier(const Watch& watch) {
    __shared__ bool opened;
    __syncthreads();
    if (threadIdx.x == 0) {
        State* state = watch.state;
        // Acquire, and read before arriving: nobody opens the barrier before this block has
        // arrived.
        const unsigned generation = load_acquire_device(&state->generation);
        opened = true;
        if (arrive_device(&state->arrived) == gridDim.x - 1) {
            state->arrived = 0;
            store_release_device(&state->generation, generation + 1);
        } else {
            opened = wait_until(&state->generation, generation + 1, watch, kPhaseBlocks, -1);
        }
    }
    __syncthreads();
    return opened;
}
