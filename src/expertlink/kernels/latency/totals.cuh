// Low latency, receiving half of a combine: what belongs to a token is added up as it comes in.
#pragma once

#include "latency/returns.cuh"

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
__device__ __forceinline__ bool receive_beside(const CombineArguments& a, const Call& call,
                                               Term& term, float& weight, float& grad) {
    Found found = kHere;
    unsigned first = 0, second = 0;
    if (term.slot >= 0) {
        unsigned long long* const words =
            beside_words(call.bases[a.rank], call.watch.transfer, term.slot, 0);
        found = wait_tagged(call, words, term.peer, kPhaseRow, first);
        if (found == kHere) found = wait_tagged(call, words + 1, term.peer, kPhaseRow, second);
        if (found == kGone) term.slot = -1;
    }
    weight = __uint_as_float(first);
    grad = __uint_as_float(second);
    return !__any_sync(kAll, found == kStop);
}

// Gradients of a token's choices: each lies beside the term from the choice's rank.
__device__ __forceinline__ bool receive_grads(const CombineArguments& a, const Call& call,
                                              const Term& term, int token) {
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

// One part of one token: its terms.
struct Adding {
    int item, token, part;
    Steps range;
    Term term;

    // The next part; its terms are on their way.
    __device__ __forceinline__ void open(const CombineArguments& a, int number, int items,
                                         const Cut& cut) {
        item = number;
        if (item >= items) return;
        const Divider by_parts(cut.parts);
        token = by_parts(item);
        part = item - token * cut.parts;
        range = cut.part(part);
        term = term_of(a, token);
    }

    // The terms are here; the first of them is looked at.
    __device__ __forceinline__ void begin(const CombineArguments& a, const Call& call,
                                          const RowsFrom& in, int items,
                                          Pieces<kSumDepth>& pieces) {
        if (item >= items) return;
        if (term.slot >= 0 && is_masked(call, term.peer)) term.slot = -1;
        look_at(a, call, in, __ballot_sync(kAll, term.slot >= 0), pieces);
    }

    __device__ __forceinline__ bool is_own(const CombineArguments& a, int slot) const {
        return takes_own_rows(a) && slot / kMaxTokens == a.rank;
    }

    // The first of some terms, if there are any.
    __device__ __forceinline__ void look_at(const CombineArguments& a, const Call& call,
                                            const RowsFrom& in, unsigned terms,
                                            Pieces<kSumDepth>& pieces) const {
        const int slot = __shfl_sync(kAll, term.slot, terms ? __ffs(terms) - 1 : 0);
        if (!terms || a.row_bytes == 0) return;
        const char* row = staged_row(call.bases[a.rank], call.watch.transfer, slot);
        int last = range.last;
        if (is_own(a, slot)) {
            const long long own = dense_row(a, in, a.rank, slot % kMaxTokens);
            row = row_at(a, own);
            if (own >= a.max_slots) last = range.first;  // there was no room for it
        }
        pieces.look_at(row, span_of(range.first, last, a.row_bytes));
    }
};

// Adds up `part`, whose first term is in `pieces`; afterwards that of `ahead` is. False: give up.
__device__ __forceinline__ bool add_part(const CombineArguments& a, const Call& call,
                                         const RowsFrom& in, const Adding& part, Adding& ahead,
                                         int items, Pieces<kSumDepth>& pieces) {
    const int lane = threadIdx.x % 32;
    const Steps range = part.range;
    const Span span = span_of(range.first, range.last, a.row_bytes);
    const unsigned terms = __ballot_sync(kAll, part.term.slot >= 0);
    Term term = part.term;
    float weight = 1.0f, grad = 0.0f;
    if (kExact && !receive_beside(a, call, term, weight, grad)) return false;
    const unsigned gone = terms & ~__ballot_sync(kAll, term.slot >= 0);
    if (kExact && part.part == 0 && term.slot >= 0 && a.rows_sent != nullptr && a.row_bytes != 0)
        count_row(a, term.peer, a.rows_received, a.bytes_received);
    if (part.part == 0 && a.flags & kGrads) {
        if (!kExact && !receive_grads(a, call, term, part.token)) return false;
        if (kExact && lane < kTopk)
            a.grads_out[static_cast<long long>(part.token) * kTopk + lane] =
                term.slot >= 0 ? grad : 0.0f;
    }
    Sums sums;
    sums.clear();
    unsigned left = terms;
    if (left == 0) ahead.begin(a, call, in, items, pieces);
#pragma unroll 1
    while (left) {
        const int i = __ffs(left) - 1;
        left &= left - 1;
        Pieces<kSumDepth> next;
        if (left)
            part.look_at(a, call, in, left, next);
        else
            ahead.begin(a, call, in, items, next);
        const int slot = __shfl_sync(kAll, part.term.slot, i);
        const int peer = __shfl_sync(kAll, part.term.peer, i);
        if (a.row_bytes != 0) {
            char* const row = staged_row(call.bases[a.rank], call.watch.transfer, slot);
            const bool own = part.is_own(a, slot);
            Found found = gone >> i & 1u ? kGone : kHere;
            if (!own && found == kHere)
                found = pieces.settle(
                    call, row, escape_words(call.bases[a.rank], call.watch.transfer, slot),
                    range.first, peer, slot % kMaxTokens);
            if (found == kStop) return false;
            if (found == kHere) {
                if (kExact)
                    sums.add<true>(pieces.piece, __shfl_sync(kAll, weight, i), range);
                else
                    sums.add<false>(pieces.piece, 0.0f, range);
            }
            if (!own) pieces.put_back(row, span);
        }
        pieces = next;
    }
    if (a.row_bytes == 0) return true;
    uint4 sum[kSumDepth];
    sums.round(sum);
    write_steps(static_cast<char*>(a.out) + static_cast<long long>(part.token) * a.row_bytes, sum,
                span);
    return true;
}

// While one part is added up the next is on its way, where there are more parts than warps.
__device__ __forceinline__ bool add_up(const CombineArguments& a, const Call& call,
                                       const RowsFrom& in, int* next) {
    const int warps = blockDim.x / 32 * gridDim.x;
    const Cut cut(a.num_tokens, a.row_bytes, warps, kSumDepth);
    const int items = a.num_tokens * cut.parts;
    const bool plenty = items > warps;
    Adding part, ahead;
    Pieces<kSumDepth> pieces;
    part.item = items;
#pragma unroll 1
    while (true) {
        const bool busy = part.item < items;
        ahead.item = items;
        if (plenty || !busy) ahead.open(a, next_item(next), items, cut);
        if (busy) {
            if (!add_part(a, call, in, part, ahead, items, pieces)) return false;
        } else if (ahead.item < items) {
            ahead.begin(a, call, in, items, pieces);
        } else {
            break;
        }
        part = ahead;
    }
    return true;
}
