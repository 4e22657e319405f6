// Waiting and telling: every word that ranks or blocks wait for, and the report of a wait that ends
// without it. docs/protocol/ht.md, "Words", says who writes what and when.
#pragma once

#include "common/ptx.cuh"

// Work is taken, not assigned: some multiprocessors reach the wire much faster than others. The
// number is on its way while the warp does something else; `taken` waits for it.
__device__ __forceinline__ int take(unsigned* counter, int count = 1) {
    return threadIdx.x % 32 == 0 ? static_cast<int>(atomicAdd(counter, count)) : 0;
}

__device__ __forceinline__ int taken(int ticket) { return __shfl_sync(0xffffffffu, ticket, 0); }

// What waits need to know of the rank they happen on.
struct Watch {
    State* state;
    Control* control;
    unsigned transfer;
    unsigned operation;
    const unsigned* ready;  // [kNumRanks] last transfer that each rank has begun
    int rank;
    const unsigned* masked;  // [kNumRanks] not 0: nobody waits for that rank; or null
};

constexpr unsigned kEagerSpins = 8;
constexpr unsigned kSpinsBetweenPolls = 256;

// `now` is at least `wanted`; counters may wrap around.
__device__ __forceinline__ bool reached(unsigned now, unsigned wanted) {
    return static_cast<int>(now - wanted) >= 0;
}

// Structs travel by value into what is not inlined: a reference would put them on the stack.
__device__ __noinline__ void report(const Watch watch, Phase phase, int peer, unsigned expected,
                                    unsigned seen, int index, unsigned long long waited_ns) {
    if (atomicCAS(&watch.state->failed, 0u, 1u) != 0u) return;  // the first wait to expire speaks
    // A rank that has not begun this transfer, the one furthest behind, keeps the others from going
    // on.
    for (int rank = 0; rank < kNumRanks && phase < kPhaseAgreement; ++rank) {
        if (rank == watch.rank) continue;
        if (watch.masked != nullptr && load_relaxed_system(&watch.masked[rank]) != 0) continue;
        const unsigned begun = load_relaxed_system(&watch.ready[rank]);
        if (reached(begun, watch.transfer) ||
            (phase == kPhaseReady && reached(begun, seen) && peer >= 0))
            continue;
        phase = kPhaseReady;
        peer = rank;
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

// The ranks are not in the same call: `header(rank, word)` is what they said. One thread.
template <typename HeaderOf>
__device__ __forceinline__ void report_headers(const Watch& watch, int peer,
                                               const HeaderOf& header) {
#pragma unroll 1
    for (int rank = 0; rank < kNumRanks; ++rank)
#pragma unroll 1
        for (int word = 0; word < kHeaderWords; ++word)
            watch.control->headers[rank * kHeaderWords + word] = header(rank, word);
    report(watch, kPhaseAgreement, peer, 0, 0, 0, 0);
}

// Whether the host of a rank has called abort(). Each writes a word of its own at every rank.
__device__ __forceinline__ bool has_aborted(const Watch& watch, int rank) {
    return load_relaxed_system(watch.ready + (kAbortsAt - kReadyAt) / 4 + rank) != 0;
}

// The first rank that has, or -1.
__device__ __forceinline__ int aborted_by(const Watch& watch) {
#pragma unroll 1
    for (int rank = 0; rank < kNumRanks; ++rank)
        if (has_aborted(watch, rank)) return rank;
    return -1;
}

__device__ __forceinline__ bool has_failed(const Watch& watch) {
    return load_acquire_device(&watch.state->failed) != 0u;
}

// Slow half of a wait: when it began, or 0 if it must end.
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
    const unsigned long long limit =
        *reinterpret_cast<volatile unsigned long long*>(&watch.control->timeout_ns);
    // What this rank's own blocks wait for is late because of a peer: whoever waits for that one
    // speaks.
    if (now - since < (peer < 0 ? 2 * limit : limit)) return since;
    report(watch, phase, peer, expected, seen, index, now - since);
    return 0;
}

// Waits until `word`, which a peer or this GPU writes, has reached `wanted`; false: give up.
__device__ __forceinline__ bool wait_until(const unsigned* word, unsigned wanted,
                                           const Watch& watch, Phase phase, int peer,
                                           int index = 0) {
    unsigned long long since = 0;
    for (unsigned spins = 1;; ++spins) {
        const unsigned now = load_acquire_system(word);
        if (reached(now, wanted)) return true;
        if (spins > kEagerSpins) __nanosleep(40);  // leaves the memory system to what is awaited
        if (spins % kSpinsBetweenPolls != 0) continue;
        since = check_deadline(watch, phase, peer, wanted, now, index, since);
        // Once more: a rank that fails since others are in another call has still to tell them.
        if (since == 0) return reached(load_acquire_system(word), wanted);
    }
}

// All blocks of this grid's row meet; what they wrote before is visible after. All of them are
// resident: grids are no larger than the GPU has multiprocessors.
__device__ __forceinline__ bool grid_barrier(const Watch& watch) {
    __shared__ bool opened;
    __syncthreads();
    if (threadIdx.x == 0) {
        State* state = watch.state;
        // Read before arriving: nobody opens the barrier before this block has arrived.
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
