// ht::dispatch_chunk: moves a chunk inside a host, as a transfer. Within the host ranks send their
// own tokens. Else each rank passes on what has come on its rail; messages are complete before the
// launch.
//
// The first `num_senders` blocks send, and then help the others to place.

#include "ht/place.cuh"
#include "ht/send.cuh"
#include "ht/tally.cuh"
#include "hybrid/ht_rail.cuh"

namespace ht {

// Where a row goes as its d-th copy in this host: peer * kWriterSlots + slot there, or -1. Codes of
// a new routing come with the row, and are kept for later calls.
__device__ __forceinline__ int relay_code(const DispatchArguments& a, const char* row, int host,
                                          int index, int d) {
    const int first = a.relayed[host * kBounds + a.chunk];
    int* const kept = a.relay_codes + (host * kMaxTokens + first + index) * kPeerCopies + d;
    if (a.flags & kCached) {
        const int code = *kept;
        return code;
    }
    const int* const positions = reinterpret_cast<const int*>(row + a.row_bytes + a.metadata_bytes);
    const int code = positions[d];
    const int peer = code / kMaxTokens;
    // Codes become addresses, so they are checked.
    const bool exists = code >= 0 && peer < kNumPeers;
    *kept = exists ? code : -1;
    return exists ? code : -1;
}

// The slot of such a code in this chunk.
__device__ __forceinline__ int relay_slot(const DispatchArguments& a, int host, int code) {
    if (code < 0) return -1;
    const int peer = code / kMaxTokens;
    const int before = a.relayed_before[(host * kBounds + a.chunk) * kNumPeers + peer];
    const int index = code % kMaxTokens - before;
    if (index < 0 || index >= kChunkRows) return -1;
    return peer * kWriterSlots + host * kChunkRows + index;
}

// Passes on the rows that this warp takes. Lane (b, d) carries the b-th row to its d-th peer.
__device__ __forceinline__ void relay_rows(const DispatchArguments& a, Ring& ring,
                                           const Messages& messages, Slots slots) {
    const int lane = threadIdx.x % 32, b = lane / kRowLanes, d = lane % kRowLanes;
    const int batch = kMostBatch == 1 ? 1 : a.batch;
    const int rows = messages.most * (kNumHosts - 1);
    int written = -1;    // of the batch before
    unsigned posts = 0;  // batches posted
    int ticket = take(&a.state->next_send, batch);
    for (int first = taken(ticket); first < rows; first = taken(ticket)) {
        ticket = take(&a.state->next_send, batch);
        const int nth = first + b;
        const int host = other_host(a, nth % (kNumHosts - 1)), index = nth / (kNumHosts - 1);
        const bool exists = b < batch && nth < rows && index < messages.rows[host];
        const char* const row =
            a.rail_receive + messages.at[host] + static_cast<long long>(index) * a.rail_stride;
        bulk_wait_read();
        __syncwarp();
        slots.load(exists && d == 0, b, row, a.row_bytes + a.metadata_bytes);
        int code = -1;
        if (exists && d < kPeerCopies)
            code = relay_slot(a, host, relay_code(a, row, host, index, d));
        bulk_wait_written();
        post(ring, written, posts);
        if (__any_sync(0xffffffffu, exists && d == 0)) slots.loaded();
        if (code >= 0) {
            const int at = own_peer(a) * kWriterSlots + code % kWriterSlots;
            bulk_store(staged_row(a.bases[code / kWriterSlots], at), slots.row(b),
                       a.row_bytes + a.metadata_bytes);
            bulk_commit();
        }
        written = code;
    }
    bulk_wait_written();
    post(ring, written, posts);
    finish_posting(ring);
}

__device__ __forceinline__ bool relay_messages(const DispatchArguments& a, const Watch& watch,
                                               char* shared, Ring& ring) {
    __shared__ Messages messages;
    load_messages(a, messages, [&](int host) { return rows_in(a, host); });
    // The head of the first message with static shapes is a count row, which was compared.
    const bool counts = !kWantsMail && a.chunk == 0 && !(a.flags & kCached);
    if (!counts && !check_heads(a, watch, messages)) return false;
    if (!peers_have_room(a, watch, false)) return false;
    const int movers = blockDim.x / 32 - 1;
    const Slots slots = open_slots(ring, shared, a.slot_bytes, a.warp_bytes);
    if (threadIdx.x / 32 < movers)
        relay_rows(a, ring, messages, slots);
    else
        announce_rows(ring, a.bases, own_peer(a), watch.transfer, movers);
    close_slots(ring);
    return true;
}

__device__ __forceinline__ bool move_chunk(const DispatchArguments& a, const Watch& watch,
                                           char* shared, Ring& ring) {
    publish_ready(a, watch);
    if (a.flags & kCached && blockIdx.x == 0 && threadIdx.x == 0)
        *a.origin = static_cast<int>(watch.transfer);
    // Of the transfers of a call one is the first chunk's inside the host.
    if (a.flags & kCached && a.flags & kWithinHost && a.chunk == 0 && blockIdx.x == 0)
        tally_dispatch(a);
    __syncthreads();
    if (blockIdx.x < a.num_senders) {
        const bool sent = a.flags & kWithinHost ? send_rows(a, watch, shared, ring)
                                                : relay_messages(a, watch, shared, ring);
        if (!sent) return false;
    }
    return place_rows(a, watch, shared, ring);
}

__device__ __forceinline__ void dispatch_chunk_rank(const DispatchArguments& a) {
    extern __shared__ __align__(128) char shared[];
    __shared__ Ring ring;
    const Watch watch = watch_after(a, a.state->sent);
    if (__syncthreads_or(threadIdx.x == 0 && has_failed(watch))) return;
    if (!move_chunk(a, watch, shared, ring)) return;
    if (last_to_leave(&a.state->left_send, gridDim.x)) end_transfer(a, watch);
}

__global__ void __launch_bounds__(kMaxWarps * 32 + 32, 1)
    dispatch_chunk(const __grid_constant__ DispatchArguments arguments) {
    dispatch_chunk_rank(arguments);
}

// Several ranks on one GPU, each a row of the grid.
__global__ void __launch_bounds__(kMaxWarps * 32 + 32, 1)
    dispatch_chunk_hosted(const DispatchArguments* arguments) {
    dispatch_chunk_rank(arguments[blockIdx.y]);
}

}  // namespace ht
