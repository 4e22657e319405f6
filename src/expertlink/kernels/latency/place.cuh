// Low latency, receiving half of a dispatch: every row to its slots as its parts come in.
#pragma once

#include "latency/counts.cuh"
#include "latency/send.cuh"

// What came beside a row: in expanded layouts lane k learns the slot of its choice, or -1; all lanes
// learn the token. Once for a row, with `keeps`, it is kept.
__device__ __forceinline__ Found receive_beside(const DispatchArguments& a, const Call& call,
                                                const Arrivals& in, int source, int position,
                                                bool keeps, int& target, int& token) {
    const int lane = threadIdx.x % 32;
    const int staged = source * kMaxTokens + position;
    const long long row = staged;
    Found found = kHere;
    unsigned code = 0, weight = 0;
    unsigned long long since = 0;
    const unsigned long long* const words =
        beside_words(call.bases[a.rank], call.watch.transfer, staged, min(lane, kTopk));
    ulonglong2 pair = load_tagged_pair(words);
    for (unsigned spins = 1;; ++spins) {
        const bool here = static_cast<unsigned>(pair.x >> 32) == call.watch.transfer &&
                          static_cast<unsigned>(pair.y >> 32) == call.watch.transfer;
        if (__all_sync(kAll, here)) break;
        pair = load_tagged_pair(words);
        if (spins % kSpinsBetweenLooks != 0) continue;
        if (lane == 0)
            found = look(call, kPhaseRow, source, call.watch.transfer, 0, position, since);
        found = static_cast<Found>(__shfl_sync(kAll, static_cast<int>(found), 0));
        if (found != kHere) break;
    }
    if (found == kHere) {
        code = static_cast<unsigned>(pair.x);
        weight = static_cast<unsigned>(pair.y);
    }
    int choice = -1;
    if (lane < kTopk && code != 0) {
        choice = static_cast<int>(code & 0xffffu) - 1;
        if (kExpanded) {
            choice = in.first_slot[source * a.num_local + choice] + static_cast<int>(code >> 16);
            if (choice >= a.max_slots) choice = kDropped;
        }
    }
    if (keeps && lane < kTopk) {
        const float value = choice < 0 ? 0.0f : __uint_as_float(weight);
        a.choices_of_row[row * kTopk + lane] = choice;
        a.weights_of_row[row * kTopk + lane] = value;
        const long long at = kLayoutIsRankMajor ? row : in.first_row[source] + position;
        if (!kExpanded && at < a.max_slots) {
            a.topk_ids[at * kTopk + lane] = choice;
            if (a.topk_weights != nullptr) a.topk_weights[at * kTopk + lane] = value;
        }
    }
    unsigned number = code;  // K < 32: lane K has the token
    if (kTopk >= 32 && lane == 0 && found == kHere)
        found =
            wait_tagged(call, beside_words(call.bases[a.rank], call.watch.transfer, staged, kTopk),
                        source, kPhaseRow, number);
    if (keeps && lane == kTopk % 32) a.tokens_of_row[row] = static_cast<int>(number);
    token = __shfl_sync(kAll, static_cast<int>(number), kTopk % 32);
    if (kTopk >= 32) found = static_cast<Found>(__shfl_sync(kAll, static_cast<int>(found), 0));
    if (kExpanded) target = choice;
    return found;
}

// Deduplicated layouts: lane 0 has the slot of a row, or -1.
__device__ __forceinline__ int dense_target(const DispatchArguments& a, const Arrivals& in,
                                            int source, int position) {
    const int at =
        kLayoutIsRankMajor ? source * kMaxTokens + position : in.first_row[source] + position;
    return threadIdx.x % 32 == 0 && at < a.max_slots ? at : -1;
}

