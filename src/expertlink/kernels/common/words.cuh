// Progress words in the arena of every rank, which both modes have: every peer writes its own.
#pragma once

#include "common/sync.cuh"

__device__ __forceinline__ unsigned* ready_word(char* base, int peer) {
    return reinterpret_cast<unsigned*>(base + kReadyAt) + peer;
}

__device__ __forceinline__ unsigned* credit_word(char* base, int peer) {
    return reinterpret_cast<unsigned*>(base + kCreditsAt) + peer;
}
