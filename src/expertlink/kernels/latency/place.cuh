// Low latency, receiving half of a dispatch: from the counts of all ranks to slots, and every row to its
// slots as its parts come in. Every block works the slots out for itself.
#pragma once

#include "latency/send.cuh"

// Shared memory of the receiving half.
struct Arrivals {
    int* first_slot;           // [R, E_loc] first slot of each source's rows of each local expert
    int* totals;               // [E_loc] rows of each local expert
    int* starts;               // [E_loc + 1] FLAT: first slot of each expert's group
    int rows_from[kNumRanks];  // rows from each rank
    int first_row[kNumRanks];  // rows from the ranks before
    int most, total;           // rows of the rank that sends most, and of all
};

// All warps of `threads` threads, which meet at barrier 1. False: give up.
__device__ __forceinline__ void meet(int threads) {
    asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

// In place: values[i] becomes the sum of those before it, rounded up to the alignment; one warp.
__device__ __forceinline__ int scan_groups(int* values, int count) {
    const int lane = threadIdx.x % 32;
    int carry = 0;
#pragma unroll 1
    for (int first = 0; first < count; first += 32) {
        const int own =
            first + lane < count
                ? (values[first + lane] + kAlignment - 1) / kAlignment * kAlignment
                : 0;
        int sum = own;
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(kAll, sum, distance);
            if (lane >= distance) sum += other;
        }
        if (first + lane < count) values[first + lane] = carry + sum - own;
        carry += __shfl_sync(kAll, sum, 31);
    }
    return carry;
}

// Reports rows for which there is no room; the host looks at it later. One thread.
__device__ __forceinline__ void report_overflow(const DispatchArguments& a, unsigned transfer, int rows) {
    Control* const control = a.control;
    if (load_acquire_system(&control->overflowed) != 0) return;
    control->overflow_rank = a.rank;
    control->overflow_rows = rows;
    control->overflow_capacity = a.max_slots;
    store_release_system(&control->overflowed, transfer);
}

// What the caller and the handle keep of the counts.
__device__ __forceinline__ void keep_counts(const DispatchArguments& a, const Arrivals& in,
                                            unsigned transfer, int thread, int threads) {
#pragma unroll 1
    for (int r = thread; r < kNumRanks; r += threads) {
        a.rows_from[r] = a.rows_from_out[r] = in.rows_from[r];
        a.first_row[r] = in.first_row[r];
        if (a.rows_received != nullptr) {
            a.rows_received[r] += in.rows_from[r];
            if (r != a.rank)
                a.bytes_received[r] +=
                    static_cast<long long>(in.rows_from[r]) * (a.row_bytes + a.scale_bytes);
        }
    }
#pragma unroll 1
    for (int e = thread; e < a.num_local; e += threads) {
        const int count = in.totals[e];
        a.tokens_per_expert[e] = a.counts_out[e] = count;
        if (a.tokens_stat != nullptr) a.tokens_stat[e] += count;
    }
    if (kExpanded && !kPadded)
#pragma unroll 1
        for (int e = thread; e <= a.num_local; e += threads) a.offsets_out[e] = in.starts[e];
#pragma unroll 1
    for (int i = thread; i < kNumRanks * a.num_local; i += threads) a.first_slot[i] = in.first_slot[i];
    const int rows = kExpanded && !kPadded ? in.starts[a.num_local] : in.total;
    if (thread == 0 && !kPadded && rows > a.max_slots) report_overflow(a, transfer, rows);
}

