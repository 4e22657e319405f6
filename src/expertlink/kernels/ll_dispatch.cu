// ll_dispatch: a dispatch of few tokens in one launch, or its halves in two.
//
// Every block counts its rank's tokens. Some warps load rows, wait for that and store the rows at
// their ranks; the others tell and receive the counts; then all place what comes. All that a block
// tells and sends it does before it waits for others.

#include "latency/place.cuh"

__device__ __forceinline__ int arrivals_words(const DispatchArguments& a) {
    return (kNumRanks + 2) * a.num_local + 2;
}

template <bool kQuantized>
__device__ __forceinline__ void dispatch_rank(const DispatchArguments& a) {
    extern __shared__ __align__(128) int memory[];
    __shared__ Call call;
    __shared__ Arrivals in;
    __shared__ int next_place;
    __shared__ volatile int known;  // the counts of all ranks are
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const bool sends = a.flags & kSend, receives = a.flags & kReceive;
    const int senders = sends ? min(a.send_warps, warps - 1) : 0;
    if (threadIdx.x == 0) {
        next_place = 0;
        known = 0;
        in.first_slot = memory;
        in.totals = in.first_slot + kNumRanks * a.num_local;
        in.starts = in.totals + a.num_local;
    }
    const Masks masks = masks_in(memory + (receives ? arrivals_words(a) : 0), a.num_tokens);
    Sender<kQuantized> sender;
    Choice choice;
    Told told;
    const auto prepare = [&] {
        if (!sends) return;
        prepare_masks(a, masks);
        sender.prepare(a, senders);
    };
    const auto loads = [&] {
        if (!sends) return;
        choice.load(a, threadIdx.x);
        if (warp >= senders) told.load(a, threadIdx.x - senders * 32);
        sender.load(a, sender.now, sender.part);
    };
    if (!begin_call(a, call, prepare, loads)) return;
    Draws draws;
    if (sends) draws.begin(call, senders, sender.items);

    if (sends) {
#pragma unroll 1
        for (int chunk = 0; chunk < kNumExperts; chunk += kExpertChunk) {
            if (chunk == 0 && warp == warps - 1 && !peers_have_room(call)) call.stopped = 1;
            fill_masks(a, masks, chunk, choice);
            if (call.stopped) return;
            if (warp >= senders) {
                publish_counts(a, call, masks, chunk, warp - senders, warps - senders);
                send_beside(a, call, masks, chunk, told, (warps - senders) * 32);
            }
            if (chunk + kExpertChunk < kNumExperts) __syncthreads();
        }
        sender.run(a, call, masks, draws);
    }
    if (sends) say_where(a, call);  // takes a fence, for which nothing else should wait
    if (!receives) return;
    if (warp >= senders) {
        const bool fine = receive_counts(a, call, in, senders);
        if (threadIdx.x == senders * 32) {
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
    }
    // Those who sent keep books first: they come here before the rows do.
    if (warp < senders || senders == 0) {
        const int keepers = senders == 0 ? warps : senders;
        if (blockIdx.x == 0) keep_counts(a, in, call.watch.transfer, threadIdx.x, keepers * 32);
        clear_rest(a, in, warp * gridDim.x + blockIdx.x, keepers * gridDim.x);
    }
    if (!place_rows<kQuantized>(a, call, in, &next_place)) return;
    if (!sends) say_where(a, call);
}

// kQuantized: the kernel makes e4m3 rows of the input.
template <bool kQuantized>
__global__ void __launch_bounds__(kDispatchWarps * 32, 1)
    ll_dispatch(const __grid_constant__ DispatchArguments arguments) {
    dispatch_rank<kQuantized>(arguments);
}

// Several ranks on one GPU, each a row of the grid.
template <bool kQuantized>
__global__ void __launch_bounds__(kDispatchWarps * 32, 1)
    ll_dispatch_hosted(const DispatchArguments* arguments) {
    dispatch_rank<kQuantized>(arguments[blockIdx.y]);
}
