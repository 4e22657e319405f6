// Sending half of a dispatch: rows to staged rows of their ranks, in parts, quantized on the way.
#pragma once

#include "common/quantize.cuh"
#include "ll/route.cuh"

namespace ll {

constexpr int kInStep = kStepBytes / kScaleBlock;  // scales of a step

// A part of a token's row: loaded, then turned into what travels.
template <bool kQuantized>
struct Part {
    static constexpr int kDepth = kQuantized ? kSendDepthQuantized : kSendDepth;
    uint4 piece[kDepth];
    uint4 rest[kQuantized ? kDepth : 1];  // second half of what a lane piece is made of

    __device__ __forceinline__ void load(const char* row, LanePieces mine) {
        if constexpr (!kQuantized) {
            read_steps(piece, row, mine);
        } else {
#pragma unroll
            for (int i = 0; i < kDepth; ++i) {
                piece[i] = rest[i] = make_uint4(0, 0, 0, 0);
                if (i >= mine.count) continue;
                // Before they are quantized, sixteen elements are twice as long.
                const char* const from = row + 2 * mine.at + 2 * i * kStepBytes;
                piece[i] = reinterpret_cast<const uint4*>(from)[0];
                rest[i] = reinterpret_cast<const uint4*>(from)[1];
            }
        }
    }
};

// The scales of a part, as they travel: one word of each lane, or none.
struct PartScales {
    unsigned word;
    int index;  // among the row's words, or -1

    // Every lane has the scale of its block in each of the steps.
    template <int kDepth>
    __device__ __forceinline__ void gather(const float (&scale)[kDepth], int first, int steps,
                                           bool packed) {
        const int lane = threadIdx.x % 32;
        word = 0;
        index = -1;
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            if (packed) {
                // One word has the exponents of a step's blocks, of those that the row has.
                const int block = (first + i) * kInStep + lane / 8;
                unsigned exponent = __float_as_uint(scale[i]) >> 23 & 0xffu;
                if (block >= kNumBlocks || lane % 8 != 0) exponent = 0;
                const unsigned four = __reduce_or_sync(kAll, exponent << lane / 8 * 8);
                if (lane == i) word = four;
            } else {
                const float own = __shfl_sync(kAll, scale[i], lane % kInStep * 8);
                if (lane / kInStep == i) word = __float_as_uint(own);
            }
        }
        const int here = packed ? lane : lane / kInStep, at = packed ? first : first * kInStep;
        if (here < min(steps, kDepth) && (packed || at + lane < kNumBlocks)) index = at + lane;
    }

    // Bit i: the packed scales of step i are the sentinel. The same in all lanes.
    __device__ __forceinline__ unsigned sentinels() const {
        return __ballot_sync(kAll, index >= 0 && word == kSentinel);
    }
};

// Whether rows of this rank's own tokens are taken from the input. They need no quantizing then,
// and the input is as it was: both halves are in this launch.
template <bool kQuantized>
__device__ __forceinline__ bool takes_own_rows(const DispatchArguments& a) {
    return !kQuantized && (a.flags & (kSend | kReceive)) == (kSend | kReceive);
}

__device__ __forceinline__ unsigned byte_at(const char* bytes, int at, int end) {
    return at < end ? static_cast<unsigned char>(bytes[at]) : 0u;
}

// Sends scales that the caller made, as words; the last may be incomplete.
__device__ __forceinline__ void send_scales(const DispatchArguments& a, char* row, unsigned* escape,
                                            unsigned transfer, int token) {
    const char* const from = a.scales + offset_of(a, token_at(a, token), a.scale_bytes);
    unsigned* const to = reinterpret_cast<unsigned*>(row + kScalesAt);
    unsigned sentinels = 0;
#pragma unroll 1
    for (int word = threadIdx.x % 32; word * 4 < a.scale_bytes; word += 32) {
        unsigned value = 0;
#pragma unroll 1
        for (int i = 3; i >= 0; --i)
            value = value << 8 | byte_at(from, word * 4 + i, a.scale_bytes);
        store_relaxed_system(to + word, value);
        if (value == kSentinel) sentinels = 1;
    }
    if (__any_sync(kAll, sentinels)) escape_steps(escape, transfer, 0, 1u);
}

// One item: a part of a token's row, for one share of the token's ranks.
struct SendItem {
    int item, token, part, share;
    StepRange steps;
};

// One warp's way through the rows that its rank sends, in parts. With few tokens each item takes a
// part to some of the ranks only, so that there is work for all warps.
template <bool kQuantized>
struct Sender {
    static constexpr int kDepth = Part<kQuantized>::kDepth;
    Cut cut;
    int shares, items;
    SendItem now;
    Part<kQuantized> part;

    // The first `warps` warps of every block that sends take part.
    __device__ __forceinline__ void prepare(const DispatchArguments& a, int warps) {
        const int all = warps * gridDim.x;
        cut = {a.num_tokens, a.row_bytes, all, kDepth};
        const int all_parts = a.num_tokens * cut.parts;
        shares = all_parts ? max(1, min(kCopies, all / all_parts)) : 1;
        items = threadIdx.x / 32 < warps ? all_parts * shares : 0;
        now = open(first_item());
    }