// How many rows come from a rank. Threads of one warp, each for ranks of its own.
__device__ __forceinline__ bool receive_heads(const DispatchArguments& a, Call& call, Arrivals& in) {
    char* const base = call.bases[a.rank];
    const unsigned long long began = a.longest_wait_ns != nullptr ? nanoseconds() : 0;
    bool fine = true;
#pragma unroll 1
    for (int r = threadIdx.x % 32; r < kNumRanks; r += 32) {
        unsigned long long* const row = count_word(base, call.watch.transfer, r, 0);
        unsigned head = a.signature, rows = 0;
        bool lost = is_masked(call, r);
        if (!lost) {
            // The pair is stored at once, but only single words are sure to be read so.
            Found found = wait_tagged(call, row + kRowsColumn, r, kPhaseReady, rows);
            if (found == kHere)
                found = wait_tagged(call, row + kHeadColumn, r, kPhaseReady, head);
            lost = found == kGone;
            fine &= found != kStop;
            if (fine && began && blockIdx.x == 0)
                atomicMax(&a.longest_wait_ns[r], static_cast<long long>(nanoseconds() - began));
        }
        if (lost) atomicOr(&call.masked[r / 32], 1u << r % 32);
        if (fine && !lost && head != a.signature) {
            report(call.watch, kPhaseAgreement, r, a.signature, head, 0, 0);
            fine = false;
        }
        in.rows_from[r] = lost ? 0 : rows;
    }
    if (!__all_sync(kAll, fine)) return false;
    int carry = 0, most = 0;
#pragma unroll 1
    for (int first = 0; first < kNumRanks; first += 32) {
        const int rank = first + threadIdx.x % 32;
        const int rows = rank < kNumRanks ? in.rows_from[rank] : 0;
        int sum = rows;
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(kAll, sum, distance);
            if (threadIdx.x % 32 >= distance) sum += other;
        }
        if (rank < kNumRanks) in.first_row[rank] = carry + sum - rows;
        carry += __shfl_sync(kAll, sum, 31);
        most = max(most, __reduce_max_sync(kAll, rows));
    }
    in.total = carry;
    in.most = most;
    return true;
}

// First slots of one local expert's rows, by source; one thread.
__device__ __forceinline__ bool receive_column(const DispatchArguments& a, Call& call, Arrivals& in, int expert) {
    constexpr int kAtOnce = kNumRanks < 8 ? kNumRanks : 8;  // loads under way together
    char* const base = call.bases[a.rank];
    int slot = kPadded ? expert * kNumRanks * kMaxTokens : 0;
    const int begin = slot;
    bool fine = true;
    for (int first = 0; first < kNumRanks; first += kAtOnce) {
        unsigned long long word[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            word[i] = first + i < kNumRanks
                          ? load_tagged(count_word(base, call.watch.transfer, first + i,
                                                   kFirstCountColumn + expert))
                          : 0;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int source = first + i;
            if (source >= kNumRanks) break;
            unsigned count = static_cast<unsigned>(word[i]);
            if (is_masked(call, source)) {
                count = 0;
            } else if (static_cast<unsigned>(word[i] >> 32) != call.watch.transfer) {
                const Found found = wait_tagged(
                    call,
                    count_word(base, call.watch.transfer, source, kFirstCountColumn + expert), source,
                    kPhaseReady, count);
                fine &= found != kStop;
                if (found == kGone) atomicOr(&call.masked[source / 32], 1u << source % 32);
                if (found != kHere) count = 0;
            }
            in.first_slot[source * a.num_local + expert] = slot;
            slot += count;
        }
    }
    in.totals[expert] = slot - begin;
    return fine;
}

// One warp of block 0: which ranks count as lost in this transfer.
__device__ __forceinline__ void tell_lost(const DispatchArguments& a, const Call& call) {
#pragma unroll 1
    for (int r = threadIdx.x % 32; r < kNumRanks; r += 32)
        atomicExch(&a.counters->decided[r], static_cast<unsigned long long>(call.watch.transfer) * 2 +
                                                is_masked(call, r));
}

// One warp of another block: waits for that. Block 0 ends its own waits.
__device__ __forceinline__ bool learn_lost(const DispatchArguments& a, Call& call) {
    bool fine = true;
#pragma unroll 1
    for (int r = threadIdx.x % 32; r < kNumRanks && fine; r += 32) {
        unsigned long long decided;
        while ((decided = load_tagged(&a.counters->decided[r])) / 2 != call.watch.transfer && fine)
            fine = !gave_up(call.watch);
        const unsigned bit = 1u << r % 32;
        if (decided & 1)
            atomicOr(&call.masked[r / 32], bit);
        else
            atomicAnd(&call.masked[r / 32], ~bit);
    }
    __threadfence();  // the counts that block 0 has seen are seen here
    return __all_sync(kAll, fine);
}

