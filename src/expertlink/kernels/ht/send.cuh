// Sending half of a dispatch: every token is loaded once and stored once at each destination rank.
//
// Warps take tokens from a counter. The last warp of the block announces what the others have
// written. Lane d carries the row to the token's d-th destination: it issues the bulk stores, and
// waits for them while the next row is being loaded.
#pragma once

#include "ht/count.cuh"
#include "ht/ring.cuh"

namespace ht {

__device__ __forceinline__ void write_metadata(const DispatchArguments& a, char* beside,
                                               int token) {
    const int lane = threadIdx.x % 32;
    if (lane < kTopk) {
        const long long at = static_cast<long long>(token) * kTopk + lane;
        if (!(a.flags & kCached)) {
            const int expert = expert_of(a, token, lane);
            reinterpret_cast<int*>(beside)[lane] = expert < 0 ? -1 : a.expert_location[expert];
            if (kExpanded)
                reinterpret_cast<int*>(beside + kPlacesAt)[lane] = load_fresh(&a.ordinals[at]);
        }
        if (a.flags & kNewWeights)
            reinterpret_cast<float*>(beside + kWeightsAt)[lane] = a.weights[at];
    }
    if (a.scale_bytes)
        copy_bytes(beside + kScalesAt, a.scales + static_cast<long long>(token) * a.scale_bytes,
                   a.scale_bytes);
    fence_shared_to_bulk();
}

// Sends the tokens that this warp takes.
__device__ __forceinline__ void send_tokens(const DispatchArguments& a, Ring& ring, Slot slot,
                                            const int* pools) {
    const int lane = threadIdx.x % 32;
    const auto destination = [&](int token) {
        if (lane >= kCopies || token >= a.num_tokens) return -1;
        const int code = load_fresh(&a.slots_of_token[token * kCopies + lane]);
        // Rows for experts of this rank are placed from the input, unless all rows go to the pool.
        const bool placed = !kZeroCopy && code / kMaxTokens == a.rank;
        return placed ? -1 : code;
    };

    int token = taken(take(&a.state->next_send));
    int next = taken(take(&a.state->next_send));
    int written = -1;    // the row before, at this lane's destination
    unsigned words = 0;  // rows posted
    for (int next_code = destination(token); token < a.num_tokens;) {
        const int current = token, code = next_code;
        const int ticket = take(&a.state->next_send);
        next_code = destination(next);
        token = next;
        const auto move_on = [&] { next = taken(ticket); };
        if (!__any_sync(0xffffffffu, code >= 0)) {
            move_on();
            continue;
        }
        bulk_wait_read();
        __syncwarp();
        if (lane == 0) slot.load(a.x + static_cast<long long>(current) * a.row_bytes, a.row_bytes);
        if (a.metadata_bytes) write_metadata(a, slot.row + a.row_bytes, current);
        const int rank = max(code, 0) / kMaxTokens, position = max(code, 0) % kMaxTokens;
        const int at = a.rank * kMaxTokens + position;
        char* const base = a.bases[rank];
        char* target = staged_row(base, at);
        if (kZeroCopy)
            target =
                base + kPoolAt + pools[rank] * kPoolBytes +
                static_cast<long long>(load_fresh(&a.first_sent[rank]) + position) * a.row_bytes;
        bulk_wait_written();
        post(ring, written, words);
        slot.loaded();
        if (code >= 0) {
            const bool apart = kZeroCopy && a.metadata_bytes;
            bulk_store(target, slot.row, a.row_bytes + (apart ? 0 : a.metadata_bytes));
            if (apart)
                bulk_store(staged_metadata(base, at, a.row_bytes), slot.row + a.row_bytes,
                           a.metadata_bytes);
            bulk_commit();
        }
        written = code;
        move_on();
    }
    bulk_wait_written();
    post(ring, written, words);
    finish_posting(ring);
}

__device__ __forceinline__ bool send_rows(const DispatchArguments& a, const Watch& watch,
                                          char* shared, Ring& ring) {
    __shared__ int pools[kNumRanks];
    if (!peers_have_room(a, watch, kZeroCopy)) return false;
    if (kZeroCopy) {
        // Every rank announces which pool its view of this dispatch is in. A rank in another call
        // may be reading its pools: then nothing is sent, and whoever compares the headers reports
        // it.
        bool same = true;
        for (int r = threadIdx.x; r < kNumRanks; r += blockDim.x) {
            const int* const header = count_row(a.bases[a.rank], r);
            pools[r] = load_fresh(&header[kPool]) & 1;
            same &= is_same_call(a, watch, [&](int word) { return load_fresh(&header[word]); });
        }
        if (!__syncthreads_and(same)) return true;
    }
    const int movers = blockDim.x / 32 - 1;
    const Slot slot = open_slot(ring, shared, a.slot_bytes);
    if (threadIdx.x / 32 < movers)
        send_tokens(a, ring, slot, pools);
    else
        announce_rows(ring, a.bases, a.rank, watch.transfer, movers);
    close_slot(ring);
    return true;
}

}  // namespace ht
