// Prefix sums of counts, and sizes of groups of rows.
#pragma once

// FLAT: groups of rows are padded to a multiple of kAlignment.
__device__ __forceinline__ int align_up(int count) {
    return (count + kAlignment - 1) / kAlignment * kAlignment;
}

// Exclusive prefix sums in place. Returns the sum of all. One warp.
__device__ __forceinline__ int scan_exclusive(int* values, int count) {
    const int lane = threadIdx.x % 32;
    int carry = 0;
    for (int first = 0; first < count; first += 32) {
        const int i = first + lane;
        const int own = i < count ? values[i] : 0;
        int sum = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, sum, step);
            if (lane >= step) sum += other;
        }
        if (i < count) values[i] = carry + sum - own;
        carry += __shfl_sync(0xffffffffu, sum, 31);
    }
    return carry;
}
