// ll_combine: a combine of few tokens in one launch, or its halves in two.
//
// First the warps return rows: one partial sum per arrival, or with kExact every expert row, stored in
// staging memory of the token's rank. Then they add up what comes in, token by token. Rows are cut into
// parts where there are more warps than rows. The roundings are those of reduction.py.

#include "choices.cuh"
#include "common/pieces.cuh"
#include "latency/protocol.cuh"

constexpr int kSumDepth = 3;  // steps that a warp has under way for each term

struct Sums {
    float value[kSumDepth][kPack];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kSumDepth; ++i)
#pragma unroll
            for (int j = 0; j < kPack; ++j) value[i][j] = 0.0f;
    }

    template <bool kWeighted>
    __device__ __forceinline__ void add(const uint4 (&piece)[kSumDepth], float weight) {
#pragma unroll
        for (int i = 0; i < kSumDepth; ++i) add_piece<kWeighted>(value[i], piece[i], weight);
    }
};

// -- sending half -----------------------------------------------------------------------------------

__device__ __forceinline__ void load_steps(uint4 (&piece)[kSumDepth], const char* row, int first,
                                           int last, int bytes) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kSumDepth; ++i) {
        const int at = (first + i) * kStepBytes + lane * 16;
        piece[i] = first + i < last && at < bytes ? *reinterpret_cast<const uint4*>(row + at)
                                                  : make_uint4(0, 0, 0, 0);
    }
}

// Steps of a row into staging memory of a peer.
__device__ __forceinline__ void return_steps(const CombineArguments& a, const Call& call, int peer,
                                             int slot, const uint4 (&piece)[kSumDepth], int first,
                                             int last) {
    const unsigned strange = strange_steps(piece, first, last);
    char* const base = call.bases[peer];
    store_steps(staged_row(base, call.sending, slot), piece, first, last, a.row_bytes);
    if (strange)
        escape_steps(escape_words(base, call.sending, slot), call.sending, first, strange);
}

__device__ __forceinline__ const char* row_at(const CombineArguments& a, long long slot) {
    return static_cast<const char*>(a.rows) + slot * a.row_bytes;
}

// Sum of an arrival's rows in top-k order; lane k has the slot and weight of choice k.
__device__ __forceinline__ void return_sum(const CombineArguments& a, const Call& call, int peer,
                                           int slot, int choice, float weight, Steps range) {
    const unsigned present = __ballot_sync(kAll, choice >= 0);
    for (int first = range.first; first < range.last; first += kSumDepth) {
        Sums sums;
        sums.clear();
        uint4 piece[kSumDepth], second[kSumDepth];
#pragma unroll 1
        for (unsigned left = present; left;) {
            // Two rows are on their way together.
            const int k = __ffs(left) - 1;
            left &= left - 1;
            const int next = left ? __ffs(left) - 1 : k;
            load_steps(piece, row_at(a, __shfl_sync(kAll, choice, k)), first, range.last, a.row_bytes);
            const long long other = __shfl_sync(kAll, choice, next);
            if (left) load_steps(second, row_at(a, other), first, range.last, a.row_bytes);
            sums.add<true>(piece, __shfl_sync(kAll, weight, k));
            const float factor = __shfl_sync(kAll, weight, next);
            if (left) sums.add<true>(second, factor);
            left &= left - 1;
        }
#pragma unroll
        for (int i = 0; i < kSumDepth; ++i) piece[i] = round_piece(sums.value[i]);
        return_steps(a, call, peer, slot, piece, first, range.last);
    }
}

__device__ __forceinline__ void return_row(const CombineArguments& a, const Call& call, int peer,
                                           int slot, long long row, Steps range) {
    for (int first = range.first; first < range.last; first += kSumDepth) {
        uint4 piece[kSumDepth];
        // A row for which there was no room is as one of zeros.
        load_steps(piece, row_at(a, max(row, 0ll)), first, row < 0 ? first : range.last, a.row_bytes);
        return_steps(a, call, peer, slot, piece, first, range.last);
    }
}

// What is sent once for a row: weights of exact sums, gradients of weights. Lane k, for choice k.
__device__ __forceinline__ void return_beside(const CombineArguments& a, const Call& call, int peer,
                                              int slot, int token, long long at, int choice,
                                              float weight) {
    const int lane = threadIdx.x % 32;
    if (lane >= kTopk) return;
    float grad = 0.0f;
    if (a.flags & kGrads && choice >= 0) grad = a.slot_grads[kExpanded ? choice : at * kTopk + lane];
    char* const base = call.bases[peer];
    if (kExact && choice != -1)
        store_tagged_pair(beside_words(base, call.sending, token * kTopk + lane, 0), call.sending,
                          __float_as_uint(weight), __float_as_uint(grad));
    if (!kExact && a.flags & kGrads)
        store_tagged(beside_words(base, call.sending, slot, lane), call.sending,
                     __float_as_uint(grad));
}

