// ordered_sum: out[m] = sum over c of weights[m, c] * rows[slots[m, c]], columns in order.
//
// The sequence of roundings is that of reduction.py: sums start at +0.0, products and sums are
// rounded one by one, negative slots are skipped, the result is rounded once to the row type.
// One block per result; its threads walk along the row, VEC elements (16 bytes, or one) at a time.

#include "common/numbers.cuh"

constexpr int kMaxTerms = 32;
constexpr int kInFlight = 4;  // loads issued before the first of them is used

template <typename Row, int VEC>
struct alignas(sizeof(Row) * VEC) Pack {
    Row x[VEC];
};

template <typename Row, int VEC, bool WEIGHTED>
__global__ void __launch_bounds__(256)
    ordered_sum(const Row* __restrict__ rows, const long long* __restrict__ slots,
                const typename Accumulator<Row>::type* __restrict__ weights, Row* __restrict__ out,
                long long num_results, long long num_terms, long long hidden) {
    using Wide = typename Accumulator<Row>::type;
    using Chunk = Pack<Row, VEC>;
    __shared__ const Chunk* term_row[kMaxTerms];
    __shared__ Wide term_weight[kMaxTerms];
    __shared__ int num_present;

    for (long long m = blockIdx.x; m < num_results; m += gridDim.x) {
        // The first warp squeezes out absent terms, keeping their order.
        if (threadIdx.x < kMaxTerms) {
            const int lane = threadIdx.x;
            const long long slot = lane < num_terms ? slots[m * num_terms + lane] : -1;
            const unsigned present = __ballot_sync(0xffffffffu, slot >= 0);
            if (slot >= 0) {
                const int place = __popc(present & ((1u << lane) - 1u));
                term_row[place] = reinterpret_cast<const Chunk*>(rows + slot * hidden);
                if (WEIGHTED) term_weight[place] = weights[m * num_terms + lane];
            }
            if (lane == 0) num_present = __popc(present);
        }
        __syncthreads();

        Chunk* result = reinterpret_cast<Chunk*>(out + m * hidden);
        const int count = num_present;
        for (long long v = threadIdx.x; v < hidden / VEC; v += blockDim.x) {
            Wide sum[VEC];
#pragma unroll
            for (int i = 0; i < VEC; ++i) sum[i] = 0;
            for (int first = 0; first < count; first += kInFlight) {
                Chunk loaded[kInFlight];
#pragma unroll
                for (int t = 0; t < kInFlight; ++t)
                    if (first + t < count) loaded[t] = term_row[first + t][v];
#pragma unroll
                for (int t = 0; t < kInFlight; ++t) {
                    if (first + t >= count) break;
#pragma unroll
                    for (int i = 0; i < VEC; ++i) {
                        Wide term = widen(loaded[t].x[i]);
                        if (WEIGHTED) term = times(term, term_weight[first + t]);
                        sum[i] = plus(sum[i], term);
                    }
                }
            }
            Chunk rounded;
#pragma unroll
            for (int i = 0; i < VEC; ++i) narrow(sum[i], rounded.x[i]);
            result[v] = rounded;
        }
        __syncthreads();  // the next result overwrites the shared terms
    }
}