// The warps from `first_warp` on: slots of everything that will come. False: give up.
__device__ __forceinline__ bool receive_counts(const DispatchArguments& a, Call& call, Arrivals& in, int first_warp) {
    const int thread = threadIdx.x - first_warp * 32, threads = blockDim.x - first_warp * 32;
    // Slots depend on the counts of all ranks. So where a rank may be lost, one block decides for all which
    // are, once everything that the others have to say is here; then nobody waits any more.
#pragma unroll 1
    for (int pass = a.flags & kMaskLost ? 0 : 1; pass < 2; ++pass) {
        bool fine = true;
        if (pass == 0 && blockIdx.x != 0) {
            fine = thread >= 32 || learn_lost(a, call);
        } else {
            if (thread < 32) fine = receive_heads(a, call, in);
            const int waiting = threads == 32 ? 0 : 32;
#pragma unroll 1
            for (int e = thread < waiting ? a.num_local : thread - waiting; e < a.num_local;
                 e += threads - waiting)
                fine &= receive_column(a, call, in, e);
        }
        if (!fine) call.stopped = 1;
        meet(threads);
        if (pass == 0 && blockIdx.x == 0 && thread < 32) tell_lost(a, call);
    }
    if (call.stopped) return false;
    if (kExpanded && !kPadded) {
#pragma unroll 1
        for (int e = thread; e < a.num_local; e += threads) in.starts[e] = in.totals[e];
        meet(threads);
        if (thread < 32) {
            const int end = scan_groups(in.starts, a.num_local);
            if (thread == 0) in.starts[a.num_local] = end;
        }
        meet(threads);
#pragma unroll 1
        for (int i = thread; i < kNumRanks * a.num_local; i += threads)
            in.first_slot[i] += in.starts[i % a.num_local];
        meet(threads);
    }
    return true;
}

// What came beside a row: lane k learns where its choice goes (expanded layouts: the slot, others: the local
// expert), or -1; all lanes learn the token. Once for a row, with `keeps`, it is kept.
__device__ __forceinline__ Found receive_beside(const DispatchArguments& a, const Call& call, const Arrivals& in, int source,
                                                int position, bool keeps, int& target, int& token) {
    const int lane = threadIdx.x % 32;
    const int staged = source * kMaxTokens + position;
    const long long row = staged;
    Found found = kHere;
    unsigned code = 0, weight = 0;
    unsigned long long since = 0;
    const unsigned long long* const words =
        beside_words(call.bases[a.rank], call.watch.transfer, staged, min(lane, kTopk));
    ulonglong2 pair = load_tagged_pair(words);
    for (unsigned spins = 1;; ++spins) {
        const bool here = static_cast<unsigned>(pair.x >> 32) == call.watch.transfer &&
                          static_cast<unsigned>(pair.y >> 32) == call.watch.transfer;
        if (__all_sync(kAll, here)) break;
        pair = load_tagged_pair(words);
        if (spins % kSpinsBetweenLooks != 0) continue;
        if (lane == 0)
            found = look(call, kPhaseRow, source, call.watch.transfer, 0, position, since);
        found = static_cast<Found>(__shfl_sync(kAll, static_cast<int>(found), 0));
        if (found != kHere) break;
    }
    if (found == kHere) {
        code = static_cast<unsigned>(pair.x);
        weight = static_cast<unsigned>(pair.y);
    }
    int choice = -1;
    if (lane < kTopk && code != 0) {
        choice = static_cast<int>(code & 0xffffu) - 1;
        if (kExpanded) {
            choice = in.first_slot[source * a.num_local + choice] + static_cast<int>(code >> 16);
            if (choice >= a.max_slots) choice = kDropped;
        }
    }
    if (keeps && lane < kTopk) {
        const float value = choice < 0 ? 0.0f : __uint_as_float(weight);
        a.choices_of_row[row * kTopk + lane] = choice;
        a.weights_of_row[row * kTopk + lane] = value;
        const long long at = kLayoutIsRankMajor ? row : in.first_row[source] + position;
        if (!kExpanded && at < a.max_slots) {
            a.topk_ids[at * kTopk + lane] = choice;
            if (a.topk_weights != nullptr) a.topk_weights[at * kTopk + lane] = value;
        }
    }
    unsigned number = code;  // K < 32: lane K has the token
    if (kTopk >= 32 && lane == 0 && found == kHere)
        found = wait_tagged(call, beside_words(call.bases[a.rank], call.watch.transfer, staged, kTopk),
                            source, kPhaseRow, number);
    if (keeps && lane == kTopk % 32) a.tokens_of_row[row] = static_cast<int>(number);
    token = __shfl_sync(kAll, static_cast<int>(number), kTopk % 32);
    if (kTopk >= 32) found = static_cast<Found>(__shfl_sync(kAll, static_cast<int>(found), 0));
    target = choice;
    if (!kExpanded) {
        const int at = kLayoutIsRankMajor ? staged : in.first_row[source] + position;
        target = lane == 0 && at < a.max_slots ? at : -1;
    }
    return found;
}

