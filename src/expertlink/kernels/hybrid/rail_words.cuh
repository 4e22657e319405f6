// The words by which the monitor of the host sees that a rank is in a step of its rail:
// hybrid/words.py.
#pragma once

#include "common/ptx.cuh"

// One more step has begun, or is done. One thread calls it, after all that the step waits for.
__device__ __forceinline__ void count_step(unsigned* counter, unsigned* word) {
    const unsigned number = *counter + 1;
    *counter = number;
    // Relaxed: the word stands for nothing but itself.
    store_relaxed_system(word, number);
}
