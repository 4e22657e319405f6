// Low latency, receiving half of a dispatch: from the counts of all ranks to the slots of
// everything that will come. Every block works them out for itself.
#pragma once

#include "latency/route.cuh"

// Shared memory of the receiving half.
struct Arrivals : RowsFrom {
    int* first_slot;  // [R, E_loc] first slot of each source's rows of each local expert
    int* totals;      // [E_loc] rows of each local expert
    int* starts;      // [E_loc + 1] FLAT: first slot of each expert's group
};

// All warps of `threads` threads, which meet at barrier 1. False: give up.
__device__ __forceinline__ void meet(int threads) {
    asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

// Reports rows for which there is no room; the host looks at it later. One thread.
__device__ __forceinline__ void report_overflow(const DispatchArguments& a, unsigned transfer,
                                                int rows) {
    Control* const control = a.control;
    if (load_acquire_system(&control->overflowed) != 0) return;
    control->overflow_rank = a.rank;
    control->overflow_rows = rows;
    control->overflow_capacity = a.max_slots;
    store_release_system(&control->overflowed, transfer);
}

// What the caller and the handle keep of the counts.
__device__ __forceinline__ void keep_counts(const DispatchArguments& a, const Arrivals& in,
                                            unsigned transfer, int thread, int threads) {
#pragma unroll 1
    for (int r = thread; r < kNumRanks; r += threads) {
        a.rows_from[r] = a.rows_from_out[r] = in.rows_from[r];
        a.first_row[r] = in.first_row[r];
        if (a.rows_received != nullptr) {
            a.rows_received[r] += in.rows_from[r];
            if (r != a.rank)
                a.bytes_received[r] +=
                    static_cast<long long>(in.rows_from[r]) * (a.row_bytes + a.scale_bytes);
        }
    }
#pragma unroll 1
    for (int e = thread; e < a.num_local; e += threads) {
        const int count = in.totals[e];
        a.tokens_per_expert[e] = a.counts_out[e] = count;
        if (a.tokens_stat != nullptr) a.tokens_stat[e] += count;
    }
    if (kExpanded && !kPadded)
#pragma unroll 1
        for (int e = thread; e <= a.num_local; e += threads) a.offsets_out[e] = in.starts[e];
#pragma unroll 1
    for (int i = thread; i < kNumRanks * a.num_local; i += threads)
        a.first_slot[i] = in.first_slot[i];
    const int rows = kExpanded && !kPadded ? in.starts[a.num_local] : in.total;
    if (thread == 0 && !kPadded && rows > a.max_slots) report_overflow(a, transfer, rows);
}

// How many rows come from a rank. Threads of one warp, each for ranks of its own.
__device__ __forceinline__ bool receive_heads(const DispatchArguments& a, Call& call,
                                              Arrivals& in) {
    char* const base = call.bases[a.rank];
    const unsigned long long began = a.longest_wait_ns != nullptr ? nanoseconds() : 0;
    bool fine = true;
#pragma unroll 1
    for (int r = threadIdx.x % 32; r < kNumRanks; r += 32) {
        unsigned long long* const row = count_word(base, call.watch.transfer, r, 0);
        unsigned head = a.signature, rows = 0;
        bool lost = is_masked(call, r);
        if (!lost) {
            // The pair is stored at once, but only single words are sure to be read so.
            Found found = wait_tagged(call, row + kRowsColumn, r, kPhaseReady, rows);
            if (found == kHere) found = wait_tagged(call, row + kHeadColumn, r, kPhaseReady, head);
            lost = found == kGone;
            fine &= found != kStop;
            if (fine && began && blockIdx.x == 0)
                atomicMax(&a.longest_wait_ns[r], static_cast<long long>(nanoseconds() - began));
        }
        if (lost) atomicOr(&call.masked[r / 32], 1u << r % 32);
        if (fine && !lost && head != a.signature) {
            report(call.watch, kPhaseAgreement, r, a.signature, head, 0, 0);
            fine = false;
        }
        in.rows_from[r] = lost ? 0 : rows;
    }
    if (!__all_sync(kAll, fine)) return false;
    __syncwarp();
    in.add_up();
    return true;
}

// First slots of one local expert's rows, by source; one thread.
__device__ __forceinline__ bool receive_column(const DispatchArguments& a, Call& call, Arrivals& in,
                                               int expert) {
    constexpr int kAtOnce = kNumRanks < 8 ? kNumRanks : 8;  // loads under way together
    char* const base = call.bases[a.rank];
    int slot = kPadded ? expert * kNumRanks * kMaxTokens : 0;
    const int begin = slot;
    bool fine = true;
    for (int first = 0; first < kNumRanks; first += kAtOnce) {
        unsigned long long word[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            word[i] = first + i < kNumRanks
                          ? load_tagged(count_word(base, call.watch.transfer, first + i,
                                                   kFirstCountColumn + expert))
                          : 0;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int source = first + i;
            if (source >= kNumRanks) break;
            unsigned count = static_cast<unsigned>(word[i]);
            if (is_masked(call, source)) {
                count = 0;
            } else if (static_cast<unsigned>(word[i] >> 32) != call.watch.transfer) {
                const Found found = wait_tagged(
                    call, count_word(base, call.watch.transfer, source, kFirstCountColumn + expert),
                    source, kPhaseReady, count);
                fine &= found != kStop;
                if (found == kGone) atomicOr(&call.masked[source / 32], 1u << source % 32);
                if (found != kHere) count = 0;
            }
            in.first_slot[source * a.num_local + expert] = slot;
            slot += count;
        }
    }
    in.totals[expert] = slot - begin;
    return fine;
}

// One warp of block 0: which ranks count as lost in this transfer.
__device__ __forceinline__ void tell_lost(const DispatchArguments& a, const Call& call) {
#pragma unroll 1
    for (int r = threadIdx.x % 32; r < kNumRanks; r += 32)
        atomicExch(&a.counters->decided[r],
                   static_cast<unsigned long long>(call.watch.transfer) * 2 + is_masked(call, r));
}

// One warp of another block: waits for that. Block 0 ends its own waits.
__device__ __forceinline__ bool learn_lost(const DispatchArguments& a, Call& call) {
    bool fine = true;
#pragma unroll 1
    for (int r = threadIdx.x % 32; r < kNumRanks && fine; r += 32) {
        unsigned long long decided;
        while ((decided = load_tagged(&a.counters->decided[r])) / 2 != call.watch.transfer && fine)
            fine = !gave_up(call.watch);
        const unsigned bit = 1u << r % 32;
        if (decided & 1)
            atomicOr(&call.masked[r / 32], bit);
        else
            atomicAnd(&call.masked[r / 32], ~bit);
    }
    __threadfence();  // the counts that block 0 has seen are seen here
    return __all_sync(kAll, fine);
}

// The warps from `first_warp` on: slots of everything that will come. False: give up.
__device__ __forceinline__ bool receive_counts(const DispatchArguments& a, Call& call, Arrivals& in,
                                               int first_warp) {
    const int thread = threadIdx.x - first_warp * 32, threads = blockDim.x - first_warp * 32;
    // Slots depend on the counts of all ranks. So where a rank may be lost, one block decides for
    // all which are, once everything that the others have to say is here; then nobody waits any
    // more.
#pragma unroll 1
    for (int pass = a.flags & kMaskLost ? 0 : 1; pass < 2; ++pass) {
        bool fine = true;
        if (pass == 0 && blockIdx.x != 0) {
            fine = thread >= 32 || learn_lost(a, call);
        } else {
            if (thread < 32) fine = receive_heads(a, call, in);
            // Where rows are not expanded, the counts of experts are for one block to keep.
            const int columns = kExpanded || blockIdx.x == 0 ? a.num_local : 0;
            const int waiting = threads == 32 ? 0 : 32;
#pragma unroll 1
            for (int e = thread < waiting ? columns : thread - waiting; e < columns;
                 e += threads - waiting)
                fine &= receive_column(a, call, in, e);
        }
        if (!fine) call.stopped = 1;
        meet(threads);
        if (pass == 0 && blockIdx.x == 0 && thread < 32) tell_lost(a, call);
    }
    if (call.stopped) return false;
    if (kExpanded && !kPadded) {
#pragma unroll 1
        for (int e = thread; e < a.num_local; e += threads) in.starts[e] = align_up(in.totals[e]);
        meet(threads);
        if (thread < 32) {
            const int end = scan_exclusive(in.starts, a.num_local);
            if (thread == 0) in.starts[a.num_local] = end;
        }
        meet(threads);
#pragma unroll 1
        for (int i = thread; i < kNumRanks * a.num_local; i += threads)
            in.first_slot[i] += in.starts[i % a.num_local];
        meet(threads);
    }
    return true;
}
