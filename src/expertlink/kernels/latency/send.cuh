// Low latency, sending half of a dispatch: rows to their staging slots, in parts, quantized on the way.
#pragma once

#include "common/quantize.cuh"
#include "latency/route.cuh"

// Some steps of a token's row: loaded, then made what travels.
template <bool kQuantized>
struct Part {
    static constexpr int kDepth = kQuantized ? 2 : 4;
    uint4 piece[kDepth];
    uint4 rest[kQuantized ? kDepth : 1];  // second half of what a piece is made of
    float scale[kQuantized ? kDepth : 1];

    __device__ __forceinline__ void load(const char* row, int first, int last, int bytes) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            const int at = (first + i) * kStepBytes + lane * 16;
            const bool exists = first + i < last && at < bytes;
            // Sixteen elements are twice as long before they are quantized.
            const uint4* const from =
                reinterpret_cast<const uint4*>(row + (kQuantized ? 2 * at : at));
            piece[i] = exists ? from[0] : make_uint4(0, 0, 0, 0);
            if constexpr (kQuantized) rest[i] = exists ? from[1] : make_uint4(0, 0, 0, 0);
        }
    }

    __device__ __forceinline__ void make(int first, int last, int kind) {
        if constexpr (kQuantized) {
#pragma unroll
            for (int i = 0; i < kDepth; ++i)
                if (first + i < last) piece[i] = quantize_piece(piece[i], rest[i], kind, scale[i]);
        }
    }

    // To one peer; returns the steps whose data look like nothing.
    __device__ __forceinline__ unsigned store(char* row, int first, int last, int bytes,
                                              int kind) const {
        const int lane = threadIdx.x % 32;
        unsigned strange = 0;
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            const int at = (first + i) * kStepBytes + lane * 16;
            if (first + i < last && at < bytes) {
                store_piece(row + at, piece[i]);
                if (holds_nothing(piece[i])) strange |= 1u << i;
            }
        }
        if constexpr (kQuantized) strange |= store_scales(row + kScalesAt, first, last, bytes, kind);
        return strange;
    }

    __device__ __forceinline__ unsigned store_scales(char* scales, int first, int last, int bytes,
                                                     int kind) const {
        const int lane = threadIdx.x % 32;
        unsigned strange = 0;
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            const int at = (first + i) * kStepBytes + lane * 16;  // bytes are elements here
            const bool exists = first + i < last && at < bytes;
            if (kind == kPackedScales) {
                // A word has the exponents of four blocks, those of a step.
                unsigned exponent = exists ? __float_as_uint(scale[i]) >> 23 & 0xffu : 0;
                exponent <<= lane / 8 * 8;
                const unsigned word = __reduce_or_sync(kAll, lane % 8 == 0 ? exponent : 0u);
                if (lane == 0 && exists) {
                    store_relaxed_system(reinterpret_cast<unsigned*>(scales) + first + i, word);
                    if (word == kNothing) strange |= 1u << i;
                }
            } else if (exists && lane % 8 == 0) {
                const int block = (first + i) * (kStepBytes / kScaleBlock) + lane / 8;
                store_relaxed_system(reinterpret_cast<unsigned*>(scales) + block,
                                     __float_as_uint(scale[i]));
            }
        }
        return strange;
    }
};

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
        for (int i = 3; i >= 0; --i) value = value << 8 | byte_at(from, word * 4 + i, a.scale_bytes);
        store_relaxed_system(to + word, value);
        if (value == kNothing) strange = 1;
    }
    escape_steps(escape, transfer, 0, strange);
}

// One part of one token to all its ranks. Every token begins with another rank.
template <bool kQuantized>
__device__ __forceinline__ void store_part(const DispatchArguments& a, const Call& call,
                                           const Masks& masks, const Part<kQuantized>& part, int token,
                                           int first, int last, bool with_scales) {
    const int turn = (a.rank + token) % kNumRanks;
#pragma unroll 1
    for (int half = 0; half < 2; ++half)  // ranks from `turn` on, then those before it
#pragma unroll 1
        for (int group = half == 0 ? turn / 32 * 32 : 0; group < (half == 0 ? kNumRanks : turn + 1);
             group += 32) {
            const int position = position_at(call, masks, token, group);
            unsigned there = __ballot_sync(kAll, position >= 0);
            const int split = turn - group;  // ranks of this group before `turn`
            if (split > 0) {
                const unsigned before = split >= 32 ? kAll : (1u << split) - 1u;
                there &= half == 0 ? ~before : before;
            } else if (half == 1) {
                there = 0;
            }
            for (; there; there &= there - 1) {
                const int peer = group + __ffs(there) - 1;
                const int slot =
                    a.rank * kMaxTokens + __shfl_sync(kAll, position, __ffs(there) - 1);
                if (is_masked(call, peer)) continue;
                char* const base = call.bases[peer];
                char* const row = staged_row(base, call.sending, slot);
                unsigned* const escapes = escape_words(base, call.sending, slot);
                const unsigned strange = part.store(row, first, last, a.row_bytes, a.scale_kind);
                escape_steps(escapes, call.sending, first, strange);
                if (with_scales) send_scales(a, row, escapes + kMaxSteps, call.sending, token);
            }
        }
}

// The first `warps` warps of every block. `counted` is called once, before anything is stored.
template <bool kQuantized, typename Counted>
__device__ __forceinline__ bool send_rows(const DispatchArguments& a, const Call& call,
                                          const Masks& masks, int warps, int* next,
                                          const Counted& counted) {
    constexpr int kDepth = Part<kQuantized>::kDepth;
    const int steps = (a.row_bytes + kStepBytes - 1) / kStepBytes;
    const int parts = parts_of(a.num_tokens, steps, warps * gridDim.x);
    const int items = threadIdx.x / 32 < warps ? a.num_tokens * parts : 0;
    int item = threadIdx.x / 32 * gridDim.x + blockIdx.x;
    int token = 0, share = 0, first = 0;
    Steps range{0, 0};
    bool begins = true, counts = true;  // a part; the whole half
#pragma unroll 1
    for (;;) {
        const bool sends = item < items;
        Part<kQuantized> part;
        Beside beside;
        if (sends) {
            if (begins) {
                token = item / parts;
                share = item - token * parts;
                range = steps_of(share, parts, steps);
                first = range.first;
            }
            part.load(a.x + static_cast<long long>(token) * a.input_bytes, first, range.last,
                      a.row_bytes);
            if (begins && share == 0) beside.load(a, token);
        }
        // The first rows are on their way while the tokens are counted.
        if (counts && !counted()) return false;
        counts = false;
        if (!sends) return true;
        // With several chunks of experts it has been told already.
        if (begins && share == 0 && kExpertChunk >= kNumExperts)
            send_beside(a, call, masks, beside, token, 0);
        part.make(first, range.last, a.scale_kind);
        const bool ends = first + kDepth >= range.last;
        store_part(a, call, masks, part, token, first, range.last,
                   ends && share == parts - 1 && a.scales != nullptr);
        first += kDepth;
        begins = ends;
        if (ends) item = next_item(next);
    }
}
