// weighted_backward: backward of rows that combine multiplied by weights, in one pass.
//
//     sums[s] = sum over h of grads[s, h] * rows[s, h];   grads[s, h] *= weights[s], in place
//
// Order and roundings are those of reduction.py: element h is added to part h % kParts, then
// neighbours are added until one is left. One warp per row. Its lanes walk along the row, kWidth
// elements (16 bytes, or one) at a time, and keep the parts in registers.

#include "common/numbers.cuh"

template <typename Row, int kWidth>
struct alignas(sizeof(Row) * kWidth) Pack {
    Row x[kWidth];
};

// Adds neighbours until the first element has the sum of all; kCount is a power of two.
template <int kCount, typename Wide>
__device__ __forceinline__ Wide add_neighbours(Wide (&x)[kCount]) {
#pragma unroll
    for (int left = kCount / 2; left > 0; left /= 2)
#pragma unroll
        for (int i = 0; i < left; ++i) x[i] = plus(x[2 * i], x[2 * i + 1]);
    return x[0];
}

template <typename Row, int kWidth, bool kSums>
__global__ void __launch_bounds__(kThreads)
    weighted_backward(const __grid_constant__ WeightedBackwardArguments a) {
    using Wide = typename Accumulator<Row>::type;
    using Chunk = Pack<Row, kWidth>;
    constexpr int kGroups = kParts / (32 * kWidth);       // chunks of a lane that make all parts
    constexpr int kInFlight = kGroups > 4 ? kGroups : 4;  // loads issued before the first is used
    static_assert(kGroups * 32 * kWidth == kParts && kInFlight % kGroups == 0);

    const int lane = threadIdx.x % 32;
    const long long slot = static_cast<long long>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
    if (slot >= a.num_slots) return;
    Chunk* const grads = reinterpret_cast<Chunk*>(static_cast<Row*>(a.grads) + slot * a.hidden);
    const Chunk* const rows =
        reinterpret_cast<const Chunk*>(static_cast<const Row*>(a.rows) + slot * a.hidden);
    const Wide weight = static_cast<const Wide*>(a.weights)[slot];
    const int chunks = static_cast<int>(a.hidden / kWidth);

    Wide part[kGroups][kWidth];
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int i = 0; i < kWidth; ++i) part[g][i] = 0;

    for (int first = lane; first < chunks; first += 32 * kInFlight) {
        Chunk grad[kInFlight], row[kInFlight];
#pragma unroll
        for (int t = 0; t < kInFlight; ++t) {
            if (first + 32 * t >= chunks) break;
            grad[t] = grads[first + 32 * t];
            if (kSums) row[t] = rows[first + 32 * t];
        }
#pragma unroll
        for (int t = 0; t < kInFlight; ++t) {
            if (first + 32 * t >= chunks) break;
            Chunk scaled;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                const Wide wide = widen(grad[t].x[i]);
                narrow(times(wide, weight), scaled.x[i]);
                if (!kSums) continue;
                Wide& sum = part[t % kGroups][i];
                sum = plus(sum, times(wide, widen(row[t].x[i])));
            }
            grads[first + 32 * t] = scaled;
        }
    }
    if (!kSums) return;

    // Neighbours lie in a thread, then in the next lane, then in the next group.
    Wide sum[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
        sum[g] = add_neighbours(part[g]);
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2)
            sum[g] = plus(sum[g], __shfl_xor_sync(0xffffffffu, sum[g], distance));
    }
    const Wide total = add_neighbours(sum);
    if (lane == 0) static_cast<Wide*>(a.sums)[slot] = total;
}
