// Sending half of a dispatch: every token is loaded once and stored once at each destination rank.
//
// Warps take tokens in turn. Lane d carries the row to the token's d-th destination: it issues the
// bulk stores, waits for them and raises the arrival flag. A row is announced while the next one is
// being loaded.
#pragma once

#include "count.cuh"
#include "ring.cuh"

__device__ __forceinline__ void write_beside(const DispatchArguments& a, char* beside, int token) {
    const int lane = threadIdx.x % 32;
    if (lane < kTopk) {
        const long long at = static_cast<long long>(token) * kTopk + lane;
        if (!(a.flags & kCached)) {
            reinterpret_cast<int*>(beside)[lane] = expert_of(a, token, lane);
            reinterpret_cast<int*>(beside + kPlacesAt)[lane] = load_fresh(&a.ordinals[at]);
        }
        if (a.flags & kNewWeights)
            reinterpret_cast<float*>(beside + kWeightsAt)[lane] = a.weights[at];
    }
    if (a.scale_bytes)
        copy_bytes(beside + kScalesAt,
                   a.scales + static_cast<long long>(token) * a.scale_bytes, a.scale_bytes);
    fence_shared_to_bulk();
}

__device__ __forceinline__ bool send_rows(const DispatchArguments& a, const Watch& watch,
                                          char* shared, unsigned long long* barriers) {
    if (!peers_have_room(a, watch, a.flags & kZeroCopy)) return false;
    const int lane = threadIdx.x % 32;
    const int num_warps = blockDim.x / 32;
    Slot slot = open_slot(shared, barriers, a.slot_bytes);
    int announced = -1;  // slot of the row before this one, at this lane's destination

    const auto announce = [&](int code) {
        if (code < 0) return;
        bulk_wait_written();
        store_release_system(
            arrival_flag(a.bases[code / kMaxTokens], a.rank * kMaxTokens + code % kMaxTokens),
            watch.transfer);
    };

    const auto destination = [&](int token) {
        if (lane >= kCopies || token >= a.num_tokens) return -1;
        const int code = load_fresh(&a.slots_of_token[token * kCopies + lane]);
        // Rows to experts of this rank are placed from the input, unless all rows go to the pool.
        const bool placed = !(a.flags & kZeroCopy) && code / kMaxTokens == a.rank;
        return placed ? -1 : code;
    };

    // Neighbouring tokens go to different blocks, so that all destinations progress alike.
    const int stride = a.num_senders * num_warps;
    int token = threadIdx.x / 32 * a.num_senders + blockIdx.x;
    for (int next = destination(token); token < a.num_tokens; token += stride) {
        const int code = next;
        next = destination(token + stride);
        if (!__any_sync(0xffffffffu, code >= 0)) continue;
        bulk_wait_read();
        __syncwarp();
        if (lane == 0)
            slot.load(a.x + static_cast<long long>(token) * a.row_bytes, a.row_bytes);
        if (a.beside_bytes) write_beside(a, slot.beside, token);
        announce(announced);
        __syncwarp();
        slot.loaded();
        if (code >= 0) {
            const int rank = code / kMaxTokens, position = code % kMaxTokens;
            char* const base = a.bases[rank];
            const int at = a.rank * kMaxTokens + position;
            char* const target =
                a.flags & kZeroCopy
                    ? base + a.pool_at +
                          static_cast<long long>(load_fresh(&a.first_sent[rank]) + position) *
                              a.row_bytes
                    : staged_row(base, at);
            bulk_store(target, slot.row, a.row_bytes);
            if (a.beside_bytes) bulk_store(staged_meta(base, at), slot.beside, a.beside_bytes);
            bulk_commit();
        }
        announced = code;
    }
    announce(announced);
    return true;
}
