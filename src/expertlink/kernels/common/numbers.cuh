// Row element types without CUDA headers: storage, widening to the accumulator, rounding back.
#pragma once

struct bfloat16 {
    unsigned short bits;
};

struct float16 {
    unsigned short bits;
};

template <typename Row>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<double> {
    using type = double;
};

__device__ __forceinline__ float widen(bfloat16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}

__device__ __forceinline__ float widen(float16 x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

// Round to nearest even. NaN stays NaN; its bits are not part of the contract.
__device__ __forceinline__ void narrow(float wide, bfloat16& x) {
    unsigned bits = __float_as_uint(wide);
    unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    x.bits = static_cast<unsigned short>(wide == wide ? rounded : 0x7fc0u);
}

__device__ __forceinline__ void narrow(float wide, float16& x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x.bits) : "f"(wide));
}

__device__ __forceinline__ void narrow(float wide, float& x) { x = wide; }
__device__ __forceinline__ void narrow(double wide, double& x) { x = wide; }

// Rounded product and rounded sum: the compiler must not fuse them.
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double times(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double plus(double a, double b) { return __dadd_rn(a, b); }
