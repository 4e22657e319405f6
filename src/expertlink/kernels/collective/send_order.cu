// send_order: routing.py on a GPU, in two launches of the same grid, one thread per token.
//
//   count_rows   rows for every rank and choices of every expert, written into the call's header,
//                and the rows of every block of tokens, from which the second launch finds its
//                place
//   order_rows   the rows' order (destination rank, token), and what travels beside every row
//
// Counts are sums of integers and positions are prefix sums in token order: nothing depends on the
// order in which blocks run.

constexpr int kThreads = 256;
constexpr int kMaxTopk = 32;
constexpr int kSharedExperts = 2048;  // more experts than this are counted in global memory

// Words of a header, as in engines/header.py.
enum {
    kOperation,
    kCommunicator,
    kCall,
    kStatus,
    kCapacity,
    kRowBytes,
    kMetadataBytes,
    kSubject,
    kNumFields
};

struct Shape {
    long long tokens, topk, ranks, experts;
};

// The rank of each of a token's choices; `ranks` where there is none.
template <typename Id>
__device__ __forceinline__ void load_ranks(const Id* ids, const long long* rank_of, Shape shape,
                                           long long token, unsigned short* ranks) {
    for (int k = 0; k < shape.topk; ++k) {
        const long long id = static_cast<long long>(ids[token * shape.topk + k]);
        const bool known = id >= 0 && id < shape.experts;
        ranks[k] = static_cast<unsigned short>(known ? rank_of[id] : shape.ranks);
    }
}

__device__ __forceinline__ bool has_rank(const unsigned short* ranks, long long topk, int rank) {
    bool found = false;
    for (int k = 0; k < topk; ++k) found |= ranks[k] == rank;
    return found;
}

// header: [kNumFields + R + E] zeroed by the caller. block_rows: [gridDim.x, R].
template <typename Id>
__global__ void __launch_bounds__(kThreads, 2)
    count_rows(const Id* __restrict__ ids, const long long* __restrict__ rank_of, long long tokens,
               long long topk, long long ranks, long long experts, long long operation,
               long long communicator, long long call, long long capacity, long long row_bytes,
               long long metadata_bytes, long long check, int* __restrict__ header,
               int* __restrict__ block_rows) {
    const Shape shape{tokens, topk, ranks, experts};
    extern __shared__ int rows[];  // [R]
    __shared__ int choices[kSharedExperts];
    __shared__ unsigned short token_ranks[kThreads][kMaxTopk];
    const bool share = shape.experts <= kSharedExperts;
    int* const total_rows = header + kNumFields;
    int* const total_choices = total_rows + shape.ranks;

    for (int r = threadIdx.x; r < shape.ranks; r += kThreads) rows[r] = 0;
    if (share)
        for (int e = threadIdx.x; e < shape.experts; e += kThreads) choices[e] = 0;
    __syncthreads();

    const long long token = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
    bool faulty = false;
    if (token < shape.tokens) {
        unsigned short* own = token_ranks[threadIdx.x];
        load_ranks(ids, rank_of, shape, token, own);
        for (int k = 0; k < shape.topk; ++k) {
            const long long id = static_cast<long long>(ids[token * shape.topk + k]);
            faulty |= id < -1 || id >= shape.experts;
            if (own[k] == shape.ranks) continue;
            atomicAdd(share ? &choices[id] : &total_choices[id], 1);
            bool first = true;  // a rank is counted once per token
            for (int earlier = 0; earlier < k; ++earlier) {
                first &= own[earlier] != own[k];
                faulty |= static_cast<long long>(ids[token * shape.topk + earlier]) == id;
            }
            if (first) atomicAdd(&rows[own[k]], 1);
        }
    }
    if (check && faulty) atomicOr(&header[kStatus], 1);
    __syncthreads();

    for (int r = threadIdx.x; r < shape.ranks; r += kThreads) {
        block_rows[blockIdx.x * shape.ranks + r] = rows[r];
        if (rows[r]) atomicAdd(&total_rows[r], rows[r]);
    }
    if (share)
        for (int e = threadIdx.x; e < shape.experts; e += kThreads)
            if (choices[e]) atomicAdd(&total_choices[e], choices[e]);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        // kStatus belongs to the checks of all blocks; kSubject of a new routing is 0.
        header[kOperation] = static_cast<int>(operation);
        header[kCommunicator] = static_cast<int>(communicator);
        header[kCall] = static_cast<int>(call);
        header[kCapacity] = static_cast<int>(capacity);
        header[kRowBytes] = static_cast<int>(row_bytes);
        header[kMetadataBytes] = static_cast<int>(metadata_bytes);
    }
}

