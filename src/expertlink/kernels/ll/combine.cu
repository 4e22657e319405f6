// ll::combine: a combine of few tokens in one launch, or its halves in two.
//
// First the warps send rows back: one partial sum per arrival, or with kExact every expert row.
// Then they sum what comes in, token by token. Rows are cut into parts where there are more warps
// than rows. The roundings are those of reduction.py.
//
// With kBrings the ranks of the tokens have the weights of partial sums, and publish them before
// anything else. Block 0 does that alone: no other block of a launch is waited for before it sends.
// Sending waits for peers then, so headers are read beside it, also in a launch that only sends.

#include "ll/totals.cuh"

namespace ll {

// Statistics: counts the rows that travel. One thread for each source.
__device__ __forceinline__ void keep_statistics(const CombineArguments& a, const RowsFrom& in) {
    if (a.rows_sent == nullptr || blockIdx.x != 0 || a.row_bytes == 0 || kExact) return;
#pragma unroll 1
    for (int r = threadIdx.x; r < kNumSources; r += blockDim.x) {
        const long long sent = in.rows_from[r], received = a.rows_to[r];
        a.rows_sent[r] += sent;
        a.rows_received[r] += received;
        if (r == own_source(a)) continue;
        a.bytes_sent[r] += sent * a.row_bytes;
        a.bytes_received[r] += received * a.row_bytes;
    }
}

// Several hosts: says in front of every message which call its sums are of. One warp.
__device__ __forceinline__ void write_headers(const CombineArguments& a, const Call& call,
                                              unsigned subject) {
    const int lane = threadIdx.x % 32;
    for (int message = lane; message < kNumHosts; message += 32) {
        unsigned* const said = reinterpret_cast<unsigned*>(a.messages + message * a.message_bytes);
        said[kMessageSignature] = a.signature;
        said[kMessageSubject] = subject;
        said[kMessageCommunicator] = a.communicator;
        said[kMessageNumber] = call.watch.transfer;
    }
    if (lane == 0) atomicAdd(a.under_way, 1u);
}

template <bool kBrings>
__device__ __forceinline__ void combine_rank(const CombineArguments& a) {
    __shared__ Call shared_call;
    __shared__ RowsFrom shared_rows;
    Call& call = at_hand(shared_call);
    RowsFrom& in = at_hand(shared_rows);
    __shared__ int next_send, next_add;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const bool sends = a.flags & kSend, receives = a.flags & kReceive;
    const bool reads_headers = receives || kBrings;
    // The other warps sum from the start.
    const int senders = min(a.send_warps, reads_headers ? warps - 1 : warps);
    if (threadIdx.x == 0) {
        next_send = senders;
        next_add = 0;
    }
    const bool publishes = blockIdx.x == 0 && warp == min(sends ? senders : 0, warps - 1);
    unsigned subject = 0;
    const auto loads = [&] {
        if (publishes) subject = load_subject(a);
        if (sends && warp == 0)
            in.fill([&](int source) { return source < kNumSources ? a.rows_from[source] : 0; });
    };
    if (!begin_call(a, call, [] {}, loads)) return;
    // All warps but the one below, whose fence would wait for these stores.
    if (kBrings && sends && blockIdx.x == 0 && !publishes)
        publish_weights(a, call, warp - (warp > senders ? 1 : 0), warps - 1);
    // One warp of the grid publishes this rank's progress. Where it reads headers, that warp does
    // not send: it reads them while its block sums.
    if (publishes) {
        if (sends) publish_headers(a, call, subject);
        if constexpr (kSpansHosts) write_headers(a, call, subject);
        publish_progress(a, call);
        if (reads_headers) {
            read_headers(a, call, subject);
            return;
        }
    }
    if (sends) {
        keep_statistics(a, in);
        if (warp < senders) return_rows<kBrings>(a, call, in, senders, &next_send);
    }
    if (receives) add_up(a, call, in, &next_add);
}

template <bool kBrings>
__global__ void __launch_bounds__(kCombineWarps * 32, 1)
    combine(const __grid_constant__ CombineArguments arguments) {
    combine_rank<kBrings>(arguments);
}

// Several ranks on one GPU, each a row of the grid. A rank's arguments are copied to shared memory,
// whose address takes no register.
template <bool kBrings>
__global__ void __launch_bounds__(kCombineWarps * 32, 1)
    combine_hosted(const CombineArguments* arguments) {
    __shared__ CombineArguments own;
    if (threadIdx.x == 0) own = arguments[blockIdx.y];
    __syncthreads();
    combine_rank<kBrings>(own);
}

}  // namespace ll
