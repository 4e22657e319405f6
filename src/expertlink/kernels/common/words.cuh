// Words in the arena of every rank by which others tell where they are; both modes have them.
#pragma once

#include "common/sync.cuh"

__device__ __forceinline__ unsigned* ready_word(char* base, int rank) {
    return reinterpret_cast<unsigned*>(base + kReadyAt) + rank;
}

__device__ __forceinline__ unsigned* credit_word(char* base, int rank) {
    return reinterpret_cast<unsigned*>(base + kCreditsAt) + rank;
}
