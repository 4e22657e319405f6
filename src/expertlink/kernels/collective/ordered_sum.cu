// ordered_sum: out[m] = sum over c of weights[m, c] * rows[slots[m, c]], columns in order.
//
// The sequence of roundings is that of reduction.py: sums start at +0.0, products and sums are
// rounded one by one, negative slots are skipped, the result is rounded once to the row type.
// One block per result; its threads walk along the row, kWidth elements (16 bytes, or one) at a
// time.

#include "common/numbers.cuh"

constexpr int kInFlight = 4;  // loads issued before the first of them is used

template <typename Row, int kWidth>
struct alignas(sizeof(Row) * kWidth) Pack {
    Row x[kWidth];
};

template <typename Row, int kWidth, bool kWeighted>
__global__ void __launch_bounds__(kThreads)
    ordered_sum(const __grid_constant__ OrderedSumArguments a) {
    using Wide = typename Accumulator<Row>::type;
    using Chunk = Pack<Row, kWidth>;
    const Row* const __restrict__ rows = static_cast<const Row*>(a.rows);
    const long long* const __restrict__ slots = a.slots;
    const Wide* const __restrict__ weights = static_cast<const Wide*>(a.weights);
    Row* const __restrict__ out = static_cast<Row*>(a.out);
    const long long num_results = a.num_results, num_terms = a.num_terms, hidden = a.hidden;
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
                if (kWeighted) term_weight[place] = weights[m * num_terms + lane];
            }
            if (lane == 0) num_present = __popc(present);
        }
        __syncthreads();

        Chunk* result = reinterpret_cast<Chunk*>(out + m * hidden);
        const int count = num_present;
        for (long long v = threadIdx.x; v < hidden / kWidth; v += blockDim.x) {
            Wide sum[kWidth];
#pragma unroll
            for (int i = 0; i < kWidth; ++i) sum[i] = 0;
            for (int first = 0; first < count; first += kInFlight) {
                Chunk loaded[kInFlight];
#pragma unroll
                for (int t = 0; t < kInFlight; ++t)
                    if (first + t < count) loaded[t] = term_row[first + t][v];
#pragma unroll
                for (int t = 0; t < kInFlight; ++t) {
                    if (first + t >= count) break;
#pragma unroll
                    for (int i = 0; i < kWidth; ++i) {
                        Wide term = widen(loaded[t].x[i]);
                        if (kWeighted) term = times(term, term_weight[first + t]);
                        sum[i] = plus(sum[i], term);
                    }
                }
            }
            Chunk rounded;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) narrow(sum[i], rounded.x[i]);
            result[v] = rounded;
        }
        __syncthreads();  // the next result overwrites the shared terms
    }
}
