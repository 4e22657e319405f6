// Rows in transit: how they are stored at peers, and how their lane pieces are awaited.
#pragma once

#include "ll/shares.cuh"

namespace ll {

// -- steps of a row -------------------------------------------------------------------------------

// The lane pieces of some steps: 16 bytes of each of `count` steps, the first at `at`.
struct LanePieces {
    int at, count;
};

__device__ __forceinline__ LanePieces lane_pieces(int first, int last, int bytes) {
    const int at = first * kStepBytes + threadIdx.x % 32 * 16;
    return {at, min(last - first, (bytes - at + kStepBytes - 1) >> 9)};
}
static_assert(kStepBytes == 1 << 9);

// Lane pieces that do not exist become zeros.
template <int kDepth>
__device__ __forceinline__ void read_steps(uint4 (&piece)[kDepth], const char* row,
                                           LanePieces mine) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
        piece[i] = make_uint4(0, 0, 0, 0);
        if (i < mine.count)
            piece[i] = *reinterpret_cast<const uint4*>(row + mine.at + i * kStepBytes);
    }
}

template <int kDepth>
__device__ __forceinline__ void write_steps(char* row, const uint4 (&piece)[kDepth],
                                            LanePieces mine) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
        if (i < mine.count) *reinterpret_cast<uint4*>(row + mine.at + i * kStepBytes) = piece[i];
}

// The same, to a staged row of a peer.
template <int kDepth>
__device__ __forceinline__ void store_steps(char* row, const uint4 (&piece)[kDepth],
                                            LanePieces mine) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
        if (i < mine.count) store_piece(row + mine.at + i * kStepBytes, piece[i]);
}

// Bit i: some lane piece of step i contains the sentinel. The same in all lanes.
template <int kDepth>
__device__ __forceinline__ unsigned sentinel_steps(const uint4 (&piece)[kDepth], LanePieces mine) {
    unsigned sentinels = 0;
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
        if (i < mine.count && has_sentinel(piece[i])) sentinels |= 1u << i;
    return __reduce_or_sync(kAll, sentinels);
}

// Lane pieces of kDepth steps of a staged row, as they come in.
template <int kDepth>
struct StagedPieces {
    uint4 piece[kDepth];

    // First poll. Lane pieces that do not exist count as arrived.
    __device__ __forceinline__ void load_first(const char* row, LanePieces mine) {
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            piece[i] = make_uint4(0, 0, 0, 0);
            if (i < mine.count) piece[i] = load_piece(row + mine.at + i * kStepBytes);
        }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kDepth; ++i) piece[i] = make_uint4(0, 0, 0, 0);
    }

    // Bit i: this lane's piece i has not arrived.
    __device__ __forceinline__ unsigned missing() const {
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < kDepth; ++i)
            if (has_sentinel(piece[i])) bits |= 1u << i;
        return bits;
    }

    // Waits until the lane pieces of `which` have arrived. The whole warp returns the same. Where a
    // rank is masked meanwhile, `awaited` is the piece that was waited for.
    template <typename Places>
    __device__ __forceinline__ WaitResult wait_for(const Call& call, const Places& places,
                                                   unsigned which, int& awaited) {
        const unsigned bits = missing() & which, left = __reduce_or_sync(kAll, bits);
        if (left == 0) return kArrived;
        awaited = __ffs(left) - 1;
        return poll_pieces(call, places, bits, awaited);
    }

    template <typename Places>
    __device__ __forceinline__ void load(const Places& places, unsigned which) {
#pragma unroll
        for (int i = 0; i < kDepth; ++i)
            if (which & 1u << i) piece[i] = load_piece(places.at(i));
    }

    template <typename Places>
    __device__ __forceinline__ WaitResult poll_pieces(const Call& call, const Places& places,
                                                      unsigned bits, int& awaited) {
        unsigned long long since = 0;
        long long* const longest = call.policy.longest_wait_ns;
        const unsigned long long began = longest != nullptr ? nanoseconds() : 0;
        WaitResult found = kArrived;
        // Polling slows down what is awaited. So, if that is much, only one lane piece is polled
        // until it is there, then all.
        unsigned polled = kAll;
        for (unsigned spins = 1;; ++spins) {
            load(places, bits & polled);
            bits &= missing();
            const unsigned left = __reduce_or_sync(kAll, bits);
            if (left == 0) break;
            awaited = __ffs(left) - 1;
            const bool came = (polled & (polled - 1)) == 0 && !(polled & left);
            polled = came || places.are_few() ? left : left & -left;
            if (spins > 2) __nanosleep(32);
            if (spins % 16 != 0) continue;
            // The data may contain the sentinel. Then the sender has written an escape word.
            // Acquire: the data came before it.
            const unsigned here = places.escaped(call) & left;
            __syncwarp();  // every lane may read what one of them has acquired
            if (here) {
                load(places, bits & here);
                bits &= ~here;
                continue;
            }
            if (spins % kSpinsBetweenPolls != 0) continue;
            const int peer = places.peer(awaited), index = places.index(awaited);
            if (threadIdx.x % 32 == 0)
                found = poll(call, kPhaseRow, peer, call.watch.transfer, 0, index, since);
            found = static_cast<WaitResult>(__shfl_sync(kAll, static_cast<int>(found), 0));
            if (found != kArrived) break;
        }
        if (began) {
            const int peer = places.peer(awaited);
            if (threadIdx.x % 32 == 0)
                atomicMax(&longest[peer], static_cast<long long>(nanoseconds() - began));
        }
        return found;
    }

    // Puts the sentinel back. Whoever may write the memory next has to be told first.
    __device__ __forceinline__ void put_back(char* row, LanePieces mine) const {
#pragma unroll
        for (int i = 0; i < kDepth; ++i)
            if (i < mine.count)
                *reinterpret_cast<uint4*>(row + mine.at + i * kStepBytes) = sentinel_piece();
    }
};

// Where the lane pieces of a part are: steps of one row.
struct PlacesOfPart {
    const char* row;
    const unsigned* escapes;
    int first, length;   // steps of the whole part
    int from, position;  // peer, and which of the source's rows

    __device__ __forceinline__ const char* at(int i) const {
        return row + (first + i) * kStepBytes + threadIdx.x % 32 * 16;
    }

    // Bit i: the data of step i contain the sentinel, and have arrived.
    __device__ __forceinline__ unsigned escaped(const Call& call) const {
        const int lane = threadIdx.x % 32;
        return __ballot_sync(
            kAll, first + lane < kMaxSteps &&
                      load_acquire_system(escapes + first + lane) == call.watch.transfer);
    }

    __device__ __forceinline__ bool are_few() const { return length <= 2; }
    __device__ __forceinline__ int peer(int) const { return from; }
    __device__ __forceinline__ int index(int) const { return position; }
};

// After a warp's stores to a peer: bit i of `steps` says that the data of step `first` + i contain
// the sentinel. The same in all lanes.
__device__ __forceinline__ void escape_steps(unsigned* escapes, unsigned transfer, int first,
                                             unsigned steps) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    fence_system();  // the escape word comes after the bytes of all lanes
    if (steps >> lane & 1u) store_relaxed_system(escapes + first + lane, transfer);
}

}  // namespace ll
