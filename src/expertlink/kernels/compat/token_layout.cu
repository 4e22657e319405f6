// token_layout: where the tokens of one rank go, in one launch.
//
// A block per destination rank. Each of them reads all ids, a thread per token, and writes what
// concerns its rank: a column of `member`, a number of `per_rank`, the choices of its experts.
// Every word has one writer, so nothing has to be cleared before.

template <typename Id>
__global__ void __launch_bounds__(kThreads, 1)
    token_layout(const __grid_constant__ LayoutArguments a) {
    const Id* const __restrict__ ids = static_cast<const Id*>(a.ids);
    extern __shared__ int choices[];  // [E / R] choices of this rank's experts
    __shared__ int rows;
    const int rank = blockIdx.x;
    const long long first = static_cast<long long>(rank) * a.local_experts;

    for (int e = threadIdx.x; e < a.local_experts; e += kThreads) choices[e] = 0;
    if (threadIdx.x == 0) rows = 0;
    __syncthreads();

    int own_rows = 0;
    for (long long token = threadIdx.x; token < a.tokens; token += kThreads) {
        const Id* const row = ids + token * a.topk;
        bool chosen = false;
#pragma unroll 8
        for (int k = 0; k < a.topk; ++k) {
            const long long expert = static_cast<long long>(row[k]) - first;
            if (expert >= 0 && expert < a.local_experts) {
                atomicAdd(&choices[expert], 1);
                chosen = true;
            }
        }
        a.member[token * gridDim.x + rank] = chosen;
        own_rows += chosen;
    }
    for (int lanes = 16; lanes > 0; lanes /= 2)
        own_rows += __shfl_down_sync(0xffffffffu, own_rows, lanes);
    if (threadIdx.x % 32 == 0) atomicAdd(&rows, own_rows);
    __syncthreads();

    if (threadIdx.x == 0) a.per_rank[rank] = rows;
    for (int e = threadIdx.x; e < a.local_experts; e += kThreads)
        a.per_expert[first + e] = choices[e];
}
