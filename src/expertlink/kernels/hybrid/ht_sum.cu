// ht::sum_hosts: the result of a chunk's own tokens, from the sums of their hosts in ascending
// order. Waits for no other rank: messages are complete before the launch.

#include "hybrid/ht_rail.cuh"
#include "hybrid/ht_sums.cuh"
#include "ht/chunk.cuh"

namespace ht {

__device__ __forceinline__ void sum_tokens(const CombineArguments& a, const Messages& messages,
                                           const Stages& stages) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32 * gridDim.x;
    const TokenRange tokens = tokens_of_chunk(a);
    for (int token = tokens.begin + threadIdx.x / 32 * gridDim.x + blockIdx.x; token < tokens.end;
         token += warps) {
        const int code = lane < kHostCopies ? a.host_slots[token * kHostCopies + lane] : -1;
        const int host = max(code, 0) / kMaxTokens;
        const int index = max(code, 0) % kMaxTokens - a.sent[a.chunk * kNumHosts + host];
        const char* term =
            a.rail_receive + messages.at[host] + static_cast<long long>(index) * a.rail_stride;
        if (host == own_host(a))
            term = a.own_sums + static_cast<long long>(token - a.chunk_begin) * a.sum_stride;
        const unsigned present = __ballot_sync(0xffffffffu, code >= 0);
        sum_present(stages, present, term, a.row_bytes,
                    static_cast<char*>(a.out) + static_cast<long long>(token) * a.row_bytes);
        if (a.flags & kGrads)
            merge_grads(
                present, term + a.row_bytes,
                reinterpret_cast<int*>(a.grads_out + static_cast<long long>(token) * kTopk));
    }
}

__device__ __forceinline__ void sum_hosts_rank(const CombineArguments& a) {
    extern __shared__ __align__(128) char shared[];
    __shared__ Messages messages;
    const Watch watch = watch_after(a, a.state->sent);
    if (__syncthreads_or(threadIdx.x == 0 && has_failed(watch))) return;
    load_messages(a, messages, [&](int host) { return rows_out(a, host); });
    if (!check_heads(a, watch, messages)) return;
    const Stages stages{shared_address(shared) + threadIdx.x / 32 * a.warp_bytes, a.warp_bytes};
    sum_tokens(a, messages, stages);
}

__global__ void __launch_bounds__(kCombineWarps * 32 + 32, 1)
    sum_hosts(const __grid_constant__ CombineArguments arguments) {
    sum_hosts_rank(arguments);
}

// Several ranks on one GPU, each a row of the grid.
__global__ void __launch_bounds__(kCombineWarps * 32 + 32, 1)
    sum_hosts_hosted(const CombineArguments* arguments) {
    sum_hosts_rank(arguments[blockIdx.y]);
}

}  // namespace ht
