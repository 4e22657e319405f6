// What each warp of a block of a dispatch does.
#pragma once

#include "ll/counts.cuh"

namespace ll {

// The first warps send rows, the others publish metadata and counts. Then some of these wait for
// counts. As soon as the counts of rows are known, all warps place rows. With few tokens the first
// warp that does not send is the one that publishes their metadata.
struct Roles {
    int warp, warps;
    int senders;                // the first warps
    int first_waiter, waiters;  // the first one waits for the counts of rows
    int first_ready;            // first warp that nobody has to wait for

    __device__ __forceinline__ Roles(const DispatchArguments& a, bool quantizes)
        : warp(threadIdx.x / 32), warps(blockDim.x / 32), senders(0) {
        const int all = warps * static_cast<int>(gridDim.x);
        const bool few = a.num_tokens * a.row_bytes <= all * kStepBytes;
        if (a.flags & kSend) {
            senders = a.send_warps;
            if (few && !quantizes && a.flags & kReceive) {
                const int blocks = gridDim.x;
                senders =
                    max(1, min((kFewSenders + blocks - 1) / blocks, warps - kPublishingWarps));
            }
            senders = min(senders, warps - 1);
        }
        waiters = count_warps(a, others());
        first_waiter = senders + min(1, others() - waiters);
        first_ready = few ? first_waiter : senders;
    }

    __device__ __forceinline__ int others() const { return warps - senders; }
    __device__ __forceinline__ bool sends() const { return warp < senders; }
    __device__ __forceinline__ int first_idle() const { return first_waiter + waiters; }
    __device__ __forceinline__ bool waits() const {
        return warp >= first_waiter && warp < first_idle();
    }

    // Counts that are only kept hold up no row, nor do the warps that wait for them.
    __device__ __forceinline__ int needed_waiters() const { return kExpanded ? waiters : 1; }
    __device__ __forceinline__ bool joins_late() const {
        return warp < first_ready || (waits() && warp >= first_waiter + needed_waiters());
    }
    __device__ __forceinline__ int late_warps() const {
        return first_ready + waiters - needed_waiters();
    }

    // Returns when the counts are known. Warps with nothing else to do begin to place at once, the
    // others when all of them are done.
    __device__ __forceinline__ void wait_for_counts() const {
        if (joins_late()) {
            barrier_sync(kPlacingBarrier, late_warps() + needed_waiters());
        } else {
            if (waits() && late_warps())
                barrier_arrive(kPlacingBarrier, late_warps() + needed_waiters());
            barrier_sync(kCountsBarrier, warps - late_warps());
        }
    }

    // Warps that keep the counts: the last of the waiters, and the first one if there is no other.
    __device__ __forceinline__ int stat_warps() const {
        return kExpanded || waiters == 1 ? waiters : waiters - 1;
    }
    __device__ __forceinline__ bool keeps() const {
        return waits() && warp >= first_idle() - stat_warps();
    }

    // A warp that neither sends nor waits, if there is one.
    __device__ __forceinline__ bool publishes_progress() const {
        return blockIdx.x == 0 && warp == min(first_idle(), warps - 1);
    }

    // The first item of a warp that does not send: idle ones come first.
    __device__ __forceinline__ int first_item() const {
        const int nth = warp - first_idle();
        return (nth < 0 ? nth + others() : nth) * gridDim.x + blockIdx.x;
    }
};

}  // namespace ll
