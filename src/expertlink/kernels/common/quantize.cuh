// e4m3 rows with a scale per 128 elements: quantization.py on the GPU, with the same bits.
//
// A lane holds 16 elements. So 8 lanes hold a block, and a warp holds four.
#pragma once

#include "common/pieces.cuh"

// Biased exponent of the smallest power of two that is not below a positive number.
__device__ __forceinline__ unsigned ceil_exponent(float scale) {
    const unsigned bits = __float_as_uint(scale);
    if (!(scale <= 3.402823466e38f)) return 255;  // infinite, or not a number
    return (bits >> 23) + ((bits & 0x7fffffu) != 0);
}

__device__ __forceinline__ float power_of(unsigned exponent) {
    return exponent == 255 ? __uint_as_float(0x7fc00000u) : __uint_as_float(exponent << 23);
}

__device__ __forceinline__ unsigned narrow_e4m3(float low, float high) {
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

// Quotients by one divisor, correctly rounded. Let r be the rounded reciprocal of s. Then one
// correction of x * r by its remainder is exact, unless the significand of s is all ones
// (Markstein, "IA-64 and Elementary Functions", 2000, section 8). Remainders that underflow belong
// to quotients that become 0.
struct Divisor {
    float scale, reciprocal;
    bool plain;  // the correction is exact

    __device__ __forceinline__ explicit Divisor(float s) : scale(s), reciprocal(__frcp_rn(s)) {
        const unsigned bits = __float_as_uint(s);
        plain = (bits & 0x7fffffu) != 0x7fffffu && bits < 0x7f800000u;
    }

    __device__ __forceinline__ float operator()(float x) const {
        const float first = __fmul_rn(x, reciprocal);
        // The remainder is negated: otherwise the correction would make +0 of -0.
        return __fmaf_rn(__fmaf_rn(first, scale, -x), -reciprocal, first);
    }
};

// amax / 448, correctly rounded. From kSmallestAmax up the correction holds for all finite values.
__device__ __forceinline__ float scale_of(float amax) {
    constexpr float kReciprocal = 1.0f / kLargestE4m3;
    const float first = __fmul_rn(amax, kReciprocal);
    const float exact = __fmaf_rn(__fmaf_rn(first, kLargestE4m3, -amax), -kReciprocal, first);
    return amax <= 3.402823466e38f ? exact : first;
}

__device__ __forceinline__ uint4 pack_e4m3(const float (&q)[16]) {
    unsigned packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)  // the conversion also clamps to the largest finite number
        packed[i] = narrow_e4m3(q[4 * i], q[4 * i + 1]) | narrow_e4m3(q[4 * i + 2], q[4 * i + 3])
                                                              << 16;
    return make_uint4(packed[0], packed[1], packed[2], packed[3]);
}

__device__ __forceinline__ void widen_pieces(const uint4& low, const uint4& high,
                                             float (&values)[16]) {
    const unsigned words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) widen_pair(words[i], values[2 * i], values[2 * i + 1]);
}

// The slow path, for scales that Divisor does not serve.
__device__ __noinline__ uint4 divide_piece(const uint4 low, const uint4 high, float scale) {
    float values[16];
    widen_pieces(low, high, values);
#pragma unroll
    for (int i = 0; i < 16; ++i) values[i] = __fdiv_rn(values[i], scale);
    return pack_e4m3(values);
}

// As integers, magnitudes order like numbers, and NaN is above all others.
__device__ __forceinline__ unsigned largest_magnitude(const uint4& low, const uint4& high) {
    const unsigned words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    unsigned pair = words[0] & 0x7fff7fffu;
#pragma unroll
    for (int i = 1; i < 8; ++i)
        asm("max.u16x2 %0, %0, %1;" : "+r"(pair) : "r"(words[i] & 0x7fff7fffu));
    float first, second;
    widen_pair(pair, first, second);
    return max(__float_as_uint(kSmallestAmax),
               max(__float_as_uint(first), __float_as_uint(second)));
}

// Quantizes sixteen elements of each of some steps, into `low`. Every lane gets the scale of its
// block. The steps are interleaved: alone, each would wait for every one of its shuffles.
template <int kSteps>
__device__ __forceinline__ void quantize_pieces(uint4 (&low)[kSteps], const uint4 (&high)[kSteps],
                                                int kind, float (&scale)[kSteps]) {
    unsigned amax[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) amax[i] = largest_magnitude(low[i], high[i]);
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2)
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
            amax[i] = max(amax[i], __shfl_xor_sync(0xffffffffu, amax[i], distance));
    bool plain = true;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        scale[i] = scale_of(__uint_as_float(amax[i]));
        if (kind != kFloatScales) scale[i] = power_of(ceil_exponent(scale[i]));
        plain &= Divisor(scale[i]).plain;
    }
    if (!plain) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) low[i] = divide_piece(low[i], high[i], scale[i]);
        return;
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        const Divisor divisor(scale[i]);
        float values[16];
        widen_pieces(low[i], high[i], values);
#pragma unroll
        for (int j = 0; j < 16; ++j) values[j] = divisor(values[j]);
        low[i] = pack_e4m3(values);
    }
}
