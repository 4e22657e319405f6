// Sending half of a combine: partial sums, or single rows, to the ranks of their tokens.
#pragma once

#include "common/choices.cuh"
#include "common/pieces.cuh"
#include "ll/header.cuh"
#include "ll/rows.cuh"

namespace ll {

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

    __device__ __forceinline__ void round(uint4 (&piece)[kSumDepth]) const {
#pragma unroll
        for (int i = 0; i < kSumDepth; ++i) piece[i] = round_piece(value[i]);
    }
};

// Sends steps of a row to a staged row of a peer.
template <int kDepth>
__device__ __forceinline__ void return_steps(const CombineArguments& a, const Call& call, int peer,
                                             int slot, const uint4 (&piece)[kDepth], int first,
                                             int last) {
    const LanePieces mine = lane_pieces(first, last, a.row_bytes);
    const unsigned sentinels = sentinel_steps(piece, mine);
    char* const base = call.bases[peer];
    store_steps(staged_row(base, call.sending, slot), piece, mine);
    if (sentinels)
        escape_steps(escape_words(base, call.sending, slot), call.sending, first, sentinels);
}

__device__ __forceinline__ const char* row_at(const CombineArguments& a, long long slot) {
    return static_cast<const char*>(a.rows) + slot * a.row_bytes;
}

// Whether rows are accompanied by metadata: gradients of weights, or weights of exact sums that the
// tokens' ranks do not have.
__device__ __forceinline__ bool has_metadata(const CombineArguments& a) {
    return a.flags & kGrads || (kExact && !(a.flags & kTokenWeights));
}

// Sends the metadata of a row, once. Lane k, for choice k.
__device__ __forceinline__ void return_metadata(const CombineArguments& a, const Call& call,
                                                int peer, int slot, int token, long long at,
                                                int choice, float weight) {
    const int lane = threadIdx.x % 32;
    if (lane >= kTopk) return;
    float grad = 0.0f;
    // A row for which there was no room has no gradients either.
    if (a.flags & kGrads && choice >= 0 && (kExpanded || at < a.max_slots))
        grad = a.slot_grads[kExpanded ? choice : at * kTopk + lane];
    char* const base = call.bases[peer];
    if (kExact && choice != -1)
        store_tagged_pair(
            metadata_words(base, call.sending, slot_of_choice(a.rank, token, lane), 0),
            call.sending, __float_as_uint(weight), __float_as_uint(grad));
    if (!kExact && a.flags & kGrads)
        store_tagged(metadata_words(base, call.sending, slot, lane), call.sending,
                     __float_as_uint(grad));
}

// Exact sums: counts a row that travels. Lane k, for choice k.
__device__ __forceinline__ void add_to_statistics(const CombineArguments& a, int peer,
                                                  long long* rows, long long* bytes) {
    atomicAdd(reinterpret_cast<unsigned long long*>(&rows[peer]), 1ull);
    if (peer != a.rank)
        atomicAdd(reinterpret_cast<unsigned long long*>(&bytes[peer]),
                  static_cast<unsigned long long>(a.row_bytes));
}

// Whether own rows of deduplicated layouts are summed from where they are. They are as they were:
// both halves are in this launch.
__device__ __forceinline__ bool takes_own_rows(const CombineArguments& a) {
    return !kExpanded && (a.flags & (kSend | kReceive)) == (kSend | kReceive);
}

// Row of an arrival in deduplicated layouts.
__device__ __forceinline__ long long dense_row(const CombineArguments& a, const RowsFrom& in,
                                               int source, int position) {
    return kLayoutIsRankMajor ? source * kMaxTokens + position : in.first_row[source] + position;
}

// Where the sum of an arrival is staged at the peer that it goes to.
__device__ __forceinline__ int returned_slot(const CombineArguments& a, int source, int position) {
    return staging_slot(returning_source(source, a.rank), position);
}

// -- weights of the tokens' ranks -----------------------------------------------------------------

