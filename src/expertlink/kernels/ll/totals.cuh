// Receiving half of a combine: the terms of a token are summed as they come in.
#pragma once

#include "ll/terms.cuh"

namespace ll {

// Where the lane pieces of one step of several terms are. Lanes have the terms.
struct PlacesOfTerms {
    Term term;
    int step;
    char* row[kTogether];
    int lane[kTogether];  // that has the term of a piece

    __device__ __forceinline__ char* at(int i) const {
        return row[i] + step * kStepBytes + threadIdx.x % 32 * 16;
    }

    __device__ __forceinline__ unsigned escaped(const Call& call) const {
        const unsigned* const words =
            escape_words(call.bases[call.watch.rank], call.watch.transfer, max(term.slot, 0));
        const unsigned found = __ballot_sync(
            kAll, term.slot >= 0 && load_acquire_system(words + step) == call.watch.transfer);
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < kTogether; ++i) bits |= (found >> lane[i] & 1u) << i;
        return bits;
    }

    __device__ __forceinline__ int lane_of(int piece) const {
        int found = lane[0];
#pragma unroll
        for (int i = 1; i < kTogether; ++i)
            if (i == piece) found = lane[i];
        return found;
    }

    __device__ __forceinline__ bool are_few() const { return true; }

    // All lanes call this.
    __device__ __forceinline__ int peer(int i) const {
        return __shfl_sync(kAll, term.peer, lane_of(i));
    }

    __device__ __forceinline__ int index(int i) const {
        return __shfl_sync(kAll, term.slot, lane_of(i)) % kMaxTokens;
    }
};

// Sums one step of all terms, of which some are awaited together. Terms of the lanes in `gone` do
// not count. False: a wait was ended.
__device__ __forceinline__ bool add_terms(const CombineArguments& a, const Call& call,
                                          const RowsFrom& in, const SumItem& part, unsigned gone,
                                          float weight, float (&sum)[kPack]) {
    const bool exists = lane_pieces(part.range.first, part.range.last, a.row_bytes).count > 0;
    unsigned left = __ballot_sync(kAll, part.term.slot >= 0);
#pragma unroll 1
    while (left) {
        StagedPieces<kTogether> pieces;
        PlacesOfTerms places;
        places.term = part.term;
        places.step = part.range.first;
        unsigned there = 0, staged = 0, lost = 0;  // bit i: piece i
        pieces.clear();
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            places.row[i] = nullptr;
            places.lane[i] = 0;
            if (!left) continue;
            const int lane = __ffs(left) - 1, slot = __shfl_sync(kAll, part.term.slot, lane);
            left &= left - 1;
            bool has_room = true;
            places.lane[i] = lane;
            places.row[i] = part.row_of(a, call, in, slot, has_room);
            there |= 1u << i;
            staged |= part.is_own(a, slot) ? 0u : 1u << i;
            lost |= (gone >> lane & 1u) << i;
            if (exists && has_room) pieces.piece[i] = load_piece(places.at(i));
        }
        while (true) {
            int awaited = 0;
            const WaitResult found = pieces.wait_for(call, places, staged & ~lost, awaited);
            if (found == kAbort) return false;
            if (found == kArrived) break;
            lost |= 1u << awaited;
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            if (!(there >> i & 1u)) break;
            if (!(lost >> i & 1u))
                add_piece<kExact>(sum, pieces.piece[i],
                                  kExact ? __shfl_sync(kAll, weight, places.lane[i]) : 0.0f);
            if (exists && staged >> i & 1u)
                *reinterpret_cast<uint4*>(places.at(i)) = sentinel_piece();
        }
    }
    return true;
}

// Receives the metadata of an item, if there is any. With exact sums lane k gets the weight of its
// term. `gone`: lanes whose terms will not come. False: a wait was ended.
__device__ __forceinline__ bool receive_row_metadata(const CombineArguments& a, const Call& call,
                                                     const SumItem& part, unsigned& gone,
                                                     float& weight) {
    const int lane = threadIdx.x % 32;
    Term term = part.term;
    float grad = 0.0f;
    if (kExact && has_metadata(a) && !receive_metadata(a, call, term, weight, grad)) return false;
    if (kExact && a.flags & kTokenWeights && term.slot >= 0)
        weight = a.weights[static_cast<long long>(part.token) * kTopk + lane];
    gone = __ballot_sync(kAll, part.term.slot >= 0 && term.slot < 0);
    if (part.part != 0) return true;
    if (kExact && term.slot >= 0 && a.rows_sent != nullptr && a.row_bytes != 0)
        add_to_statistics(a, term.peer, a.rows_received, a.bytes_received);
    if (!(a.flags & kGrads)) return true;
    if (!kExact) return receive_grads(a, call, term, part.token);
    if (lane < kTopk) grads_of(a, part.token)[lane] = term.slot >= 0 ? grad : 0.0f;
    return true;
}

