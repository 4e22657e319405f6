// ht::dispatch: counts, plans, sends and places the rows of one dispatch. The flags of a launch say
// which of these it does:
//
//   (count + plan +) send + place  the outputs exist, or the host expects their size to be enough
//   count + plan + send            the host still has to learn how much memory the rows need
//   place                          into that memory, while the launch before may still be sending
//
// The first `num_senders` blocks send, and then help the others to place. The last block plans.

#include "ht/place.cuh"
#include "ht/plan.cuh"
#include "ht/send.cuh"

namespace ht {

__device__ __forceinline__ bool wait_for_plan(const DispatchArguments& a, const Watch& watch) {
    __shared__ bool known;
    if (threadIdx.x == 0)
        known = wait_until(&a.state->planned, watch.transfer, watch, kPhaseReady, -1);
    __syncthreads();
    return known;
}

// Whether this launch places nothing: the rows need more memory than the host had guessed, and it
// will launch the placing half again. Or the ranks disagree.
__device__ __forceinline__ bool is_deferred(const DispatchArguments& a) {
    return a.flags & kCount && load_acquire_device(&a.state->deferred) != 0;
}

// A cached dispatch: its number, and the caller's own counts. One block.
__device__ __forceinline__ void copy_counts(const DispatchArguments& a, const Watch& watch) {
    if (threadIdx.x == 0) *a.origin = static_cast<int>(watch.transfer);
    for (int e = threadIdx.x; e <= a.num_local; e += blockDim.x) {
        if (e < a.num_local) a.counts_out[e] = a.tokens_per_expert[e];
        if (kExpanded) a.offsets_out[e] = a.expert_offsets[e];
    }
    for (int r = threadIdx.x; r < kNumRanks; r += blockDim.x) a.rows_from_out[r] = a.rows_from[r];
}

__device__ __forceinline__ bool run_halves(const DispatchArguments& a, const Watch& watch,
                                           char* shared, Ring& ring) {
    const int block = blockIdx.x, blocks = gridDim.x;
    if (a.flags & kCount) {
        const auto publish = [&](const int* totals) { return publish_counts(a, watch, totals); };
        const auto place = [&](const unsigned* masks, const int* running, int token, int group,
                               int lane) { place_token(a, masks, running, token, group, lane); };
        if (!count_tokens(a, watch, reinterpret_cast<unsigned*>(shared), publish, place))
            return false;
        // A launch that places what this one has no room for may run beside the sending half.
        if (kWantsMail) let_follower_start();
        if (block == blocks - 1 && !plan_slots(a, watch, reinterpret_cast<int*>(shared)))
            return false;
    } else if (a.flags & kSend) {
        publish_ready(a, watch);
        if (block == 0) {
            copy_counts(a, watch);
            tally_dispatch(a);
        }
    }
    __syncthreads();
    if (a.flags & kSend && block < a.num_senders) {
        if (kZeroCopy && a.flags & kCount && !wait_for_plan(a, watch)) return false;
        if (!send_rows(a, watch, shared, ring)) return false;
    }
    if (!(a.flags & kPlace)) return true;
    if (a.flags & kCount && !wait_for_plan(a, watch)) return false;
    __syncthreads();
    return is_deferred(a) || place_rows(a, watch, shared, ring);
}

__device__ __forceinline__ void dispatch_rank(const DispatchArguments& a) {
    extern __shared__ __align__(128) char shared[];
    __shared__ Ring ring;
    const bool sends = a.flags & kSend, places = a.flags & kPlace || a.flags & kDiscard;
    const Watch watch = watch_after(a, sends ? a.state->sent : a.state->received);
    const bool over = __syncthreads_or(threadIdx.x == 0 && has_failed(watch));
    const bool done = !over && run_halves(a, watch, shared, ring);
    // Placing may have started before the sending half was over. The next kernel must not.
    if (places && !sends) wait_for_predecessor();
    if (!done) return;
    const bool placed = places && !is_deferred(a);
    if (sends && last_to_leave(&a.state->left_send, gridDim.x) && threadIdx.x == 0) {
        a.state->sent = watch.transfer;
        a.state->next_send = 0;
        if (a.flags & kCount) *a.faulty = 0;
    }
    if (placed && last_to_leave(&a.state->left_place, gridDim.x)) {
        grant_credit(a, watch);
        if (threadIdx.x == 0) {
            a.state->received = watch.transfer;
            a.state->next_place = 0;
        }
    }
}

__global__ void __launch_bounds__(kMaxWarps * 32 + 32, 1)
    dispatch(const __grid_constant__ DispatchArguments arguments) {
    dispatch_rank(arguments);
}

// Several ranks on one GPU, each a row of the grid.
__global__ void __launch_bounds__(kMaxWarps * 32 + 32, 1)
    dispatch_hosted(const DispatchArguments* arguments) {
    dispatch_rank(arguments[blockIdx.y]);
}

}  // namespace ht
