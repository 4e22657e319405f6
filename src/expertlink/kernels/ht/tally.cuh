// Statistics: adds a call to the totals of its rank, where they are kept. The counts are those of
// the routing's tables. One block of one kernel of a call does it.
#pragma once

#include "ht/peers.cuh"

namespace ht {

// Rows of the call that go out and come in: one per (token, rank). Bytes between hosts are not
// those of a rank.
template <typename Arguments>
__device__ __forceinline__ void tally_rows(const Arguments& a, const int* out, const int* in,
                                           int row_bytes) {
#pragma unroll 1
    for (int r = threadIdx.x; r < kNumSources; r += blockDim.x) {
        const long long sent = out[r], received = in[r];
        a.rows_sent[r] += sent;
        a.rows_received[r] += received;
        const bool same_host = seat_of(a, r) / kNumPeers == own_seat(a) / kNumPeers;
        if (r == a.rank || !same_host) continue;
        a.bytes_sent[r] += sent * row_bytes;
        a.bytes_received[r] += received * row_bytes;
    }
}

// A dispatch whose tables are written.
__device__ __forceinline__ void tally_dispatch(const DispatchArguments& a) {
    if (a.rows_sent == nullptr || a.flags & kUncounted) return;
    tally_rows(a, a.rows_to, a.rows_from, a.row_bytes + a.scale_bytes);
#pragma unroll 1
    for (int e = threadIdx.x; e < a.num_local; e += blockDim.x)
        a.tokens_stat[e] += a.tokens_per_expert[e];
}

// A combine; gradients alone are no rows.
__device__ __forceinline__ void tally_combine(const CombineArguments& a) {
    if (a.rows_sent == nullptr || a.row_bytes == 0) return;
    tally_rows(a, a.rows_from, a.rows_to, a.row_bytes);
}

}  // namespace ht
