// flag_latency: how long a word takes from one GPU to another. Two ranks pass a number back and
// forth: one store and one wait each way, as the flags of dispatch and combine do.
//
// One thread on each rank. Numbers go on from launch to launch, so words are never cleared.

#include "common/ptx.cuh"

constexpr unsigned kSpinsBetweenPolls = 1024;

// Waits until `word` is `wanted`; false: not within `limit_ns`.
__device__ __forceinline__ bool wait_for(const unsigned* word, unsigned wanted,
                                         unsigned long long limit_ns) {
    unsigned long long since = 0;
    for (unsigned spins = 1;; ++spins) {
        // Acquire: a flag stands for rows that are read next.
        if (load_acquire_system(word) == wanted) return true;
        if (spins % kSpinsBetweenPolls != 0) continue;
        const unsigned long long now = nanoseconds();
        if (since == 0) since = now;
        if (now - since > limit_ns) return false;
    }
}

extern "C" __global__ void __launch_bounds__(32) flag_latency(const FlagLatencyArguments a) {
    if (threadIdx.x != 0) return;
    unsigned long long begun = 0;
    for (unsigned round = 1; round <= a.rounds; ++round) {
        // Release: a flag stands for rows that were written before.
        if (a.leads) store_release_system(a.theirs, a.base + round);
        if (!wait_for(a.mine, a.base + round, a.limit_ns)) return;
        if (!a.leads) store_release_system(a.theirs, a.base + round);
        if (round == a.warm_rounds) begun = nanoseconds();
    }
    *a.elapsed_ns = nanoseconds() - begun;
}
