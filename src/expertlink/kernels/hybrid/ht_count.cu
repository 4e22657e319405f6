// ht::count: where this rank's tokens go, on all hosts. The count row that it makes travels to
// every rank; positions and slots stay in the tables of the routing.

#include "ht/count.cuh"
#include "hybrid/ht_rail.cuh"

namespace ht {

// Writes the positions of a token at ranks and hosts, and what lies before the chunk that it
// begins.
__device__ __forceinline__ void place_across(const DispatchArguments& a, const unsigned* masks,
                                             const int* running, int token, int group, int lane) {
    place_token(a, masks, running, token, group, lane);
    const unsigned* const row = masks + group * kColumns;
    const unsigned below = (1u << lane) - 1u;
    const auto place = [&](int column) {
        return running[column] + bits_before(masks, group, column) + __popc(row[column] & below);
    };
    int found = 0;
    for (int host = 0; host < kNumHosts; ++host)
        if (row[kHostsAt + host] >> lane & 1u)
            a.host_slots[token * kHostCopies + found++] =
                host * kMaxTokens + place(kHostsAt + host);
    for (; found < kHostCopies; ++found) a.host_slots[token * kHostCopies + found] = -1;
    for (int chunk = 1; chunk < kNumChunks; ++chunk) {
        if (token != a.chunk_starts[chunk]) continue;
        int* const bounds = a.count_row + bounds_at(chunk);
        for (int r = 0; r < kNumSources; ++r) bounds[r] = place(r);
        for (int h = 0; h < kNumHosts; ++h) {
            bounds[kNumSources + h] = place(kHostsAt + h);
            a.sent[chunk * kNumHosts + h] = place(kHostsAt + h);
        }
    }
}

// Writes the count row but for chunks that begin with a token of this rank. One block.
__device__ __forceinline__ void write_counts(const DispatchArguments& a, const Watch& watch,
                                             const int* totals) {
    for (int i = threadIdx.x; i < kColumns; i += blockDim.x)
        a.count_row[kHeaderWords + i] = totals[i];
    for (int i = threadIdx.x; i < kHeaderWords; i += blockDim.x) {
        int word = header_word(a, watch, i);
        // Every block has added its findings before the grid barrier.
        if (i == kStatus) word |= load_fresh(a.faulty);
        a.count_row[i] = word;
    }
    for (int chunk = 1; chunk < kNumChunks; ++chunk) {
        if (a.chunk_starts[chunk] < a.num_tokens) continue;
        int* const bounds = a.count_row + bounds_at(chunk);
        for (int i = threadIdx.x; i < kBoundWords; i += blockDim.x)
            bounds[i] = totals[i < kNumSources ? i : kHostsAt + i - kNumSources];
        for (int h = threadIdx.x; h < kNumHosts; h += blockDim.x)
            a.sent[chunk * kNumHosts + h] = totals[kHostsAt + h];
    }
    for (int h = threadIdx.x; h < kNumHosts; h += blockDim.x) {
        a.sent[h] = 0;
        a.sent[kNumChunks * kNumHosts + h] = totals[kHostsAt + h];
    }
}

__device__ __forceinline__ void count_rank(const DispatchArguments& a) {
    extern __shared__ __align__(128) char shared[];
    const Watch watch = watch_after(a, a.state->sent);
    if (__syncthreads_or(threadIdx.x == 0 && has_failed(watch))) return;
    const auto publish = [&](const int* totals) {
        if (blockIdx.x == 0) write_counts(a, watch, totals);
        return true;
    };
    const auto place = [&](const unsigned* masks, const int* running, int token, int group,
                           int lane) { place_across(a, masks, running, token, group, lane); };
    count_tokens(a, watch, reinterpret_cast<unsigned*>(shared), publish, place);
}

__global__ void __launch_bounds__(kMaxWarps * 32 + 32, 1)
    count(const __grid_constant__ DispatchArguments arguments) {
    count_rank(arguments);
}

// Several ranks on one GPU, each a row of the grid.
__global__ void __launch_bounds__(kMaxWarps * 32 + 32, 1)
    count_hosted(const DispatchArguments* arguments) {
    count_rank(arguments[blockIdx.y]);
}

}  // namespace ht
