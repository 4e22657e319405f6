// Receiving half of a dispatch: every row that has arrived goes to its slots in the output, with
// its ids, weights and scales. With zero copy the rows are in place already.
//
// Warps take batches of rows in the order in which they are sent: the first row of every source,
// the second row, and so on. A transfer of a chunk has some of the sources, and some of their rows.
// Blocks that send join in when they have sent everything. Rows of this rank's own tokens come
// straight from the input. In expanded layouts lane (b, k) carries the b-th row to the slot of its
// choice k; in others lane (b, 0) carries it to its only slot.
#pragma once

#include "ht/chunk.cuh"
#include "ht/count.cuh"
#include "ht/ring.cuh"

namespace ht {

struct Arrival {
    int source;    // rank whose token it is
    int position;  // among the rows of that rank
    int staged;    // across hosts: where it is staged
    int row;       // among all rows: where its choices and weights are kept
    int token;     // of this rank, if it is an own row
};

// The staging slot of a row.
__device__ __forceinline__ int slot_of(const Arrival& arrival) {
    return kSpansHosts ? arrival.staged : arrival.source * kMaxTokens + arrival.position;
}

// Tables that every row needs. In shared memory.
struct Groups {
    Sources sources;
    int first_row[kNumSources];  // by seat
    int most;  // rows of the source that sends most, or of every source if padding is cleared
    const int* slots;  // [R, E_loc] first slot of each source's rows of each local expert
};

__device__ __forceinline__ void load_groups(const DispatchArguments& a, Groups& groups,
                                            int* shared_slots) {
    const bool fits = kExpanded && shared_slots != nullptr && !(a.flags & kCached);
    if (threadIdx.x == 0) {
        groups.most = kLayoutIsRankMajor && !kSpansHosts ? kMaxTokens : 0;
        groups.slots = fits ? shared_slots : a.first_slot;
    }
    __syncthreads();
    for (int s = threadIdx.x; s < kNumSources; s += blockDim.x) {
        load_source(a, groups.sources, s);
        groups.first_row[s] = load_fresh(&a.first_row[rank_at(a, s)]);
        atomicMax(&groups.most, groups.sources.rows[s]);
    }
    if (fits)
        for (int i = threadIdx.x; i < kNumSources * a.num_local; i += blockDim.x)
            shared_slots[i] = load_fresh(&a.first_slot[i]);
    __syncthreads();
}

// Volatile: another block of this launch may have written it.
__device__ __forceinline__ int load_slot(const Groups& groups, int at) {
    return *reinterpret_cast<const volatile int*>(groups.slots + at);
}

// The nth row in the order of arrival. False where there is none.
__device__ __forceinline__ bool arrival_at(const DispatchArguments& a, const Groups& groups,
                                           int nth, Arrival& arrival) {
    const Turn turn = turn_at(a, nth);
    arrival.source = rank_at(a, turn.seat);
    arrival.position = turn.index;
    if constexpr (kSpansHosts) {
        arrival.position += groups.sources.before[turn.seat];
        arrival.staged = staged_slot(turn.seat, turn.index);
    }
    arrival.row = kLayoutIsRankMajor ? arrival.source * kMaxTokens + arrival.position
                                     : groups.first_row[turn.seat] + arrival.position;
    return turn.index < groups.sources.rows[turn.seat];
}

__device__ __forceinline__ unsigned* flag_of(const DispatchArguments& a, const Arrival& arrival) {
    return arrival_flag(a.bases[own_peer(a)], slot_of(arrival));
}

__device__ __forceinline__ const char* metadata_of(const DispatchArguments& a,
                                                   const Arrival& arrival) {
    return staged_metadata(a.bases[own_peer(a)], slot_of(arrival), a.row_bytes);
}

// The peer that stages a row here.
__device__ __forceinline__ int writer_of(const DispatchArguments& a, const Arrival& arrival) {
    return kSpansHosts ? arrival.staged / kWriterSlots : arrival.source;
}

// Reads the metadata of choice k of a row, and keeps them. Returns the choice's slot (expanded
// layouts).
__device__ __forceinline__ int read_metadata(const DispatchArguments& a, const Groups& groups,
                                             const Arrival& arrival, int k) {
    const bool own = arrival.source == a.rank;
    const long long at = static_cast<long long>(arrival.row) * kTopk + k;
    const long long own_at = static_cast<long long>(arrival.token) * kTopk + k;
    const int* const metadata = reinterpret_cast<const int*>(metadata_of(a, arrival));

    int choice;  // slot (expanded layouts) or local expert (others), -1: lives on another rank
    float weight = 0.0f;
    if (a.flags & kNewWeights)
        weight =
            own ? a.weights[own_at] : __int_as_float(load_fresh(metadata + kWeightsAt / 4 + k));
    if (a.flags & kCached) {
        choice = a.choices_of_row[at];
    } else {
        int location, place = 0;
        if (own) {
            const int expert = expert_of(a, arrival.token, k);
            if (kExpanded) place = load_fresh(&a.ordinals[own_at]);
            location = expert < 0 ? -1 : a.expert_location[expert];
        } else {
            location = load_fresh(metadata + k);
            if (kExpanded) place = load_fresh(metadata + kPlacesAt / 4 + k);
        }
        const bool here =
            location >= 0 && rank_of(location) == a.rank && local_of(location) < a.num_local;
        choice = here ? local_of(location) : -1;
        if (kExpanded && choice >= 0) {
            choice = load_slot(groups, arrival.source * a.num_local + choice) + place;
            // Static shapes: dropped. The overflow has been reported.
            if (choice < 0 || choice >= a.max_slots) choice = -1;
        }
        a.choices_of_row[at] = choice;
    }
    if (a.flags & kNewWeights) {
        if (choice < 0) weight = 0.0f;
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

__device__ __forceinline__ const char* scales_of(const DispatchArguments& a,
                                                 const Arrival& arrival) {
    if (arrival.source == a.rank)
        return a.scales + static_cast<long long>(arrival.token) * a.scale_bytes;
    return metadata_of(a, arrival) + kScalesAt;
}

// Writes which token of its rank a row is.
__device__ __forceinline__ void place_source_token(const DispatchArguments& a,
                                                   const Arrival& arrival, int slot) {
    const int* const sent = reinterpret_cast<const int*>(metadata_of(a, arrival) + kSourceAt);
    a.source_tokens[slot] = arrival.source == a.rank ? arrival.token : load_fresh(sent);
}

__device__ __forceinline__ void fill_zeros(char* target, int bytes) {
    const int lane = threadIdx.x % 32;
    if ((reinterpret_cast<unsigned long long>(target) | bytes) % 16 == 0)
        for (int i = lane; i < bytes / 16; i += 32)
            reinterpret_cast<uint4*>(target)[i] = make_uint4(0, 0, 0, 0);
    else
        for (int i = lane; i < bytes; i += 32) target[i] = 0;
}

// FLAT: zeroes the rows between an expert's last one and the next expert's group.
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

// Clears the metadata of choice k of a row that does not exist.
__device__ __forceinline__ void clear_choice(const DispatchArguments& a, const Arrival& arrival,
                                             int k) {
    const long long at = static_cast<long long>(arrival.row) * kTopk + k;
    a.topk_ids[at] = -1;
    if (a.topk_weights != nullptr) a.topk_weights[at] = 0.0f;
}

// Copies the scales of a batch to the slots of its rows. Lane (b, k): `target` is a slot, or -1.
__device__ __forceinline__ void place_scales(const DispatchArguments& a, const Arrival& arrival,
                                             bool exists, int target) {
    const unsigned long long scales =
        exists ? reinterpret_cast<unsigned long long>(scales_of(a, arrival)) : 0;
    unsigned targets = __ballot_sync(0xffffffffu, target >= 0);
    for (; targets; targets &= targets - 1) {
        const int lane = __ffs(targets) - 1;
        const long long to = __shfl_sync(0xffffffffu, target, lane);
        copy_bytes(a.scales_out + to * a.scale_bytes,
                   reinterpret_cast<const char*>(__shfl_sync(0xffffffffu, scales, lane)),
                   a.scale_bytes);
    }
}

// Moves the rows that this warp takes.
__device__ __forceinline__ bool place_staged(const DispatchArguments& a, const Watch& watch,
                                             const Groups& groups, Slots slots) {
    const int lane = threadIdx.x % 32, b = lane / kRowLanes, k = lane % kRowLanes;
    const int batch = kMostBatch == 1 ? 1 : a.batch;
    const int arrivals = groups.most * num_sources(a);
    int ticket = take(&a.state->next_place, batch);
    for (int first = taken(ticket); first < arrivals; first = taken(ticket)) {
        ticket = take(&a.state->next_place, batch);
        const int nth = first + b;
        const bool in_batch = b < batch && nth < arrivals;
        Arrival arrival;
        const bool exists = arrival_at(a, groups, nth, arrival) && in_batch;
        if (kLayoutIsRankMajor && !kSpansHosts && in_batch && !exists && k < kTopk)
            clear_choice(a, arrival, k);
        const bool own = arrival.source == a.rank, leads = exists && k == 0;
        arrival.token = exists && own ? load_fresh(&a.own_tokens[arrival.position]) : 0;
        bool here = true;
        if (leads && !own)
            here = wait_until(flag_of(a, arrival), watch.transfer, watch, kPhaseRow,
                              writer_of(a, arrival), arrival.position);
        if (!__all_sync(0xffffffffu, here)) return false;
        bulk_wait_read();
        __syncwarp();  // every lane may read what one of them has acquired
        if (leads) fence_global_to_bulk();
        slots.load(leads, b,
                   own ? a.x + static_cast<long long>(arrival.token) * a.row_bytes
                       : staged_row(a.bases[own_peer(a)], slot_of(arrival)),
                   a.row_bytes);
        int target = exists && k < kTopk ? read_metadata(a, groups, arrival, k) : -1;
        if (!kExpanded && leads && arrival.row < a.max_slots) target = arrival.row;
        if (kSourceTokens && target >= 0) place_source_token(a, arrival, target);
        if (a.scale_bytes) place_scales(a, arrival, exists, target);
        if (__any_sync(0xffffffffu, leads)) slots.loaded();
        if (target >= 0) {
            bulk_store(a.tokens + static_cast<long long>(target) * a.row_bytes, slots.row(b),
                       a.row_bytes);
            bulk_commit();
        }
    }
    return true;
}

// Zero copy: the rows are in place, their metadata are not. Lanes share out rows and choices.
__device__ __forceinline__ bool receive_in_place(const DispatchArguments& a, const Watch& watch,
                                                 const Groups& groups) {
    const int lane = threadIdx.x % 32, k = lane % kRowLanes;
    const int arrivals = groups.most * num_sources(a);
    int ticket = take(&a.state->next_place, kMostBatch);
    for (int first = taken(ticket); first < arrivals; first = taken(ticket)) {
        ticket = take(&a.state->next_place, kMostBatch);
        const int nth = first + lane / kRowLanes;
        Arrival arrival;
        const bool exists = arrival_at(a, groups, nth, arrival) && nth < arrivals;
        bool here = true;
        if (exists)
            here = wait_until(flag_of(a, arrival), watch.transfer, watch, kPhaseRow,
                              writer_of(a, arrival), arrival.position);
        if (!__all_sync(0xffffffffu, here)) return false;
        if (exists) {
            arrival.token =
                arrival.source == a.rank ? load_fresh(&a.own_tokens[arrival.position]) : 0;
            if (k < kTopk) read_metadata(a, groups, arrival, k);
            if (kSourceTokens && k == 0 && arrival.row < a.max_slots)
                place_source_token(a, arrival, arrival.row);
        } else if (kLayoutIsRankMajor && nth < arrivals && k < kTopk) {
            clear_choice(a, arrival, k);
        }
        if (a.scale_bytes && exists && arrival.row < a.max_slots)
            for (int i = k; i < a.scale_bytes; i += kRowLanes)
                a.scales_out[static_cast<long long>(arrival.row) * a.scale_bytes + i] =
                    *reinterpret_cast<const volatile char*>(scales_of(a, arrival) + i);
    }
    return true;
}

// Clears what no row fills, where the contract says how it reads.
__device__ __forceinline__ void clear_rest(const DispatchArguments& a, int warp, int num_warps) {
    if (kClearsRest) {
        const int last = kNumSources - 1;
        const int rows = load_fresh(&a.first_row[last]) + load_fresh(&a.rows_from[last]);
        for (int row = rows + warp; row < a.max_slots; row += num_warps) clear_choices(a, row);
    }
    if (kLayoutIsRankMajor && kSpansHosts)
        for (int row = warp; row < kNumSources * kMaxTokens; row += num_warps)
            if (row % kMaxTokens >= load_fresh(&a.rows_from[row / kMaxTokens]))
                clear_choices(a, row);
    if (kExpanded && !kPadded && kAlignment > 1) zero_gaps(a, warp, num_warps);
}

// Any block of the grid, as soon as it has nothing else to do. The last warp of a block moves
// nothing.
__device__ __forceinline__ bool place_rows(const DispatchArguments& a, const Watch& watch,
                                           char* shared, Ring& ring) {
    __shared__ Groups groups;
    __shared__ int first_slots[kExpanded ? kMostSharedSlots : 1];
    const int movers = blockDim.x / 32 - 1;
    const Slots slots = open_slots(ring, shared, a.slot_bytes, a.warp_bytes);
    load_groups(a, groups, kNumSources * a.num_local <= kMostSharedSlots ? first_slots : nullptr);
    bool fine = true;
    if (threadIdx.x / 32 < movers) {
        fine =
            kZeroCopy ? receive_in_place(a, watch, groups) : place_staged(a, watch, groups, slots);
        const int num_warps = movers * gridDim.x;
        const int warp = threadIdx.x / 32 * gridDim.x + blockIdx.x;
        // Of a call in several transfers the first one sees to slots that no row fills.
        if (fine && (!kSpansHosts || a.flags & kClear)) clear_rest(a, warp, num_warps);
        bulk_wait_written();
    }
    // The last warp of the grid moves nothing: it checks the headers.
    if (!(a.flags & kCount) && a.flags & kSend && blockIdx.x == gridDim.x - 1 &&
        threadIdx.x / 32 == movers)
        fine = check_headers(a, watch);
    close_slots(ring);
    return fine;
}

}  // namespace ht
