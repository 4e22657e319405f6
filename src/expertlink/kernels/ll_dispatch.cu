// ll_dispatch: a dispatch of few tokens in one launch, or its halves in two.
//
// Most warps of a block load rows, wait until the block has counted its rank's tokens, and store the rows
// at their ranks. A few tell and receive the counts meanwhile. Then all place what comes. No block waits
// for another one of its rank.

#include "latency/place.cuh"
#include "latency/send.cuh"

__device__ __forceinline__ int arrivals_words(const DispatchArguments& a) {
    return (kNumRanks + 2) * a.num_local + 2;
}

constexpr int kTellers = 4;  // warps of a block that deal with counts

template <bool kQuantized>
__device__ __forceinline__ void dispatch_rank(const DispatchArguments& a) {
    extern __shared__ __align__(128) int memory[];
    __shared__ Call call;
    __shared__ Arrivals in;
    __shared__ int next_send, next_place;
    __shared__ volatile int known;  // the counts of all ranks are
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const bool sends = a.flags & kSend, receives = a.flags & kReceive;
    const int senders = receives && !sends ? 0 : warps - max(1, min(kTellers, warps / 4));
    if (threadIdx.x == 0) {
        next_send = senders;  // every sending warp has its first item
        next_place = 0;
        known = 0;
        in.first_slot = memory;
        in.totals = in.first_slot + kNumRanks * a.num_local;
        in.starts = in.totals + a.num_local;
    }
    if (!begin_call(a, call)) return;
    const Masks masks = masks_in(memory + (receives ? arrivals_words(a) : 0), a.num_tokens);
    const Watch watch = watch_of(a, call, sends ? call.sending : call.receiving);

    const auto counted = [&] {
        for (int chunk = 0; chunk < kNumExperts; chunk += kExpertChunk) {
            if (chunk == 0 && warp == warps - 1 && !peers_have_room(a, call, watch))
                call.stopped = 1;
            fill_masks(a, masks, chunk);
            if (call.stopped) return false;
            const int teller = warp - senders, tellers = warps - senders;
            if (teller >= 0) {
                publish_counts(a, call, masks, chunk, teller, tellers);
                if (kExpertChunk < kNumExperts)
                    for (int token = teller * gridDim.x + blockIdx.x; token < a.num_tokens;
                         token += tellers * gridDim.x) {
                        Beside beside;
                        beside.load(a, token);
                        send_beside(a, call, masks, beside, token, chunk);
                    }
            }
            if (chunk + kExpertChunk < kNumExperts) __syncthreads();
        }
        return true;
    };
    if (sends) {
        if (!send_rows<kQuantized>(a, call, masks, senders, &next_send, counted)) return;
    }
    if (sends) say_where(a, call);  // takes a fence, for which nothing else should wait
    if (!receives) return;
    if (warp >= senders) {
        const bool fine = receive_counts(a, call, watch, in, senders);
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
    // In one launch those who sent keep books first: they come here before the rows do.
    if (warp < senders || senders == 0) {
        const int keepers = senders == 0 ? warps : senders;
        if (blockIdx.x == 0)
            keep_counts(a, in, watch.transfer, threadIdx.x, keepers * 32);
        clear_rest(a, in, warp * gridDim.x + blockIdx.x, keepers * gridDim.x);
    }
    if (!place_rows(a, call, watch, in, warps, &next_place)) return;
    if (!sends) say_where(a, call);
}

// kQuantized: the kernel makes e4m3 rows of the input.
template <bool kQuantized>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    ll_dispatch(const __grid_constant__ DispatchArguments arguments) {
    dispatch_rank<kQuantized>(arguments);
}

// Several ranks on one GPU, each a row of the grid.
template <bool kQuantized>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    ll_dispatch_hosted(const DispatchArguments* arguments) {
    dispatch_rank<kQuantized>(arguments[blockIdx.y]);
}
