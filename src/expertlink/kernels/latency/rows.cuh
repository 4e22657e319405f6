// Low latency: rows on their way. How they are stored at peers, how their pieces are waited for,
// and how the work is shared out.
#pragma once

#include "common/scan.cuh"
#include "latency/waits.cuh"

// -- steps of a row -------------------------------------------------------------------------------

// What a lane has of some steps of a row: 16 bytes of each of `count` steps, the first at `at`.
struct Span {
    int at, count;
};

__device__ __forceinline__ Span span_of(int first, int last, int bytes) {
    const int at = first * kStepBytes + threadIdx.x % 32 * 16;
    return {at, min(last - first, (bytes - at + kStepBytes - 1) >> 9)};
}
static_assert(kStepBytes == 1 << 9);

// Pieces that do not exist become zeros.
template <int kDepth>
__device__ __forceinline__ void read_steps(uint4 (&piece)[kDepth], const char* row, Span span) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
        piece[i] = make_uint4(0, 0, 0, 0);
        if (i < span.count)
            piece[i] = *reinterpret_cast<const uint4*>(row + span.at + i * kStepBytes);
    }
}

template <int kDepth>
__device__ __forceinline__ void write_steps(char* row, const uint4 (&piece)[kDepth], Span span) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
        if (i < span.count) *reinterpret_cast<uint4*>(row + span.at + i * kStepBytes) = piece[i];
}

// To the row of a peer.
template <int kDepth>
__device__ __forceinline__ void store_steps(char* row, const uint4 (&piece)[kDepth], Span span) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
        if (i < span.count) store_piece(row + span.at + i * kStepBytes, piece[i]);
}

// The same in all lanes: steps whose data look like nothing.
template <int kDepth>
__device__ __forceinline__ unsigned strange_steps(const uint4 (&piece)[kDepth], Span span) {
    unsigned strange = 0;
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
        if (i < span.count && holds_nothing(piece[i])) strange |= 1u << i;
    return __reduce_or_sync(kAll, strange);
}

// Pieces of a staged row as they come in: kDepth steps of one lane's 16 bytes.
template <int kDepth>
struct Pieces {
    uint4 piece[kDepth];

    // First look; pieces that do not exist are there.
    __device__ __forceinline__ void look_at(const char* row, Span span) {
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            piece[i] = make_uint4(0, 0, 0, 0);
            if (i < span.count) piece[i] = load_piece(row + span.at + i * kStepBytes);
        }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kDepth; ++i) piece[i] = make_uint4(0, 0, 0, 0);
    }

    // Waits until all of them are here; the warp finds the same.
    __device__ __forceinline__ Found settle(const Call& call, const char* row,
                                            const unsigned* escapes, int first, int peer,
                                            int index) {
        unsigned missing = 0;
#pragma unroll
        for (int i = 0; i < kDepth; ++i)
            if (holds_nothing(piece[i])) missing |= 1u << i;
        if (!__any_sync(kAll, missing)) return kHere;
        return poll(call, row, escapes, first, missing, peer, index);
    }

    __device__ __forceinline__ Found poll(const Call& call, const char* row,
                                          const unsigned* escapes, int first, unsigned missing,
                                          int peer, int index) {
        const int lane = threadIdx.x % 32;
        unsigned long long since = 0;
        long long* const longest = call.patience.longest_wait_ns;
        const unsigned long long began = longest != nullptr ? nanoseconds() : 0;
        Found found = kHere;
        // Looks keep the memory system from what is awaited: only one step is looked at until it is
        // here, then all.
        unsigned looked_at = kAll;
        for (unsigned spins = 1;; ++spins) {
#pragma unroll
            for (int i = 0; i < kDepth; ++i)
                if (missing & looked_at & 1u << i) {
                    piece[i] = load_piece(row + (first + i) * kStepBytes + lane * 16);
                    if (!holds_nothing(piece[i])) missing &= ~(1u << i);
                }
            const unsigned left = __reduce_or_sync(kAll, missing);
            if (left == 0) break;
            const bool came = (looked_at & (looked_at - 1)) == 0 && !(looked_at & left);
            looked_at = came ? left : left & -left;
            if (spins > 2) __nanosleep(32);
            if (spins % 16 != 0) continue;
            // The data themselves may look like nothing; then the sender has said that they are
            // here.
            bool escaped = false;
            if (lane < kDepth)
                escaped = load_acquire_system(escapes + first + lane) == call.watch.transfer;
            const unsigned here = __ballot_sync(kAll, escaped) & left;
            __syncwarp();  // every lane may read what one of them has acquired
            if (here) {
#pragma unroll
                for (int i = 0; i < kDepth; ++i)
                    if (here & missing & 1u << i)
                        piece[i] = load_piece(row + (first + i) * kStepBytes + lane * 16);
                missing &= ~here;
                continue;
            }
            if (spins % kSpinsBetweenLooks != 0) continue;
            if (lane == 0)
                found = look(call, kPhaseRow, peer, call.watch.transfer, 0, index, since);
            found = static_cast<Found>(__shfl_sync(kAll, static_cast<int>(found), 0));
            if (found != kHere) break;
        }
        if (began && lane == 0)
            atomicMax(&longest[peer], static_cast<long long>(nanoseconds() - began));
        return found;
    }

    // The memory is free again; who may write it next has to be told first.
    __device__ __forceinline__ void put_back(char* row, Span span) const {
#pragma unroll
        for (int i = 0; i < kDepth; ++i)
            if (i < span.count)
                *reinterpret_cast<uint4*>(row + span.at + i * kStepBytes) = nothing();
    }
};