struct Arrivals {
    int rows_from[kNumRanks], first_row[kNumRanks];
    int most, total;
};

// Exact sums: rows that travel are counted as they do; lane k, for choice k.
__device__ __forceinline__ void count_row(const CombineArguments& a, int peer, long long* rows,
                                          long long* bytes) {
    atomicAdd(reinterpret_cast<unsigned long long*>(&rows[peer]), 1ull);
    if (peer != a.rank)
        atomicAdd(reinterpret_cast<unsigned long long*>(&bytes[peer]),
                  static_cast<unsigned long long>(a.row_bytes));
}

// Own rows of deduplicated layouts are added up from where they are, if they are sure to be as they were:
// both halves are in this launch.
__device__ __forceinline__ bool takes_own_rows(const CombineArguments& a) {
    return !kExpanded && (a.flags & (kSend | kReceive)) == (kSend | kReceive);
}

// Row of an arrival in deduplicated layouts.
__device__ __forceinline__ long long dense_row(const CombineArguments& a, const Arrivals& in, int source,
                                               int position) {
    return kLayoutIsRankMajor ? source * kMaxTokens + position : in.first_row[source] + position;
}

// One part of what belongs to an arrival. With no bytes, part 0 has the numbers only.
__device__ __forceinline__ void return_part(const CombineArguments& a, const Call& call,
                                            const Arrivals& in, int source, int position, Steps range,
                                            bool is_first) {
    const int lane = threadIdx.x % 32;
    const int arrival = source * kMaxTokens + position;
    const long long at = dense_row(a, in, source, position);
    int choice = -1;
    float weight = 1.0f;  // a product with one is exact
    if (lane < kTopk && (kExpanded || a.flags & kGrads)) {
        choice = a.choices_of_row[static_cast<long long>(arrival) * kTopk + lane];
        if (a.slot_weights != nullptr && choice >= 0)
            weight = a.slot_weights[choice];
        else if (a.weights_of_row != nullptr)
            weight = a.weights_of_row[static_cast<long long>(arrival) * kTopk + lane];
    }
    if (!kExpanded && at >= a.max_slots) choice = kDropped;
    const int slot = a.rank * kMaxTokens + position;
    const int token = kExact ? a.tokens_of_row[arrival] : 0;
    if (kExact && is_first && choice != -1 && a.rows_sent != nullptr && a.row_bytes != 0)
        count_row(a, source, a.rows_sent, a.bytes_sent);
    if (is_first && (kExact || a.flags & kGrads))
        return_beside(a, call, source, slot, token, at, choice, weight);
    if (a.row_bytes == 0 || (takes_own_rows(a) && source == a.rank)) return;
    if (!kExpanded) {
        return_row(a, call, source, slot, at < a.max_slots ? at : -1, range);
    } else if (!kExact) {
        return_sum(a, call, source, slot, choice, weight, range);
    } else {
        for (unsigned left = __ballot_sync(kAll, choice != -1); left; left &= left - 1) {
            const int k = __ffs(left) - 1;
            return_row(a, call, source, token * kTopk + k, __shfl_sync(kAll, choice, k), range);
        }
    }
}

__device__ __forceinline__ void return_rows(const CombineArguments& a, const Call& call,
                                            const Arrivals& in, int warps, int* next) {
    const int steps = (a.row_bytes + kStepBytes - 1) / kStepBytes;
    const int parts = parts_of(in.total, steps, warps * gridDim.x);
    const int items = in.most * kNumRanks * parts;
    const Divider by_parts(parts);
    for (int item = next_item(next); item < items; item = next_item(next)) {
        const int turn = by_parts(item), part = item - turn * parts;
        const int source = (turn + a.rank) % kNumRanks, position = turn / kNumRanks;
        if (position >= in.rows_from[source] || is_masked(call, source)) continue;
        return_part(a, call, in, source, position, steps_of(part, by_parts, steps), part == 0);
    }
}

// -- receiving half ---------------------------------------------------------------------------------

// Lane i: where the i-th term of a token is staged (slot) and whose it is, or -1.
struct Term {
    int slot, peer;
};

__device__ __forceinline__ Term term_of(const CombineArguments& a, int token) {
    const int lane = threadIdx.x % 32;
    Term term{-1, -1};
    if (kExact) {
        if (lane < kTopk) {
            const int expert = expert_of(a, token, lane);
            if (expert >= 0) term = {token * kTopk + lane, rank_of(a.home_of[expert])};
        }
    } else if (lane < kCopies) {
        const int code = a.slots_of_token[token * kCopies + lane];
        if (code >= 0) term = {code, code / kMaxTokens};
    }
    return term;
}

