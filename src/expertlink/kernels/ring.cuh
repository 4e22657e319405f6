// A warp's slot of shared memory for one row and what travels beside it, with its load barrier.
#pragma once

#include "common/sync.cuh"

struct Slot {
    char* row;
    char* beside;
    unsigned long long* barrier;
    unsigned parity;

    // Starts loading a row; one lane.
    __device__ __forceinline__ void load(const char* source, int bytes) {
        bulk_load(row, source, bytes, barrier);
    }

    // Every lane: the row is here.
    __device__ __forceinline__ void loaded() {
        bulk_load_wait(barrier, parity);
        parity ^= 1u;
    }
};

// This warp's slot; `barriers` are shared by the whole block and initialised once.
__device__ __forceinline__ Slot open_slot(char* shared, unsigned long long* barriers,
                                          int slot_bytes) {
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) barrier_init(&barriers[warp]);
    fence_shared_to_bulk();  // the memory may have been used by ordinary stores
    __syncthreads();
    char* const begin = shared + static_cast<long long>(warp) * slot_bytes;
    return {begin, begin + slot_bytes - kMetaStride, &barriers[warp], 0};
}

// What travels beside a row: K ids, K places, K weights, then scales.
constexpr int kPlacesAt = kTopk * 4;
constexpr int kWeightsAt = kTopk * 8;

__device__ __forceinline__ char* staged_row(char* base, int slot) {
    return base + kStagingAt + static_cast<long long>(slot) * kStagingStride;
}

__device__ __forceinline__ char* staged_meta(char* base, int slot) {
    return base + kMetaAt + static_cast<long long>(slot) * kMetaStride;
}

__device__ __forceinline__ unsigned* arrival_flag(char* base, int slot) {
    return reinterpret_cast<unsigned*>(base + kFlagsAt) + slot;
}

// Copies bytes of any alignment and number, a warp.
__device__ __forceinline__ void copy_bytes(char* target, const char* source, int bytes) {
    const unsigned long long either = reinterpret_cast<unsigned long long>(target) |
                                      reinterpret_cast<unsigned long long>(source) | bytes;
    const int lane = threadIdx.x % 32;
    if (either % 4 == 0)
        for (int i = lane; i < bytes / 4; i += 32)
            reinterpret_cast<int*>(target)[i] =
                load_fresh(reinterpret_cast<const int*>(source) + i);
    else
        for (int i = lane; i < bytes; i += 32)
            target[i] = *reinterpret_cast<const volatile char*>(source + i);
}

// The last block to leave a half of a kernel; what all blocks did is visible to it.
__device__ __forceinline__ bool last_to_leave(unsigned* left, unsigned blocks) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        last = arrive_device(left) == blocks - 1;
        if (last) *left = 0;
    }
    __syncthreads();
    return last;
}
