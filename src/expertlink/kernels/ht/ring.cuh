// What the warps of a block share: for each warp shared memory with room for a batch of rows and
// their metadata, and a mailbox in which it posts the rows that have been written.
#pragma once

#include "ht/peers.cuh"

namespace ht {

// Lanes of a warp that see to each row of a batch: at least one for every choice.
constexpr int kRowLanes = 32 / kMostBatch;
static_assert(kTopk <= kRowLanes);

__device__ __forceinline__ unsigned lanes_of_row(int index) {
    return (kRowLanes == 32 ? 0xffffffffu : (1u << kRowLanes) - 1u) << (index * kRowLanes);
}

// Room for a batch of rows, one behind the other.
struct Slots {
    char* memory;
    int stride;  // bytes from one row to the next
    unsigned long long* barrier;
    unsigned parity;

    // Where the row of a batch is. Its metadata follow.
    __device__ __forceinline__ char* row(int index) const { return memory + index * stride; }

    // Starts loading rows of `bytes` each: lanes with `loads` have one each. Every lane.
    __device__ __forceinline__ void load(bool loads, int index, const char* source, int bytes) {
        const unsigned loading = __ballot_sync(0xffffffffu, loads);
        if (loading == 0) return;
        if (threadIdx.x % 32 == 0) barrier_expect(barrier, __popc(loading) * bytes);
        __syncwarp();  // bytes are expected before they come
        if (loads) bulk_copy(row(index), source, bytes, barrier);
    }

    // Waits until the rows are there. Every lane.
    __device__ __forceinline__ void loaded() {
        bulk_load_wait(barrier, parity);
        parity ^= 1u;
    }
};

// Static shared memory of a block with at most kWarps that move rows.
template <int kWarps>
struct RingOf {
    static_assert(kWarps <= 32, "the announcing warp has a lane for every mailbox");
    unsigned long long barriers[kWarps];
    int codes[kWarps][kMailboxDepth][32];  // peer * kWriterSlots + slot of announced rows
    unsigned posted[kWarps];               // batches put into the mailbox
    unsigned taken[kWarps];                // batches taken out of it
    unsigned finished;                     // warps that will post no more
};

using Ring = RingOf<kMaxWarps>;  // of a dispatch

// Every thread of the block. Each warp has `warp_bytes`. The last warp gets slots that it must not
// use.
template <int kWarps>
__device__ __forceinline__ Slots open_slots(RingOf<kWarps>& ring, char* shared, int slot_bytes,
                                            int warp_bytes) {
    const int warp = threadIdx.x / 32;
    if (threadIdx.x < kWarps) {
        barrier_init(&ring.barriers[threadIdx.x]);
        ring.posted[threadIdx.x] = ring.taken[threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) ring.finished = 0;
    fence_shared_to_bulk();  // the memory may have been used by ordinary stores
    __syncthreads();
    return {shared + warp * warp_bytes, slot_bytes, &ring.barriers[min(warp, kWarps - 1)], 0};
}

template <int kWarps>
__device__ __forceinline__ void close_slots(RingOf<kWarps>& ring) {
    __syncthreads();
    if (threadIdx.x < kWarps) barrier_inval(&ring.barriers[threadIdx.x]);
    __syncthreads();
}

// Every peer writes kWriterSlots staged rows, those from its number * kWriterSlots on. On one host
// it has a slot for every token.
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

// Copies bytes of any alignment and number. One warp. Volatile: past the L1 cache.
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
// A release at system scope takes longer than a row does. So the warps that move rows only post
// those whose bytes are written. One warp announces the rows of all of them after one fence.

// Posts a batch. Every lane: `code` is peer * kWriterSlots + slot of a row that has been written
// there, or -1.
template <int kWarps>
__device__ __forceinline__ void post(RingOf<kWarps>& ring, int code, unsigned& count) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Acquire: the announcing warp has read what is overwritten. It waits for nobody, so there will
    // be room.
    while (count - load_acquire_block(&ring.taken[warp]) >= kMailboxDepth) {
    }
    ring.codes[warp][count % kMailboxDepth][lane] = code;
    ++count;
    __syncwarp();
    // Release: the codes come before their number.
    if (lane == 0) store_release_block(&ring.posted[warp], count);
}

template <int kWarps>
__device__ __forceinline__ void finish_posting(RingOf<kWarps>& ring) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) add_release_block(&ring.finished);
}

// The announcing warp: raises arrival flags until `num_warps` warps have finished posting.
template <int kWarps>
__device__ __forceinline__ void announce_rows(RingOf<kWarps>& ring, char* const* bases, int peer,
                                              unsigned transfer, int num_warps) {
    const int lane = threadIdx.x % 32;
    unsigned done = 0;  // batches of warp `lane` that have been announced
    for (;;) {
        // Acquire, and read before the mailboxes: once all have finished, these hold all there will
        // be.
        const bool over = load_acquire_block(&ring.finished) == num_warps;
        const unsigned posted = lane < num_warps ? load_acquire_block(&ring.posted[lane]) : 0;
        unsigned fresh = __ballot_sync(0xffffffffu, posted != done);
        if (fresh == 0) {
            if (__all_sync(0xffffffffu, over)) return;
            continue;
        }
        // Fence: flags come after rows. Whoever posted a row had seen it written, and one lane has
        // seen the post.
        __syncwarp();
        fence_system();
        for (; fresh; fresh &= fresh - 1) {
            const int warp = __ffs(fresh) - 1;
            const unsigned until = __shfl_sync(0xffffffffu, posted, warp);
            for (unsigned n = __shfl_sync(0xffffffffu, done, warp); n != until; ++n) {
                const int code = ring.codes[warp][n % kMailboxDepth][lane];
                if (code < 0) continue;
                const int at = peer * kWriterSlots + code % kWriterSlots;
                store_relaxed_system(arrival_flag(bases[code / kWriterSlots], at), transfer);
            }
        }
        __syncwarp();
        if (posted != done) store_release_block(&ring.taken[lane], posted);
        done = posted;
    }
}

// Whether this block is the last one to leave a half of a kernel. What all blocks did is visible to
// it.
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
