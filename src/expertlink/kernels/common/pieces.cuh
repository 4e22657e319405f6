// Sums of rows, 16 bytes at a time: bfloat16 or float16 elements, with the roundings of
// reduction.py.
#pragma once

constexpr int kPack = 8;  // elements of a 16-byte piece

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