// Four bytes of a row's scales to their place; the last may be fewer.
__device__ __forceinline__ void store_scale(const DispatchArguments& a, int slot, int word,
                                            unsigned value) {
    const int columns = a.scale_bytes / a.scale_item;
    long long at = static_cast<long long>(slot) * a.scale_bytes + word * 4;
    int step = 1;  // bytes from one byte to the next
    if (a.scale_stride != 0) {
        // Column by column: [group, column, slot of the group].
        const int group = slot / a.scale_stride, column = word * 4 / a.scale_item;
        at = (static_cast<long long>(group) * columns + column) * a.scale_stride +
             (slot - group * a.scale_stride);
        at = at * a.scale_item + word * 4 % a.scale_item;
        step = a.scale_item < 4 ? a.scale_stride : 1;
    }
    if (step == 1 && a.scale_bytes % 4 == 0) {
        *reinterpret_cast<unsigned*>(a.scales_out + at) = value;
        return;
    }
    const int item = step == 1 ? 4 : a.scale_item;
#pragma unroll 1
    for (int i = 0; i < 4 && word * 4 + i < a.scale_bytes; ++i)
        a.scales_out[at + static_cast<long long>(i / item) * item * step + i % item] =
            static_cast<char>(value >> 8 * i);
}

// First look at a row's scales, while its last part is on its way: words of this lane.
struct ScaleWords {
    unsigned first, second;

    __device__ __forceinline__ static unsigned load(const DispatchArguments& a, const char* row,
                                                    int word) {
        if (word * 4 >= a.scale_bytes) return 0;
        return static_cast<unsigned>(
            load_fresh(reinterpret_cast<const int*>(row + kScalesAt) + word));
    }

    __device__ __forceinline__ void look_at(const DispatchArguments& a, const char* row) {
        first = load(a, row, threadIdx.x % 32);
        second = load(a, row, threadIdx.x % 32 + 32);
    }
};

// Copies the scales of a row, word by word, to the slots that lanes hold.
__device__ __forceinline__ Found receive_scales(const DispatchArguments& a, const Call& call,
                                                int source, int position, int target, bool gone,
                                                const ScaleWords& early) {
    const int lane = threadIdx.x % 32;
    const int staged = source * kMaxTokens + position;
    char* const row = staged_row(call.bases[a.rank], call.watch.transfer, staged);
    const unsigned* const escapes = escape_words(call.bases[a.rank], call.watch.transfer, staged);
    const unsigned targets = __ballot_sync(kAll, target >= 0);
#pragma unroll 1
    for (int first = 0; first * 4 < a.scale_bytes; first += 32) {
        const int word = first + lane;
        const bool exists = word * 4 < a.scale_bytes;
        unsigned value = 0;
        Found found = kHere;
        if (first < 64)
            value = first == 0 ? early.first : early.second;
        else
            value = ScaleWords::load(a, row, word);
        if (exists && !gone) {
            // The kernel's own packed scales belong to a step, those of the caller are sent at
            // once.
            const unsigned* const escape =
                escapes + (a.scale_kind == kNotQuantized ? kMaxSteps : word);
            unsigned long long since = 0;
            for (unsigned spins = 1; value == kNothing; ++spins) {
                value = ScaleWords::load(a, row, word);
                if (spins % 16 != 0 || value != kNothing) continue;
                if (a.scale_kind != kFloatScales && a.scale_kind != kPowerScales &&
                    load_acquire_system(escape) == call.watch.transfer) {
                    value = ScaleWords::load(a, row, word);
                    break;
                }
                if (spins % kSpinsBetweenLooks != 0) continue;
                found = look(call, kPhaseRow, source, call.watch.transfer, 0, position, since);
                if (found != kHere) break;
            }
            reinterpret_cast<unsigned*>(row + kScalesAt)[word] = kNothing;
        }
        if (gone || found == kGone) value = 0;
        if (__any_sync(kAll, found == kStop)) return kStop;
#pragma unroll 1
        for (unsigned left = targets; left; left &= left - 1) {
            const int slot = __shfl_sync(kAll, target, __ffs(left) - 1);
            if (exists) store_scale(a, slot, word, value);
        }
    }
    return kHere;
}

