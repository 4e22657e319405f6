// Sums of rows by one warp, 16 bytes of every row at a time, with the roundings of reduction.py.
#pragma once

#include "common/ptx.cuh"

constexpr int kPack = 8;      // elements of a 16-byte piece
constexpr int kInFlight = 4;  // rows loaded before the first of them is used

__device__ __forceinline__ void widen_pair(unsigned pair, float& low, float& high) {
    if (kIsBfloat16) {
        low = __uint_as_float(pair << 16);
        high = __uint_as_float(pair & 0xffff0000u);
    } else {
        asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
            : "=f"(low), "=f"(high)
            : "r"(pair));
    }
}

__device__ __forceinline__ unsigned narrow_pair(float low, float high) {
    unsigned pair;
    if (kIsBfloat16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// sum += weight * piece, product and sum rounded one by one.
template <bool kWeighted>
__device__ __forceinline__ void add_piece(float (&sum)[kPack], const uint4& piece, float weight) {
    const unsigned words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float low, high;
        widen_pair(words[i], low, high);
        if (kWeighted) {
            low = __fmul_rn(low, weight);
            high = __fmul_rn(high, weight);
        }
        sum[2 * i] = __fadd_rn(sum[2 * i], low);
        sum[2 * i + 1] = __fadd_rn(sum[2 * i + 1], high);
    }
}

__device__ __forceinline__ uint4 round_piece(const float (&sum)[kPack]) {
    return make_uint4(narrow_pair(sum[0], sum[1]), narrow_pair(sum[2], sum[3]),
                      narrow_pair(sum[4], sum[5]), narrow_pair(sum[6], sum[7]));
}

// `terms` rows: lane i holds the address (and weight) of the i-th. Pieces per step: kWide.
template <bool kWeighted, bool kFresh, int kWide, typename Store>
__device__ __forceinline__ void sum_pieces(const char* term, float weight, int terms, int first,
                                           int pieces, const Store& store) {
    const int lane = threadIdx.x % 32;
    float sums[kWide][kPack];
#pragma unroll
    for (int w = 0; w < kWide; ++w)
#pragma unroll
        for (int i = 0; i < kPack; ++i) sums[w][i] = 0.0f;
    for (int begin = 0; begin < terms; begin += kInFlight) {
        uint4 loaded[kInFlight][kWide];
#pragma unroll
        for (int t = 0; t < kInFlight; ++t) {
            if (begin + t >= terms) break;
            const uint4* const row = reinterpret_cast<const uint4*>(__shfl_sync(
                0xffffffffu, reinterpret_cast<unsigned long long>(term), begin + t));
#pragma unroll
            for (int w = 0; w < kWide; ++w) {
                const int piece = first + w * 32 + lane;
                if (piece < pieces)
                    loaded[t][w] = kFresh ? load_fresh(row + piece) : load_once(row + piece);
            }
        }
#pragma unroll
        for (int t = 0; t < kInFlight; ++t) {
            if (begin + t >= terms) break;
            const float factor =
                kWeighted ? __shfl_sync(0xffffffffu, weight, begin + t) : 1.0f;
#pragma unroll
            for (int w = 0; w < kWide; ++w) add_piece<kWeighted>(sums[w], loaded[t][w], factor);
        }
    }
#pragma unroll
    for (int w = 0; w < kWide; ++w) {
        const int piece = first + w * 32 + lane;
        if (piece < pieces) store(piece, round_piece(sums[w]));
    }
}

template <bool kWeighted, bool kFresh, typename Store>
__device__ __forceinline__ void sum_rows(const char* term, float weight, int terms, int row_bytes,
                                         const Store& store) {
    constexpr int kWide = 2;
    const int pieces = row_bytes / 16;
    for (int first = 0; first < pieces; first += 32 * kWide)
        sum_pieces<kWeighted, kFresh, kWide>(term, weight, terms, first, pieces, store);
}

// Adds up the partial sums of a token; the i-th present lane holds the i-th term, lanes ascend.
__device__ __forceinline__ void sum_terms(const char* term, int terms, char* out, int row_bytes) {
    sum_rows<false, true>(term, 0.0f, terms, row_bytes, [&](int piece, const uint4& value) {
        reinterpret_cast<uint4*>(out)[piece] = value;
    });
}

// Partial sum of an arrival's choices in top-k order, into shared memory.
__device__ __forceinline__ void sum_choices(const CombineArguments& a, long long row, char* out) {
    const int lane = threadIdx.x % 32;
    int slot = -1;
    float weight = 1.0f;
    if (lane < kTopk) {
        slot = a.choices_of_row[row * kTopk + lane];
        if (a.weights_of_row != nullptr) weight = a.weights_of_row[row * kTopk + lane];
    }
    // Present choices move to the first lanes, in order.
    const unsigned present = __ballot_sync(0xffffffffu, slot >= 0);
    const int terms = __popc(present);
    const int from = lane < terms ? static_cast<int>(__fns(present, 0, lane + 1)) : 0;
    slot = __shfl_sync(0xffffffffu, slot, from);
    weight = __shfl_sync(0xffffffffu, weight, from);
    const char* const term =
        static_cast<const char*>(a.rows) + static_cast<long long>(max(slot, 0)) * a.row_bytes;
    const auto store = [&](int piece, const uint4& value) {
        reinterpret_cast<uint4*>(out)[piece] = value;
    };
    if (a.weights_of_row != nullptr)
        sum_rows<true, false>(term, weight, terms, a.row_bytes, store);
    else
        sum_rows<false, false>(term, weight, terms, a.row_bytes, store);
}
