// ht::combine_chunk: a chunk of a combine inside a host, as a transfer. What arrived in the chunk
// goes back to the peer that it came from, and that one adds up the sum of the host for each token:
// of own tokens into `own_sums`, of others into the messages for their hosts.
//
// The first `num_senders` blocks return rows, as in combine.cu; all blocks add up.

#include "ht/returns.cuh"
#include "ht/tally.cuh"
#include "hybrid/ht_rail.cuh"
#include "hybrid/ht_sums.cuh"

namespace ht {

// A token whose partial sums are added up here. Lane i has the i-th of them.
struct Token {
    int code;   // its slot in the arena, or -1
    int index;  // for waits: its index among the rows of the chunk
    bool own;   // lies in `rows`
    const char* term;
    char* out;
};

// Writer of a slot of this rank's arena, and its index in the chunk, from a position at a peer.
__device__ __forceinline__ int slot_of_sum(const CombineArguments& a, int host, int peer,
                                           int position) {
    const int before = a.relayed_before[(host * kBounds + a.chunk) * kNumPeers + peer];
    const int index = min(max(position - before, 0), kChunkRows - 1);
    return peer * kWriterSlots + host * kChunkRows + index;
}

// An own token of the chunk, or none.
__device__ __forceinline__ Token own_token(const CombineArguments& a, int token, int end) {
    const int lane = threadIdx.x % 32;
    Token result{-1, 0, false, nullptr, nullptr};
    if (token >= end) return result;
    result.out = a.own_sums + static_cast<long long>(token - a.chunk_begin) * a.sum_stride;
    const int code = lane < kCopies ? a.slots_of_token[token * kCopies + lane] : -1;
    if (code < 0) return result;
    const int rank = code / kMaxTokens, position = code % kMaxTokens, seat = seat_of(a, rank);
    if (host_of_seat(seat) != own_host(a)) return result;
    result.code = slot_of_sum(a, own_host(a), seat % kNumPeers, position);
    result.term = staged_row(a.bases[own_peer(a)], result.code);
    // An own row of a deduplicated layout is its own partial sum.
    result.own = !kExpanded && rank == a.rank;
    if (!result.own) return result;
    const long long row = row_of(a, rank, position);
    if (exists(a, row)) result.term = static_cast<const char*>(a.rows) + row * a.row_bytes;
    return result;
}

// A token of another host: the nth in the order of turns, or none.
__device__ __forceinline__ Token relayed_token(const CombineArguments& a, const Messages& messages,
                                               int nth, int end) {
    const int lane = threadIdx.x % 32;
    Token result{-1, 0, false, nullptr, nullptr};
    const int host = other_host(a, nth % (kNumHosts - 1)), index = nth / (kNumHosts - 1);
    if (nth >= end || index >= messages.rows[host]) return result;
    result.out = a.rail_send + messages.at[host] + static_cast<long long>(index) * a.rail_stride;
    const int first = a.relayed[host * kBounds + a.chunk];
    const int code = lane < kPeerCopies
                         ? a.relay_codes[(host * kMaxTokens + first + index) * kPeerCopies + lane]
                         : -1;
    if (code < 0) return result;
    result.code = slot_of_sum(a, host, code / kMaxTokens, code % kMaxTokens);
    result.term = staged_row(a.bases[own_peer(a)], result.code);
    return result;
}

__device__ __forceinline__ bool add_up_chunk(const CombineArguments& a, const Watch& watch,
                                             const Messages& messages, const Stages& stages) {
    if (threadIdx.x / 32 == blockDim.x / 32 - 1)  // has no stages: it checks the headers
        return blockIdx.x != gridDim.x - 1 || check_headers(a, watch);
    const bool within = a.flags & kWithinHost;
    const TokenRange tokens = tokens_of_chunk(a);
    const int end = within ? tokens.end : messages.most * (kNumHosts - 1);
    const int begin = within ? tokens.begin : 0;
    for (int ticket = take(&a.state->next_place);;) {
        const int item = begin + taken(ticket);
        if (item >= end) return true;
        ticket = take(&a.state->next_place);
        const Token token =
            within ? own_token(a, item, end) : relayed_token(a, messages, item, end);
        const unsigned present = __ballot_sync(0xffffffffu, token.code >= 0);
        if (present == 0) continue;
        bool here = true;
        if (token.code >= 0 && (!token.own || a.flags & kGrads))
            here = wait_until(arrival_flag(a.bases[own_peer(a)], token.code), watch.transfer, watch,
                              kPhaseRow, token.code / kWriterSlots, token.code % kWriterSlots);
        if (!__all_sync(0xffffffffu, here)) return false;
        __syncwarp();  // every lane may read what one of them has acquired
        sum_present(stages, present, token.term, a.row_bytes, token.out);
        if (a.flags & kGrads)
            merge_grads(present,
                        token.code < 0 ? nullptr
                                       : staged_row(a.bases[own_peer(a)], token.code) + a.row_bytes,
                        reinterpret_cast<int*>(token.out + a.row_bytes));
    }
}

__device__ __forceinline__ bool run_chunk(const CombineArguments& a, const Watch& watch,
                                          char* shared, ReturnRing& ring) {
    __shared__ Messages messages;
    const Stages stages{shared_address(shared) + threadIdx.x / 32 * a.warp_bytes, a.warp_bytes};
    publish_ready(a, watch);
    // Of the transfers of a call one is the first chunk's inside the host.
    if (a.flags & kWithinHost && a.chunk == 0 && blockIdx.x == 0) tally_combine(a);
    load_messages(a, messages, [&](int host) { return rows_in(a, host); });
    if (!(a.flags & kWithinHost) && blockIdx.x == 0) write_heads(a, watch, messages);
    if (blockIdx.x < a.num_senders && !return_rows(a, watch, shared, ring, stages)) return false;
    return add_up_chunk(a, watch, messages, stages);
}

__device__ __forceinline__ void combine_chunk_rank(const CombineArguments& a) {
    extern __shared__ __align__(128) char shared[];
    __shared__ ReturnRing ring;
    const Watch watch = watch_after(a, a.state->sent);
    if (__syncthreads_or(threadIdx.x == 0 && has_failed(watch))) return;
    if (!run_chunk(a, watch, shared, ring)) return;
    if (last_to_leave(&a.state->left_send, gridDim.x)) end_transfer(a, watch);
}

__global__ void __launch_bounds__(kCombineWarps * 32 + 32, 1)
    combine_chunk(const __grid_constant__ CombineArguments arguments) {
    combine_chunk_rank(arguments);
}

// Several ranks on one GPU, each a row of the grid.
__global__ void __launch_bounds__(kCombineWarps * 32 + 32, 1)
    combine_chunk_hosted(const CombineArguments* arguments) {
    combine_chunk_rank(arguments[blockIdx.y]);
}

}  // namespace ht