// Sums `part`, whose first term is in `pieces`. Afterwards that of `ahead` is. False: a wait was
// ended.
__device__ __forceinline__ bool add_part(const CombineArguments& a, const Call& call,
                                         const RowsFrom& in, const SumItem& part, SumItem& ahead,
                                         int items, StagedPieces<kSumDepth>& pieces) {
    const StepRange range = part.range;
    const LanePieces mine = lane_pieces(range.first, range.last, a.row_bytes);
    const unsigned terms = __ballot_sync(kAll, part.term.slot >= 0);
    unsigned gone = 0;
    float weight = 1.0f;
    if (!receive_row_metadata(a, call, part, gone, weight)) return false;
    Sums sums;
    sums.clear();
    unsigned left = terms;
    if (left == 0) ahead.begin(a, call, in, items, pieces);
#pragma unroll 1
    while (left) {
        const int i = __ffs(left) - 1;
        left &= left - 1;
        StagedPieces<kSumDepth> next;
        if (left)
            part.load_first(a, call, in, left, next);
        else
            ahead.begin(a, call, in, items, next);
        const int slot = __shfl_sync(kAll, part.term.slot, i);
        const int peer = __shfl_sync(kAll, part.term.peer, i);
        if (a.row_bytes != 0) {
            char* const row = staged_row(call.bases[a.rank], call.watch.transfer, slot);
            const bool own = part.is_own(a, slot);
            WaitResult found = gone >> i & 1u ? kPeerMasked : kArrived;
            const unsigned* const escapes =
                escape_words(call.bases[a.rank], call.watch.transfer, slot);
            int awaited = 0;
            if (!own && found == kArrived)
                found =
                    pieces.wait_for(call,
                                    PlacesOfPart{row, escapes, range.first,
                                                 range.last - range.first, peer, slot % kMaxTokens},
                                    kAll, awaited);
            if (found == kAbort) return false;
            if (found == kArrived) {
                if (kExact)
                    sums.add<true>(pieces.piece, __shfl_sync(kAll, weight, i));
                else
                    sums.add<false>(pieces.piece, 0.0f);
            }
            if (!own) pieces.put_back(row, mine);
        }
        pieces = next;
    }
    if (a.row_bytes == 0) return true;
    uint4 sum[kSumDepth];
    sums.round(sum);
    write_steps(static_cast<char*>(a.out) + offset_of(a, token_at(a, part.token), a.row_bytes), sum,
                mine);
    return true;
}

// Sums parts of one step, one after the other.
__device__ __forceinline__ void add_up_few(const CombineArguments& a, const Call& call,
                                           const RowsFrom& in, const Cut& cut, int items,
                                           int* next) {
    SumItem part;
#pragma unroll 1
    for (int item = next_item(next); item < items; item = next_item(next)) {
        part.open(a, item, items, cut);
        part.leave_out_masked(call);
        unsigned gone = 0;
        float weight = 1.0f, sum[kPack] = {};
        if (!receive_row_metadata(a, call, part, gone, weight)) return;
        if (!add_terms(a, call, in, part, gone, weight, sum)) return;
        const uint4 one[1] = {round_piece(sum)};
        write_steps(static_cast<char*>(a.out) + offset_of(a, token_at(a, part.token), a.row_bytes),
                    one, lane_pieces(part.range.first, part.range.last, a.row_bytes));
    }
}

// Sums all items. While one part is summed the next is in flight, where there are more parts than
// warps. Ends early where a wait has expired.
__device__ __forceinline__ void add_up(const CombineArguments& a, const Call& call,
                                       const RowsFrom& in, int* next) {
    const int warps = blockDim.x / 32 * gridDim.x;
    const Cut cut(a.num_tokens, a.row_bytes, warps, kSumDepth);
    const int items = a.num_tokens * cut.parts;
    const bool plenty = items > warps;
    if (cut.length == 1 && a.row_bytes != 0) {
        add_up_few(a, call, in, cut, items, next);
        return;
    }
    SumItem part, ahead;
    StagedPieces<kSumDepth> pieces;
    part.item = items;
#pragma unroll 1
    while (true) {
        const bool busy = part.item < items;
        ahead.item = items;
        if (plenty || !busy) ahead.open(a, next_item(next), items, cut);
        if (busy) {
            if (!add_part(a, call, in, part, ahead, items, pieces)) return;
        } else if (ahead.item < items) {
            ahead.begin(a, call, in, items, pieces);
        } else {
            break;
        }
        part = ahead;
    }
}

}  // namespace ll
