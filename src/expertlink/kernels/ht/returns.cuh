// The sending half of a combine: what arrived here goes back to the tokens' ranks, in the order in
// which it arrived. Deduplicated layouts return rows as they are, expanded ones partial sums.
#pragma once

#include "ht/chunk.cuh"
#include "ht/sum.cuh"

namespace ht {

using ReturnRing = RingOf<kCombineWarps>;

// Where an arrival's choices and weights are kept. In deduplicated layouts this is also its row.
__device__ __forceinline__ long long row_of(const CombineArguments& a, int source, int position) {
    return kLayoutIsRankMajor ? source * kMaxTokens + position : a.first_row[source] + position;
}

// Static shapes: a row for which there was no room does not exist. The overflow has been reported.
__device__ __forceinline__ bool exists(const CombineArguments& a, long long row) {
    return kExpanded || row < a.max_slots;
}

// A row that arrived here.
struct Arrival {
    int source;  // rank whose token it is
    int peer;    // where it goes: that rank, or the peer that passes it on to its host
    int slot;    // among those that this rank writes there
    long long row;
    bool returns;  // something goes back

    // What goes back, as it is announced to the peer.
    __device__ __forceinline__ int code() const {
        return returns ? peer * kWriterSlots + slot : -1;
    }
};

// The nth arrival; `taken`: there may be one.
__device__ __forceinline__ Arrival arrival_at(const CombineArguments& a, const Sources& sources,
                                              int nth, bool taken) {
    const Turn turn = turn_at(a, nth);
    Arrival arrival;
    arrival.source = rank_at(a, turn.seat);
    arrival.peer = kSpansHosts ? turn.seat % kNumPeers : turn.seat;
    arrival.slot = writer_slot(turn.seat, turn.index);
    // Own rows of deduplicated layouts are partial sums already: nothing to copy.
    const bool stays = arrival.source == a.rank && !kExpanded && !(a.flags & kGrads);
    arrival.returns = taken && turn.index < sources.rows[turn.seat] && !stays;
    int position = turn.index;
    if constexpr (kSpansHosts) position += sources.before[turn.seat];
    arrival.row = arrival.returns ? row_of(a, arrival.source, position) : 0;
    return arrival;
}

// Where the partial sum of an arrival goes. The gradients of weights follow it.
__device__ __forceinline__ char* target_of(const CombineArguments& a, const Arrival& arrival) {
    return staged_row(a.bases[arrival.peer], own_peer(a) * kWriterSlots + arrival.slot);
}

// Writes the gradient of the weight of an arrival's k-th choice.
__device__ __forceinline__ void write_grad(const CombineArguments& a, const Arrival& arrival,
                                           int k) {
    if (!arrival.returns || k >= kTopk) return;
    const long long at = arrival.row * kTopk + k;
    const int choice = a.choices_of_row[at];
    float grad = 0.0f;
    if (choice >= 0 && exists(a, arrival.row)) grad = a.slot_grads[kExpanded ? choice : at];
    reinterpret_cast<float*>(target_of(a, arrival) + a.row_bytes)[k] = grad;
}

// A choice of an arrival that stays here: lane k has the k-th.
struct Choice {
    int slot;  // or -1
    float weight;
};

__device__ __forceinline__ Choice choice_of(const CombineArguments& a, const Arrival& arrival) {
    const int lane = threadIdx.x % 32;
    Choice choice{-1, 1.0f};  // a product with one is exact
    if (!arrival.returns || lane >= kTopk) return choice;
    choice.slot = a.choices_of_row[arrival.row * kTopk + lane];
    if (a.weights_of_row != nullptr) choice.weight = a.weights_of_row[arrival.row * kTopk + lane];
    return choice;
}

// The partial sum of choices in top-k order, into the memory of a peer.
__device__ __forceinline__ void sum_choices(const CombineArguments& a, const Stages& stages,
                                            const Choice& choice, char* out) {
    const int lane = threadIdx.x % 32;
    // Choices that are present move to the first lanes, in order.
    unsigned present = __ballot_sync(0xffffffffu, choice.slot >= 0);
    const int terms = __popc(present);
    int from = 0;
    for (int i = 0; i < terms; ++i, present &= present - 1)
        if (lane == i) from = __ffs(present) - 1;
    const int slot = __shfl_sync(0xffffffffu, choice.slot, from);
    const float weight = __shfl_sync(0xffffffffu, choice.weight, from);
    const char* const term =
        static_cast<const char*>(a.rows) + static_cast<long long>(max(slot, 0)) * a.row_bytes;
    sum_rows<true>(stages, term, weight, terms, a.row_bytes, out);
}

// Expanded layouts: sums up what goes back. While one arrival is summed up, the choices of the next
// one are loaded, and the one after that is taken.
__device__ __forceinline__ void return_sums(const CombineArguments& a, ReturnRing& ring,
                                            const Stages& stages, const Sources& sources,
                                            int arrivals) {
    const int lane = threadIdx.x % 32;
    unsigned posts = 0;
    int nth = taken(take(&a.state->next_send));
    int ticket = take(&a.state->next_send);
    Arrival arrival = arrival_at(a, sources, nth, nth < arrivals);
    Choice choice = choice_of(a, arrival);
    while (nth < arrivals) {
        const Arrival current = arrival;
        const Choice terms = choice;
        nth = taken(ticket);
        ticket = take(&a.state->next_send);
        arrival = arrival_at(a, sources, nth, nth < arrivals);
        choice = choice_of(a, arrival);
        if (!current.returns) continue;
        sum_choices(a, stages, terms, target_of(a, current));
        if (a.flags & kGrads) write_grad(a, current, lane);
        __syncwarp();  // one lane posts the row for all of them
        post(ring, lane == 0 ? current.code() : -1, posts);
    }
}

// Returns rows as they are, or gradients alone, a batch at a time. Lane (b, k) sees to the k-th
// choice of the b-th arrival; lane (b, 0) moves it.
__device__ __forceinline__ void return_copies(const CombineArguments& a, ReturnRing& ring,
                                              Slots slots, const Sources& sources, int arrivals) {
    const int lane = threadIdx.x % 32, b = lane / kRowLanes;
    const bool leads = lane % kRowLanes == 0;
    const int batch = kMostBatch == 1 ? 1 : a.batch;
    int written = -1;    // of the batch before; lanes that lead
    unsigned posts = 0;  // batches posted
    int ticket = take(&a.state->next_send, batch);
    for (int first = taken(ticket); first < arrivals; first = taken(ticket)) {
        ticket = take(&a.state->next_send, batch);
        const int nth = first + b;
        const Arrival arrival = arrival_at(a, sources, nth, b < batch && nth < arrivals);
        if (!__any_sync(0xffffffffu, arrival.returns)) continue;
        const bool loads = leads && arrival.returns && !kExpanded && a.row_bytes != 0 &&
                           arrival.source != a.rank && exists(a, arrival.row);
        bulk_wait_read();
        __syncwarp();
        slots.load(loads, b, static_cast<const char*>(a.rows) + arrival.row * a.row_bytes,
                   a.row_bytes);
        if (a.flags & kGrads) write_grad(a, arrival, lane % kRowLanes);
        bulk_wait_written();
        post(ring, written, posts);
        if (__any_sync(0xffffffffu, loads)) slots.loaded();
        if (loads) {
            bulk_store(target_of(a, arrival), slots.row(b), a.row_bytes);
            bulk_commit();
        }
        __syncwarp();  // whoever posts a row speaks for all lanes
        written = leads ? arrival.code() : -1;
    }
    bulk_wait_written();
    post(ring, written, posts);
}

// Blocks that send.
__device__ __forceinline__ bool return_rows(const CombineArguments& a, const Watch& watch,
                                            char* shared, ReturnRing& ring, const Stages& stages) {
    __shared__ Sources sources;
    __shared__ int most;
    const int movers = blockDim.x / 32 - 1;
    const Slots slots = open_slots(ring, shared, a.slot_bytes, a.warp_bytes);
    if (threadIdx.x == 0) most = 0;
    if (!peers_have_room(a, watch, false)) return false;
    for (int s = threadIdx.x; s < kNumSources; s += blockDim.x) {
        load_source(a, sources, s);
        atomicMax(&most, sources.rows[s]);
    }
    __syncthreads();
    if (threadIdx.x / 32 < movers) {
        const int arrivals = most * num_sources(a);
        if (kExpanded && a.row_bytes != 0)
            return_sums(a, ring, stages, sources, arrivals);
        else
            return_copies(a, ring, slots, sources, arrivals);
        finish_posting(ring);
    } else {
        announce_rows(ring, a.bases, own_peer(a), watch.transfer, movers);
    }
    close_slots(ring);
    return true;
}

}  // namespace ht
