// Receiving half of a dispatch: from the counts of all ranks to the slots of everything that will
// come. Every block computes them for itself.
#pragma once

#include "common/scan.cuh"
#include "ll/route.cuh"

namespace ll {

// Shared memory of the receiving half.
struct Arrivals : RowsFrom {
    int* first_slot;  // [R, E_loc] first slot of each source's rows of each local expert
    int* totals;      // [E_loc] rows of each local expert
    int* starts;      // [E_loc + 1] FLAT: first slot of each expert's group
};

// Named barriers, for some warps of a block. What a warp wrote before it came to one is visible to
// those that leave it.
enum Barrier { kWaitersBarrier = 1, kCountsBarrier = 2, kPlacingBarrier = 3 };

__device__ __forceinline__ void barrier_sync(Barrier where, int warps) {
    asm volatile("bar.sync %0, %1;" ::"r"(static_cast<int>(where)), "r"(warps * 32) : "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier where, int warps) {
    asm volatile("bar.arrive %0, %1;" ::"r"(static_cast<int>(where)), "r"(warps * 32) : "memory");
}

// Records an overflow. The header of the next transfer tells all ranks, this one too, so that all
// hosts learn it alike. One thread.
__device__ __forceinline__ void record_overflow(const DispatchArguments& a, unsigned transfer,
                                                int rows) {
    a.state->overflow = transfer;
    a.state->overflow_rows = static_cast<unsigned>(rows);
    a.state->overflow_room = static_cast<unsigned>(a.max_slots);
}

// Keeps the counts for the caller and the handle.
__device__ __forceinline__ void keep_counts(const DispatchArguments& a, const Arrivals& in,
                                            unsigned transfer, int thread, int threads) {
#pragma unroll 1
    for (int r = thread; r < kNumSources; r += threads) {
        a.rows_from[r] = a.rows_from_out[r] = in.rows_from[r];
        a.first_row[r] = in.first_row[r];
        if (a.rows_received != nullptr) {
            a.rows_received[r] += in.rows_from[r];
            if (r != own_source(a))
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
    for (int i = thread; i < kNumSources * a.num_local; i += threads)
        a.first_slot[i] = in.first_slot[i];
    const int rows = kExpanded && !kPadded ? in.starts[a.num_local] : in.total;
    if (thread == 0 && !kPadded && rows > a.max_slots) record_overflow(a, transfer, rows);
    if (thread == 0) *a.origin = static_cast<int>(transfer);
}

// Reads how many rows come from each source, and whether it is in this call. One warp.
__device__ __forceinline__ bool receive_headers(const DispatchArguments& a, Call& call,
                                                Arrivals& in, unsigned subject) {
    Headers headers;
    in.fill([&](int source) { return read_header(a, call, source, subject, headers); });
    return judge_headers(a, call, headers);
}

// Computes the first slots of one local expert's rows, by source. One thread. All words that are
// awaited are polled together.
__device__ __forceinline__ bool receive_column(const DispatchArguments& a, Call& call, Arrivals& in,
                                               int expert) {
    constexpr int kAtOnce = kNumSources < 8 ? kNumSources : 8;
    char* const base = call.bases[a.rank];
    int slot = kPadded ? expert * kNumSources * kMaxTokens : 0;
    const int begin = slot;
#pragma unroll 1
    for (int first = 0; first < kNumSources; first += kAtOnce) {
        unsigned long long word[kAtOnce];
        unsigned missing = 0;
        unsigned long long since = 0;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            word[i] = 0;
            if (first + i < kNumSources && !is_masked(call, peer_of(first + i))) missing |= 1u << i;
        }
        for (unsigned spins = 1; missing; ++spins) {
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                if (missing >> i & 1u)
                    word[i] = load_tagged(count_word(base, call.watch.transfer, first + i,
                                                     kColumnFirstCount + expert));
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                if (is_of(call, word[i])) missing &= ~(1u << i);
            if (missing == 0 || spins % kSpinsBetweenPolls != 0) continue;
            const int peer = peer_of(first + __ffs(missing) - 1);
            unsigned seen = 0;
#pragma unroll
            for (int i = kAtOnce - 1; i >= 0; --i)
                if (missing >> i & 1u) seen = static_cast<unsigned>(word[i] >> 32);
            const WaitResult found =
                poll(call, kPhaseReady, peer, call.watch.transfer, seen, 0, since);
            if (found == kAbort) return false;
            if (found == kArrived) continue;
            atomicOr(&call.masked[peer / 32], 1u << peer % 32);
            missing &= missing - 1;
            since = 0;  // the next one gets as much time
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            if (first + i >= kNumSources) break;
            in.first_slot[(first + i) * a.num_local + expert] = slot;
            if (is_of(call, word[i]))
                slot += min(static_cast<unsigned>(word[i]), static_cast<unsigned>(kMaxTokens));
        }
    }
    in.totals[expert] = slot - begin;
    return true;
}

// Publishes to the other blocks which ranks count as lost in this transfer. One warp of block 0.
__device__ __forceinline__ void publish_lost(const DispatchArguments& a, const Call& call) {
#pragma unroll 1
    for (int r = threadIdx.x % 32; r < kNumPeers; r += 32)
        atomicExch(&a.counters->decided[r],
                   static_cast<unsigned long long>(call.watch.transfer) * 2 + is_masked(call, r));
}

// Waits for that. One warp of another block. Block 0 ends its own waits.
__device__ __forceinline__ bool read_lost(const DispatchArguments& a, Call& call) {
    bool fine = true;
#pragma unroll 1
    for (int r = threadIdx.x % 32; r < kNumPeers && fine; r += 32) {
        unsigned long long decided;
        while ((decided = load_tagged(&a.counters->decided[r])) / 2 != call.watch.transfer && fine)
            fine = !has_failed(call.watch);
        const unsigned bit = 1u << r % 32;
        if (decided & 1)
            atomicOr(&call.masked[r / 32], bit);
        else
            atomicAnd(&call.masked[r / 32], ~bit);
    }
    __threadfence();  // what block 0 has read is read here after its decision
    return __all_sync(kAll, fine);
}

// How many of the warps that do not send wait for counts: one for those of rows, the others for
// those of experts. In deduplicated layouts the latter are for block 0 to keep, and no row waits
// for them.
__device__ __forceinline__ int count_warps(const DispatchArguments& a, int warps) {
    return kExpanded || blockIdx.x == 0 ? min(warps, 1 + (a.num_local + 31) / 32) : 1;
}

// Computes the slots of everything that will come. For `warps` warps from `first_warp` on; the
// slots are known when all of them are done. The first warp has the counts of rows. May stop the
// call.
__device__ __forceinline__ void receive_counts(const DispatchArguments& a, Call& call, Arrivals& in,
                                               int first_warp, int warps, unsigned subject) {
    const int thread = threadIdx.x - first_warp * 32, threads = warps * 32;
    // Slots depend on the counts of all ranks. So where a rank may be lost, one block decides for
    // all which ranks are: once everything that the others publish is there. Then nobody waits any
    // more.
#pragma unroll 1
    for (int pass = kMaskLost ? 0 : 1; pass < 2; ++pass) {
        bool fine = true;
        if (pass == 0 && blockIdx.x != 0) {
            fine = thread >= 32 || read_lost(a, call);
        } else {
            if (thread < 32) fine = receive_headers(a, call, in, subject);
            const int columns = kExpanded || blockIdx.x == 0 ? a.num_local : 0;
            const int waiting = threads == 32 ? 0 : 32;
#pragma unroll 1
            for (int e = thread < waiting ? columns : thread - waiting; e < columns;
                 e += threads - waiting)
                fine &= receive_column(a, call, in, e);
        }
        if (!fine) call.stopped = 1;
        if (pass == 0) {
            barrier_sync(kWaitersBarrier, warps);
            if (blockIdx.x == 0 && thread < 32) publish_lost(a, call);
        }
    }
    if (kExpanded && !kPadded) {
        barrier_sync(kWaitersBarrier, warps);
#pragma unroll 1
        for (int e = thread; e < a.num_local; e += threads) in.starts[e] = align_up(in.totals[e]);
        barrier_sync(kWaitersBarrier, warps);
        if (thread < 32) {
            const int end = scan_exclusive(in.starts, a.num_local);
            if (thread == 0) in.starts[a.num_local] = end;
        }
        barrier_sync(kWaitersBarrier, warps);
#pragma unroll 1
        for (int i = thread; i < kNumSources * a.num_local; i += threads)
            in.first_slot[i] += in.starts[i % a.num_local];
    }
}

}  // namespace ll
