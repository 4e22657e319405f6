// ll::sum_hosts: the last step of a combine of few tokens: the sums of the hosts, hosts ascending.
//
// Every host has sent a message with its sum of each token; that of the own host is where it was
// made. A host without experts of a token is left out, as in reduction.py.

#include "hybrid/rail_words.cuh"
#include "ll/returns.cuh"

namespace ll {

__device__ __forceinline__ const char* message_at(const SumArguments& a, int message) {
    return message == kNumHosts - 1 ? a.own : a.receive + message * a.message_bytes;
}

// The message from the host of the token's choice k, or -1.
__device__ __forceinline__ int message_of_choice(const SumArguments& a, int token, int k) {
    const int expert = expert_of(a, token, k);
    return expert < 0 ? -1 : message_of(a, host_of(a.rank_of_expert[expert]));
}

// Checks that all messages are of this call. One warp.
__device__ __forceinline__ void check_messages(const SumArguments& a) {
    if (threadIdx.x % 32 == 0 && a.mark_counter != nullptr) count_step(a.mark_counter, a.mark_word);
    const unsigned* const own = reinterpret_cast<const unsigned*>(a.own);
    bool same = true;
#pragma unroll 1
    for (int message = threadIdx.x % 32; message < kNumHosts; message += 32) {
        const unsigned* const said = reinterpret_cast<const unsigned*>(message_at(a, message));
        for (int word = kMessageSignature; word <= kMessageCommunicator; ++word)
            same &= said[word] == own[word];
    }
    const bool all = __all_sync(kAll, same);
    if (threadIdx.x % 32 != 0) return;
    const unsigned transfer = own[kMessageNumber];
    const Watch watch = {a.state, a.control, transfer, static_cast<unsigned>(a.operation),
                         nullptr, a.rank,    nullptr};
    const unsigned calls = atomicSub(a.under_way, 1u);
    if (calls != 1) report(watch, kPhaseHalves, -1, calls, 1, 0, 0);
    if (all) return;
    // Ranks of other rails count as being where this one is: they tell their own rail.
    report_headers(watch, own_source(a), [&](int rank, int word) {
        const int message = peer_of(rank) == a.rank ? message_of(a, host_of(rank)) : kNumHosts - 1;
        const unsigned* const said = reinterpret_cast<const unsigned*>(message_at(a, message));
        return report_word(said[kMessageSignature], said[kMessageCommunicator], transfer,
                           said[kMessageSubject], word);
    });
}

// Gradients of a token's weights: each comes from the host of its choice. One warp.
__device__ __forceinline__ void pick_grads(const SumArguments& a, int token) {
    const int lane = threadIdx.x % 32;
    if (lane >= kTopk) return;
    const int message = message_of_choice(a, token, lane), at = token * kTopk + lane;
    a.grads_out[at] = message < 0
                          ? 0.0f
                          : reinterpret_cast<const float*>(message_at(a, message) + a.grads_at)[at];
}

__device__ __forceinline__ void sum_rank(const SumArguments& a) {
    wait_for_predecessor();
    if (blockIdx.x == 0 && threadIdx.x < 32) check_messages(a);
    if (a.num_tokens == 0) return;
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32 * gridDim.x;
    const Cut cut(a.num_tokens, a.row_bytes, warps, kSumDepth);
#pragma unroll 1
    for (int item = first_item(); item < a.num_tokens * cut.parts; item += warps) {
        const int token = item / cut.parts, part = item - token * cut.parts;
        if (part == 0 && a.flags & kGrads) pick_grads(a, token);
        if (a.row_bytes == 0) continue;
        const int message = lane < kTopk ? message_of_choice(a, token, lane) : -1;
        const unsigned hosts = __reduce_or_sync(kAll, message < 0 ? 0u : 1u << host_at(a, message));
        const StepRange range = cut.part(part);
        const LanePieces mine = lane_pieces(range.first, range.last, a.row_bytes);
        const long long at = static_cast<long long>(token) * a.row_bytes;
        Sums sums;
        sums.clear();
        uint4 piece[kSumDepth];
#pragma unroll 1
        for (unsigned left = hosts; left; left &= left - 1) {
            const char* const from = message_at(a, message_of(a, __ffs(left) - 1));
            read_steps(piece, from + a.rows_at + at, mine);
            sums.add<false>(piece, 0.0f);
        }
        sums.round(piece);
        write_steps(static_cast<char*>(a.out) + at, piece, mine);
    }
}

__global__ void __launch_bounds__(kCombineWarps * 32, 1)
    sum_hosts(const __grid_constant__ SumArguments arguments) {
    sum_rank(arguments);
}

// Several ranks on one GPU, each a row of the grid.
__global__ void __launch_bounds__(kCombineWarps * 32, 1)
    sum_hosts_hosted(const SumArguments* arguments) {
    sum_rank(arguments[blockIdx.y]);
}

}  // namespace ll