// Four bytes of a row's scales to their place; the last may be fewer.
__device__ __forceinline__ void store_scale(const DispatchArguments& a, int slot, int word,
                                            unsigned value) {
    const int columns = a.scale_bytes / a.scale_item;
    long long at = static_cast<long long>(slot) * a.scale_bytes + word * 4;
    int step = 1;  // bytes from one byte to the next
    if (a.scale_stride != 0) {
        // Column by column: [group, column, slot of the group].
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

// Copies the scales of a row, word by word, to the slots that lanes hold.
__device__ __forceinline__ Found receive_scales(const DispatchArguments& a, const Call& call, int source, int position,
                                                int target, bool gone) {
    const int lane = threadIdx.x % 32;
    const int staged = source * kMaxTokens + position;
    unsigned* const words = reinterpret_cast<unsigned*>(
        staged_row(call.bases[a.rank], call.watch.transfer, staged) + kScalesAt);
    const unsigned* const escapes = escape_words(call.bases[a.rank], call.watch.transfer, staged);
    const unsigned targets = __ballot_sync(kAll, target >= 0);
#pragma unroll 1
    for (int first = 0; first * 4 < a.scale_bytes; first += 32) {
        const int word = first + lane;
        const bool exists = word * 4 < a.scale_bytes;
        unsigned value = 0;
        Found found = kHere;
        if (exists && !gone) {
            // The kernel's own packed scales belong to a step, those of the caller are sent at once.
            const unsigned* const escape = escapes + (a.scale_kind == kNotQuantized ? kMaxSteps : word);
            unsigned long long since = 0;
            for (unsigned spins = 1;; ++spins) {
                value = static_cast<unsigned>(load_fresh(reinterpret_cast<const int*>(words + word)));
                if (value != kNothing) break;
                if (spins % 16 != 0) continue;
                if (a.scale_kind != kFloatScales && a.scale_kind != kPowerScales &&
                    load_acquire_system(escape) == call.watch.transfer) {
                    value = static_cast<unsigned>(
                        load_fresh(reinterpret_cast<const int*>(words + word)));
                    break;
                }
                if (spins % kSpinsBetweenLooks != 0) continue;
                found = look(call, kPhaseRow, source, call.watch.transfer, 0, position, since);
                if (found != kHere) break;
            }
            words[word] = kNothing;
        }
        if (found == kGone) value = 0;
        if (__any_sync(kAll, found == kStop)) return kStop;
#pragma unroll 1
        for (unsigned left = targets; left; left &= left - 1) {
            const int slot = __shfl_sync(kAll, target, __ffs(left) - 1);
            if (exists) store_scale(a, slot, word, value);
        }
    }
    return kHere;
}

constexpr int kPlaceDepth = 4;

// One part of an arrival to all its slots. False: give up.
template <bool kQuantized>
__device__ __forceinline__ bool place_part(const DispatchArguments& a, const Call& call, const Arrivals& in, int source,
                                           int position, Steps range, bool is_first, bool is_last) {
    const int lane = threadIdx.x % 32;
    const int staged = source * kMaxTokens + position;
    char* const base = call.bases[a.rank];
    char* const row = staged_row(base, call.watch.transfer, staged);
    const unsigned* const escapes = escape_words(base, call.watch.transfer, staged);
    const bool own = takes_own_rows<kQuantized>(a) && source == a.rank;
    int target = -1, token = 0;
    unsigned targets = 0;
    bool gone = false;
#pragma unroll 1
    for (int first = range.first; first < range.last; first += kPlaceDepth) {
        Pieces<kPlaceDepth> pieces;
        if (!own) pieces.look_at(row, first, range.last, a.row_bytes);
        if (first == range.first) {  // while the first pieces are on their way
            const Found found =
                receive_beside(a, call, in, source, position, is_first, target, token);
            if (found == kStop) return false;
            gone = found == kGone;
            if (gone && kExpanded) target = -1;
            targets = __ballot_sync(kAll, target >= 0);
        }
        if (own) {
            pieces.look_at(a.x + static_cast<long long>(token) * a.input_bytes, first, range.last,
                           a.row_bytes);
        } else if (!gone) {
            const Found found = pieces.settle(call, row, escapes, first, source, position);
            if (found == kStop) return false;
            gone = found == kGone;
        }
        if (gone) pieces.clear();
#pragma unroll 1
        for (unsigned left = targets; left; left &= left - 1) {
            const int slot = __shfl_sync(kAll, target, __ffs(left) - 1);
            char* const to = a.tokens + static_cast<long long>(slot) * a.row_bytes;
#pragma unroll
            for (int i = 0; i < kPlaceDepth; ++i) {
                const int at = (first + i) * kStepBytes + lane * 16;
                if (first + i < range.last && at < a.row_bytes)
                    *reinterpret_cast<uint4*>(to + at) = pieces.piece[i];
            }
        }
        if (!own) pieces.put_back(row, first, range.last, a.row_bytes);
    }
    if (!is_last || a.scale_bytes == 0) return true;
    return receive_scales(a, call, source, position, target, gone) != kStop;
}

// Parts of rows, by whichever warp is free.
template <bool kQuantized>
__device__ __forceinline__ bool place_rows(const DispatchArguments& a, const Call& call, const Arrivals& in, int* next) {
    const int steps = (a.row_bytes + kStepBytes - 1) / kStepBytes;
    const int parts = parts_of(in.total, steps, blockDim.x / 32 * gridDim.x);
    const int items = in.most * kNumRanks * parts;
    const Divider by_parts(parts);
    for (int item = next_item(next); item < items; item = next_item(next)) {
        const int turn = by_parts(item), part = item - turn * parts;
        const int source = (turn + a.rank) % kNumRanks, position = turn / kNumRanks;
        if (position >= in.rows_from[source]) continue;
        if (!place_part<kQuantized>(a, call, in, source, position, steps_of(part, by_parts, steps),
                        part == 0, part == parts - 1))
            return false;
    }
    return true;
}

__device__ __forceinline__ void clear_choices(const DispatchArguments& a, long long slot) {
    const int lane = threadIdx.x % 32;
    if (lane >= kTopk) return;
    a.topk_ids[slot * kTopk + lane] = -1;
    if (a.topk_weights != nullptr) a.topk_weights[slot * kTopk + lane] = 0.0f;
}

// Slots that no row fills: ids and weights of deduplicated layouts, gaps between FLAT's groups.
__device__ __forceinline__ void clear_rest(const DispatchArguments& a, const Arrivals& in, int warp,
                                           int warps) {
    const int lane = threadIdx.x % 32;
    if (kLayoutIsRankMajor) {
#pragma unroll 1
        for (int slot = warp; slot < kNumRanks * kMaxTokens; slot += warps)
            if (slot % kMaxTokens >= in.rows_from[slot / kMaxTokens]) clear_choices(a, slot);
    } else if (!kExpanded) {
#pragma unroll 1
        for (int slot = in.total + warp; slot < a.max_slots; slot += warps) clear_choices(a, slot);
    } else if (!kPadded && kAlignment > 1) {
#pragma unroll 1
        for (int e = warp; e < a.num_local; e += warps) {
            const int begin = in.starts[e] + in.totals[e];
            const int end = min(in.starts[e + 1], a.max_slots);
            for (long long slot = begin; slot < end; ++slot) {
                for (int at = lane * 16; at < a.row_bytes; at += kStepBytes)
                    *reinterpret_cast<uint4*>(a.tokens + slot * a.row_bytes + at) =
                        make_uint4(0, 0, 0, 0);
#pragma unroll 1
                for (int i = lane; i < a.scale_bytes; i += 32) {
                    const int column = i / a.scale_item, byte = i % a.scale_item;
                    const long long at = a.scale_stride == 0
                                             ? slot * a.scale_bytes + i
                                             : (column * a.scale_stride + slot) * a.scale_item + byte;
                    a.scales_out[at] = 0;
                }
            }
        }
    }
}