// They lie where the metadata of a dispatch lies: a tagged word for each choice of a row, in the
// slots of the rank whose token it is. Gradients of weights take the word before.
__device__ __forceinline__ unsigned long long* weight_word(const Call& call, int holder, int source,
                                                           int position, int k) {
    return metadata_words(call.bases[holder], call.sending, staging_slot(source, position), k) + 1;
}

// Publishes the weights of this rank's tokens to the ranks that sum their rows. Warp `nth` of
// `warps`, before anything that waits for peers.
__device__ __forceinline__ void publish_weights(const CombineArguments& a, const Call& call,
                                                int nth, int warps) {
    constexpr int kOfToken = kCopies * kTopk;
    const int total = a.num_tokens * kOfToken;
#pragma unroll 4
    for (int i = nth * 32 + threadIdx.x % 32; i < total; i += warps * 32) {
        const int token = i / kOfToken, copy = i % kOfToken / kTopk, k = i % kTopk;
        const int code = a.slots_of_token[token * kCopies + copy];
        const float weight = a.weights[static_cast<long long>(token) * kTopk + k];
        if (code < 0 || is_masked(call, peer_of(code / kMaxTokens))) continue;
        const int to = code / kMaxTokens;
        store_tagged(
            weight_word(call, peer_of(to), returning_source(to, a.rank), code % kMaxTokens, k),
            call.sending, __float_as_uint(weight));
    }
}

// Waits for the weights of a row. Lane k gets that of choice k. Where the wait is ended, or the
// source is lost, nobody reads the sum.
__device__ __forceinline__ float receive_weights(const Call& call, int source, int position) {
    const int lane = threadIdx.x % 32;
    const unsigned long long* const word =
        weight_word(call, call.watch.rank, source, position, min(lane, kTopk - 1));
    unsigned long long value = load_tagged(word), since = 0;
    if (__all_sync(kAll, is_of(call, value))) return __uint_as_float(static_cast<unsigned>(value));
    long long* const longest = call.policy.longest_wait_ns;
    const unsigned long long began = longest != nullptr ? nanoseconds() : 0;
    for (unsigned spins = 1; !__all_sync(kAll, is_of(call, value)); ++spins) {
        value = load_tagged(word);
        if (spins % kSpinsBetweenPolls != 0) continue;
        WaitResult found = kArrived;
        if (lane == 0)
            found = poll(call, kPhaseRow, peer_of(source), call.watch.transfer, 0, position, since);
        if (__shfl_sync(kAll, static_cast<int>(found), 0) != kArrived) break;
    }
    if (began && lane == 0)
        atomicMax(&longest[peer_of(source)], static_cast<long long>(nanoseconds() - began));
    return __uint_as_float(static_cast<unsigned>(value));
}

// One item: a part of an arrival, with what is known of it. Without bytes, part 0 has the metadata
// only.
struct ReturnItem {
    int item, source, position, part, token;
    int choice;    // lane k: slot (expanded layouts) or local expert of choice k
    float weight;  // lane k
    StepRange range;

    // Opens the next item that exists, from `first` on. What is known of its choices is being
    // loaded.
    template <bool kBrings, typename Next>
    __device__ __forceinline__ void open(const CombineArguments& a, const Call& call,
                                         const RowsFrom& in, int first, int items, const Cut& cut,
                                         const Next& next) {
        const int lane = threadIdx.x % 32;
        const Divider by_parts(cut.parts);
        for (item = first; item < items; item = next()) {
            const int nth = by_parts(item);
            part = item - nth * cut.parts;
            source = (nth + a.rank) % kNumSources;
            position = nth / kNumSources;
            if (position < in.rows_from[source] && !is_masked(call, peer_of(source))) break;
        }
        if (item >= items) return;
        range = cut.part(part);
        choice = -1;
        weight = 1.0f;  // a product with one is exact
        token = kExact ? a.tokens_of_row[arrival()] : 0;
        if constexpr (kBrings) weight = receive_weights(call, source, position);
        if (lane >= kTopk || !(kExpanded || a.flags & kGrads)) return;
        const long long at = static_cast<long long>(arrival()) * kTopk + lane;
        choice = a.choices_of_row[at];
        if (a.slot_weights == nullptr && a.weights_of_row != nullptr) weight = a.weights_of_row[at];
    }

