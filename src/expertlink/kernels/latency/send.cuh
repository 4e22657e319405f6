// Low latency, sending half of a dispatch: rows to their staging slots, in parts, quantized on the
// way.
#pragma once

#include "common/quantize.cuh"
#include "latency/route.cuh"

// Some steps of a token's row: loaded, then made what travels.
template <bool kQuantized>
struct Part {
    static constexpr int kDepth = kQuantized ? 3 : 4;
    uint4 piece[kDepth];
    uint4 rest[kQuantized ? kDepth : 1];  // second half of what a piece is made of
    float scale[kQuantized ? kDepth : 1];

    __device__ __forceinline__ void load(const char* row, int first, int last, int bytes) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            const int at = (first + i) * kStepBytes + lane * 16;
            piece[i] = make_uint4(0, 0, 0, 0);
            if constexpr (kQuantized) rest[i] = make_uint4(0, 0, 0, 0);
            if (first + i >= last || at >= bytes) continue;
            // Sixteen elements are twice as long before they are quantized.
            const uint4* const from =
                reinterpret_cast<const uint4*>(row + (kQuantized ? 2 * at : at));
            piece[i] = from[0];
            if constexpr (kQuantized) rest[i] = from[1];
        }
    }

    // Returns the steps whose data look like nothing, the same in all lanes.
    __device__ __forceinline__ unsigned make(int first, int last, int kind) {
        unsigned strange = 0;
        if constexpr (kQuantized) {
#pragma unroll
            for (int i = 0; i < kDepth; ++i) {
                if (first + i >= last) break;
                piece[i] = quantize_piece(piece[i], rest[i], kind, scale[i]);
                if (kind != kPackedScales) continue;
                scale[i] = packed_scales(first + i, scale[i]);
                if (__float_as_uint(scale[i]) == kNothing) strange |= 1u << i;
            }
        }
        return strange | strange_steps(piece, first, last);
    }

    // A word with the exponents of a step's four blocks, those of the row only.
    __device__ __forceinline__ static float packed_scales(int step, float scale) {
        const int lane = threadIdx.x % 32;
        const int block = step * (kStepBytes / kScaleBlock) + lane / 8;
        unsigned exponent = __float_as_uint(scale) >> 23 & 0xffu;
        if (block >= kNumBlocks || lane % 8 != 0) exponent = 0;
        return __uint_as_float(__reduce_or_sync(kAll, exponent << lane / 8 * 8));
    }

    __device__ __forceinline__ void store_scales(char* scales, int first, int last,
                                                 int kind) const {
        const int lane = threadIdx.x % 32;
        unsigned* const words = reinterpret_cast<unsigned*>(scales);
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            if (first + i >= last) break;
            const int block = (first + i) * (kStepBytes / kScaleBlock) + lane / 8;
            const bool packed = kind == kPackedScales;
            if (packed ? lane == 0 : lane % 8 == 0 && block < kNumBlocks)
                store_relaxed_system(words + (packed ? first + i : block),
                                     __float_as_uint(scale[i]));
        }
    }
};

// Rows of this rank's own tokens are taken from the input, where they need no quantizing and the
// input is sure to be as it was: both halves are in this launch.
template <bool kQuantized>
__device__ __forceinline__ bool takes_own_rows(const DispatchArguments& a) {
    return !kQuantized && (a.flags & (kSend | kReceive)) == (kSend | kReceive);
}

__device__ __forceinline__ unsigned byte_at(const char* bytes, int at, int end) {
    return at < end ? static_cast<unsigned char>(bytes[at]) : 0u;
}

// Scales that the caller made, as words; the last may be incomplete.
__device__ __forceinline__ void send_scales(const DispatchArguments& a, char* row, unsigned* escape,
                                            unsigned transfer, int token) {
    const char* const from = a.scales + static_cast<long long>(token) * a.scale_bytes;
    unsigned* const to = reinterpret_cast<unsigned*>(row + kScalesAt);
    unsigned strange = 0;
#pragma unroll 1
    for (int word = threadIdx.x % 32; word * 4 < a.scale_bytes; word += 32) {
        unsigned value = 0;
#pragma unroll 1
        for (int i = 3; i >= 0; --i)
            value = value << 8 | byte_at(from, word * 4 + i, a.scale_bytes);
        store_relaxed_system(to + word, value);
        if (value == kNothing) strange = 1;
    }
    if (__any_sync(kAll, strange)) escape_steps(escape, transfer, 0, 1u);
}

