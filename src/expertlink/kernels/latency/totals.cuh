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

// One part of one token. False: give up.
__device__ __forceinline__ bool add_part(const CombineArguments& a, const Call& call,
                                         const RowsFrom& in, int token, Steps range,
                                         bool is_first) {
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
            a.grads_out[static_cast<long long>(token) * kTopk + lane] =
                term.slot >= 0 ? grad : 0.0f;
    }
    if (a.row_bytes == 0) return true;
    char* const base = call.bases[a.rank];
    char* const out = static_cast<char*>(a.out) + static_cast<long long>(token) * a.row_bytes;
    const unsigned present = __ballot_sync(kAll, term.slot >= 0);
#pragma unroll 1
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
#pragma unroll 1
        while (left) {
            const int i = __ffs(left) - 1;
            left &= left - 1;
            look_at_next(ahead);
            const int slot = __shfl_sync(kAll, term.slot, i),
                      peer = __shfl_sync(kAll, term.peer, i);
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

__device__ __forceinline__ bool add_up(const CombineArguments& a, const Call& call,
                                       const RowsFrom& in, int* next) {
    const int steps = (a.row_bytes + kStepBytes - 1) / kStepBytes;
    const int parts = parts_of(a.num_tokens, steps, blockDim.x / 32 * gridDim.x);
    const Divider by_parts(parts);
    for (int item = next_item(next); item < a.num_tokens * parts; item = next_item(next)) {
        const int token = by_parts(item), part = item - token * parts;
        if (!add_part(a, call, in, token, steps_of(part, by_parts, steps), part == 0)) return false;
    }
    return true;
}
