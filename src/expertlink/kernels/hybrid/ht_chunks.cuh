// Across hosts: what the chunks of a call hold, from the count rows of all ranks.
#pragma once

#include "ht/chunk.cuh"

namespace ht {

// Rows that a source has for a column (a rank, or kNumSources + host) before a chunk. Counts become
// addresses, so they are clamped to what is possible.
__device__ __forceinline__ int rows_before_chunk(const int* row, int column, int total_at,
                                                 int chunk) {
    if (chunk == 0) return 0;
    const int* const word =
        chunk == kNumChunks ? row + kHeaderWords + total_at : row + bounds_at(chunk) + column;
    return min(max(load_fresh(word), 0), kMaxTokens);
}

// The block that plans, once all count rows are here; before the mail is complete. Fills the tables
// of the chunks, and tells the host the lengths of the messages and how many chunks hold anything.
template <typename Arguments, typename Mail>
__device__ __forceinline__ void plan_chunks(const Arguments& a, Mail* mail) {
    if constexpr (kSpansHosts) {
        __shared__ int used;
        if (threadIdx.x == 0) used = 1;
        char* const base = a.bases[own_peer(a)];
        const int own = own_seat(a) / kNumPeers;
        const auto before = [&](int seat, int rank, int chunk) {
            return rows_before_chunk(count_row(base, seat), rank, rank, chunk);
        };
        const auto before_host = [&](int seat, int host, int chunk) {
            return rows_before_chunk(count_row(base, seat), kNumSources + host,
                                     kNumSources + kNumExperts + host, chunk);
        };
        __syncthreads();
        for (int i = threadIdx.x; i < kNumSources * kBounds; i += blockDim.x)
            a.rows_before[i] = before(i / kBounds, a.rank, i % kBounds);
        for (int i = threadIdx.x; i < kNumHosts * kBounds * kNumPeers; i += blockDim.x) {
            const int peer = i % kNumPeers, chunk = i / kNumPeers % kBounds;
            const int seat = i / kNumPeers / kBounds * kNumPeers + own_peer(a);
            a.relayed_before[i] = before(seat, rank_at(a, own * kNumPeers + peer), chunk);
        }
        for (int i = threadIdx.x; i < kNumHosts * kBounds; i += blockDim.x)
            a.relayed[i] = before_host(i / kBounds * kNumPeers + own_peer(a), own, i % kBounds);
        for (int i = threadIdx.x; i < kNumSources * kNumHosts * kNumChunks; i += blockDim.x) {
            const int chunk = i % kNumChunks, host = i / kNumChunks % kNumHosts;
            const int seat = i / kNumChunks / kNumHosts;
            if (before_host(seat, host, chunk + 1) > before_host(seat, host, chunk))
                atomicMax(&used, chunk + 1);
        }
        __syncthreads();
        if (kWantsMail) {
            // [C, 2, N]: rows that each host gets from this rank, and rows that come from it.
            for (int i = threadIdx.x; i < kNumChunks * kNumHosts; i += blockDim.x) {
                const int chunk = i / kNumHosts, host = i % kNumHosts;
                int* const out = mail->mail_rail + chunk * 2 * kNumHosts + host;
                const int* const sent = a.sent + i;
                const int* const relayed = a.relayed + host * kBounds + chunk;
                out[0] = host == own ? 0 : sent[kNumHosts] - sent[0];
                out[kNumHosts] = host == own ? 0 : relayed[1] - relayed[0];
            }
            if (threadIdx.x == 0) mail->mail_chunks = used;
        }
        __syncthreads();
    }
}

}  // namespace ht
