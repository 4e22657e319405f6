// Receiving half of a dispatch: every row that has arrived goes to its slots in the output, together
// with the ids, weights and scales that came beside it. With zero copy the rows are in place already.
//
// Warps take rows in the order in which they are sent: first row of every source, second row, and so
// on. Rows of this rank's own tokens come straight from the input. Lane k carries the row to the slot
// of choice k, or lane 0 to its one slot.
#pragma once

#include "count.cuh"
#include "ring.cuh"

struct Arrival {
    int source;    // rank that sent it
    int position;  // among the rows of that rank
    int row;       // among all rows: where its choices and weights are kept
    int token;     // of this rank, if it is an own row
};

// What came beside the row, choice by choice. Returns the slot of choice `lane`, expanded layouts.
__device__ __forceinline__ int read_beside(const DispatchArguments& a, const Arrival& arrival,
                                           const char* beside) {
    const int lane = threadIdx.x % 32;
    if (lane >= kTopk) return -1;
    const bool own = arrival.source == a.rank;
    const long long at = static_cast<long long>(arrival.row) * kTopk + lane;
    const long long own_at = static_cast<long long>(arrival.token) * kTopk + lane;
    const int* const words = reinterpret_cast<const int*>(beside);

    int choice;  // slot (expanded layouts) or local expert (others), -1: lives on another rank
    if (a.flags & kCached) {
        choice = a.choices_of_row[at];
    } else {
        const int expert = own ? expert_of(a, arrival.token, lane) : load_fresh(words + lane);
        choice = expert >= 0 && a.rank_of[expert] == a.rank ? a.local_of[expert] : -1;
        if (kExpanded && choice >= 0) {
            const int place = own ? load_fresh(&a.ordinals[own_at])
                                  : load_fresh(words + kPlacesAt / 4 + lane);
            choice = load_fresh(&a.first_slot[arrival.source * a.num_local + choice]) + place;
            if (choice >= a.max_slots) choice = -1;  // static shapes: reported, and dropped
        }
        a.choices_of_row[at] = choice;
    }
    float weight = 0.0f;
    if (a.flags & kNewWeights) {
        if (choice >= 0)
            weight = own ? a.weights[own_at]
                         : __int_as_float(load_fresh(words + kWeightsAt / 4 + lane));
        a.weights_of_row[at] = weight;
    } else if (a.weights_of_row != nullptr) {
        weight = a.weights_of_row[at];
    }
    if (!kExpanded && arrival.row < a.max_slots) {
        a.topk_ids[at] = choice;
        if (a.topk_weights != nullptr) a.topk_weights[at] = weight;
    }
    return kExpanded ? choice : -1;
}

__device__ __forceinline__ void fill_zeros(char* target, int bytes) {
    const int lane = threadIdx.x % 32;
    if ((reinterpret_cast<unsigned long long>(target) | bytes) % 16 == 0)
        for (int i = lane; i < bytes / 16; i += 32)
            reinterpret_cast<uint4*>(target)[i] = make_uint4(0, 0, 0, 0);
    else
        for (int i = lane; i < bytes; i += 32) target[i] = 0;
}

// FLAT: rows between an expert's last and the start of the next expert's group.
__device__ __forceinline__ void zero_gaps(const DispatchArguments& a, int warp, int num_warps) {
    for (int e = warp; e < a.num_local; e += num_warps) {
        const int begin = load_fresh(&a.expert_offsets[e]) + load_fresh(&a.tokens_per_expert[e]);
        const int end = min(load_fresh(&a.expert_offsets[e + 1]), a.max_slots);
        for (int slot = begin; slot < end; ++slot) {
            fill_zeros(a.tokens + static_cast<long long>(slot) * a.row_bytes, a.row_bytes);
            if (a.scale_bytes)
                fill_zeros(a.scales_out + static_cast<long long>(slot) * a.scale_bytes,
                           a.scale_bytes);
        }
    }
}

