// Low latency, sending half of a combine: partial sums, or single rows, to the ranks of their
// tokens.
#pragma once

#include "choices.cuh"
#include "common/pieces.cuh"
#include "latency/rows.cuh"

constexpr int kSumDepth = 4;  // steps that a warp has under way for each term

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
    if (strange) escape_steps(escape_words(base, call.sending, slot), call.sending, first, strange);
}

__device__ __forceinline__ const char* row_at(const CombineArguments& a, long long slot) {
    return static_cast<const char*>(a.rows) + slot * a.row_bytes;
}

// Sum of an arrival's rows in top-k order; lane k has the slot and weight of choice k.
__device__ __forceinline__ void return_sum(const CombineArguments& a, const Call& call, int peer,
                                           int slot, int choice, float weight, Steps range) {
    const unsigned present = __ballot_sync(kAll, choice >= 0);
#pragma unroll 1
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
            load_steps(piece, row_at(a, __shfl_sync(kAll, choice, k)), first, range.last,
                       a.row_bytes);
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
#pragma unroll 1
    for (int first = range.first; first < range.last; first += kSumDepth) {
        uint4 piece[kSumDepth];
        // A row for which there was no room is as one of zeros.
        load_steps(piece, row_at(a, max(row, 0ll)), first, row < 0 ? first : range.last,
                   a.row_bytes);
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
    if (a.flags & kGrads && choice >= 0)
        grad = a.slot_grads[kExpanded ? choice : at * kTopk + lane];
    char* const base = call.bases[peer];
    if (kExact && choice != -1)
        store_tagged_pair(beside_words(base, call.sending, token * kTopk + lane, 0), call.sending,
                          __float_as_uint(weight), __float_as_uint(grad));
    if (!kExact && a.flags & kGrads)
        store_tagged(beside_words(base, call.sending, slot, lane), call.sending,
                     __float_as_uint(grad));
}

// Exact sums: rows that travel are counted as they do; lane k, for choice k.
__device__ __forceinline__ void count_row(const CombineArguments& a, int peer, long long* rows,
                                          long long* bytes) {
    atomicAdd(reinterpret_cast<unsigned long long*>(&rows[peer]), 1ull);
    if (peer != a.rank)
        atomicAdd(reinterpret_cast<unsigned long long*>(&bytes[peer]),
                  static_cast<unsigned long long>(a.row_bytes));
}

// Own rows of deduplicated layouts are added up from where they are, if they are sure to be as they
// were: both halves are in this launch.
__device__ __forceinline__ bool takes_own_rows(const CombineArguments& a) {
    return !kExpanded && (a.flags & (kSend | kReceive)) == (kSend | kReceive);
}

// Row of an arrival in deduplicated layouts.
__device__ __forceinline__ long long dense_row(const CombineArguments& a, const RowsFrom& in,
                                               int source, int position) {
    return kLayoutIsRankMajor ? source * kMaxTokens + position : in.first_row[source] + position;
}

// One part of what belongs to an arrival. With no bytes, part 0 has the numbers only.
__device__ __forceinline__ void return_part(const CombineArguments& a, const Call& call,
                                            const RowsFrom& in, int source, int position,
                                            Steps range, bool is_first) {
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
                                            const RowsFrom& in, int warps, int* next) {
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
