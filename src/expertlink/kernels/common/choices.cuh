// A token's choices: which experts, and where these live.
//
// `Arguments` has the caller's ids, `flags` with kWideIds, and memory for a copy of the ids.
#pragma once

// An expert's location is one number: rank * kLocationStride + index on that rank.
__device__ __forceinline__ int rank_of(int location) { return location / kLocationStride; }
__device__ __forceinline__ int local_of(int location) { return location % kLocationStride; }

constexpr int kChunk = kTopk < 8 ? kTopk : 8;  // choices that are loaded together

// Some of a token's choices: global experts, or -1 for none. All loads are issued before the first
// result is used.
struct Choices {
    int expert[kChunk];
    bool faulty;  // an id is out of range
};

// The choices from `first` on. With `keeps` their ids are copied too.
template <typename Arguments>
__device__ __forceinline__ Choices choices_of(const Arguments& a, int token, int first,
                                              bool keeps) {
    const long long at = static_cast<long long>(token) * kTopk + first;
    const bool wide = a.flags & kWideIds;
    long long ids[kChunk];
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
        ids[k] = -1;
        if (first + k >= kTopk) continue;
        if (wide)
            ids[k] = static_cast<const long long*>(a.ids)[at + k];
        else
            ids[k] = static_cast<const int*>(a.ids)[at + k];
    }
    Choices choices;
    choices.faulty = false;
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
        choices.expert[k] = ids[k] >= 0 && ids[k] < kNumExperts ? static_cast<int>(ids[k]) : -1;
        choices.faulty |= ids[k] < -1 || ids[k] >= kNumExperts;
        if (!keeps || first + k >= kTopk) continue;
        if (wide)
            static_cast<long long*>(a.ids_copy)[at + k] = ids[k];
        else
            static_cast<int*>(a.ids_copy)[at + k] = static_cast<int>(ids[k]);
    }
    return choices;
}

template <typename Arguments>
__device__ __forceinline__ int expert_of(const Arguments& a, int token, int k) {
    const long long at = static_cast<long long>(token) * kTopk + k;
    const long long id = a.flags & kWideIds ? static_cast<const long long*>(a.ids)[at]
                                            : static_cast<const int*>(a.ids)[at];
    return id >= 0 && id < kNumExperts ? static_cast<int>(id) : -1;
}

// Deduplicated layouts: clears ids and weights of a slot that no row fills. One warp.
template <typename Arguments>
__device__ __forceinline__ void clear_choices(const Arguments& a, int slot) {
    const int lane = threadIdx.x % 32;
    if (lane >= kTopk) return;
    const long long at = static_cast<long long>(slot) * kTopk + lane;
    a.topk_ids[at] = -1;
    if (a.topk_weights != nullptr) a.topk_weights[at] = 0.0f;
}
