// The receiving half of a combine: the partial sums of every token are added up as they come in.
#pragma once

#include "ht/returns.cuh"

namespace ht {

// Collects the gradients of a token's choices: each lies behind the partial sum from the choice's
// rank.
__device__ __forceinline__ void collect_grads(const CombineArguments& a, int token, int code) {
    const int lane = threadIdx.x % 32;
    const long long at = static_cast<long long>(token) * kTopk + lane;
    long long id = -1;
    if (lane < kTopk)
        id = a.flags & kWideIds ? static_cast<const long long*>(a.ids)[at]
                                : static_cast<const int*>(a.ids)[at];
    const int rank = id >= 0 && id < kNumExperts ? rank_of(a.expert_location[id]) : -1;
    float grad = 0.0f;
    for (int d = 0; d < kCopies; ++d) {
        const int candidate = __shfl_sync(0xffffffffu, code, d);
        if (candidate >= 0 && candidate / kMaxTokens == rank)
            grad = __int_as_float(load_fresh(
                reinterpret_cast<const int*>(staged_row(a.bases[a.rank], candidate) + a.row_bytes) +
                lane));
    }
    if (lane < kTopk) a.grads_out[at] = grad;
}

// Any block of the grid, as soon as it has nothing else to do.
__device__ __forceinline__ bool add_up(const CombineArguments& a, const Watch& watch,
                                       const Stages& stages) {
    const int lane = threadIdx.x % 32;
    if (threadIdx.x / 32 == blockDim.x / 32 - 1)  // has no stages: it checks the headers
        return blockIdx.x != gridDim.x - 1 || check_headers(a, watch);
    char* const base = a.bases[a.rank];
    const auto code_of = [&](int token) {
        return lane < kCopies && token < a.num_tokens ? a.slots_of_token[token * kCopies + lane]
                                                      : -1;
    };
    int token = taken(take(&a.state->next_place));
    int next = taken(take(&a.state->next_place));
    for (int next_code = code_of(token); token < a.num_tokens;) {
        const int current = token, code = next_code;
        const int ticket = take(&a.state->next_place);
        next_code = code_of(next);
        token = next;
        const int source = code / kMaxTokens;
        // An own row of a deduplicated layout is its own partial sum.
        const bool direct = !kExpanded && code >= 0 && source == a.rank;
        bool here = true;
        if (code >= 0 && (!direct || a.flags & kGrads))
            here = wait_until(arrival_flag(base, code), watch.transfer, watch, kPhaseRow, source,
                              code % kMaxTokens);
        if (!__all_sync(0xffffffffu, here)) return false;
        __syncwarp();  // every lane may read what one of them has acquired
        if (a.row_bytes != 0) {
            const char* term = staged_row(base, max(code, 0));
            if (direct) {
                const long long row = row_of(a, source, code % kMaxTokens);
                if (exists(a, row)) term = static_cast<const char*>(a.rows) + row * a.row_bytes;
            }
            const int terms = __popc(__ballot_sync(0xffffffffu, code >= 0));
            sum_rows<false>(
                stages, term, 0.0f, terms, a.row_bytes,
                static_cast<char*>(a.out) + static_cast<long long>(current) * a.row_bytes);
        }
        if (a.flags & kGrads) collect_grads(a, current, code);
        next = taken(ticket);
    }
    return true;
}

}  // namespace ht
