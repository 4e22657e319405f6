// e4m3 rows with a scale per 128 elements: the GPU form of quantization.py, with the same bits.
//
// A lane holds 16 elements, so 8 lanes hold a block and a warp four.
#pragma once

#include "common/pieces.cuh"

constexpr float kLargestE4m3 = 448.0f;
constexpr float kSmallestAmax = 1e-4f;
constexpr int kScaleBlock = 128;  // elements

enum ScaleKind { kNotQuantized, kFloatScales, kPowerScales, kPackedScales };

// Biased exponent of the smallest power of two that is not below a positive number.
__device__ __forceinline__ unsigned ceil_exponent(float scale) {
    const unsigned bits = __float_as_uint(scale);
    if (!(scale <= 3.402823466e38f)) return 255;  // infinite, or not a number
    return (bits >> 23) + ((bits & 0x7fffffu) != 0);
}

__device__ __forceinline__ float power_of(unsigned exponent) {
    return exponent == 255 ? __uint_as_float(0x7fc00000u)
                           : __uint_as_float(exponent << 23);
}

__device__ __forceinline__ unsigned narrow_e4m3(float low, float high) {
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float quotient(float value, float scale) {
    return __fdiv_rn(value, scale);
}

// Sixteen elements of a row to e4m3. Every lane of a block of 128 gets its scale.
__device__ __forceinline__ uint4 quantize_piece(const uint4& low, const uint4& high, int kind,
                                                float& scale) {
    const unsigned words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    float values[16];
#pragma unroll
    for (int i = 0; i < 8; ++i) widen_pair(words[i], values[2 * i], values[2 * i + 1]);
    // As integers, magnitudes order like numbers, and what is no number is above all others.
    unsigned amax = __float_as_uint(kSmallestAmax);
#pragma unroll
    for (int i = 0; i < 16; ++i) amax = max(amax, __float_as_uint(values[i]) & 0x7fffffffu);
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2)
        amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, distance));
    scale = __fdiv_rn(__uint_as_float(amax), kLargestE4m3);
    if (kind != kFloatScales) scale = power_of(ceil_exponent(scale));
    unsigned packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float q[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float exact = quotient(values[4 * i + j], scale);
            // Not fminf / fmaxf: what is no number has to stay so.
            q[j] = exact > kLargestE4m3 ? kLargestE4m3 : exact < -kLargestE4m3 ? -kLargestE4m3 : exact;
        }
        packed[i] = narrow_e4m3(q[0], q[1]) | narrow_e4m3(q[2], q[3]) << 16;
    }
    return make_uint4(packed[0], packed[1], packed[2], packed[3]);
}
