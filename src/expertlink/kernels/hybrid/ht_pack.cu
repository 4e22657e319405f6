// ht::pack: the rows of a chunk that go to other hosts, into this rank's messages. A row is
// followed by its metadata and, in a new routing, by its positions at the ranks of the host that it
// goes to: peer * kMaxTokens + position, ascending, then -1. Waits for no other rank.
//
// As in send.cuh, lane (b, d) carries the row of the b-th token to its d-th host.

#include "ht/send.cuh"
#include "hybrid/ht_rail.cuh"

namespace ht {

// Writes behind a row where it goes in the host. One lane.
__device__ __forceinline__ void write_positions(const DispatchArguments& a, int token, int host,
                                                int* positions) {
    int found = 0;
    for (int d = 0; d < kCopies; ++d) {
        const int code = a.slots_of_token[token * kCopies + d];
        const int seat = code < 0 ? -1 : seat_of(a, code / kMaxTokens);
        if (seat < 0 || host_of_seat(seat) != host) continue;
        positions[found++] = seat % kNumPeers * kMaxTokens + code % kMaxTokens;
    }
    for (; found < kPeerCopies; ++found) positions[found] = -1;
}

__device__ __forceinline__ void pack_tokens(const DispatchArguments& a, const Messages& messages,
                                            Slots slots) {
    const int lane = threadIdx.x % 32, b = lane / kRowLanes, d = lane % kRowLanes;
    const int batch = kMostBatch == 1 ? 1 : a.batch;
    const int movers = blockDim.x / 32;
    const TokenRange tokens = tokens_of_chunk(a);
    const int step = movers * gridDim.x * batch;
    for (int first = tokens.begin + (threadIdx.x / 32 * gridDim.x + blockIdx.x) * batch;
         first < tokens.end; first += step) {
        const int token = first + b;
        int code = -1;
        if (b < batch && d < kHostCopies && token < tokens.end)
            code = a.host_slots[token * kHostCopies + d];
        const int host = max(code, 0) / kMaxTokens;
        if (host == own_host(a)) code = -1;
        const unsigned going = __ballot_sync(0xffffffffu, code >= 0);
        if (going == 0) continue;
        const bool sends = (going & lanes_of_row(b)) != 0;
        bulk_wait_read();
        __syncwarp();
        slots.load(sends && d == 0, b, a.x + static_cast<long long>(token) * a.row_bytes,
                   a.row_bytes);
        if (a.metadata_bytes) write_metadata(a, slots, token, sends);
        const int index = code % kMaxTokens - a.sent[a.chunk * kNumHosts + host];
        char* const target =
            a.rail_send + messages.at[host] + static_cast<long long>(index) * a.rail_stride;
        slots.loaded();
        __syncwarp();  // every lane has written its part of the metadata
        if (code >= 0) {
            bulk_store(target, slots.row(b), a.row_bytes + a.metadata_bytes);
            bulk_commit();
            if (!(a.flags & kCached))
                write_positions(a, token, host,
                                reinterpret_cast<int*>(target + a.row_bytes + a.metadata_bytes));
        }
        __syncwarp();
    }
    bulk_wait_written();
}

// The head of the first message of a dispatch with static shapes is the whole count row.
__device__ __forceinline__ void write_counts_to_heads(const DispatchArguments& a,
                                                      const Messages& messages) {
    for (int h = blockIdx.x; h < kNumHosts; h += gridDim.x) {
        if (h == own_host(a)) continue;
        int* const head = reinterpret_cast<int*>(a.rail_send + messages.head[h]);
        for (int i = threadIdx.x; i < kCountStride; i += blockDim.x) head[i] = a.count_row[i];
    }
}

__device__ __forceinline__ void pack_rank(const DispatchArguments& a) {
    extern __shared__ __align__(128) char shared[];
    __shared__ Ring ring;
    __shared__ Messages messages;
    const Watch watch = watch_after(a, a.state->sent);
    if (__syncthreads_or(threadIdx.x == 0 && has_failed(watch))) return;
    load_messages(a, messages, [&](int host) { return rows_out(a, host); });
    if (!kWantsMail && a.chunk == 0 && !(a.flags & kCached))
        write_counts_to_heads(a, messages);
    else if (blockIdx.x == 0)
        write_heads(a, watch, messages);
    const Slots slots = open_slots(ring, shared, a.slot_bytes, a.warp_bytes);
    pack_tokens(a, messages, slots);
    close_slots(ring);
}

__global__ void __launch_bounds__(kMaxWarps * 32 + 32, 1)
    pack(const __grid_constant__ DispatchArguments arguments) {
    pack_rank(arguments);
}

// Several ranks on one GPU, each a row of the grid.
__global__ void __launch_bounds__(kMaxWarps * 32 + 32, 1)
    pack_hosted(const DispatchArguments* arguments) {
    pack_rank(arguments[blockIdx.y]);
}

}  // namespace ht