// After stores of a warp to a peer: bit i of `steps` says that the data of step `first` + i look
// like nothing; the same in all lanes.
__device__ __forceinline__ void escape_steps(unsigned* escapes, unsigned transfer, int first,
                                             unsigned steps) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    fence_system();  // the word says that all lanes' bytes are there
    if (steps >> lane & 1u) store_relaxed_system(escapes + first + lane, transfer);
}

// How many rows come from each rank, in shared memory.
struct RowsFrom {
    int rows_from[kNumRanks];  // rows from each rank
    int first_row[kNumRanks];  // rows from the ranks before
    int most, total;           // rows of the rank that sends most, and of all

    // One warp, all of whose lanes see what was written to `rows_from`.
    __device__ __forceinline__ void add_up() {
        const int lane = threadIdx.x % 32;
        int largest = 0;
#pragma unroll 1
        for (int rank = lane; rank < kNumRanks; rank += 32) {
            first_row[rank] = rows_from[rank];
            largest = max(largest, rows_from[rank]);
        }
        __syncwarp();
        const int sum = scan_exclusive(first_row, kNumRanks);
        largest = __reduce_max_sync(kAll, largest);
        if (lane == 0) {
            total = sum;
            most = largest;
        }
    }
};

// -- shares of the work ---------------------------------------------------------------------------

// The item of the sending half that a warp begins with.
__device__ __forceinline__ int first_item() {
    return threadIdx.x / 32 * gridDim.x + blockIdx.x;
}

// Items are dealt out to the blocks in turn, and inside a block to whoever is free.
__device__ __forceinline__ int next_item(int* counter) {
    int taken = 0;
    // One lane asks; an atomicAdd would be compiled for any number of them.
    if (threadIdx.x % 32 == 0)
        asm volatile("atom.shared.add.u32 %0, [%1], 1;"
                     : "=r"(taken)
                     : "r"(static_cast<unsigned>(__cvta_generic_to_shared(counter)))
                     : "memory");
    return __shfl_sync(kAll, taken, 0) * gridDim.x + blockIdx.x;
}

// Items that all blocks draw from one counter: for what a dispatch sends, since some SMs reach the
// wire much faster than others. Each draw is on its way while the item before is sent.
struct Draws {
    unsigned* drawn;
    int first;        // of the items that are drawn
    unsigned ticket;  // lane 0
    bool any;         // there are so many items

    __device__ __forceinline__ void begin(const Call& call, int warps, int items) {
        drawn = &call.patience.counters->drawn[set_of(call.sending)];
        first = warps * gridDim.x;
        any = first < items;
        draw();
    }

    __device__ __forceinline__ void draw() {
        ticket = 0;
        if (any && threadIdx.x % 32 == 0)
            asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;"
                         : "=r"(ticket)
                         : "l"(drawn)
                         : "memory");
    }

    // Past the last item if there are no more.
    __device__ __forceinline__ int next() {
        const int item = first + static_cast<int>(__shfl_sync(kAll, ticket, 0));
        draw();
        return item;
    }
};

// Quotients of small numbers by one divisor: an ordinary division takes as long as a row's checks.
struct Divider {
    int divisor;
    float reciprocal;

    __device__ __forceinline__ explicit Divider(int d) : divisor(d), reciprocal(__frcp_rn(d)) {}

    __device__ __forceinline__ int operator()(int n) const {
        const int near = static_cast<int>(static_cast<float>(n) * reciprocal);
        const int rest = n - near * divisor;
        return near + (rest >= divisor) - (rest < 0);
    }
};

struct Steps {
    int first, last;
};

// How rows are cut, so that there is work for all warps and no part is longer than `most` steps.
struct Cut {
    int parts, length, steps;  // of a row; of a part, in steps; of a row

    Cut() = default;

    __device__ __forceinline__ Cut(int rows, int row_bytes, int warps, int most)
        : steps((row_bytes + kStepBytes - 1) / kStepBytes) {
        if (rows * steps <= warps) {  // few rows: a warp for every step
            length = 1;
            parts = max(1, steps);
            return;
        }
        const int wanted = max(1, Divider(rows)(warps));
        length = min(most, Divider(wanted)(steps + wanted - 1));
        parts = Divider(length)(steps + length - 1);
    }

    __device__ __forceinline__ Steps part(int index) const {
        return {index * length, min((index + 1) * length, steps)};
    }
};
