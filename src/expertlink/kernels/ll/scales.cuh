// Receiving half of a dispatch: scales of rows to their slots.
#pragma once

#include "ll/counts.cuh"
#include "ll/send.cuh"

namespace ll {

// Where this transfer's rows are staged. In registers, which are faster than the block's `Call`.
struct Staging {
    char* base;
    unsigned transfer;
};

// Stores four bytes of a row's scales; the last may be fewer.
__device__ __forceinline__ void store_scale(const DispatchArguments& a, int slot, int word,
                                            unsigned value) {
    const int columns = a.scale_bytes / a.scale_item;
    long long at = static_cast<long long>(slot) * a.scale_bytes + word * 4;
    int step = 1;  // bytes from one byte to the next
    if (a.scale_stride != 0) {
        // By columns: [group, column, slot of the group].
        const int group = slot / a.scale_stride, column = word * 4 / a.scale_item;
        at = (static_cast<long long>(group) * columns + column) * a.scale_stride +
             (slot - group * a.scale_stride);
        at = at * a.scale_item + word * 4 % a.scale_item;
        step = a.scale_item < 4 ? a.scale_stride : 1;
    }
    if (step == 1 && a.scale_bytes % 4 == 0) {
        *reinterpret_cast<unsigned*>(a.scales_out + at) = value;
        return;
    }
    const int item = step == 1 ? 4 : a.scale_item;
#pragma unroll 1
    for (int i = 0; i < 4 && word * 4 + i < a.scale_bytes; ++i)
        a.scales_out[at + static_cast<long long>(i / item) * item * step + i % item] =
            static_cast<char>(value >> 8 * i);
}

// The words of scales that a part brings. Scales that the kernel has made come with their steps,
// those of the caller with the last part. `early` are this lane's words as first polled.
struct ScaleWords {
    int begin, end;
    unsigned early[2];

    template <bool kQuantized>
    __device__ __forceinline__ void locate(const DispatchArguments& a, StepRange range,
                                           bool is_last) {
        const int all = (a.scale_bytes + 3) / 4;
        const int each = a.scale_kind == kPackedScales ? 1 : kInStep;  // words of a step
        begin = kQuantized ? range.first * each : 0;
        end = kQuantized ? min(range.last * each, all) : is_last ? all : 0;
    }

    __device__ __forceinline__ unsigned load(const char* row, int word) const {
        if (word >= end) return 0;
        return static_cast<unsigned>(
            load_fresh(reinterpret_cast<const int*>(row + kScalesAt) + word));
    }

    __device__ __forceinline__ void load_first(const char* row) {
        const int word = begin + threadIdx.x % 32;
        early[0] = load(row, word);
        early[1] = load(row, word + 32);
    }

    // Polls again what was missing. The row has arrived, so its scales may have.
    __device__ __forceinline__ void load_missing(const char* row) {
        const int word = begin + threadIdx.x % 32;
        if (early[0] == kSentinel) early[0] = load(row, word);
        if (early[1] == kSentinel) early[1] = load(row, word + 32);
    }
};

// Copies the scales of a part, word by word, to the slots that lanes hold.
__device__ __forceinline__ WaitResult receive_scales(const DispatchArguments& a, const Call& call,
                                                     const Staging& at, int source, int position,
                                                     int target, bool gone,
                                                     const ScaleWords& words) {
    const int lane = threadIdx.x % 32;
    const int staged = staging_slot(source, position);
    char* const row = staged_row(at.base, at.transfer, staged);
    const unsigned targets = __ballot_sync(kAll, target >= 0);
#pragma unroll 1
    for (int first = words.begin; first < words.end; first += 32) {
        const int word = first + lane;
        const bool exists = word < words.end;
        unsigned value = 0;
        WaitResult found = kArrived;
        if (first < words.begin + 64)
            value = first == words.begin ? words.early[0] : words.early[1];
        else
            value = words.load(row, word);
        if (exists && !gone) {
            // Scales that the kernel packs belong to a step. Those of the caller are sent at once,
            // with one escape word.
            const unsigned* const escape = escape_words(at.base, at.transfer, staged) +
                                           (a.scale_kind == kNotQuantized ? kMaxSteps : word);
            unsigned long long since = 0;
            for (unsigned spins = 1; value == kSentinel; ++spins) {
                value = words.load(row, word);
                if (spins % 16 != 0 || value != kSentinel) continue;
                if (a.scale_kind != kFloatScales && a.scale_kind != kPowerScales &&
                    load_acquire_system(escape) == at.transfer) {
                    value = words.load(row, word);
                    break;
                }
                if (spins % kSpinsBetweenPolls != 0) continue;
                found =
                    poll(call, kPhaseRow, peer_of(source), call.watch.transfer, 0, position, since);
                if (found != kArrived) break;
            }
            reinterpret_cast<unsigned*>(row + kScalesAt)[word] = kSentinel;
        }
        if (gone || found == kPeerMasked) value = 0;
        if (__any_sync(kAll, found == kAbort)) return kAbort;
#pragma unroll 1
        for (unsigned left = targets; left; left &= left - 1) {
            const int slot = __shfl_sync(kAll, target, __ffs(left) - 1);
            if (exists) store_scale(a, slot, word, value);
        }
    }
    return kArrived;
}

}  // namespace ll
