// ll_dispatch: a dispatch of few tokens in one launch, or its halves in two.
//
// Half of the warps of every block send: they load rows, wait until the block has counted, and store the
// rows at their ranks. The others tell counts, ids and weights, then receive; senders that are done
// join them. No block waits for another one of its rank.

#include "latency/place.cuh"
#include "latency/send.cuh"

__device__ __forceinline__ int arrivals_words(const DispatchArguments& a) {
    return (kNumRanks + 2) * a.num_local + 2;
}

__device__ __forceinline__ void dispatch_rank(const DispatchArguments& a) {
    extern __shared__ __align__(128) int memory[];
    __shared__ Call call;
    __shared__ Arrivals in;
    __shared__ int next_send, next_place;
    __shared__ volatile int known;  // the counts of all ranks are
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const bool sends = a.flags & kSend, receives = a.flags & kReceive;
    const int senders = !receives ? warps : sends ? warps / 2 : 0;
    if (threadIdx.x == 0) {
        next_send = senders;  // every sending warp has its first item
        next_place = 0;
        known = 0;
        in.first_slot = memory;
        in.starts = memory + kNumRanks * a.num_local;
    }
    if (!begin_call(a, call)) return;
    const Masks masks = masks_in(memory + (receives ? arrivals_words(a) : 0), a.num_tokens);
    const Watch watch = watch_of(a, call, sends ? call.sending : call.receiving);
    say_where(a, call);

    const auto counted = [&] {
        for (int chunk = 0; chunk < kNumExperts; chunk += kExpertChunk) {
            fill_masks(a, masks, chunk);
            if (chunk == 0 && warp == 0 && !peers_have_room(a, call, watch)) call.stopped = 1;
            if (chunk == 0) __syncthreads();
            if (call.stopped) return false;
            // Senders have other things to do, unless all warps are.
            const int tellers = senders < warps ? warps - senders : warps;
            if (warp >= warps - tellers) {
                const int teller = warp - (warps - tellers);
                publish_counts(a, call, masks, chunk, teller, tellers);
                for (int token = teller * gridDim.x + blockIdx.x; token < a.num_tokens;
                     token += tellers * gridDim.x)
                    send_beside(a, call, masks, token, chunk);
            }
            if (chunk + kExpertChunk < kNumExperts) __syncthreads();
        }
        return true;
    };
    if (sends) {
        const bool fine = a.scale_kind != kNotQuantized
                              ? send_rows<true>(a, call, masks, senders, &next_send, counted)
                              : send_rows<false>(a, call, masks, senders, &next_send, counted);
        if (!fine) return;
    }
    if (!receives) return;
    if (warp >= senders) {
        const int thread = threadIdx.x - senders * 32, threads = blockDim.x - senders * 32;
        const bool fine = receive_counts(a, call, watch, in, thread, threads);
        if (thread == 0) {
            __threadfence_block();
            known = 1;
        }
        if (!fine) return;
    } else {
        while (!known) {
        }
        __threadfence_block();
        __syncwarp();
        if (call.stopped) return;
        clear_rest(a, in, warp * gridDim.x + blockIdx.x, senders * gridDim.x);
    }
    if (senders == 0) clear_rest(a, in, warp * gridDim.x + blockIdx.x, warps * gridDim.x);
    if (!place_rows(a, call, watch, in, warps - senders, &next_place)) call.stopped = 1;
}

extern "C" __global__ void __launch_bounds__(kMaxWarps * 32, 1)
    ll_dispatch(const __grid_constant__ DispatchArguments arguments) {
    dispatch_rank(arguments);
}

// Several ranks on one GPU, each a row of the grid.
extern "C" __global__ void __launch_bounds__(kMaxWarps * 32, 1)
    ll_dispatch_hosted(const DispatchArguments* arguments) {
    dispatch_rank(arguments[blockIdx.y]);
}
