// Receiving half of a combine: the terms of a token's sum, and where they are.
#pragma once

#include "ll/returns.cuh"

namespace ll {

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
            if (expert >= 0) {
                const int peer = rank_of(a.expert_location[expert]);
                term = {slot_of_choice(peer, token, lane), peer};
            }
        }
    } else if (lane < kCopies) {
        const int code = a.slots_of_token[token * kCopies + lane];
        if (code >= 0) term = {code, peer_of(code / kMaxTokens)};
    }
    return term;
}

// Where the gradients of a token's weights go.
__device__ __forceinline__ float* grads_of(const CombineArguments& a, int token) {
    if constexpr (kSpansHosts)
        return reinterpret_cast<float*>(reinterpret_cast<char*>(a.grads_out) +
                                        offset_of(a, token_at(a, token), 4 * kTopk));
    else
        return a.grads_out + static_cast<long long>(token) * kTopk;
}

// Exact sums: receives the weight of a term and the gradient that came with it. Lane k waits for
// its own.
__device__ __forceinline__ bool receive_metadata(const CombineArguments& a, const Call& call,
                                                 Term& term, float& weight, float& grad) {
    WaitResult found = kArrived;
    unsigned first = 0, second = 0;
    if (term.slot >= 0) {
        unsigned long long* const words =
            metadata_words(call.bases[a.rank], call.watch.transfer, term.slot, 0);
        found = wait_tagged(call, words, term.peer, kPhaseRow, first);
        if (found == kArrived) found = wait_tagged(call, words + 1, term.peer, kPhaseRow, second);
        if (found == kPeerMasked) term.slot = -1;
    }
    weight = __uint_as_float(first);
    grad = __uint_as_float(second);
    return !__any_sync(kAll, found == kAbort);
}

// Receives the gradients of a token's choices: metadata of the term from the choice's rank.
__device__ __forceinline__ bool receive_grads(const CombineArguments& a, const Call& call,
                                              const Term& term, int token) {
    const int lane = threadIdx.x % 32;
    const int expert = lane < kTopk ? expert_of(a, token, lane) : -1;
    const int rank = expert >= 0 ? rank_of(a.expert_location[expert]) : -1;
    float grad = 0.0f;
    bool fine = true;
    for (unsigned left = __ballot_sync(kAll, term.slot >= 0); left; left &= left - 1) {
        const int i = __ffs(left) - 1;
        const int slot = __shfl_sync(kAll, term.slot, i), peer = __shfl_sync(kAll, term.peer, i);
        if (peer != rank) continue;
        unsigned bits = 0;
        fine &=
            wait_tagged(call, metadata_words(call.bases[a.rank], call.watch.transfer, slot, lane),
                        peer, kPhaseRow, bits) != kAbort;
        grad = __uint_as_float(bits);
    }
    if (lane < kTopk) grads_of(a, token)[lane] = grad;
    return __all_sync(kAll, fine);
}

// One item: a part of one token's sum, with its terms.
struct SumItem {
    int item, token, part;
    StepRange range;
    Term term;

    // Opens the next item. Its terms are loads in flight.
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

    __device__ __forceinline__ void leave_out_masked(const Call& call) {
        if (term.slot >= 0 && is_masked(call, term.peer)) term.slot = -1;
    }

    // The terms are known. Polls the first of them.
    __device__ __forceinline__ void begin(const CombineArguments& a, const Call& call,
                                          const RowsFrom& in, int items,
                                          StagedPieces<kSumDepth>& pieces) {
        if (item >= items) return;
        leave_out_masked(call);
        load_first(a, call, in, __ballot_sync(kAll, term.slot >= 0), pieces);
    }

    __device__ __forceinline__ bool is_own(const CombineArguments& a, int slot) const {
        return takes_own_rows(a) && peer_of(slot / kMaxTokens) == a.rank;
    }

    // Polls the first of some terms, if there are any.
    __device__ __forceinline__ void load_first(const CombineArguments& a, const Call& call,
                                               const RowsFrom& in, unsigned terms,
                                               StagedPieces<kSumDepth>& pieces) const {
        const int slot = __shfl_sync(kAll, term.slot, terms ? __ffs(terms) - 1 : 0);
        if (!terms || a.row_bytes == 0) return;
        bool exists = true;
        const char* const row = row_of(a, call, in, slot, exists);
        const int last = exists ? range.last : range.first;
        pieces.load_first(row, lane_pieces(range.first, last, a.row_bytes));
    }

    // Where a term is. An own row, which is only read, may have found no room.
    __device__ __forceinline__ char* row_of(const CombineArguments& a, const Call& call,
                                            const RowsFrom& in, int slot, bool& exists) const {
        if (!is_own(a, slot)) return staged_row(call.bases[a.rank], call.watch.transfer, slot);
        const int source = kSpansHosts ? slot / kMaxTokens : a.rank;
        const long long own = dense_row(a, in, source, slot % kMaxTokens);
        exists = own < a.max_slots;
        return const_cast<char*>(row_at(a, own));
    }
};

}  // namespace ll
