// put_rows, get_rows: what the wire allows. Every rank moves consecutive rows to, or from, every
// other rank by plain bulk copies, without routing or flags.
//
// A warp moves one row at a time through its own slot of shared memory; its first lane does all of
// it. Steps go over the peers row by row, and every rank starts at another peer: at any time each
// GPU is written to, or read from, by few others.

#include "common/ptx.cuh"

// Launched to follow each other, like the calls that they are compared with.
__device__ __forceinline__ void follow_predecessor() {
    wait_for_predecessor();
    let_follower_start();
}

// Calls move(peer, row) for this warp's share of the rows.
template <typename Move>
__device__ __forceinline__ void share_rows(const CeilingArguments& a, Move move) {
    const int peers = a.ranks - 1;
    const int warps = gridDim.x * (blockDim.x / 32);
    const int warp = threadIdx.x / 32 * gridDim.x + blockIdx.x;  // few rows use many blocks
    // Whole rounds over the peers, so that they can turn: no warp is left with one peer for good.
    const int rows_at_once = warps > peers ? warps / peers : 1;
    const int stride = warps > peers ? rows_at_once * peers : warps;
    if (warp >= stride) return;
    for (long long step = warp; step < a.most_rows * peers; step += stride) {
        const long long row = step / peers;
        const long long turned = step % peers + row / rows_at_once;
        const int peer = (a.rank + 1 + static_cast<int>(turned % peers)) % a.ranks;
        if (row < a.rows[peer]) move(peer, row);
    }
}

// Addresses are kept as numbers: tables of them come from the host.
__device__ __forceinline__ char* row_at(const long long* first, int peer, long long row,
                                        unsigned row_bytes) {
    return reinterpret_cast<char*>(first[peer]) + row * row_bytes;
}

// Local memory -> shared memory -> memory of the peer.
extern "C" __global__ void __launch_bounds__(kMaxWarps * 32) put_rows(const CeilingArguments a) {
    extern __shared__ __align__(128) char slots[];
    __shared__ unsigned long long barriers[kMaxWarps];
    follow_predecessor();
    if (threadIdx.x % 32 != 0) return;
    char* const slot = slots + threadIdx.x / 32 * a.row_bytes;
    unsigned long long* const barrier = &barriers[threadIdx.x / 32];
    barrier_init(barrier);
    unsigned parity = 0;
    share_rows(a, [&](int peer, long long row) {
        bulk_wait_read();  // the last row has left the slot
        bulk_load(slot, row_at(a.near_rows, peer, row, a.row_bytes), a.row_bytes, barrier);
        bulk_load_wait(barrier, parity);
        parity ^= 1;
        bulk_store(row_at(a.far_rows, peer, row, a.row_bytes), slot, a.row_bytes);
        bulk_commit();
    });
    bulk_wait_written();  // the kernel ends when all rows have arrived
}

// Memory of the peer -> shared memory.
extern "C" __global__ void __launch_bounds__(kMaxWarps * 32) get_rows(const CeilingArguments a) {
    extern __shared__ __align__(128) char slots[];
    __shared__ unsigned long long barriers[kMaxWarps];
    follow_predecessor();
    if (threadIdx.x % 32 != 0) return;
    char* const slot = slots + threadIdx.x / 32 * a.row_bytes;
    unsigned long long* const barrier = &barriers[threadIdx.x / 32];
    barrier_init(barrier);
    unsigned parity = 0;
    share_rows(a, [&](int peer, long long row) {
        bulk_load(slot, row_at(a.far_rows, peer, row, a.row_bytes), a.row_bytes, barrier);
        bulk_load_wait(barrier, parity);
        parity ^= 1;
    });
}
