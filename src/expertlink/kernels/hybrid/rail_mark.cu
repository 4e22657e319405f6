// rail_mark: says to the host that a step of the rail begins, or is done.
//
// One thread. Steps of a rail are in stream order, so nobody else counts at the same time.

#include "hybrid/rail_words.cuh"

extern "C" __global__ void __launch_bounds__(32) rail_mark(const RailMarkArguments a) {
    if (threadIdx.x == 0) count_step(a.counter, a.word);
}
