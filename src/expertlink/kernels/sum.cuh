// Sums of rows by one warp, 16 bytes of every row at a time, with the roundings of reduction.py.
#pragma once

#include "ring.cuh"

constexpr int kPack = 8;      // elements of a 16-byte piece

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

// A warp's slot as stages: chunks of all terms of a sum are loaded into one while those in others are
// added up or stored.
template <int kStages>
struct Stages {
    char* memory;
    unsigned long long* barriers;  // [kMaxStages]
    int bytes;                     // of a stage
    unsigned parity;               // bit s: phase that stage s waits for next

    __device__ __forceinline__ char* at(int stage) const { return memory + stage * bytes; }

    // Bytes of each of `terms` rows that fit into a stage; 0: too many terms.
    __device__ __forceinline__ int chunk(int terms) const {
        return terms == 0 ? 0 : bytes / terms / kUnit * kUnit;
    }

    // Starts loading `count` bytes of every term; lane i has the address of the i-th.
    __device__ __forceinline__ void load(int stage, const char* term, int terms, int from,
                                         int count) {
        const int lane = threadIdx.x % 32;
        // The barrier must expect all of it before any of it can arrive.
        if (lane == 0) barrier_expect(&barriers[stage], terms * count);
        __syncwarp();
        if (lane < terms) bulk_copy(at(stage) + lane * count, term + from, count, &barriers[stage]);
    }

    __device__ __forceinline__ void wait(int stage) {
        bulk_load_wait(&barriers[stage], parity >> stage & 1u);
        parity ^= 1u << stage;
    }

    static constexpr int kUnit = 512;  // bytes that a warp adds up at once
};

template <int kStages>
__device__ __forceinline__ Stages<kStages> make_stages(const Slot& slot, int slot_bytes) {
    return {slot.row, slot.barriers, slot_bytes / kStages / 128 * 128, 0};
}

// Adds up a chunk, `count` bytes of each term one after another; lane i has the weight of the i-th.
template <bool kWeighted, typename Store>
__device__ __forceinline__ void sum_chunk(const char* chunk, int count, int terms, float weight,
                                          const Store& store) {
    const int lane = threadIdx.x % 32;
    for (int begin = 0; begin < count; begin += Stages<1>::kUnit) {
        const int at = begin + lane * 16;
        float sum[kPack];
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[i] = 0.0f;
        for (int t = 0; t < terms; ++t) {
            const float factor = kWeighted ? __shfl_sync(0xffffffffu, weight, t) : 1.0f;
            if (at < count)
                add_piece<kWeighted>(
                    sum, *reinterpret_cast<const uint4*>(chunk + t * count + at), factor);
        }
        if (at < count) store(at, round_piece(sum));
    }
}

// The same of rows in global memory, for more terms than a stage can hold.
template <bool kWeighted, typename Store>
__device__ __forceinline__ void sum_far(const char* term, float weight, int terms, int row_bytes,
                                        const Store& store) {
    const int lane = threadIdx.x % 32;
    for (int begin = 0; begin < row_bytes; begin += Stages<1>::kUnit) {
        const int at = begin + lane * 16;
        float sum[kPack];
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[i] = 0.0f;
        for (int t = 0; t < terms; ++t) {
            const float factor = kWeighted ? __shfl_sync(0xffffffffu, weight, t) : 1.0f;
            const char* const row = reinterpret_cast<const char*>(__shfl_sync(
                0xffffffffu, reinterpret_cast<unsigned long long>(term), t));
            if (at < row_bytes)
                add_piece<kWeighted>(sum, load_fresh(reinterpret_cast<const uint4*>(row + at)),
                                     factor);
        }
        if (at < row_bytes) store(at, round_piece(sum));
    }
}

constexpr int kSumStages = 2;   // one is loaded while the other is added up
constexpr int kSendStages = 4;  // two are loaded, one is added up, one is stored

