// ordered_sum: out[m] = sum over c of weights[m, c] * rows[slots[m, c]], columns in order.
//
// The sequence of roundings is that of reduction.py: sums start at +0.0, products and sums are
// rounded one by one, negative slots are skipped, the result is rounded once to the row type.
// kByHost: terms of one host are added up and rounded to the row type first, hosts ascending.
// One block per result; its threads walk along the row, kWidth elements (16 bytes, or one) at a
// time.

#include "common/numbers.cuh"

constexpr int kInFlight = 4;  // loads issued before the first of them is used
constexpr int kNoHost = 0x7fffffff;
static_assert(kMaxTerms == 32, "a lane for every term");

template <typename Row, int kWidth>
struct alignas(sizeof(Row) * kWidth) Pack {
    Row x[kWidth];
};

// Place of this lane's term by (host, lane); absent terms, with the largest host, come last.
__device__ __forceinline__ int place_by_host(int host) {
    const int lane = threadIdx.x;
    int place = 0;
    for (int other = 0; other < kMaxTerms; ++other) {
        const int theirs = __shfl_sync(0xffffffffu, host, other);
        place += theirs < host || (theirs == host && other < lane);
    }
    return place;
}

template <typename Row, int kWidth, Sum kSum>
__global__ void __launch_bounds__(kThreads)
    ordered_sum(const __grid_constant__ OrderedSumArguments a) {
    using Wide = typename Accumulator<Row>::type;
    using Chunk = Pack<Row, kWidth>;
    const Row* const __restrict__ rows = static_cast<const Row*>(a.rows);
    const long long* const __restrict__ slots = a.slots;
    const Wide* const __restrict__ weights = static_cast<const Wide*>(a.weights);
    const int* const __restrict__ hosts = a.hosts;
    Row* const __restrict__ out = static_cast<Row*>(a.out);
    const long long num_results = a.num_results, num_terms = a.num_terms, hidden = a.hidden;
    __shared__ const Chunk* term_row[kMaxTerms];
    __shared__ Wide term_weight[kMaxTerms];
    __shared__ int term_host[kMaxTerms];
    __shared__ int num_present;
    __shared__ unsigned last_of_host;  // bit t: the host of term t has no later one

    for (long long m = blockIdx.x; m < num_results; m += gridDim.x) {
        // The first warp squeezes out absent terms, keeping their order, or puts them in that of
        // hosts.
        if (threadIdx.x < kMaxTerms) {
            const int lane = threadIdx.x;
            const long long slot = lane < num_terms ? slots[m * num_terms + lane] : -1;
            const unsigned present = __ballot_sync(0xffffffffu, slot >= 0);
            const int count = __popc(present);
            int place = __popc(present & ((1u << lane) - 1u));
            if constexpr (kSum == kByHost) {
                const int host = slot >= 0 ? hosts[slot] : kNoHost;
                place = place_by_host(host);
                term_host[place] = host;
                __syncwarp();  // lanes read what others wrote
                const bool last =
                    lane + 1 == count || term_host[lane] != term_host[(lane + 1) % 32];
                const unsigned ends = __ballot_sync(0xffffffffu, last);
                if (lane == 0) last_of_host = ends;
            }
            if (slot >= 0) {
                term_row[place] = reinterpret_cast<const Chunk*>(rows + slot * hidden);
                if constexpr (kSum == kWeighted) term_weight[place] = weights[m * num_terms + lane];
            }
            if (lane == 0) num_present = count;
        }
        __syncthreads();

        Chunk* result = reinterpret_cast<Chunk*>(out + m * hidden);
        const int count = num_present;
        const unsigned ends = last_of_host;
        for (long long v = threadIdx.x; v < hidden / kWidth; v += blockDim.x) {
            Wide sum[kWidth];
            Wide of_hosts[kWidth];  // sums of the hosts before
            Chunk rounded;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) sum[i] = of_hosts[i] = 0;
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
                        if constexpr (kSum == kWeighted) term = times(term, term_weight[first + t]);
                        sum[i] = plus(sum[i], term);
                    }
                    if constexpr (kSum == kByHost) {
                        if (!(ends >> (first + t) & 1u)) continue;
#pragma unroll
                        for (int i = 0; i < kWidth; ++i) {
                            narrow(sum[i], rounded.x[i]);
                            of_hosts[i] = plus(of_hosts[i], widen(rounded.x[i]));
                            sum[i] = 0;
                        }
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < kWidth; ++i)
                narrow(kSum == kByHost ? of_hosts[i] : sum[i], rounded.x[i]);
            result[v] = rounded;
        }
        __syncthreads();  // the next result overwrites the shared terms
    }
}
