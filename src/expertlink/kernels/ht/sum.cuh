// Sums of rows by one warp, 16 bytes of every row at a time, with the roundings of reduction.py.
#pragma once

#include "common/pieces.cuh"
#include "ht/ring.cuh"

namespace ht {

constexpr int kStep = 512;  // bytes of a row that a warp sums at once: 16 in every lane

// A warp's shared memory for rows that are loaded.
struct Stages {
    unsigned memory;  // shared address
    int bytes;
};

// Copies 16 bytes to shared memory. Every lane loads what it will add up itself, so stages need no
// barriers.
__device__ __forceinline__ void copy_piece(unsigned shared, const char* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared),
                 "l"(__cvta_generic_to_global(global))
                 : "memory");
}

__device__ __forceinline__ uint4 load_piece(unsigned shared) {
    uint4 piece;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
                 : "r"(shared)
                 : "memory");
    return piece;
}

__device__ __forceinline__ void close_group() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for the oldest of kStages groups.
template <int kStages>
__device__ __forceinline__ void wait_oldest() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
}

__device__ __forceinline__ const char* term_of(const char* term, int index) {
    return reinterpret_cast<const char*>(
        __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(term), index));
}

// The number of stages is kStages: all but one are being loaded, one is added up. `load(at, stage)`
// requests what the lanes need from byte `at` on, kWide steps of every term; `add(stage, w, sum)`
// adds up step w of a stage.
template <int kStages, int kWide, typename Load, typename Add>
__device__ __forceinline__ void pass_stages(int stage_bytes, int row_bytes, char* out,
                                            const Load& load, const Add& add) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
        load(s * kWide * kStep, s * stage_bytes);
        close_group();
    }
    int from = 0, to = (kStages - 1) * stage_bytes;
#pragma unroll 1
    for (int first = 0; first < row_bytes; first += kWide * kStep) {
        load(first + (kStages - 1) * kWide * kStep, to);
        close_group();  // also an empty one: groups are counted
        wait_oldest<kStages>();
#pragma unroll
        for (int w = 0; w < kWide; ++w) {
            float sum[kPack];
#pragma unroll
            for (int i = 0; i < kPack; ++i) sum[i] = 0.0f;
            add(from, w, sum);
            const int at = first + w * kStep + lane * 16;
            if (at < row_bytes) *reinterpret_cast<uint4*>(out + at) = round_piece(sum);
        }
        to = from;
        from = from == (kStages - 1) * stage_bytes ? 0 : from + stage_bytes;
    }
}

// Sums kTerms rows: their addresses and weights are in registers of every lane.
template <bool kWeighted, int kTerms, int kWide>
__device__ __forceinline__ void sum_few(const Stages& stages, const char* term, float weight,
                                        int row_bytes, char* out) {
    const int lane = threadIdx.x % 32;
    const char* rows[kTerms];
    float factors[kTerms];
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
        rows[t] = term_of(term, t) + lane * 16;
        factors[t] = kWeighted ? __shfl_sync(0xffffffffu, weight, t) : 1.0f;
    }
    const unsigned memory = stages.memory + lane * 16;
    const auto load = [&](int first, int stage) {
#pragma unroll
        for (int w = 0; w < kWide; ++w) {
            if (first + w * kStep + lane * 16 >= row_bytes) continue;
#pragma unroll
            for (int t = 0; t < kTerms; ++t)
                copy_piece(memory + stage + (t * kWide + w) * kStep, rows[t] + first + w * kStep);
        }
    };
    const auto add = [&](int stage, int w, float (&sum)[kPack]) {
#pragma unroll
        for (int t = 0; t < kTerms; ++t)
            add_piece<kWeighted>(sum, load_piece(memory + stage + (t * kWide + w) * kStep),
                                 factors[t]);
    };
    pass_stages<kSumStages, kWide>(kTerms * kWide * kStep, row_bytes, out, load, add);
}

// Sums `terms` rows of which two stages fit.
template <bool kWeighted>
__device__ __forceinline__ void sum_several(const Stages& stages, const char* term, float weight,
                                            int terms, int row_bytes, char* out) {
    const int lane = threadIdx.x % 32;
    const unsigned memory = stages.memory + lane * 16;
    const auto load = [&](int first, int stage) {
        const bool loads = first + lane * 16 < row_bytes;
#pragma unroll 4
        for (int t = 0; t < terms; ++t) {
            const char* const row = term_of(term, t) + lane * 16;
            if (loads) copy_piece(memory + stage + t * kStep, row + first);
        }
    };
    const auto add = [&](int stage, int, float (&sum)[kPack]) {
#pragma unroll 4
        for (int t = 0; t < terms; ++t) {
            const float factor = kWeighted ? __shfl_sync(0xffffffffu, weight, t) : 1.0f;
            add_piece<kWeighted>(sum, load_piece(memory + stage + t * kStep), factor);
        }
    };
    pass_stages<2, 1>(terms * kStep, row_bytes, out, load, add);
}

// Sums any number of rows, none too, without stages.
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
            const char* const row = term_of(term, t);
            const float factor = kWeighted ? __shfl_sync(0xffffffffu, weight, t) : 1.0f;
            if (at < row_bytes)
                add_piece<kWeighted>(sum, load_fresh(reinterpret_cast<const uint4*>(row + at)),
                                     factor);
        }
        if (at < row_bytes) *reinterpret_cast<uint4*>(out + at) = round_piece(sum);
    }
}

// Sums `terms` rows. Lane i has the address, and the weight, of the i-th row.
template <bool kWeighted>
__device__ __forceinline__ void sum_rows(const Stages& stages, const char* term, float weight,
                                         int terms, int row_bytes, char* out) {
    static_assert(kLeastSumBytes >= 4 * kSumStages * kStep);
    if (terms == 1)
        sum_few<kWeighted, 1, 4>(stages, term, weight, row_bytes, out);
    else if (terms == 2)
        sum_few<kWeighted, 2, 2>(stages, term, weight, row_bytes, out);
    else if (terms == 3)
        sum_few<kWeighted, 3, 1>(stages, term, weight, row_bytes, out);
    else if (terms == 4)
        sum_few<kWeighted, 4, 1>(stages, term, weight, row_bytes, out);
    else if (terms != 0 && 2 * terms * kStep <= stages.bytes)
        sum_several<kWeighted>(stages, term, weight, terms, row_bytes, out);
    else
        sum_many<kWeighted>(term, weight, terms, row_bytes, out);
}

}  // namespace ht
