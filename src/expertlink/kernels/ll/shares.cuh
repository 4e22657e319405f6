// How work is shared out between blocks and warps.
#pragma once

#include "ll/begin.cuh"

namespace ll {

// How many rows come from each source. In shared memory.
struct RowsFrom {
    int rows_from[kNumSources];  // rows from each source
    int first_row[kNumSources];  // rows from the sources before
    int most, total;             // rows of the source with most, and of all

    // One warp. Its lanes ask `rows_of` together how many rows come from a source; it returns 0
    // for one that does not exist.
    template <typename RowsOf>
    __device__ __forceinline__ void fill(const RowsOf& rows_of) {
        const int lane = threadIdx.x % 32;
        int before = 0, largest = 0;
#pragma unroll 1
        for (int first = 0; first < kNumSources; first += 32) {
            const int source = first + lane, rows = rows_of(source);
            int sum = rows;  // of the lanes up to this one
#pragma unroll
            for (int step = 1; step < min(32, kNumSources); step *= 2) {
                const int other = __shfl_up_sync(kAll, sum, step);
                if (lane >= step) sum += other;
            }
            if (source < kNumSources) {
                rows_from[source] = rows;
                first_row[source] = before + sum - rows;
            }
            before += __shfl_sync(kAll, sum, min(32, kNumSources) - 1);
            largest = max(largest, __reduce_max_sync(kAll, rows));
        }
        if (lane == 0) {
            total = before;
            most = largest;
        }
        __syncwarp();
    }
};

// The first item of a warp in a sending half.
__device__ __forceinline__ int first_item() { return threadIdx.x / 32 * gridDim.x + blockIdx.x; }

// Items go to the blocks in turn, and inside a block to whichever warp is free.
__device__ __forceinline__ int next_item(int* counter) {
    int taken = 0;
    // One lane asks. An atomicAdd would be compiled for any number of lanes.
    if (threadIdx.x % 32 == 0)
        asm volatile("atom.shared.add.u32 %0, [%1], 1;"
                     : "=r"(taken)
                     : "r"(static_cast<unsigned>(__cvta_generic_to_shared(counter)))
                     : "memory");
    return __shfl_sync(kAll, taken, 0) * gridDim.x + blockIdx.x;
}

// Items that all blocks draw from one counter, for sending: some SMs reach the wire much faster
// than others. A draw is in flight while the item before is sent.
struct Draws {
    unsigned* drawn;
    int first;        // of the items that are drawn
    unsigned ticket;  // lane 0
    bool any;         // there are items to draw

    __device__ __forceinline__ void begin(const Call& call, int warps, int items) {
        drawn = &call.policy.counters->drawn[set_of(call.sending)];
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

    // The next item; past the last one if there are no more.
    __device__ __forceinline__ int next() {
        const int item = first + static_cast<int>(__shfl_sync(kAll, ticket, 0));
        draw();
        return item;
    }
};

// Quotients of small numbers by one divisor. An ordinary division takes as long as a row's checks.
struct Divider {
    int divisor;
    float reciprocal;

    __device__ __forceinline__ explicit Divider(int d) : divisor(d) {
        // An approximation is enough.
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(static_cast<float>(d)));
    }

    __device__ __forceinline__ int operator()(int n) const {
        const int near = static_cast<int>(static_cast<float>(n) * reciprocal);
        const int rest = n - near * divisor;
        return near + (rest >= divisor) - (rest < 0);
    }
};

struct StepRange {
    int first, last;
};

// How rows are cut into parts, so that there is work for all warps and no part is longer than
// `most` steps.
struct Cut {
    int parts, length, steps;  // of a row; of a part, in steps; of a row

    Cut() = default;

    __device__ __forceinline__ Cut(int rows, int row_bytes, int warps, int most)
        : steps((row_bytes + kStepBytes - 1) / kStepBytes) {
        if (rows * steps <= warps) {  // few rows: one step per warp
            length = 1;
            parts = max(1, steps);
            return;
        }
        const int wanted = max(1, Divider(rows)(warps));
        length = min(most, Divider(wanted)(steps + wanted - 1));
        parts = Divider(length)(steps + length - 1);
    }

    __device__ __forceinline__ StepRange part(int index) const {
        return {index * length, min((index + 1) * length, steps)};
    }
};

}  // namespace ll