// Exact sums: the weight of a term, and the gradient that came with it; lane k waits for its own.
__device__ __forceinline__ bool receive_beside(const CombineArguments& a, const Call& call, Term& term, float& weight,
                                               float& grad) {
    Found found = kHere;
    unsigned first = 0, second = 0;
    if (term.slot >= 0) {
        unsigned long long* const words =
            beside_words(call.bases[a.rank], call.watch.transfer, term.slot, 0);
        found = wait_tagged(call, words, term.peer, kPhaseRow, first);
        if (found == kHere)
            found = wait_tagged(call, words + 1, term.peer, kPhaseRow, second);
        if (found == kGone) term.slot = -1;
    }
    weight = __uint_as_float(first);
    grad = __uint_as_float(second);
    return !__any_sync(kAll, found == kStop);
}

// Gradients of a token's choices: each lies beside the term from the choice's rank.
__device__ __forceinline__ bool receive_grads(const CombineArguments& a, const Call& call, const Term& term, int token) {
    const int lane = threadIdx.x % 32;
    const int expert = lane < kTopk ? expert_of(a, token, lane) : -1;
    const int rank = expert >= 0 ? rank_of(a.home_of[expert]) : -1;
    float grad = 0.0f;
    bool fine = true;
    for (unsigned left = __ballot_sync(kAll, term.slot >= 0); left; left &= left - 1) {
        const int i = __ffs(left) - 1;
        const int slot = __shfl_sync(kAll, term.slot, i), peer = __shfl_sync(kAll, term.peer, i);
        if (peer != rank) continue;
        unsigned bits = 0;
        fine &= wait_tagged(call, beside_words(call.bases[a.rank], call.watch.transfer, slot, lane),
                            peer, kPhaseRow, bits) != kStop;
        grad = __uint_as_float(bits);
    }
    if (lane < kTopk) a.grads_out[static_cast<long long>(token) * kTopk + lane] = grad;
    return __all_sync(kAll, fine);
}

// One part of one token. False: give up.
__device__ __forceinline__ bool add_part(const CombineArguments& a, const Call& call, const Arrivals& in, int token,
                                         Steps range, bool is_first) {
    const int lane = threadIdx.x % 32;
    Term term = term_of(a, token);
    if (term.slot >= 0 && is_masked(call, term.peer)) term.slot = -1;
    float weight = 1.0f, grad = 0.0f;
    if (kExact && !receive_beside(a, call, term, weight, grad)) return false;
    if (kExact && is_first && term.slot >= 0 && a.rows_sent != nullptr && a.row_bytes != 0)
        count_row(a, term.peer, a.rows_received, a.bytes_received);
    if (is_first && a.flags & kGrads) {
        if (!kExact && !receive_grads(a, call, term, token)) return false;
        if (kExact && lane < kTopk)
            a.grads_out[static_cast<long long>(token) * kTopk + lane] = term.slot >= 0 ? grad : 0.0f;
    }
    if (a.row_bytes == 0) return true;
    char* const base = call.bases[a.rank];
    char* const out = static_cast<char*>(a.out) + static_cast<long long>(token) * a.row_bytes;
    const unsigned present = __ballot_sync(kAll, term.slot >= 0);
    for (int first = range.first; first < range.last; first += kSumDepth) {
        Sums sums;
        sums.clear();
        Pieces<kSumDepth> pieces, ahead;
        unsigned left = present;
        const auto is_own = [&](int slot) {
            return takes_own_rows(a) && slot / kMaxTokens == a.rank;
        };
        const auto look_at_next = [&](Pieces<kSumDepth>& into) {
            const int slot = __shfl_sync(kAll, term.slot, left ? __ffs(left) - 1 : 0);
            if (!left) return;
            const char* row = staged_row(base, call.watch.transfer, slot);
            int last = range.last;
            if (is_own(slot)) {
                const long long own = dense_row(a, in, a.rank, slot % kMaxTokens);
                row = row_at(a, own);
                if (own >= a.max_slots) last = first;  // there was no room for it
            }
            into.look_at(row, first, last, a.row_bytes);
        };
        look_at_next(pieces);
        while (left) {
            const int i = __ffs(left) - 1;
            left &= left - 1;
            look_at_next(ahead);
            const int slot = __shfl_sync(kAll, term.slot, i), peer = __shfl_sync(kAll, term.peer, i);
            char* const row = staged_row(base, call.watch.transfer, slot);
            const bool own = is_own(slot);
            const Found found =
                own ? kHere
                    : pieces.settle(call, row, escape_words(base, call.watch.transfer, slot), first,
                                    peer, slot % kMaxTokens);
            if (found == kStop) return false;
            if (found == kHere) {
                if (kExact)
                    sums.add<true>(pieces.piece, __shfl_sync(kAll, weight, i));
                else
                    sums.add<false>(pieces.piece, 0.0f);
            }
            if (!own) pieces.put_back(row, first, range.last, a.row_bytes);
            pieces = ahead;
        }
#pragma unroll
        for (int i = 0; i < kSumDepth; ++i) {
            const int at = (first + i) * kStepBytes + lane * 16;
            if (first + i < range.last && at < a.row_bytes)
                *reinterpret_cast<uint4*>(out + at) = round_piece(sums.value[i]);
        }
    }
    return true;
}