// One warp's way through the rows that its rank sends: in parts, and with few tokens each part to
// some of its ranks only, so that there is work for all warps.
template <bool kQuantized>
struct Sender {
    static constexpr int kDepth = Part<kQuantized>::kDepth;
    int steps, parts, splits, items;
    int item, token, share, split, first;
    Steps range;
    Part<kQuantized> part;

    // The first `warps` warps of every block take part.
    __device__ __forceinline__ void prepare(const DispatchArguments& a, int warps) {
        const int all = warps * gridDim.x;
        steps = (a.row_bytes + kStepBytes - 1) / kStepBytes;
        parts = parts_of(a.num_tokens, steps, all);
        splits = a.num_tokens ? max(1, min(kCopies, all / (a.num_tokens * parts))) : 1;
        items = threadIdx.x / 32 < warps ? a.num_tokens * parts * splits : 0;
        item = threadIdx.x / 32 * gridDim.x + blockIdx.x;
        open();
    }

    __device__ __forceinline__ void open() {
        const Divider by_splits(splits), by_parts(parts);
        const int piece = by_splits(item);
        split = item - piece * splits;
        token = by_parts(piece);
        share = piece - token * parts;
        range = steps_of(share, by_parts, steps);
        first = range.first;
    }

    __device__ __forceinline__ void load(const DispatchArguments& a) {
        if (item < items)
            part.load(a.x + static_cast<long long>(token) * a.input_bytes, first, range.last,
                      a.row_bytes);
    }

    // What has been loaded, to the ranks of this split. Every token begins with another rank.
    __device__ __forceinline__ void store(const DispatchArguments& a, const Call& call,
                                          const Masks& masks, bool with_scales) {
        const unsigned strange = part.make(first, range.last, a.scale_kind);
        const int turn = (a.rank + token) % kNumRanks;
        const long long offset =
            staged_row(nullptr, call.sending, a.rank * kMaxTokens) - static_cast<char*>(nullptr);
        int number = 0;  // of the rank among the token's
#pragma unroll 1
        for (int part_of = 0; part_of < (kNumRanks > 32 ? 2 * ((kNumRanks + 31) / 32) : 1);
             ++part_of) {
            // More ranks than lanes: groups of 32, ranks from `turn` on, then those before it.
            const int groups = (kNumRanks + 31) / 32, group = part_of % groups * 32;
            const int position = target_at(call, masks, token, group);
            unsigned there = __ballot_sync(kAll, position >= 0);
            int shift = 0;
            if constexpr (kNumRanks > 32) {
                const int before = min(max(turn - group, 0), 32);
                const unsigned below = before == 32 ? kAll : (1u << before) - 1u;
                there &= part_of < groups ? ~below : below;
            } else if (turn != 0) {
                shift = turn;  // bit i stands for rank (i + turn) % R
                there = (there >> turn | there << (kNumRanks - turn)) & (kAll >> (32 - kNumRanks));
            }
#pragma unroll 1
            for (; there; there &= there - 1, ++number) {
                if (splits > 1 && number % splits != split) continue;
                int lane_of = __ffs(there) - 1 + shift;
                if (kNumRanks <= 32 && lane_of >= kNumRanks) lane_of -= kNumRanks;
                const int slot = __shfl_sync(kAll, position, lane_of);
                const int peer = group + lane_of;
                char* const base = call.bases[peer];
                char* const row = base + offset + static_cast<long long>(slot) * kRowStride;
                const bool stays = takes_own_rows<kQuantized>(a) && peer == a.rank;
                if (!stays) store_steps(row, part.piece, first, range.last, a.row_bytes);
                if constexpr (kQuantized)
                    part.store_scales(row + kScalesAt, first, range.last, a.scale_kind);
                if (strange && !stays)
                    escape_steps(escape_words(base, call.sending, a.rank * kMaxTokens + slot),
                                 call.sending, first, strange);
                if (!kQuantized && with_scales)
                    send_scales(
                        a, row,
                        escape_words(base, call.sending, a.rank * kMaxTokens + slot) + kMaxSteps,
                        call.sending, token);
            }
        }
    }

    // All items, once the block has counted.
    __device__ __forceinline__ void run(const DispatchArguments& a, const Call& call,
                                        const Masks& masks, int* next) {
        while (item < items) {
            const bool ends = first + kDepth >= range.last;
            store(a, call, masks, ends && share == parts - 1 && a.scales != nullptr);
            if (ends) {
                item = next_item(next);
                open();
            } else {
                first += kDepth;
            }
            load(a);
        }
    }
};