// Outputs as in routing.py: token_of_row [T * D], rows_of_token [T, D], row_of_choice [T, K], and
// extras [T * D, words] with K int32 local ids and, where weights are given, K weights.
template <typename Id, typename Weight>
__global__ void __launch_bounds__(kThreads, 2)
    order_rows(const Id* __restrict__ ids, const Weight* __restrict__ weights,
               const long long* __restrict__ rank_of, const int* __restrict__ local_of,
               long long tokens, long long topk, long long num_ranks, long long experts,
               const int* __restrict__ header, const int* __restrict__ block_rows,
               long long* __restrict__ token_of_row, long long* __restrict__ rows_of_token,
               long long* __restrict__ row_of_choice, int* __restrict__ extras, long long copies) {
    const Shape shape{tokens, topk, num_ranks, experts};
    // Weights are moved as words: in a row they may sit at any multiple of four bytes.
    constexpr int kWeightWords = sizeof(Weight) / sizeof(int);
    const int* const weight_words = reinterpret_cast<const int*>(weights);
    const long long row_words = topk * (1 + (weights ? kWeightWords : 0));
    extern __shared__ int
        shared[];  // [R] first rows of this block, [kThreads / 32, R] rows per warp
    __shared__ unsigned short token_ranks[kThreads][kMaxTopk];
    int* const base = shared;
    int* const warp_rows = shared + shape.ranks;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    // Rows of lower ranks, then of earlier blocks for the same rank, come before this block's.
    for (int r = threadIdx.x; r < shape.ranks; r += kThreads) {
        int first = 0;
        for (int lower = 0; lower < r; ++lower) first += header[kNumFields + lower];
        for (int block = 0; block < blockIdx.x; ++block)
            first += block_rows[block * shape.ranks + r];
        base[r] = first;
    }

    const long long token = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
    const bool active = token < shape.tokens;
    unsigned short* ranks = token_ranks[threadIdx.x];
    if (active) load_ranks(ids, rank_of, shape, token, ranks);

    for (int r = 0; r < shape.ranks; ++r) {
        const bool member = active && has_rank(ranks, shape.topk, r);
        const unsigned members = __ballot_sync(0xffffffffu, member);
        if (lane == 0) warp_rows[warp * shape.ranks + r] = __popc(members);
    }
    __syncthreads();

    if (active)
        for (int k = 0; k < shape.topk; ++k) row_of_choice[token * shape.topk + k] = -1;
    int copy = 0;
    for (int r = 0; r < shape.ranks; ++r) {
        const bool member = active && has_rank(ranks, shape.topk, r);
        const unsigned members = __ballot_sync(0xffffffffu, member);
        if (!member) continue;
        long long row = base[r] + __popc(members & ((1u << lane) - 1u));
        for (int earlier = 0; earlier < warp; ++earlier)
            row += warp_rows[earlier * shape.ranks + r];
        token_of_row[row] = token;
        rows_of_token[token * copies + copy++] = row;
        int* const row_ids = extras + row * row_words;
        for (int k = 0; k < shape.topk; ++k) {
            const bool here = ranks[k] == r;
            const long long choice = token * shape.topk + k;
            row_ids[k] = here ? local_of[static_cast<long long>(ids[choice])] : -1;
            if (weights)
                for (int w = 0; w < kWeightWords; ++w)
                    row_ids[topk + k * kWeightWords + w] =
                        here ? weight_words[choice * kWeightWords + w] : 0;
            if (here) row_of_choice[choice] = row;
        }
    }
    if (active)
        for (; copy < copies; ++copy) rows_of_token[token * copies + copy] = -1;
}
