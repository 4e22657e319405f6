// ht::plan: a transfer without rows. This rank passes the count rows of its rail on to its peers,
// and from those of all ranks come the slots of all rows, the chunks, and the host's mail.
//
// The last block plans. Each block serves some of the peers.

#include "ht/plan.cuh"
#include "hybrid/ht_rail.cuh"

namespace ht {

// The count row of the host's rank of this rail: from the rail's gather, or from the head of the
// first message; the own one from where it was made.
__device__ __forceinline__ const int* gathered_row(const DispatchArguments& a, int host) {
    if (host == own_host(a)) return a.count_row;
    const int nth = kWantsMail || host < own_host(a) ? host : host - 1;
    return reinterpret_cast<const int*>(a.gathered + nth * a.gathered_stride);
}

__device__ __forceinline__ bool publish_rail(const DispatchArguments& a, const Watch& watch) {
    const int own = own_peer(a);
    for (int step = blockIdx.x; step < kNumPeers; step += gridDim.x) {
        const int peer = (own + step) % kNumPeers;
        __shared__ bool has_room;
        // The peer may still be reading the count rows of the last transfer.
        if (threadIdx.x == 0)
            has_room = wait_until(credit_word(a.bases[own], peer), watch.transfer - 1, watch,
                                  kPhaseCredit, peer);
        __syncthreads();
        if (!has_room) return false;
        for (int i = threadIdx.x; i < kNumHosts * kCountStride; i += blockDim.x) {
            const int host = i / kCountStride, word = i % kCountStride;
            count_row(a.bases[peer], host * kNumPeers + own)[word] = gathered_row(a, host)[word];
        }
        __syncthreads();  // the release below covers what all threads wrote
        if (threadIdx.x == 0) store_release_system(ready_word(a.bases[peer], own), watch.transfer);
    }
    return true;
}

__device__ __forceinline__ void plan_rank(const DispatchArguments& a) {
    extern __shared__ __align__(128) char shared[];
    const Watch watch = watch_after(a, a.state->sent);
    if (__syncthreads_or(threadIdx.x == 0 && has_failed(watch))) return;
    if (!publish_rail(a, watch)) return;
    if (blockIdx.x == gridDim.x - 1 && !plan_slots(a, watch, reinterpret_cast<int*>(shared)))
        return;
    if (!last_to_leave(&a.state->left_send, gridDim.x)) return;
    grant_credit(a, watch);
    if (threadIdx.x == 0) {
        a.state->sent = a.state->received = watch.transfer;
        *a.faulty = 0;
    }
}

__global__ void __launch_bounds__(kMaxWarps * 32 + 32, 1)
    plan(const __grid_constant__ DispatchArguments arguments) {
    plan_rank(arguments);
}

// Several ranks on one GPU, each a row of the grid.
__global__ void __launch_bounds__(kMaxWarps * 32 + 32, 1)
    plan_hosted(const DispatchArguments* arguments) {
    plan_rank(arguments[blockIdx.y]);
}

}  // namespace ht
