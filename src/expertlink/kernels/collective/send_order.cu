// send_order: routing.py on a GPU, in two launches of the same grid, one thread per token.
//
//   count_rows   rows for every rank and choices of every expert, written into the call's header,
//                and the rows of every block of tokens, from which the second launch finds its
//                place
//   order_rows   the rows' order (destination rank, token), and the metadata of every row
//
// Counts are sums of integers and positions are prefix sums in token order: nothing depends on the
// order in which blocks run.

constexpr int kSharedExperts = 2048;  // more experts than this are counted in global memory

// The rank of each of a token's choices; `ranks` where there is none.
template <typename Arguments, typename Id>
__device__ __forceinline__ void load_ranks(const Arguments& a, const Id* ids, long long token,
                                           unsigned short* ranks) {
    for (int k = 0; k < a.topk; ++k) {
        const long long id = static_cast<long long>(ids[token * a.topk + k]);
        const bool known = id >= 0 && id < a.experts;
        ranks[k] = static_cast<unsigned short>(known ? a.rank_of[id] : a.ranks);
    }
}

__device__ __forceinline__ bool has_rank(const unsigned short* ranks, long long topk, int rank) {
    bool found = false;
    for (int k = 0; k < topk; ++k) found |= ranks[k] == rank;
    return found;
}

// `header` is zeroed by the caller.
template <typename Id>
__global__ void __launch_bounds__(kThreads, 2)
    count_rows(const __grid_constant__ CountArguments a) {
    const Id* const __restrict__ ids = static_cast<const Id*>(a.ids);
    int* const __restrict__ header = a.header;
    int* const __restrict__ block_rows = a.block_rows;
    extern __shared__ int rows[];  // [R]
    __shared__ int choices[kSharedExperts];
    __shared__ unsigned short token_ranks[kThreads][kMaxTopk];
    const bool share = a.experts <= kSharedExperts;
    int* const total_rows = header + kNumFields;
    int* const total_choices = total_rows + a.ranks;

    for (int r = threadIdx.x; r < a.ranks; r += kThreads) rows[r] = 0;
    if (share)
        for (int e = threadIdx.x; e < a.experts; e += kThreads) choices[e] = 0;
    __syncthreads();

    const long long token = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
    bool faulty = false;
    if (token < a.tokens) {
        unsigned short* own = token_ranks[threadIdx.x];
        load_ranks(a, ids, token, own);
        for (int k = 0; k < a.topk; ++k) {
            const long long id = static_cast<long long>(ids[token * a.topk + k]);
            faulty |= id < -1 || id >= a.experts;
            if (own[k] == a.ranks) continue;
            atomicAdd(share ? &choices[id] : &total_choices[id], 1);
            bool first = true;  // a rank is counted once per token
            for (int earlier = 0; earlier < k; ++earlier) {
                first &= own[earlier] != own[k];
                faulty |= static_cast<long long>(ids[token * a.topk + earlier]) == id;
            }
            if (first) atomicAdd(&rows[own[k]], 1);
        }
    }
    if (a.check && faulty) atomicOr(&header[kStatus], 1);
    __syncthreads();

    for (int r = threadIdx.x; r < a.ranks; r += kThreads) {
        block_rows[blockIdx.x * a.ranks + r] = rows[r];
        if (rows[r]) atomicAdd(&total_rows[r], rows[r]);
    }
    if (share)
        for (int e = threadIdx.x; e < a.experts; e += kThreads)
            if (choices[e]) atomicAdd(&total_choices[e], choices[e]);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        // kStatus belongs to the checks of all blocks; kSubject of a new routing is 0.
        header[kOperation] = a.operation;
        header[kCommunicator] = a.communicator;
        header[kCall] = a.call;
        header[kCapacity] = a.capacity;
        header[kRowBytes] = a.row_bytes;
        header[kMetadataBytes] = a.metadata_bytes;
    }
}

// Outputs are those of routing.py.
template <typename Id, typename Weight>
__global__ void __launch_bounds__(kThreads, 2)
    order_rows(const __grid_constant__ OrderArguments a) {
    const Id* const __restrict__ ids = static_cast<const Id*>(a.ids);
    const Weight* const __restrict__ weights = static_cast<const Weight*>(a.weights);
    const int* const __restrict__ header = a.header;
    const int* const __restrict__ block_rows = a.block_rows;
    long long* const __restrict__ row_of_choice = a.row_of_choice;
    // Weights are moved as words: in a row they may sit at any multiple of four bytes.
    constexpr int kWeightWords = sizeof(Weight) / sizeof(int);
    const int* const weight_words = reinterpret_cast<const int*>(weights);
    const long long row_words = a.topk * (1 + (weights ? kWeightWords : 0));
    // [R] first rows of this block, then [kThreads / 32, R] rows of each warp.
    extern __shared__ int shared[];
    __shared__ unsigned short token_ranks[kThreads][kMaxTopk];
    int* const base = shared;
    int* const warp_rows = shared + a.ranks;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    // Rows of lower ranks, then of earlier blocks for the same rank, come before this block's.
    for (int r = threadIdx.x; r < a.ranks; r += kThreads) {
        int first = 0;
        for (int lower = 0; lower < r; ++lower) first += header[kNumFields + lower];
        for (int block = 0; block < blockIdx.x; ++block) first += block_rows[block * a.ranks + r];
        base[r] = first;
    }

    const long long token = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
    const bool active = token < a.tokens;
    unsigned short* ranks = token_ranks[threadIdx.x];
    if (active) load_ranks(a, ids, token, ranks);

    for (int r = 0; r < a.ranks; ++r) {
        const bool member = active && has_rank(ranks, a.topk, r);
        const unsigned members = __ballot_sync(0xffffffffu, member);
        if (lane == 0) warp_rows[warp * a.ranks + r] = __popc(members);
    }
    __syncthreads();

    if (active)
        for (int k = 0; k < a.topk; ++k) row_of_choice[token * a.topk + k] = -1;
    int copy = 0;
    for (int r = 0; r < a.ranks; ++r) {
        const bool member = active && has_rank(ranks, a.topk, r);
        const unsigned members = __ballot_sync(0xffffffffu, member);
        if (!member) continue;
        long long row = base[r] + __popc(members & ((1u << lane) - 1u));
        for (int earlier = 0; earlier < warp; ++earlier) row += warp_rows[earlier * a.ranks + r];
        a.token_of_row[row] = token;
        a.rows_of_token[token * a.copies + copy++] = row;
        int* const row_ids = a.metadata + row * row_words;
        for (int k = 0; k < a.topk; ++k) {
            const bool here = ranks[k] == r;
            const long long choice = token * a.topk + k;
            row_ids[k] = here ? a.local_of[static_cast<long long>(ids[choice])] : -1;
            if (weights)
                for (int w = 0; w < kWeightWords; ++w)
                    row_ids[a.topk + k * kWeightWords + w] =
                        here ? weight_words[choice * kWeightWords + w] : 0;
            if (here) row_of_choice[choice] = row;
        }
    }
    if (active)
        for (; copy < a.copies; ++copy) a.rows_of_token[token * a.copies + copy] = -1;
}
