// ht::combine: one partial sum per (token, rank) travels back to the token's rank, which sums them
// up.
//
// The first `num_senders` blocks make the partial sums and send them, in the order in which the
// rows arrived. The other blocks sum them up token by token as they come in, and the senders join
// them in the end. The roundings are those of reduction.py.

#include "ht/peers.cuh"
#include "ht/ring.cuh"
#include "ht/sum.cuh"

namespace ht {

// Where an arrival's choices and weights are kept. In deduplicated layouts this is also its row.
__device__ __forceinline__ long long row_of(const CombineArguments& a, int source, int position) {
    return kLayoutIsRankMajor ? source * kMaxTokens + position : a.first_row[source] + position;
}

// Static shapes: a row for which there was no room does not exist. The overflow has been reported.
__device__ __forceinline__ bool exists(const CombineArguments& a, long long row) {
    return kExpanded || row < a.max_slots;
}

// Writes the weight gradients of an arrival's choices: metadata of the partial sum.
__device__ __forceinline__ void write_grads(const CombineArguments& a, char* metadata,
                                            long long row) {
    const int lane = threadIdx.x % 32;
    if (lane < kTopk) {
        const long long at = row * kTopk + lane;
        const int choice = a.choices_of_row[at];
        float grad = 0.0f;
        if (choice >= 0 && exists(a, row)) grad = a.slot_grads[kExpanded ? choice : at];
        reinterpret_cast<float*>(metadata)[lane] = grad;
    }
    fence_shared_to_bulk();
}

// Sends back the rows that this warp takes.
__device__ __forceinline__ void return_arrivals(const CombineArguments& a, Ring& ring, Slots slots,
                                                const int* rows_from, int most) {
    const int lane = threadIdx.x % 32;
    const int arrivals = most * kNumRanks;
    int written = -1;    // the row before; lane 0
    unsigned posts = 0;  // rows posted
    const auto post_written = [&] {
        bulk_wait_written();
        post(ring, lane == 0 ? written : -1, posts);
    };
    int ticket = take(&a.state->next_send);
    for (int nth = taken(ticket); nth < arrivals; nth = taken(ticket)) {
        ticket = take(&a.state->next_send);
        const int position = nth / kNumRanks;
        const int source = (nth + a.rank) % kNumRanks;
        if (position >= rows_from[source]) continue;
        // Own rows of deduplicated layouts are partial sums already: nothing to copy.
        const bool own = source == a.rank;
        if (own && !kExpanded && !(a.flags & kGrads)) continue;
        const long long row = row_of(a, source, position);
        const bool loads = !kExpanded && a.row_bytes != 0 && !own && exists(a, row);
        bulk_wait_read();
        __syncwarp();
        slots.load(loads && lane == 0, 0, static_cast<const char*>(a.rows) + row * a.row_bytes,
                   a.row_bytes);
        if (a.flags & kGrads) write_grads(a, slots.memory + a.row_bytes, row);
        const int at = a.rank * kMaxTokens + position;
        char* const peer = a.bases[source];
        post_written();
        if (kExpanded && a.row_bytes != 0) {
            sum_choices(a, slots.memory, row, staged_row(peer, at));
            __syncwarp();  // one lane posts the row for all of them
        }
        if (loads) slots.loaded();
        __syncwarp();
        if (lane == 0) {
            if (loads) bulk_store(staged_row(peer, at), slots.memory, a.row_bytes);
            if (a.flags & kGrads)
                bulk_store(staged_row(peer, at) + a.row_bytes, slots.memory + a.row_bytes,
                           kGradBytes);
            bulk_commit();
            written = source * kMaxTokens + position;
        }
    }
    post_written();
    finish_posting(ring);
}

__device__ __forceinline__ bool return_rows(const CombineArguments& a, const Watch& watch,
                                            char* shared, Ring& ring) {
    __shared__ int rows_from[kNumRanks];
    __shared__ int most;
    const int movers = blockDim.x / 32 - 1;
    const Slots slots = open_slots(ring, shared, a.slot_bytes, a.warp_bytes);
    if (threadIdx.x == 0) most = 0;
    if (!peers_have_room(a, watch, false)) return false;
    for (int r = threadIdx.x; r < kNumRanks; r += blockDim.x) {
        rows_from[r] = a.rows_from[r];
        atomicMax(&most, rows_from[r]);
    }
    __syncthreads();
    if (threadIdx.x / 32 < movers)
        return_arrivals(a, ring, slots, rows_from, most);
    else
        announce_rows(ring, a.bases, a.rank, watch.transfer, movers);
    close_slots(ring);
    return true;
}

// Collects the gradients of a token's choices: metadata of the partial sum from the choice's rank.
__device__ __forceinline__ void collect_grads(const CombineArguments& a, int token, int code) {
    const int lane = threadIdx.x % 32;
    const long long at = static_cast<long long>(token) * kTopk + lane;
    long long id = -1;
    if (lane < kTopk)
        id = a.flags & kWideIds ? static_cast<const long long*>(a.ids)[at]
                                : static_cast<const int*>(a.ids)[at];
    const int rank = id >= 0 && id < kNumExperts ? rank_of(a.expert_location[id]) : -1;
    float grad = 0.0f;
    for (int d = 0; d < kCopies; ++d) {
        const int candidate = __shfl_sync(0xffffffffu, code, d);
        if (candidate >= 0 && candidate / kMaxTokens == rank)
            grad = __int_as_float(load_fresh(
                reinterpret_cast<const int*>(staged_row(a.bases[a.rank], candidate) + a.row_bytes) +
                lane));
    }
    if (lane < kTopk) a.grads_out[at] = grad;
}

// Any block of the grid, as soon as it has nothing else to do.
__device__ __forceinline__ bool add_up(const CombineArguments& a, const Watch& watch,
                                       char* shared) {
    const int lane = threadIdx.x % 32;
    if (threadIdx.x / 32 == blockDim.x / 32 - 1)  // has no slot: it checks the headers
        return blockIdx.x != gridDim.x - 1 || check_headers(a, watch);
    char* const slot = shared + static_cast<long long>(threadIdx.x / 32) * a.slot_bytes;
    char* const base = a.bases[a.rank];
    const auto code_of = [&](int token) {
        return lane < kCopies && token < a.num_tokens ? a.slots_of_token[token * kCopies + lane]
                                                      : -1;
    };
    int token = taken(take(&a.state->next_place));
    int next = taken(take(&a.state->next_place));
    for (int next_code = code_of(token); token < a.num_tokens;) {
        const int current = token, code = next_code;
        const int ticket = take(&a.state->next_place);
        next_code = code_of(next);
        token = next;
        const int source = code / kMaxTokens;
        // An own row of a deduplicated layout is its own partial sum.
        const bool direct = !kExpanded && code >= 0 && source == a.rank;
        bool here = true;
        if (code >= 0 && (!direct || a.flags & kGrads))
            here = wait_until(arrival_flag(base, code), watch.transfer, watch, kPhaseRow, source,
                              code % kMaxTokens);
        if (!__all_sync(0xffffffffu, here)) return false;
        __syncwarp();  // every lane may read what one of them has acquired
        if (a.row_bytes != 0) {
            const char* term = staged_row(base, max(code, 0));
            if (direct) {
                const long long row = row_of(a, source, code % kMaxTokens);
                if (exists(a, row)) term = static_cast<const char*>(a.rows) + row * a.row_bytes;
            }
            const int terms = __popc(__ballot_sync(0xffffffffu, code >= 0));
            sum_rows<false>(
                slot, a.slot_bytes, term, 0.0f, terms, a.row_bytes,
                static_cast<char*>(a.out) + static_cast<long long>(current) * a.row_bytes);
        }
        if (a.flags & kGrads) collect_grads(a, current, code);
        next = taken(ticket);
    }
    return true;
}

__device__ __forceinline__ bool run_halves(const CombineArguments& a, const Watch& watch,
                                           char* shared, Ring& ring) {
    publish_ready(a, watch);
    if (blockIdx.x < a.num_senders && !return_rows(a, watch, shared, ring)) return false;
    return add_up(a, watch, shared);
}

__device__ __forceinline__ void combine_rank(const CombineArguments& a) {
    extern __shared__ __align__(128) char shared[];
    __shared__ Ring ring;
    const Watch watch{a.state,
                      a.control,
                      a.state->sent + 1,
                      static_cast<unsigned>(a.operation),
                      ready_word(a.bases[a.rank], 0),
                      a.rank,
                      nullptr};
    if (__syncthreads_or(threadIdx.x == 0 && has_failed(watch))) return;
    if (!run_halves(a, watch, shared, ring)) return;
    if (!last_to_leave(&a.state->left_send, gridDim.x)) return;
    grant_credit(a, watch);
    if (threadIdx.x == 0) {
        a.state->sent = a.state->received = watch.transfer;
        a.state->next_send = a.state->next_place = 0;
    }
}

__global__ void __launch_bounds__(kMaxWarps * 32 + 32, 1)
    combine(const __grid_constant__ CombineArguments arguments) {
    combine_rank(arguments);
}

// Several ranks on one GPU, each a row of the grid.
__global__ void __launch_bounds__(kMaxWarps * 32 + 32, 1)
    combine_hosted(const CombineArguments* arguments) {
    combine_rank(arguments[blockIdx.y]);
}

}  // namespace ht