    __device__ __forceinline__ int arrival() const { return source * kMaxTokens + position; }

    __device__ __forceinline__ bool stays(const CombineArguments& a) const {
        return takes_own_rows(a) && peer_of(source) == a.rank;
    }

    // The choices are known. Loads the row, or the first of those to be summed.
    __device__ __forceinline__ void begin(const CombineArguments& a, const RowsFrom& in,
                                          uint4 (&piece)[kSumDepth]) {
        if (a.slot_weights != nullptr && choice >= 0) weight = a.slot_weights[choice];
        if (a.row_bytes == 0 || kExact) return;
        if (kExpanded) {
            load_choice(a, __ballot_sync(kAll, choice >= 0), piece);
            return;
        }
        const long long row = dense_row(a, in, source, position);
        if (!stays(a)) load_row(a, row < a.max_slots ? row : -1, piece);
    }

    // Loads the row of the first of some choices, if there are any.
    __device__ __forceinline__ void load_choice(const CombineArguments& a, unsigned choices,
                                                uint4 (&piece)[kSumDepth]) const {
        const long long slot = __shfl_sync(kAll, choice, choices ? __ffs(choices) - 1 : 0);
        if (choices) load_row(a, slot, piece);
    }

    // A row for which there was no room counts as zeros.
    __device__ __forceinline__ void load_row(const CombineArguments& a, long long row,
                                             uint4 (&piece)[kSumDepth]) const {
        read_steps(piece, row_at(a, max(row, 0ll)),
                   lane_pieces(range.first, row < 0 ? range.first : range.last, a.row_bytes));
    }
};

__device__ __forceinline__ void copy_steps(uint4 (&to)[kSumDepth], const uint4 (&from)[kSumDepth]) {
#pragma unroll
    for (int i = 0; i < kSumDepth; ++i) to[i] = from[i];
}

// Sends the metadata of an item.
__device__ __forceinline__ void return_row_metadata(const CombineArguments& a, const Call& call,
                                                    const RowsFrom& in, const ReturnItem& part) {
    if (part.part != 0) return;
    if (kExact && part.choice != -1 && a.rows_sent != nullptr && a.row_bytes != 0)
        add_to_statistics(a, part.source, a.rows_sent, a.bytes_sent);
    if (!has_metadata(a)) return;
    return_metadata(a, call, peer_of(part.source), returned_slot(a, part.source, part.position),
                    part.token, dense_row(a, in, part.source, part.position), part.choice,
                    part.weight);
}

// Sends back `part`, whose first row is in `piece`. Afterwards that of `ahead` is.
__device__ __forceinline__ void return_part(const CombineArguments& a, const Call& call,
                                            const RowsFrom& in, const ReturnItem& part,
                                            ReturnItem& ahead, int items,
                                            uint4 (&piece)[kSumDepth]) {
    const int peer = peer_of(part.source), slot = returned_slot(a, part.source, part.position);
    const StepRange range = part.range;
    const bool more = ahead.item < items;
    return_row_metadata(a, call, in, part);
    if (a.row_bytes == 0 || part.stays(a)) {
        if (more) ahead.begin(a, in, piece);
        return;
    }
    if (kExact) {
        if (more) ahead.begin(a, in, piece);
#pragma unroll 1
        for (unsigned left = __ballot_sync(kAll, part.choice != -1); left; left &= left - 1) {
            const int k = __ffs(left) - 1;
            part.load_row(a, __shfl_sync(kAll, part.choice, k), piece);
            return_steps(a, call, peer, slot_of_choice(a.rank, part.token, k), piece, range.first,
                         range.last);
        }
        return;
    }
    uint4 next[kSumDepth];
    if (!kExpanded) {
        if (more) ahead.begin(a, in, next);
        return_steps(a, call, peer, slot, piece, range.first, range.last);
        copy_steps(piece, next);
        return;
    }
    Sums sums;
    sums.clear();
    unsigned left = __ballot_sync(kAll, part.choice >= 0);
    if (left == 0 && more) ahead.begin(a, in, piece);
#pragma unroll 1
    while (left) {
        const int k = __ffs(left) - 1;
        left &= left - 1;
        if (left)
            part.load_choice(a, left, next);
        else if (more)
            ahead.begin(a, in, next);
        sums.add<true>(piece, __shfl_sync(kAll, part.weight, k));
        copy_steps(piece, next);
    }
    sums.round(next);
    return_steps(a, call, peer, slot, next, range.first, range.last);
}