// Adds up the partial sums of a token; the i-th of the first `terms` lanes has the i-th.
__device__ __forceinline__ void sum_terms(Stages<kSumStages>& stages, const char* term, int terms,
                                          char* out, int row_bytes) {
    const int most = stages.chunk(terms);
    if (most == 0) {
        sum_far<false>(term, 0.0f, terms, row_bytes, [&](int at, const uint4& value) {
            *reinterpret_cast<uint4*>(out + at) = value;
        });
        return;
    }
    fence_global_to_bulk();
    stages.load(0, term, terms, 0, min(most, row_bytes));
    for (int from = 0, stage = 0; from < row_bytes; from += most, stage ^= 1) {
        const int count = min(most, row_bytes - from);
        const int after = from + count;
        if (after < row_bytes)
            stages.load(stage ^ 1, term, terms, after, min(most, row_bytes - after));
        stages.wait(stage);
        sum_chunk<false>(stages.at(stage), count, terms, 0.0f, [&](int at, const uint4& value) {
            *reinterpret_cast<uint4*>(out + from + at) = value;
        });
        __syncwarp();  // everybody has read the stage before it is loaded again
    }
}

// The rows of an arrival's local choices, in top-k order: lane i has the i-th and its weight.
struct Terms {
    const char* row;
    float weight;
    int count;
};

__device__ __forceinline__ Terms terms_of(const CombineArguments& a, long long row) {
    const int lane = threadIdx.x % 32;
    int slot = -1;
    float weight = 1.0f;
    if (lane < kTopk) {
        slot = a.choices_of_row[row * kTopk + lane];
        if (a.weights_of_row != nullptr) weight = a.weights_of_row[row * kTopk + lane];
    }
    // Present choices move to the first lanes, in order.
    const unsigned present = __ballot_sync(0xffffffffu, slot >= 0);
    const int count = __popc(present);
    const int from = lane < count ? static_cast<int>(__fns(present, 0, lane + 1)) : 0;
    slot = __shfl_sync(0xffffffffu, slot, from);
    weight = __shfl_sync(0xffffffffu, weight, from);
    return {static_cast<const char*>(a.rows) + static_cast<long long>(max(slot, 0)) * a.row_bytes,
            weight, count};
}

// Adds up an arrival's choices and stores the partial sum at a peer, chunk by chunk. A chunk's sum
// takes the place of its first term. `meanwhile` runs while the first chunks are being loaded.
template <bool kWeighted, typename Meanwhile>
__device__ __forceinline__ void send_sum(Stages<kSendStages>& stages, const Terms& terms,
                                         char* target, int row_bytes, const Meanwhile& meanwhile) {
    const int lane = threadIdx.x % 32;
    const int most = stages.chunk(terms.count);
    if (most == 0) {  // nothing to add, or too many terms: the row is made as a whole
        meanwhile();
        sum_far<kWeighted>(terms.row, terms.weight, terms.count, row_bytes,
                           [&](int at, const uint4& value) {
                               *reinterpret_cast<uint4*>(target + at) = value;
                           });
        __syncwarp();
        return;
    }
    const auto load = [&](int stage, int from) {
        if (from < row_bytes)
            stages.load(stage, terms.row, terms.count, from, min(most, row_bytes - from));
    };
    load(0, 0);
    load(1, most);
    meanwhile();
    for (int from = 0, stage = 0; from < row_bytes; from += most, stage = (stage + 1) % kSendStages) {
        // The stage after next was stored from two turns ago.
        bulk_wait_read_but_one();
        __syncwarp();
        load((stage + 2) % kSendStages, from + 2 * most);
        stages.wait(stage);
        const int count = min(most, row_bytes - from);
        char* const chunk = stages.at(stage);
        sum_chunk<kWeighted>(chunk, count, terms.count, terms.weight,
                             [&](int at, const uint4& value) {
                                 *reinterpret_cast<uint4*>(chunk + at) = value;
                             });
        fence_shared_to_bulk();
        __syncwarp();
        if (lane == 0) {
            bulk_store(target + from, chunk, count);
            bulk_commit();
        }
    }
}
