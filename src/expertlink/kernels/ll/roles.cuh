// Low latency: what each warp of a block of a dispatch does.
#pragma once

#include "ll/counts.cuh"

namespace ll {

constexpr int kFewSenders = 192;  // of all blocks, with a step of a row or less for each warp

// The first warps send rows, the others publish_item what belongs to them. When that is done some
// of these wait for counts, and as soon as the counts of rows are known all place rows. With few
// tokens the first of the others is the one that tells of them.
struct Roles {
    int warp, warps;
    int senders;                // the first warps
    int first_waiter, waiters;  // the first of them waits for the counts of rows
    int first_ready;            // of those that nobody needs to wait for

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

    // No row waits for counts that are only kept, nor for the warps that wait for those.
    __device__ __forceinline__ int needed_waiters() const { return kExpanded ? waiters : 1; }
    __device__ __forceinline__ bool joins_late() const {
        return warp < first_ready || (waits() && warp >= first_waiter + needed_waiters());
    }
    __device__ __forceinline__ int late_warps() const {
        return first_ready + waiters - needed_waiters();
    }

    // Returns when the counts are known: whoever has sentinel_piece else to do begins to place at
    // once, the others when all of them are done.
    __device__ __forceinline__ void wait_for_counts() const {
        if (joins_late()) {
            barrier_sync(kPlacingBarrier, late_warps() + needed_waiters());
        } else {
            if (waits() && late_warps())
                barrier_arrive(kPlacingBarrier, late_warps() + needed_waiters());
            barrier_sync(kCountsBarrier, warps - late_warps());
        }
    }

    // Those that keep the counts: the last of the waiters, the first too if it is needed for that.
    __device__ __forceinline__ int stat_warps() const {
        return kExpanded || waiters == 1 ? waiters : waiters - 1;
    }
    __device__ __forceinline__ bool keeps() const {
        return waits() && warp >= first_idle() - stat_warps();
    }

    // One that neither sends nor waits, if there is one.
    __device__ __forceinline__ bool publishes_progress() const {
        return blockIdx.x == 0 && warp == min(first_idle(), warps - 1);
    }

    // The item that a warp which does not send begins with: idle ones come first.
    __device__ __forceinline__ int first_item() const {
        const int nth = warp - first_idle();
        return (nth < 0 ? nth + others() : nth) * gridDim.x + blockIdx.x;
    }
};

}  // namespace ll
