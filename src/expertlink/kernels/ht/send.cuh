// Sending half of a dispatch: every token is loaded once and stored once at each destination rank.
//
// Warps take batches of tokens from a counter: rows that are short share a warp's memory. The last
// warp of the block announces what the others have written. Lane (b, d) carries the row of the b-th
// token to its d-th destination: it issues the bulk stores, and waits for them while the next batch
// is being loaded.
#pragma once

#include "ht/chunk.cuh"
#include "ht/count.cuh"
#include "ht/ring.cuh"

namespace ht {

// Writes the metadata of a batch. Lane (b, k): `token` is the b-th one, `sends` says that its row
// goes anywhere.
__device__ __forceinline__ void write_metadata(const DispatchArguments& a, const Slots& slots,
                                               int token, bool sends) {
    const int lane = threadIdx.x % 32, b = lane / kRowLanes, k = lane % kRowLanes;
    char* const metadata = slots.row(b) + a.row_bytes;
    if (sends && k < kTopk) {
        const long long at = static_cast<long long>(token) * kTopk + k;
        if (!(a.flags & kCached)) {
            const int expert = expert_of(a, token, k);
            reinterpret_cast<int*>(metadata)[k] = expert < 0 ? -1 : a.expert_location[expert];
            if (kExpanded)
                reinterpret_cast<int*>(metadata + kPlacesAt)[k] = load_fresh(&a.ordinals[at]);
        }
        if (a.flags & kNewWeights)
            reinterpret_cast<float*>(metadata + kWeightsAt)[k] = a.weights[at];
        if (kSourceTokens && k == 0) *reinterpret_cast<int*>(metadata + kSourceAt) = token;
    }
    if (a.scale_bytes) {
        unsigned rows = __ballot_sync(0xffffffffu, sends && k == 0);
        for (; rows; rows &= rows - 1) {
            const int from = __ffs(rows) - 1;
            const long long other = __shfl_sync(0xffffffffu, token, from);
            copy_bytes(slots.row(from / kRowLanes) + a.row_bytes + kScalesAt,
                       a.scales + other * a.scale_bytes, a.scale_bytes);
        }
    }
    fence_shared_to_bulk();
}

// Where the row of a token goes as its d-th copy: peer * kWriterSlots + slot there, or -1. Rows for
// experts of this rank are placed from the input, unless all rows go to the pool.
template <typename Arguments>
__device__ __forceinline__ int code_of(const Arguments& a, int token, int d) {
    const int code = load_fresh(&a.slots_of_token[token * kCopies + d]);
    const bool placed = !kZeroCopy && code / kMaxTokens == a.rank;
    if constexpr (kSpansHosts) return code < 0 || placed ? -1 : chunk_code(a, code);
    return placed ? -1 : code;
}

// Sends the tokens that this warp takes.
__device__ __forceinline__ void send_tokens(const DispatchArguments& a, Ring& ring, Slots slots,
                                            const int* pools) {
    const int lane = threadIdx.x % 32, b = lane / kRowLanes, d = lane % kRowLanes;
    const int batch = kMostBatch == 1 ? 1 : a.batch;
    const TokenRange tokens = tokens_of_chunk(a);
    const auto destination = [&](int first) {
        const int token = first + b;
        if (b >= batch || d >= kCopies || token >= tokens.end) return -1;
        return code_of(a, token, d);
    };

    int first = tokens.begin + taken(take(&a.state->next_send, batch));
    int next = tokens.begin + taken(take(&a.state->next_send, batch));
    int written = -1;    // of the batch before: the row at this lane's destination
    unsigned posts = 0;  // batches posted
    for (int next_code = destination(first); first < tokens.end;) {
        const int token = first + b, code = next_code;
        const int ticket = take(&a.state->next_send, batch);
        next_code = destination(next);
        first = next;
        const unsigned going = __ballot_sync(0xffffffffu, code >= 0);
        if (going == 0) {
            next = tokens.begin + taken(ticket);
            continue;
        }
        const bool sends = (going & lanes_of_row(b)) != 0;
        bulk_wait_read();
        __syncwarp();
        slots.load(sends && d == 0, b, a.x + static_cast<long long>(token) * a.row_bytes,
                   a.row_bytes);
        if (a.metadata_bytes) write_metadata(a, slots, token, sends);
        const int peer = max(code, 0) / kWriterSlots, slot = max(code, 0) % kWriterSlots;
        const int at = own_peer(a) * kWriterSlots + slot;
        char* const base = a.bases[peer];
        char* target = staged_row(base, at);
        if (kZeroCopy)
            target = base + kPoolAt + pools[peer] * kPoolBytes +
                     static_cast<long long>(load_fresh(&a.first_sent[peer]) + slot) * a.row_bytes;
        bulk_wait_written();
        post(ring, written, posts);
        slots.loaded();
        if (code >= 0) {
            const bool apart = kZeroCopy && a.metadata_bytes;
            bulk_store(target, slots.row(b), a.row_bytes + (apart ? 0 : a.metadata_bytes));
            if (apart)
                bulk_store(staged_metadata(base, at, a.row_bytes), slots.row(b) + a.row_bytes,
                           a.metadata_bytes);
            bulk_commit();
        }
        written = code;
        next = tokens.begin + taken(ticket);
    }
    bulk_wait_written();
    post(ring, written, posts);
    finish_posting(ring);
}

__device__ __forceinline__ bool send_rows(const DispatchArguments& a, const Watch& watch,
                                          char* shared, Ring& ring) {
    __shared__ int pools[kNumPeers];
    if (!peers_have_room(a, watch, kZeroCopy)) return false;
    if (kZeroCopy) {
        // Every rank announces which pool its view of this dispatch is in. A rank in another call
        // may be reading its pools: then nothing is sent, and whoever compares the headers reports
        // it.
        bool same = true;
        for (int r = threadIdx.x; r < kNumPeers; r += blockDim.x) {
            const int* const header = count_row(a.bases[a.rank], r);
            pools[r] = load_fresh(&header[kPool]) & 1;
            same &= is_same_call(a, watch, [&](int word) { return load_fresh(&header[word]); });
        }
        if (!__syncthreads_and(same)) return true;
    }
    const int movers = blockDim.x / 32 - 1;
    const Slots slots = open_slots(ring, shared, a.slot_bytes, a.warp_bytes);
    if (threadIdx.x / 32 < movers)
        send_tokens(a, ring, slots, pools);
    else
        announce_rows(ring, a.bases, own_peer(a), watch.transfer, movers);
    close_slots(ring);
    return true;
}

}  // namespace ht
