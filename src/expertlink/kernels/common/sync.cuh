// Waiting and telling: every word that ranks or blocks wait for, and the report of a wait that ends
// without it. docs/architecture.md, "The flag protocol", says who writes what and when.
#pragma once

#include "common/ptx.cuh"

// Phases of a wait, as watchdog.py names them; the last three are reasons to end all waits.
enum Phase {
    kPhaseBlocks = 1,
    kPhaseCredit = 2,
    kPhaseReady = 3,
    kPhaseRow = 4,
    kPhaseAgreement = 5,
    kPhaseAborted = 6,
    kPhaseHalves = 7,
};

// What a rank says of its call, in words that engines/header.py names; the last two are the nvlink
// engine's own. Reports of disagreement hold the words of all ranks.
enum Head {
    kOperation,
    kCommunicator,
    kCall,  // number of the transfer
    kStatus,
    kCapacity,
    kRowBytes,
    kMetadataBytes,
    kSubject,  // transfer of the dispatch whose routing the call uses; 0: a new routing
    kForm,     // bit 0: new weights travel, bit 1: the host waits for the counts
    kPool,     // zero copy: which pool has the view of this rank
    kHeadWords
};
static_assert(kHeadWords == kHostHeadWords);

// Device memory of one rank, zeroed at start.
struct State {
    unsigned sent;        // transfers whose sending half is over
    unsigned received;    // transfers whose receiving half is over
    unsigned arrived;     // blocks at the grid barrier
    unsigned generation;  // times the grid barrier has opened
    unsigned left_send;   // blocks that are done with the sending half
    unsigned left_place;  // blocks that are done with the receiving half
    unsigned planned;     // last transfer whose slots are known
    unsigned failed;      // not 0: a wait has expired, nobody waits any more
    unsigned next_send;   // work of the sending half that no warp has taken yet
    unsigned next_place;  // work of the receiving half
    unsigned deferred;    // not 0: no rows are placed: a later launch does, or the ranks disagree
    unsigned overflow;    // low latency: last transfer that found no room, how many rows it had,
    unsigned overflow_rows, overflow_room;  // and for how many there was room
    unsigned overflow_told;                 // last one, of any rank, that the host has been told of
};
static_assert(sizeof(State) <= 4 * kHostStateWords);

// Work is taken, not assigned: some multiprocessors reach the wire much faster than others. The
// number is on its way while the warp does something else; `taken` waits for it.
__device__ __forceinline__ int take(unsigned* counter, int count = 1) {
    return threadIdx.x % 32 == 0 ? static_cast<int>(atomicAdd(counter, count)) : 0;
}

__device__ __forceinline__ int taken(int ticket) { return __shfl_sync(0xffffffffu, ticket, 0); }

// Host memory that the device writes, one per rank.
struct Control {
    unsigned reported;  // not 0: the words below are valid
    unsigned phase, peer, expected, seen, index, waited_ms, operation;
    unsigned long long timeout_ns;  // written by the host
    unsigned overflowed;            // static shapes: transfer that found no room, and for whom
    unsigned overflow_rank, overflow_rows, overflow_capacity;
    unsigned unused[2];
    unsigned mail_number;  // transfer that the mail below belongs to
    unsigned mail[1];  // see plan.cuh; reports of disagreement leave the heads of all ranks there
};

constexpr int kMailWords = 6;  // of a mail, before the heads

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
constexpr unsigned kSpinsBetweenLooks = 256;

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
    control->peer = static_cast<unsigned>(peer);
    control->expected = expected;
    control->seen = seen;
    control->index = static_cast<unsigned>(index);
    control->waited_ms = static_cast<unsigned>(waited_ns / 1000000ull);
    control->operation = watch.operation;
    store_release_system(&control->reported, watch.transfer ? watch.transfer : 1u);
}

// The ranks are not in the same call: `head(rank, word)` is what they said. One thread.
template <typename HeadOf>
__device__ __forceinline__ void report_heads(const Watch& watch, int peer, const HeadOf& head) {
#pragma unroll 1
    for (int rank = 0; rank < kNumRanks; ++rank)
#pragma unroll 1
        for (int word = 0; word < kHeadWords; ++word)
            watch.control->mail[kMailWords + rank * kHeadWords + word] = head(rank, word);
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

__device__ __forceinline__ bool gave_up(const Watch& watch) {
    return load_acquire_device(&watch.state->failed) != 0u;
}

// Slow half of a wait: when it began, or 0 if it must end.
__device__ __noinline__ unsigned long long look_at_clock(const Watch watch, Phase phase, int peer,
                                                         unsigned expected, unsigned seen,
                                                         int index, unsigned long long since) {
    if (gave_up(watch)) return 0;
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
        if (spins % kSpinsBetweenLooks != 0) continue;
        since = look_at_clock(watch, phase, peer, wanted, now, index, since);
        // Once more: a rank that fails since others are in another call has still to tell them.
        if (since == 0) return reached(load_acquire_system(word), wanted);
    }
}

// All blocks of this grid's row meet; what they wrote before is visible after. All of them are
// resident: grids are no larger than the GPU has multiprocessors.
__device__ __forceinline__ bool meet_blocks(const Watch& watch) {
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
