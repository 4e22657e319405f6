// Receiving half of a dispatch: every row to its slots as its parts come in.
#pragma once

#include "ll/scales.cuh"

namespace ll {

// Receives the metadata of a row. In expanded layouts lane k gets the slot of its choice, or -1.
// All lanes get the token. With `keeps`, once for a row, the handle's tables are written.
__device__ __forceinline__ WaitResult receive_metadata(const DispatchArguments& a, const Call& call,
                                                       const Staging& at, const Arrivals& in,
                                                       int source, int position, bool keeps,
                                                       int& target, int& token) {
    const int lane = threadIdx.x % 32;
    const int staged = staging_slot(source, position);
    const long long row = source * kMaxTokens + position;
    WaitResult found = kArrived;
    unsigned code = 0, weight = 0;
    unsigned long long since = 0;
    const unsigned long long* const words =
        metadata_words(at.base, at.transfer, staged, min(lane, kTopk));
    ulonglong2 pair = load_tagged_pair(words);
    for (unsigned spins = 1;; ++spins) {
        const bool here = static_cast<unsigned>(pair.x >> 32) == at.transfer &&
                          static_cast<unsigned>(pair.y >> 32) == at.transfer;
        if (__all_sync(kAll, here)) break;
        pair = load_tagged_pair(words);
        if (spins % kSpinsBetweenPolls != 0) continue;
        if (lane == 0)
            found = poll(call, kPhaseRow, peer_of(source), call.watch.transfer, 0, position, since);
        found = static_cast<WaitResult>(__shfl_sync(kAll, static_cast<int>(found), 0));
        if (found != kArrived) break;
    }
    if (found == kArrived) {
        code = static_cast<unsigned>(pair.x);
        weight = static_cast<unsigned>(pair.y);
    }
    int choice = -1;
    if (lane < kTopk && code != 0) {
        choice = min(static_cast<int>(code & 0xffffu), a.num_local) - 1;
        if (kExpanded) {
            choice = in.first_slot[source * a.num_local + choice] + static_cast<int>(code >> 16);
            if (choice >= a.max_slots) choice = kDropped;
        }
    }
    if (keeps && lane < kTopk) {
        const float value = choice < 0 ? 0.0f : __uint_as_float(weight);
        a.choices_of_row[row * kTopk + lane] = choice;
        a.weights_of_row[row * kTopk + lane] = value;
        const long long slot = kLayoutIsRankMajor ? row : in.first_row[source] + position;
        if (!kExpanded && slot < a.max_slots) {
            a.topk_ids[slot * kTopk + lane] = choice;
            if (a.topk_weights != nullptr) a.topk_weights[slot * kTopk + lane] = value;
        }
    }
    unsigned number = code;  // K < 32: lane K has the token
    if (kTopk >= 32 && lane == 0 && found == kArrived)
        found = wait_tagged(call, metadata_words(at.base, at.transfer, staged, kTopk),
                            peer_of(source), kPhaseRow, number);
    number = min(number, static_cast<unsigned>(kMaxTokens - 1));
    if (keeps && lane == kTopk % 32) a.tokens_of_row[row] = static_cast<int>(number);
    token = __shfl_sync(kAll, static_cast<int>(number), kTopk % 32);
    if (kTopk >= 32) found = static_cast<WaitResult>(__shfl_sync(kAll, static_cast<int>(found), 0));
    if (kExpanded) target = choice;
    return found;
}

// Deduplicated layouts: lane 0 gets the slot of a row, or -1.
__device__ __forceinline__ int dense_target(const DispatchArguments& a, const Arrivals& in,
                                            int source, int position) {
    const int at =
        kLayoutIsRankMajor ? source * kMaxTokens + position : in.first_row[source] + position;
    return threadIdx.x % 32 == 0 && at < a.max_slots ? at : -1;
}

// Places one part of an arrival in all its slots. False: a wait was ended.
template <bool kQuantized>
__device__ __forceinline__ bool place_part(const DispatchArguments& a, const Call& call,
                                           const Staging& at, const Arrivals& in, int source,
                                           int position, StepRange range, bool is_first,
                                           bool is_last) {
    const int staged = staging_slot(source, position);
    char* const row = staged_row(at.base, at.transfer, staged);
    const unsigned* const escapes = escape_words(at.base, at.transfer, staged);
    const bool own = takes_own_rows<kQuantized>(a) && peer_of(source) == a.rank;
    const char* from = row;
    StagedPieces<kPlaceDepth> pieces, ahead;
    ScaleWords scales;
    scales.locate<kQuantized>(a, range, is_last);
    int target = dense_target(a, in, source, position), token = 0;
    LanePieces mine = lane_pieces(range.first, range.last, a.row_bytes);
    if (!own) pieces.load_first(from, mine);
    scales.load_first(row);
    // While these loads are in flight.
    WaitResult found = kArrived;
    if (kExpanded || is_first || own)
        found = receive_metadata(a, call, at, in, source, position, is_first, target, token);
    if (found == kAbort) return false;
    if (found == kPeerMasked && kExpanded) target = -1;
    const unsigned targets = __ballot_sync(kAll, target >= 0);
    if (own) {
        from = a.x + offset_of(a, {message_of(a, host_of(source)), token}, a.input_bytes);
        pieces.load_first(from, mine);
    }
#pragma unroll 1
    for (int first = range.first; first < range.last; first += kPlaceDepth) {
        const LanePieces then = lane_pieces(first + kPlaceDepth, range.last, a.row_bytes);
        ahead.load_first(from, then);
        if (!own && found == kArrived) {
            int awaited = 0;
            const PlacesOfPart places{
                row, escapes, first, range.last - range.first, peer_of(source), position};
            found = pieces.wait_for(call, places, kAll, awaited);
            if (found == kAbort) return false;
        }
        if (found == kPeerMasked) pieces.clear();
        scales.load_missing(row);
#pragma unroll 1
        for (unsigned left = targets; left; left &= left - 1) {
            const int slot = __shfl_sync(kAll, target, __ffs(left) - 1);
            write_steps(a.tokens + static_cast<long long>(slot) * a.row_bytes, pieces.piece, mine);
        }
        if (!own) pieces.put_back(row, mine);
        pieces = ahead;
        mine = then;
    }
    return receive_scales(a, call, at, source, position, target, found == kPeerMasked, scales) !=
           kAbort;
}

// Places parts of rows, from item `first` on, by whichever warp is free. Ends early where a wait
// has expired.
template <bool kQuantized>
__device__ __forceinline__ void place_rows(const DispatchArguments& a, const Call& call,
                                           const Arrivals& in, int first, int* next) {
    const Cut cut(in.total, a.row_bytes, blockDim.x / 32 * gridDim.x, kPlaceMost);
    const int items = in.most * kNumSources * cut.parts;
    const Divider by_parts(cut.parts);
    const Staging at{call.bases[a.rank], call.watch.transfer};
#pragma unroll 1
    for (int item = first; item < items; item = next_item(next)) {
        const int nth = by_parts(item), part = item - nth * cut.parts;
        const int source = (nth + a.rank) % kNumSources, position = nth / kNumSources;
        if (position >= in.rows_from[source]) continue;
        if (!place_part<kQuantized>(a, call, at, in, source, position, cut.part(part), part == 0,
                                    part == cut.parts - 1))
            return;
    }
}

// Clears slots that no row fills: ids and weights of deduplicated layouts, gaps between FLAT's
// groups.
__device__ __forceinline__ void clear_rest(const DispatchArguments& a, const Arrivals& in, int warp,
                                           int warps) {
    const int lane = threadIdx.x % 32;
    if (kLayoutIsRankMajor) {
        // Most slots are empty, so every lane takes a choice rather than every warp a slot.
#pragma unroll 1
        for (int at = warp * 32 + lane; at < kNumSources * kMaxTokens * kTopk; at += warps * 32) {
            const int slot = at / kTopk;
            if (slot % kMaxTokens < in.rows_from[slot / kMaxTokens]) continue;
            a.topk_ids[at] = -1;
            if (a.topk_weights != nullptr) a.topk_weights[at] = 0.0f;
        }
    } else if (!kExpanded) {
#pragma unroll 1
        for (int slot = in.total + warp; slot < a.max_slots; slot += warps) clear_choices(a, slot);
    } else if (!kPadded && kAlignment > 1) {
#pragma unroll 1
        for (int e = warp; e < a.num_local; e += warps) {
            const int begin = in.starts[e] + in.totals[e];
            const int end = min(in.starts[e + 1], a.max_slots);
            for (long long slot = begin; slot < end; ++slot) {
                for (int at = lane * 16; at < a.row_bytes; at += kStepBytes)
                    *reinterpret_cast<uint4*>(a.tokens + slot * a.row_bytes + at) =
                        make_uint4(0, 0, 0, 0);
#pragma unroll 1
                for (int i = lane; i < a.scale_bytes; i += 32) {
                    const int column = i / a.scale_item, byte = i % a.scale_item;
                    const long long at =
                        a.scale_stride == 0
                            ? slot * a.scale_bytes + i
                            : (column * a.scale_stride + slot) * a.scale_item + byte;
                    a.scales_out[at] = 0;
                }
            }
        }
    }
}

}  // namespace ll
