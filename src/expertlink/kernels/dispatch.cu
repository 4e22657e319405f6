// dispatch: counts, plans, sends and places the rows of one dispatch; which of these a launch does
// is in its flags.
//
//   count + plan + send           uncached, while the host learns how much memory the rows need
//   place                         follows it into that memory, beside it
//   (count + plan +) send + place  in one launch where the outputs exist already
//
// The first `num_senders` blocks send, the others place. The last block plans.

#include "place.cuh"
#include "plan.cuh"
#include "send.cuh"

__device__ __forceinline__ bool wait_for_plan(const DispatchArguments& a, const Watch& watch) {
    __shared__ bool known;
    if (threadIdx.x == 0)
        known = wait_until(&a.state->planned, watch.transfer, watch, kPhaseReady, -1);
    __syncthreads();
    return known;
}

__device__ __forceinline__ bool run_halves(const DispatchArguments& a, const Watch& watch,
                                           char* shared, Ring& ring) {
    const int block = blockIdx.x, blocks = gridDim.x;
    if (a.flags & kCount) {
        if (!count_tokens(a, watch, reinterpret_cast<unsigned*>(shared))) return false;
        if (!(a.flags & kPlace)) let_follower_start();
        if (block == blocks - 1 && !plan_slots(a, watch, reinterpret_cast<int*>(shared)))
            return false;
    } else if (a.flags & kSend) {
        say_ready(a, watch);
    }
    __syncthreads();
    if (a.flags & kSend && block < a.num_senders) {
        if (a.flags & kZeroCopy && a.flags & kCount && !wait_for_plan(a, watch)) return false;
        if (!send_rows(a, watch, shared, ring)) return false;
    }
    if (a.flags & kPlace && (block >= a.num_senders || blocks == a.num_senders)) {
        if (a.flags & kCount && !wait_for_plan(a, watch)) return false;
        __syncthreads();
        const int first = blocks == a.num_senders ? 0 : a.num_senders;
        if (!place_rows(a, watch, shared, ring, block - first, blocks - first)) return false;
    }
    return true;
}

__device__ __forceinline__ void dispatch_rank(const DispatchArguments& a) {
    extern __shared__ __align__(128) char shared[];
    __shared__ Ring ring;
    const bool sends = a.flags & kSend, places = a.flags & kPlace || a.flags & kDiscard;
    const Watch watch{a.state, a.control,
                      (sends ? a.state->sent : a.state->received) + 1,
                      static_cast<unsigned>(a.operation)};
    if (gave_up(watch)) return;
    if (!run_halves(a, watch, shared, ring)) return;

    // Placing may have started before the sending half was over; the kernel after this one may not.
    if (places && !sends) wait_for_predecessor();
    if (sends && last_to_leave(&a.state->left_send, gridDim.x) && threadIdx.x == 0) {
        a.state->sent = watch.transfer;
        if (a.flags & kCount) *a.faulty = 0;
    }
    if (places && last_to_leave(&a.state->left_place, gridDim.x)) {
        grant_credit(a, watch);
        if (threadIdx.x == 0) a.state->received = watch.transfer;
    }
}

extern "C" __global__ void __launch_bounds__(kMaxWarps * 32 + 32, 1)
    dispatch(const __grid_constant__ DispatchArguments arguments) {
    dispatch_rank(arguments);
}

// Several ranks on one GPU, each a row of the grid.
extern "C" __global__ void __launch_bounds__(kMaxWarps * 32 + 32, 1)
    dispatch_hosted(const DispatchArguments* arguments) {
    dispatch_rank(arguments[blockIdx.y]);
}
