// ll::dispatch: a dispatch of few tokens in one launch, or its halves in two.
//
// Every block counts its rank's tokens. Meanwhile some warps load rows; they store them at their
// ranks as soon as the block has counted. The others publish counts and metadata, and receive
// counts. Then all of them place what comes. A warp publishes and sends before it waits for others.

#include "hybrid/rail_words.cuh"
#include "ll/place.cuh"
#include "ll/roles.cuh"

namespace ll {

__device__ __forceinline__ int arrivals_words(const DispatchArguments& a) {
    return (kNumSources + 2) * a.num_local + 2;
}

// Several hosts: the memory has the messages of one call, this one. One warp.
__device__ __forceinline__ void take_messages(const DispatchArguments& a, const Call& call) {
    if (threadIdx.x % 32 != 0) return;
    const unsigned calls = atomicSub(a.under_way, 1u);
    if (calls != 1) report(call.watch, kPhaseHalves, -1, calls, 1, 0, 0);
}

template <bool kQuantized>
__device__ __forceinline__ void dispatch_rank(const DispatchArguments& a) {
    extern __shared__ __align__(128) int memory[];
    __shared__ Call shared_call;
    __shared__ Arrivals shared_arrivals;
    Call& call = at_hand(shared_call);
    Arrivals& in = at_hand(shared_arrivals);
    __shared__ int next_place;
    const bool sends = a.flags & kSend, receives = a.flags & kReceive;
    const Roles roles(a, kQuantized);
    if (threadIdx.x == 0) {
        next_place = roles.others();
        in.first_slot = memory;
        in.totals = in.first_slot + kNumSources * a.num_local;
        in.starts = in.totals + a.num_local;
    }
    const Masks masks = masks_in(a, memory + (receives ? arrivals_words(a) : 0));
    Sender<kQuantized> sender;
    BlockChoices choices;
    MetadataItem item;
    unsigned subject = 0;
    const auto prepare = [&] {
        if (!sends) return;
        prepare_masks(a, masks);
        sender.prepare(a, roles.senders);
        choices.locate();
        item.locate(threadIdx.x - roles.senders * 32);
    };
    const auto loads = [&] {
        if (!roles.sends()) subject = load_subject(a);
        if (!sends) return;
        choices.load(a);
        if (!roles.sends()) item.load(a);
        sender.load(a, sender.now, sender.part);
    };
    const bool goes_on = begin_call(a, call, prepare, loads);
    // The rail has come to its end, also where a failure is known: the host must not blame it.
    if constexpr (kSpansHosts)
        if (blockIdx.x == 0 && threadIdx.x == 0 && a.mark_counter != nullptr)
            count_step(a.mark_counter, a.mark_word);
    if (!goes_on) return;
    if (roles.publishes_progress()) {
        publish_progress(a, call);
        if constexpr (kSpansHosts) take_messages(a, call);
    }

    if (sends) {
        Draws draws;
        draws.begin(call, roles.senders, sender.items);
#pragma unroll 1
        for (int chunk = 0; chunk < kNumExperts; chunk += kExpertChunk) {
            fill_masks(a, masks, chunk, choices);
            if (!roles.sends()) {
                // Counts from the last warp on, metadata from the first one on: so both begin at
                // once.
                publish_counts(a, call, masks, chunk, roles.warps - 1 - roles.warp, roles.others(),
                               subject);
                publish_metadata(a, call, masks, chunk, item, roles.others() * 32);
            }
            if (chunk + kExpertChunk < kNumExperts) __syncthreads();
        }
        sender.run(a, call, masks, draws);
    }
    if (!receives) return;
    if (roles.waits()) receive_counts(a, call, in, roles.first_waiter, roles.waiters, subject);
    roles.wait_for_counts();
    if (call.stopped) return;
    if (blockIdx.x == 0 && roles.keeps())
        keep_counts(a, in, call.watch.transfer,
                    threadIdx.x - (roles.first_idle() - roles.stat_warps()) * 32,
                    roles.stat_warps() * 32);
    // Warps that sent come here before the rows arrive.
    const int clearing = roles.senders ? roles.senders : roles.warps;
    if (roles.warp < clearing)
        clear_rest(a, in, roles.warp * gridDim.x + blockIdx.x, clearing * gridDim.x);
    const int first = roles.sends() ? next_item(&next_place) : roles.first_item();
    place_rows<kQuantized>(a, call, in, first, &next_place);
}

// kQuantized: the kernel makes e4m3 rows of the input.
template <bool kQuantized>
__global__ void __launch_bounds__(kDispatchWarps * 32, 1)
    dispatch(const __grid_constant__ DispatchArguments arguments) {
    dispatch_rank<kQuantized>(arguments);
}

// Several ranks on one GPU, each a row of the grid.
template <bool kQuantized>
__global__ void __launch_bounds__(kDispatchWarps * 32, 1)
    dispatch_hosted(const DispatchArguments* arguments) {
    dispatch_rank<kQuantized>(arguments[blockIdx.y]);
}

}  // namespace ll
