// What the warps of a block share: a slot of shared memory per warp for one row and what travels
// beside it, and the box in which they leave word of rows that have been written.
#pragma once

#include "ht/peers.cuh"

namespace ht {

struct Slot {
    char* row;  // what travels beside it follows
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

constexpr int kMailboxDepth = 2;  // rows of a warp that may wait to be announced

// Static shared memory of a block.
struct Ring {
    unsigned long long barriers[kMaxWarps];
    int codes[kMaxWarps][kMailboxDepth]
             [kCopies];          // rank * kMaxTokens + position of an announced row
    unsigned posted[kMaxWarps];  // rows left in the box
    unsigned taken[kMaxWarps];   // rows taken out of it
    unsigned finished;           // warps that will leave no more
};

// Every thread of the block; warps beyond the last slot get one that they must not use.
__device__ __forceinline__ Slot open_slot(Ring& ring, char* shared, int slot_bytes) {
    const int warp = threadIdx.x / 32;
    if (threadIdx.x < kMaxWarps) {
        barrier_init(&ring.barriers[threadIdx.x]);
        ring.posted[threadIdx.x] = ring.taken[threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) ring.finished = 0;
    fence_shared_to_bulk();  // the memory may have been used by ordinary stores
    __syncthreads();
    return {shared + static_cast<long long>(warp) * slot_bytes,
            &ring.barriers[min(warp, kMaxWarps - 1)], 0};
}

__device__ __forceinline__ void close_slot(Ring& ring) {
    __syncthreads();
    if (threadIdx.x < kMaxWarps) barrier_inval(&ring.barriers[threadIdx.x]);
    __syncthreads();
}

__device__ __forceinline__ char* staged_row(char* base, int slot) {
    return base + kStagingAt + static_cast<long long>(slot) * kStagingStride;
}

// Metadata of a row: behind it, or apart where rows lie in the pool one after another.
__device__ __forceinline__ char* staged_metadata(char* base, int slot, int row_bytes) {
    return kZeroCopy ? base + kMetadataAt + static_cast<long long>(slot) * kMetadataStride
                     : staged_row(base, slot) + row_bytes;
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

// -- announcing rows ------------------------------------------------------------------------------
// A release at system scope takes longer than a row does. So the warps that move rows only leave
// word of those whose bytes are written, and one warp announces the rows of all of them after one
// fence.

// Lane d: the row at its d-th destination, `code`, has been written; -1: none.
__device__ __forceinline__ void post(Ring& ring, int code, unsigned& count) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // The announcing warp waits for nobody, so there will be room.
    while (count - load_acquire_block(&ring.taken[warp]) >= kMailboxDepth) {
    }
    if (lane < kCopies) ring.codes[warp][count % kMailboxDepth][lane] = code;
    ++count;
    __syncwarp();
    if (lane == 0) store_release_block(&ring.posted[warp], count);
}

__device__ __forceinline__ void finish_posting(Ring& ring) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) add_release_block(&ring.finished);
}

// The announcing warp: raises the arrival flags until `num_warps` warps will leave no more.
__device__ __forceinline__ void announce_rows(Ring& ring, char* const* bases, int rank,
                                              unsigned transfer, int num_warps) {
    const int lane = threadIdx.x % 32;
    unsigned done = 0;  // rows of warp `lane` that have been announced
    for (;;) {
        // Read before the boxes: when all have finished, what is in them is all there will be.
        const bool over = load_acquire_block(&ring.finished) == num_warps;
        const unsigned posted = lane < num_warps ? load_acquire_block(&ring.posted[lane]) : 0;
        unsigned fresh = __ballot_sync(0xffffffffu, posted != done);
        if (fresh == 0) {
            if (__all_sync(0xffffffffu, over)) return;
            continue;
        }
        // Orders the flags after the rows: those who left word had seen their rows written, and one
        // lane has seen the word.
        __syncwarp();
        fence_system();
        for (; fresh; fresh &= fresh - 1) {
            const int warp = __ffs(fresh) - 1;
            const unsigned until = __shfl_sync(0xffffffffu, posted, warp);
            for (unsigned n = __shfl_sync(0xffffffffu, done, warp); n != until; ++n) {
                const int code = lane < kCopies ? ring.codes[warp][n % kMailboxDepth][lane] : -1;
                if (code < 0) continue;
                const int at = rank * kMaxTokens + code % kMaxTokens;
                store_relaxed_system(arrival_flag(bases[code / kMaxTokens], at), transfer);
            }
        }
        __syncwarp();
        if (posted != done) store_release_block(&ring.taken[lane], posted);
        done = posted;
    }
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

}  // namespace ht
