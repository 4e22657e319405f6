// Planning, the second step of an uncached dispatch, done by one block. From the count rows of all
// ranks it computes the first slot of every group of rows, the counts that the caller sees, and the
// host's mail.
#pragma once

#include "common/scan.cuh"
#include "ht/count.cuh"
#include "ht/tally.cuh"
#include "hybrid/ht_chunks.cuh"

namespace ht {

// Words of all ranks' count rows. They are read once into shared memory if they fit there.
constexpr int kTableWords = kNumSources * kCountWords;

// Shared memory: 2 * kNumSources + num_local + 1 words, and the table.
__device__ __forceinline__ bool plan_slots(const DispatchArguments& a, const Watch& watch,
                                           int* shared) {
    char* const base = a.bases[own_peer(a)];
    const int* const arrived = count_row(base, 0);
    // A word of the count row of a source.
    const auto arrived_at = [&](int source, int index) {
        return load_fresh(&arrived[seat_of(a, source) * kCountStride + index]);
    };
    const unsigned* const ready = reinterpret_cast<const unsigned*>(base + kReadyAt);
    bool here = true;
    for (int p = threadIdx.x; p < kNumPeers; p += blockDim.x)
        here &= wait_until(&ready[p], watch.transfer, watch, kPhaseReady, p);
    if (!__syncthreads_and(here)) return false;
    plan_chunks(a, watch.control);

    int* const arrivals = shared;                  // [R] rows from each rank
    int* const groups = arrivals + kNumSources;    // [E_loc] rows of each local expert
    int* const needed = groups + a.num_local + 1;  // [R] rows each rank would receive
    int* const table = needed + kNumSources;
    __shared__ int num_arrivals, num_slots, disagree, verdict, worst, room;
    if (kTableIsShared)
        for (int i = threadIdx.x; i < kTableWords; i += blockDim.x)
            table[i] = arrived_at(i / kCountWords, i % kCountWords);
    __syncthreads();
    const auto word = [&](int source, int index) {
        return kTableIsShared ? table[source * kCountWords + index] : arrived_at(source, index);
    };
    // Counts become addresses, so a peer's word is clamped to what is possible.
    const auto count = [&](int source, int column) {
        return min(max(word(source, kHeaderWords + column), 0), kMaxTokens);
    };
    if (threadIdx.x == 0) disagree = worst = room = 0;
    for (int r = threadIdx.x; r < kNumSources; r += blockDim.x) {
        arrivals[r] = count(r, a.rank);
        needed[r] = 0;
        if (!kExpanded)
            for (int s = 0; s < kNumSources; ++s) needed[r] += count(s, r);
    }
    __syncthreads();

    // Where the rows of each source rank start inside the group of each local expert.
    for (int e = threadIdx.x; e < a.num_local; e += blockDim.x) {
        int sum = 0;
        for (int s = 0; s < kNumSources; ++s) {
            const int own = count(s, kNumSources + a.experts[e]);
            if (kExpanded) a.first_slot[s * a.num_local + e] = sum;
            sum += own;
        }
        groups[e] = sum;
        a.tokens_per_expert[e] = a.counts_out[e] = sum;
    }
    if (kExpanded && !kPadded)
        for (int e = threadIdx.x; e < kNumExperts; e += blockDim.x) {
            int sum = 0;
            for (int s = 0; s < kNumSources; ++s) sum += count(s, kNumSources + e);
            atomicAdd(&needed[rank_of(a.expert_location[e])], align_up(sum));
        }
    for (int r = threadIdx.x; r < kNumSources; r += blockDim.x) {
        if (!is_same_call(a, watch, [&](int i) { return word(r, i); })) atomicOr(&disagree, 1);
    }
    __syncthreads();

    Control* const control = watch.control;
    if (kWantsMail) {
        for (int e = threadIdx.x; e < a.num_local; e += blockDim.x)
            control->mail_counts[e] = groups[e];
        for (int r = threadIdx.x; r < kNumSources; r += blockDim.x)
            control->mail_rows_from[r] = arrivals[r];
        for (int i = threadIdx.x; i < kNumSources * kHeaderWords; i += blockDim.x)
            control->headers[i] = word(i / kHeaderWords, i % kHeaderWords);
    }
    __syncthreads();  // counts of experts become offsets below

    if (threadIdx.x < 32) {
        for (int e = threadIdx.x; e < a.num_local; e += 32) groups[e] = align_up(groups[e]);
        __syncwarp();
        const int slots = scan_exclusive(groups, a.num_local);
        const int total = scan_exclusive(arrivals, kNumSources);
        if (threadIdx.x == 0) {
            groups[a.num_local] = slots;
            num_arrivals = total;
            num_slots = kExpanded ? slots : total;
        }
    }
    __syncthreads();

    if (kExpanded) {
        for (int i = threadIdx.x; i < kNumSources * a.num_local; i += blockDim.x) {
            const int e = i % a.num_local;
            a.first_slot[i] += kPadded ? e * kNumSources * kMaxTokens : groups[e];
        }
        for (int e = threadIdx.x; e <= a.num_local; e += blockDim.x)
            a.expert_offsets[e] = a.offsets_out[e] = groups[e];
    }
    if (threadIdx.x == 0) {
        verdict = disagree ? kDisagree : kFine;
        for (int r = 0; r < kNumSources && verdict == kFine; ++r) {
            room = word(r, kCapacity);
            worst = r;
            if (room >= 0 && needed[r] > room) verdict = kOverflow;
        }
    }
    __syncthreads();
    for (int r = threadIdx.x; r < kNumSources; r += blockDim.x) {
        a.first_row[r] = arrivals[r];
        const int own = count(r, a.rank);
        a.rows_from[r] = a.rows_from_out[r] = own;
        a.rows_to[r] = count(a.rank, r);
        int before = 0;  // where this rank's rows start at rank r
        for (int s = 0; s < a.rank; ++s) before += count(s, r);
        a.first_sent[r] = kPadded ? a.rank * kMaxTokens : before;
    }
    __syncthreads();

    if (threadIdx.x == 0) {
        if (kWantsMail) {
            control->mail_verdict = verdict;
            control->mail_rank = worst;
            control->mail_rows = needed[worst];
            control->mail_capacity = room;
            control->mail_arrivals = num_arrivals;
            control->mail_slots = num_slots;
            // Release: the number says that the mail is complete.
            store_release_system(&control->mail_number, watch.transfer);
        } else if (verdict == kDisagree) {
            report_headers(watch, worst, word);
        } else if (verdict == kOverflow && control->overflowed == 0) {
            control->overflow_rank = worst;
            control->overflow_rows = needed[worst];
            control->overflow_capacity = room;
            store_release_system(&control->overflowed, watch.transfer);
        }
        *a.origin = static_cast<int>(watch.transfer);
        // The host discards what it refuses, and allocates more for what does not fit. Counts that
        // do not belong together place nothing.
        const int rows = kExpanded ? num_slots : num_arrivals;
        const bool fits = kPadded || rows <= a.max_slots;
        watch.state->deferred = verdict == kDisagree || (kWantsMail && (verdict != kFine || !fits));
        // Release: other blocks read the tables after this.
        store_release_device(&watch.state->planned, watch.transfer);
    }
    if (verdict == kFine) tally_dispatch(a);
    return kWantsMail || verdict != kDisagree;
}

}  // namespace ht