constexpr int kPlaceDepth = 3;  // steps that a warp looks at together
constexpr int kPlaceMost = 6;   // of a part

// One part of an arrival to all its slots. False: give up.
template <bool kQuantized>
__device__ __forceinline__ bool place_part(const DispatchArguments& a, const Call& call,
                                           const Arrivals& in, int source, int position,
                                           Steps range, bool is_first, bool is_last) {
    const int staged = source * kMaxTokens + position;
    char* const base = call.bases[a.rank];
    char* const row = staged_row(base, call.watch.transfer, staged);
    const unsigned* const escapes = escape_words(base, call.watch.transfer, staged);
    const bool own = takes_own_rows<kQuantized>(a) && source == a.rank;
    const char* from = row;
    Pieces<kPlaceDepth> pieces, ahead;
    ScaleWords scales{0, 0};
    int target = dense_target(a, in, source, position), token = 0;
    Span span = span_of(range.first, range.last, a.row_bytes);
    if (!own) pieces.look_at(from, span);
    if (is_last) scales.look_at(a, row);
    // While these are on their way.
    Found found = kHere;
    if (kExpanded || is_first || own)
        found = receive_beside(a, call, in, source, position, is_first, target, token);
    if (found == kStop) return false;
    if (found == kGone && kExpanded) target = -1;
    const unsigned targets = __ballot_sync(kAll, target >= 0);
    if (own) {
        from = a.x + static_cast<long long>(token) * a.input_bytes;
        pieces.look_at(from, span);
    }
#pragma unroll 1
    for (int first = range.first; first < range.last; first += kPlaceDepth) {
        const Span then = span_of(first + kPlaceDepth, range.last, a.row_bytes);
        ahead.look_at(from, then);
        if (!own && found == kHere) {
            found = pieces.settle(call, row, escapes, first, source, position);
            if (found == kStop) return false;
        }
        if (found == kGone) pieces.clear();
#pragma unroll 1
        for (unsigned left = targets; left; left &= left - 1) {
            const int slot = __shfl_sync(kAll, target, __ffs(left) - 1);
            write_steps(a.tokens + static_cast<long long>(slot) * a.row_bytes, pieces.piece, span);
        }
        if (!own) pieces.put_back(row, span);
        pieces = ahead;
        span = then;
    }
    if (!is_last || a.scale_bytes == 0) return true;
    return receive_scales(a, call, source, position, target, found == kGone, scales) != kStop;
}

// Parts of rows, by whichever warp is free.
template <bool kQuantized>
__device__ __forceinline__ bool place_rows(const DispatchArguments& a, const Call& call,
                                           const Arrivals& in, int* next) {
    const Cut cut(in.total, a.row_bytes, blockDim.x / 32 * gridDim.x, kPlaceMost);
    const int items = in.most * kNumRanks * cut.parts;
    const Divider by_parts(cut.parts);
    for (int item = next_item(next); item < items; item = next_item(next)) {
        const int turn = by_parts(item), part = item - turn * cut.parts;
        const int source = (turn + a.rank) % kNumRanks, position = turn / kNumRanks;
        if (position >= in.rows_from[source]) continue;
        if (!place_part<kQuantized>(a, call, in, source, position, cut.part(part),
                                    part == 0, part == cut.parts - 1))
            return false;
    }
    return true;
}

// Slots that no row fills: ids and weights of deduplicated layouts, gaps between FLAT's groups.
__device__ __forceinline__ void clear_rest(const DispatchArguments& a, const Arrivals& in, int warp,
                                           int warps) {
    const int lane = threadIdx.x % 32;
    if (kLayoutIsRankMajor) {
        // Most slots are empty, so every lane has a choice, not every warp a slot.
#pragma unroll 1
        for (int at = warp * 32 + lane; at < kNumRanks * kMaxTokens * kTopk; at += warps * 32) {
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
