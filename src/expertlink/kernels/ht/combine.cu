// ht::combine: one partial sum per (token, rank) travels back to the token's rank, which sums them
// up.
//
// The first `num_senders` blocks make the partial sums and send them, in the order in which the
// rows arrived. The other blocks sum them up token by token as they come in, and the senders join
// them in the end. The roundings are those of reduction.py.

#include "ht/peers.cuh"
#include "ht/returns.cuh"
#include "ht/tally.cuh"
#include "ht/totals.cuh"

namespace ht {

__device__ __forceinline__ bool run_halves(const CombineArguments& a, const Watch& watch,
                                           char* shared, ReturnRing& ring) {
    const Stages stages{shared_address(shared) + threadIdx.x / 32 * a.warp_bytes, a.warp_bytes};
    publish_ready(a, watch);
    if (blockIdx.x == 0) tally_combine(a);
    if (blockIdx.x < a.num_senders && !return_rows(a, watch, shared, ring, stages)) return false;
    return add_up(a, watch, stages);
}

__device__ __forceinline__ void combine_rank(const CombineArguments& a) {
    extern __shared__ __align__(128) char shared[];
    __shared__ ReturnRing ring;
    const Watch watch = watch_after(a, a.state->sent);
    if (__syncthreads_or(threadIdx.x == 0 && has_failed(watch))) return;
    if (!run_halves(a, watch, shared, ring)) return;
    if (last_to_leave(&a.state->left_send, gridDim.x)) end_transfer(a, watch);
}

__global__ void __launch_bounds__(kCombineWarps * 32 + 32, 1)
    combine(const __grid_constant__ CombineArguments arguments) {
    combine_rank(arguments);
}

// Several ranks on one GPU, each a row of the grid.
__global__ void __launch_bounds__(kCombineWarps * 32 + 32, 1)
    combine_hosted(const CombineArguments* arguments) {
    combine_rank(arguments[blockIdx.y]);
}

}  // namespace ht