    __device__ __forceinline__ SendItem open(int item) const {
        const Divider by_shares(shares), by_parts(cut.parts);
        const int row_part = by_shares(item), token = by_parts(row_part);
        const int number = row_part - token * cut.parts;
        return {item, token, number, item - row_part * shares, cut.part(number)};
    }

    __device__ __forceinline__ void load(const DispatchArguments& a, const SendItem& at,
                                         Part<kQuantized>& target) const {
        if (at.item < items)
            target.load(a.x + offset_of(a, token_at(a, at.token), a.input_bytes),
                        lane_pieces(at.steps.first, at.steps.last, a.row_bytes));
    }

    // Sends what has been loaded to the ranks of this share. Every token begins with another rank.
    __device__ __forceinline__ void store(const DispatchArguments& a, const Call& call,
                                          const Masks& masks) {
        const int token = now.token, first = now.steps.first, last = now.steps.last;
        const bool with_scales = now.part == cut.parts - 1 && a.scales != nullptr;
        const LanePieces mine = lane_pieces(first, last, a.row_bytes);
        PartScales scales;
        unsigned sentinels = 0;
        if constexpr (kQuantized) {
            float scale[kDepth];
            if (last - first == 1) {  // with few tokens
                uint4 low[1] = {part.piece[0]}, high[1] = {part.rest[0]};
                float own[1];
                quantize_pieces(low, high, a.scale_kind, own);
                part.piece[0] = low[0];
                scale[0] = own[0];
                for (int i = 1; i < kDepth; ++i) scale[i] = 0.0f;
            } else {
                quantize_pieces(part.piece, part.rest, a.scale_kind, scale);
            }
            const bool packed = a.scale_kind == kPackedScales;
            scales.gather(scale, first, last - first, packed);
            if (packed) sentinels = scales.sentinels();
        }
        sentinels |= sentinel_steps(part.piece, mine);
        const TokenAt at = token_at(a, token);
        const int source = source_at(a, at.message), first_rank = (a.rank + token) % kNumPeers;
        const long long offset = staged_row(nullptr, call.sending, staging_slot(source, 0)) -
                                 static_cast<char*>(nullptr);
        int skip = now.share;  // ranks of the token that other warps send to
#pragma unroll 1
        for (int pass = 0; pass < (kNumPeers > 32 ? 2 * ((kNumPeers + 31) / 32) : 1); ++pass) {
            // More ranks than lanes: groups of 32. First ranks from `first_rank` on, then those
            // before it.
            const int groups = (kNumPeers + 31) / 32, group = pass % groups * 32;
            const int position = target_at(call, masks, at, group);
            unsigned there = __ballot_sync(kAll, position >= 0);
            int shift = 0;
            if constexpr (kNumPeers > 32) {
                const int before = min(max(first_rank - group, 0), 32);
                const unsigned below = before == 32 ? kAll : (1u << before) - 1u;
                there &= pass < groups ? ~below : below;
            } else if (first_rank != 0) {
                shift = first_rank;  // bit i stands for peer (i + first_rank) % G
                there = (there >> first_rank | there << (kNumPeers - first_rank)) &
                        (kAll >> (32 - kNumPeers));
            }
#pragma unroll 1
            for (; there; there &= there - 1) {
                if (skip-- > 0) continue;
                skip = shares - 1;
                int lane_of = __ffs(there) - 1 + shift;
                if (kNumPeers <= 32 && lane_of >= kNumPeers) lane_of -= kNumPeers;
                const int slot = __shfl_sync(kAll, position, lane_of);
                const int peer = group + lane_of;
                char* const base = call.bases[peer];
                char* const row = base + offset + static_cast<long long>(slot) * kRowStride;
                const bool stays = takes_own_rows<kQuantized>(a) && peer == a.rank;
                if (!stays) store_steps(row, part.piece, mine);
                if (kQuantized && scales.index >= 0)
                    store_relaxed_system(
                        reinterpret_cast<unsigned*>(row + kScalesAt) + scales.index, scales.word);
                if (sentinels && !stays)
                    escape_steps(escape_words(base, call.sending, staging_slot(source, slot)),
                                 call.sending, first, sentinels);
                if (!kQuantized && with_scales)
                    send_scales(
                        a, row,
                        escape_words(base, call.sending, staging_slot(source, slot)) + kMaxSteps,
                        call.sending, token);
            }
        }
    }

    // Sends all items, once the block has counted. While one part is sent the next is being loaded.
    __device__ __forceinline__ void run(const DispatchArguments& a, const Call& call,
                                        const Masks& masks, Draws& draws) {
#pragma unroll 1
        while (now.item < items) {
            const SendItem then = open(draws.next());
            Part<kQuantized> ahead;
            load(a, then, ahead);
            store(a, call, masks);
            part = ahead;
            now = then;
        }
    }
};

}  // namespace ll
