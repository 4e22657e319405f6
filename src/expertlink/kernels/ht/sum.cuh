// Sums of rows by one warp, 16 bytes of every row at a time, with the roundings of reduction.py.
#pragma once

#include "common/pieces.cuh"
#include "ht/ring.cuh"

namespace ht {

constexpr int kStep = 512;  // bytes of a row that a warp sums at once: 16 in every lane

// Copies 16 bytes to shared memory. Every lane loads what it will add up itself, so stages need no
// barriers.
__device__ __forceinline__ void copy_piece(char* shared, const char* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global))
                 : "memory");
}

__device__ __forceinline__ void close_group() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for the oldest of kSumStages groups.
__device__ __forceinline__ void wait_oldest() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kSumStages - 1) : "memory");
}

// Sums kTerms rows, or `terms` rows if kTerms is 0. A stage holds kWide steps.
template <bool kWeighted, int kTerms, int kWide>
__device__ __forceinline__ void sum_staged(char* memory, int stage_bytes, const char* term,
                                           float weight, int terms, int row_bytes, char* out) {
    const int lane = threadIdx.x % 32;
    const int count = kTerms ? kTerms : terms;
    const auto load = [&](int first, int stage) {
        char* const to = memory + stage * stage_bytes + lane * 16;
#pragma unroll
        for (int t = 0; t < count; ++t) {
            const char* const row = reinterpret_cast<const char*>(
                __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(term), t));
#pragma unroll
            for (int w = 0; w < kWide; ++w) {
                const int at = first + w * kStep + lane * 16;
                if (at < row_bytes) copy_piece(to + (t * kWide + w) * kStep, row + at);
            }
        }
        close_group();  // also an empty one: groups are counted
    };
#pragma unroll
    for (int stage = 0; stage < kSumStages - 1; ++stage) load(stage * kWide * kStep, stage);
    int stage = 0;
#pragma unroll 1
    for (int first = 0; first < row_bytes; first += kWide * kStep) {
        load(first + (kSumStages - 1) * kWide * kStep, (stage + kSumStages - 1) % kSumStages);
        wait_oldest();
        const char* const from = memory + stage * stage_bytes + lane * 16;
        float sums[kWide][kPack];
#pragma unroll
        for (int w = 0; w < kWide; ++w)
#pragma unroll
            for (int i = 0; i < kPack; ++i) sums[w][i] = 0.0f;
#pragma unroll
        for (int t = 0; t < count; ++t) {
            const float factor = kWeighted ? __shfl_sync(0xffffffffu, weight, t) : 1.0f;
#pragma unroll
            for (int w = 0; w < kWide; ++w)
                add_piece<kWeighted>(
                    sums[w], *reinterpret_cast<const uint4*>(from + (t * kWide + w) * kStep),
                    factor);
        }
#pragma unroll
        for (int w = 0; w < kWide; ++w) {
            const int at = first + w * kStep + lane * 16;
            if (at < row_bytes) *reinterpret_cast<uint4*>(out + at) = round_piece(sums[w]);
        }
        stage = (stage + 1) % kSumStages;
    }
}

// Sums more rows than a stage holds.
template <bool kWeighted>
__device__ __forceinline__ void sum_many(const char* term, float weight, int terms, int row_bytes,
                                         char* out) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = 0; first < row_bytes; first += kStep) {
        const int at = first + lane * 16;
        float sum[kPack];
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[i] = 0.0f;
#pragma unroll 1
        for (int t = 0; t < terms; ++t) {
            const char* const row = reinterpret_cast<const char*>(
                __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(term), t));
            const float factor = kWeighted ? __shfl_sync(0xffffffffu, weight, t) : 1.0f;
            if (at < row_bytes)
                add_piece<kWeighted>(sum, load_fresh(reinterpret_cast<const uint4*>(row + at)),
                                     factor);
        }
        if (at < row_bytes) *reinterpret_cast<uint4*>(out + at) = round_piece(sum);
    }
}

// Sums `terms` rows. Lane i has the address, and the weight, of the i-th row. `memory` is the
// warp's slot.
template <bool kWeighted>
__device__ __forceinline__ void sum_rows(char* memory, int slot_bytes, const char* term,
                                         float weight, int terms, int row_bytes, char* out) {
    const int stage = slot_bytes / kSumStages / 128 * 128;
    if (terms <= 1 && 4 * kStep <= stage)
        terms == 0 ? sum_many<kWeighted>(term, weight, 0, row_bytes, out)
                   : sum_staged<kWeighted, 1, 4>(memory, stage, term, weight, 1, row_bytes, out);
    else if (terms == 2 && 4 * kStep <= stage)
        sum_staged<kWeighted, 2, 2>(memory, stage, term, weight, 2, row_bytes, out);
    else if (terms == 3 && 6 * kStep <= stage)
        sum_staged<kWeighted, 3, 2>(memory, stage, term, weight, 3, row_bytes, out);
    else if (terms * kStep <= stage)
        sum_staged<kWeighted, 0, 1>(memory, stage, term, weight, terms, row_bytes, out);
    else
        sum_many<kWeighted>(term, weight, terms, row_bytes, out);
}

// The partial sum of an arrival's choices in top-k order, into the memory of a peer.
__device__ __forceinline__ void sum_choices(const CombineArguments& a, char* memory, long long row,
                                            char* out) {
    const int lane = threadIdx.x % 32;
    int choice = -1;
    float weight = 1.0f;  // a product with one is exact
    if (lane < kTopk) {
        choice = a.choices_of_row[row * kTopk + lane];
        if (a.weights_of_row != nullptr) weight = a.weights_of_row[row * kTopk + lane];
    }
    // Choices that are present move to the first lanes, in order.
    unsigned present = __ballot_sync(0xffffffffu, choice >= 0);
    const int terms = __popc(present);
    int from = 0;
    for (int i = 0; i < terms; ++i, present &= present - 1)
        if (lane == i) from = __ffs(present) - 1;
    choice = __shfl_sync(0xffffffffu, choice, from);
    weight = __shfl_sync(0xffffffffu, weight, from);
    const char* const term =
        static_cast<const char*>(a.rows) + static_cast<long long>(max(choice, 0)) * a.row_bytes;
    sum_rows<true>(memory, a.row_bytes, term, weight, terms, a.row_bytes, out);
}

}  // namespace ht