// Deduplicated layouts: ids and weights of a slot that no row fills.
__device__ __forceinline__ void clear_choices(const DispatchArguments& a, int slot) {
    const int lane = threadIdx.x % 32;
    if (lane >= kTopk) return;
    const long long at = static_cast<long long>(slot) * kTopk + lane;
    a.topk_ids[at] = -1;
    if (a.topk_weights != nullptr) a.topk_weights[at] = 0.0f;
}

// `block` of `num_blocks` that place rows. Shared memory: the ring, then kNumRanks words.
__device__ __forceinline__ bool place_rows(const DispatchArguments& a, const Watch& watch,
                                           char* shared, unsigned long long* barriers, int block,
                                           int num_blocks) {
    __shared__ int rows_from[kNumRanks];
    __shared__ int most;
    const int lane = threadIdx.x % 32;
    const int num_warps = blockDim.x / 32 * num_blocks;
    const int warp = threadIdx.x / 32 * num_blocks + block;
    char* const base = a.bases[a.rank];
    const bool move_rows = !(a.flags & kZeroCopy);
    Slot slot = open_slot(shared, barriers, a.slot_bytes);
    if (threadIdx.x == 0) most = kLayoutIsRankMajor ? kMaxTokens : 0;
    __syncthreads();
    for (int r = threadIdx.x; r < kNumRanks; r += blockDim.x) {
        rows_from[r] = load_fresh(&a.rows_from[r]);
        atomicMax(&most, rows_from[r]);
    }
    __syncthreads();

    for (int turn = warp; turn < most * kNumRanks; turn += num_warps) {
        Arrival arrival;
        arrival.position = turn / kNumRanks;
        arrival.source = (turn + a.rank) % kNumRanks;
        if (arrival.position >= rows_from[arrival.source]) {
            if (kLayoutIsRankMajor)
                clear_choices(a, arrival.source * kMaxTokens + arrival.position);
            continue;
        }
        const int staged = arrival.source * kMaxTokens + arrival.position;
        const bool own = arrival.source == a.rank;
        arrival.row = kLayoutIsRankMajor
                          ? staged
                          : load_fresh(&a.first_row[arrival.source]) + arrival.position;
        arrival.token = own ? load_fresh(&a.own_tokens[arrival.position]) : 0;
        if (!own || !move_rows) {
            const bool here = wait_until(arrival_flag(base, staged), watch.transfer, watch,
                                         kPhaseRow, arrival.source, arrival.position);
            if (!__all_sync(0xffffffffu, here)) return false;
        }
        if (move_rows) {
            bulk_wait_read();
            __syncwarp();
            if (lane == 0) {
                fence_global_to_bulk();
                slot.load(own ? a.x + static_cast<long long>(arrival.token) * a.row_bytes
                              : staged_row(base, staged),
                          a.row_bytes);
            }
        }
        const char* const beside = staged_meta(base, staged);
        int target = read_beside(a, arrival, beside);
        if (!kExpanded && lane == 0 && arrival.row < a.max_slots) target = arrival.row;
        if (a.scale_bytes) {
            const char* const scales =
                own ? a.scales + static_cast<long long>(arrival.token) * a.scale_bytes
                    : beside + kScalesAt;
            for (int k = 0; k < (kExpanded ? kTopk : 1); ++k) {
                const int to = __shfl_sync(0xffffffffu, target, k);
                if (to >= 0)
                    copy_bytes(a.scales_out + static_cast<long long>(to) * a.scale_bytes, scales,
                               a.scale_bytes);
            }
        }
        if (!move_rows) continue;
        slot.loaded();
        if (target >= 0) {
            bulk_store(a.tokens + static_cast<long long>(target) * a.row_bytes, slot.row,
                       a.row_bytes);
            bulk_commit();
        }
    }
    if (a.flags & kClearRest) {
        const int last = kNumRanks - 1;
        for (int row = load_fresh(&a.first_row[last]) + rows_from[last] + warp; row < a.max_slots;
             row += num_warps)
            clear_choices(a, row);
    }
    if (kExpanded && !kPadded && kAlignment > 1) zero_gaps(a, warp, num_warps);
    bulk_wait_written();
    return true;
}