// Partial sums of parts of one step. The rows of some choices are loaded together.
template <bool kBrings>
__device__ __forceinline__ void return_few(const CombineArguments& a, const Call& call,
                                           const RowsFrom& in, const Cut& cut, int items,
                                           int* counter) {
    const auto next = [&] { return next_item(counter); };
    ReturnItem part;
#pragma unroll 1
    for (part.open<kBrings>(a, call, in, first_item(), items, cut, next); part.item < items;
         part.open<kBrings>(a, call, in, next(), items, cut, next)) {
        if (a.slot_weights != nullptr && part.choice >= 0)
            part.weight = a.slot_weights[part.choice];
        return_row_metadata(a, call, in, part);
        if (a.row_bytes == 0) continue;
        const LanePieces mine = lane_pieces(part.range.first, part.range.last, a.row_bytes);
        float sum[kPack] = {};
#pragma unroll 1
        for (unsigned left = __ballot_sync(kAll, part.choice >= 0); left;) {
            uint4 piece[kTogether][1];
            unsigned rest = left;
#pragma unroll
            for (int i = 0; i < kTogether; ++i, rest &= rest - 1) {
                const long long slot = __shfl_sync(kAll, part.choice, rest ? __ffs(rest) - 1 : 0);
                read_steps(piece[i], row_at(a, max(slot, 0ll)), {mine.at, rest ? mine.count : 0});
            }
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                if (!left) break;
                add_piece<true>(sum, piece[i][0], __shfl_sync(kAll, part.weight, __ffs(left) - 1));
                left &= left - 1;
            }
        }
        const uint4 one[1] = {round_piece(sum)};
        return_steps(a, call, peer_of(part.source), returned_slot(a, part.source, part.position),
                     one, part.range.first, part.range.last);
    }
}

// Sends back all items. While one part is sent the next is in flight, where there are more parts
// than warps. With kBrings rows are multiplied by weights that their tokens' ranks publish.
template <bool kBrings>
__device__ __forceinline__ void return_rows(const CombineArguments& a, const Call& call,
                                            const RowsFrom& in, int warps, int* counter) {
    const int all = warps * gridDim.x;
    const Cut cut(in.total, a.row_bytes, all, kSumDepth);
    const int items = in.most * kNumSources * cut.parts;
    const int parts = in.total * cut.parts;
    const bool plenty = parts > all, drawn = parts >= kDrawnFrom * all;
    if (kExpanded && !kExact && cut.length == 1) {
        return_few<kBrings>(a, call, in, cut, items, counter);
        return;
    }
    Draws draws;
    if (drawn) draws.begin(call, warps, items);
    const auto next = [&] { return drawn ? draws.next() : next_item(counter); };
    ReturnItem part, ahead;
    uint4 piece[kSumDepth];
    part.open<kBrings>(a, call, in, first_item(), items, cut, next);
    if (part.item < items) part.begin(a, in, piece);
#pragma unroll 1
    while (part.item < items) {
        ahead.item = items;
        if (plenty) ahead.open<kBrings>(a, call, in, next(), items, cut, next);
        return_part(a, call, in, part, ahead, items, piece);
        part = ahead;
        if (plenty) continue;
        part.open<kBrings>(a, call, in, next(), items, cut, next);
        if (part.item < items) part.begin(a, in, piece);
    }
}

}  // namespace ll
