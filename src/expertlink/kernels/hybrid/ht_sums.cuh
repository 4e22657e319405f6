// Sums of rows that some lanes of a warp have.
#pragma once

#include "ht/sum.cuh"

namespace ht {

// The lane with the ith bit, for lane i.
__device__ __forceinline__ int nth_lane(unsigned present) {
    const int lane = threadIdx.x % 32;
    int from = 0;
    for (int i = 0; present; ++i, present &= present - 1)
        if (lane == i) from = __ffs(present) - 1;
    return from;
}

// Adds up the rows of the lanes in `present`, in their order. `out` is the same in all lanes.
__device__ __forceinline__ void sum_present(const Stages& stages, unsigned present,
                                            const char* term, int row_bytes, char* out) {
    if (row_bytes == 0) return;
    const int from = nth_lane(present);
    sum_rows<false>(stages, term_of(term, from), 0.0f, __popc(present), row_bytes, out);
}

// The gradients of a token's choices. Each is behind the row of one lane, and 0 behind all others:
// their bits are merged, so that signs of zeros stay. `out` is the same in all lanes.
__device__ __forceinline__ void merge_grads(unsigned present, const char* grads, int* out) {
    const int lane = threadIdx.x % 32;
    int merged = 0;
    for (; present; present &= present - 1) {
        const int* const other = reinterpret_cast<const int*>(term_of(grads, __ffs(present) - 1));
        if (lane < kTopk) merged |= load_fresh(other + lane);
    }
    if (lane < kTopk) out[lane] = merged;
}

}  // namespace ht