__device__ __forceinline__ bool add_up(const CombineArguments& a, const Call& call, const Arrivals& in, int* next) {
    const int steps = (a.row_bytes + kStepBytes - 1) / kStepBytes;
    const int parts = parts_of(a.num_tokens, steps, blockDim.x / 32 * gridDim.x);
    const Divider by_parts(parts);
    for (int item = next_item(next); item < a.num_tokens * parts;
         item = next_item(next)) {
        const int token = by_parts(item), part = item - token * parts;
        if (!add_part(a, call, in, token, steps_of(part, by_parts, steps), part == 0))
            return false;
    }
    return true;
}

// -- the launch -------------------------------------------------------------------------------------

// Whole block: how many rows came from each rank; kept by the dispatch.
__device__ __forceinline__ void load_arrivals(const CombineArguments& a, Arrivals& in) {
    if (threadIdx.x < 32) {
        int carry = 0, most = 0;
#pragma unroll 1
        for (int first = 0; first < kNumRanks; first += 32) {
            const int rank = first + threadIdx.x;
            const int rows = rank < kNumRanks ? a.rows_from[rank] : 0;
            int sum = rows;
            for (int distance = 1; distance < 32; distance *= 2) {
                const int other = __shfl_up_sync(kAll, sum, distance);
                if (threadIdx.x >= distance) sum += other;
            }
            if (rank < kNumRanks) {
                in.rows_from[rank] = rows;
                in.first_row[rank] = carry + sum - rows;
            }
            carry += __shfl_sync(kAll, sum, 31);
            most = max(most, __reduce_max_sync(kAll, rows));
        }
        if (threadIdx.x == 0) {
            in.most = most;
            in.total = carry;
        }
    }
    __syncthreads();
}

// Rows that travel, for the statistics; one thread for each rank.
__device__ __forceinline__ void keep_statistics(const CombineArguments& a, const Arrivals& in) {
    if (a.rows_sent == nullptr || blockIdx.x != 0 || a.row_bytes == 0 || kExact) return;
#pragma unroll 1
    for (int r = threadIdx.x; r < kNumRanks; r += blockDim.x) {
        const long long sent = in.rows_from[r], received = a.rows_to[r];
        a.rows_sent[r] += sent;
        a.rows_received[r] += received;
        if (r == a.rank) continue;
        a.bytes_sent[r] += sent * a.row_bytes;
        a.bytes_received[r] += received * a.row_bytes;
    }
}

__device__ __forceinline__ void combine_rank(const CombineArguments& a) {
    __shared__ Call call;
    __shared__ Arrivals in;
    __shared__ int next_send, next_add;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const bool sends = a.flags & kSend, receives = a.flags & kReceive;
    const int senders = min(a.send_warps, warps);  // the others add up from the start
    if (threadIdx.x == 0) next_send = next_add = 0;
    if (!begin_call(a, call, [] {}, [] {})) return;
    if (sends) {
        if (warp == warps - 1 && !peers_have_room(call)) call.stopped = 1;
        load_arrivals(a, in);
        if (call.stopped) return;
        keep_statistics(a, in);
        if (warp < senders) return_rows(a, call, in, senders, &next_send);
    }
    if (sends) say_where(a, call);  // takes a fence, for which nothing else should wait
    if (!receives || !add_up(a, call, in, &next_add)) return;
    if (!sends) say_where(a, call);
}

extern "C" __global__ void __launch_bounds__(kMaxWarps * 32, 1)
    ll_combine(const __grid_constant__ CombineArguments arguments) {
    combine_rank(arguments);
}

// Several ranks on one GPU, each a row of the grid.
extern "C" __global__ void __launch_bounds__(kMaxWarps * 32, 1)
    ll_combine_hosted(const CombineArguments* arguments) {
    combine_rank(arguments[blockIdx.y]);
}
