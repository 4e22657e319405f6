// Low latency: what a call's launches share. Numbers of transfers, memory that peers write, and waits.
//
// Rows carry their own arrival flag. Staging memory that nobody has written holds kNothing in every
// word; a reader polls the row itself until no word of it is kNothing, and puts kNothing back. A
// sender whose data contain such a word says so with an escape word, after a fence. Small words (counts,
// ids, weights) are stored together with the number of their transfer, eight bytes at a time, and
// need no putting back. docs/architecture.md, "Low latency", says who writes what and when.
#pragma once

#include "common/sync.cuh"

constexpr unsigned kNothing = 0xffffffffu;
constexpr unsigned kAll = 0xffffffffu;  // lanes of a warp
constexpr int kStepBytes = 512;         // of a row that a warp moves at once: 16 in every lane
constexpr int kRankWords = (kNumRanks + 31) / 32;

// Device memory of one rank, zeroed at start. `sent` and `received` count launches in units: each adds
// exactly kUnits, a part by every block once it has read them. So all blocks of a launch read
// the same number of launches, however late they start, and none has to wait for the last.
struct Counters {
    unsigned long long sent;
    unsigned long long received;
    unsigned long long decided[kNumRanks];   // transfer * 2 + whether the rank counts as lost in it
    unsigned long long heard_at[kNumRanks];  // when the rank was last seen to be alive
    unsigned heard[kNumRanks];               // what it said then
    unsigned masked[kNumRanks];              // not 0: neither sent to nor waited for
};

constexpr int kUnitBits = 16;
constexpr unsigned long long kUnits = 1ull << kUnitBits;

// -- memory that peers write ------------------------------------------------------------------------

__device__ __forceinline__ unsigned* ready_word(char* base, int rank) {
    return reinterpret_cast<unsigned*>(base + kReadyAt) + rank;
}

__device__ __forceinline__ unsigned* credit_word(char* base, int rank) {
    return reinterpret_cast<unsigned*>(base + kCreditsAt) + rank;
}

// A rank that waits for others says now and then that it is there.
__device__ __forceinline__ unsigned* alive_word(char* base, int rank) {
    return reinterpret_cast<unsigned*>(base + kAliveAt) + rank;
}

// Rows are staged in kSets sets in turn.
__device__ __forceinline__ int set_of(unsigned transfer) { return transfer % kSets; }

constexpr int kDropped = -2;  // slot of a choice for whose row there was no room; that is reported

enum CountColumn { kHeadColumn, kRowsColumn, kFirstCountColumn };

// Tagged word: what `rank` says in its count row.
__device__ __forceinline__ unsigned long long* count_word(char* base, unsigned transfer, int rank,
                                                          int column) {
    return reinterpret_cast<unsigned long long*>(base + kCountsAt) +
           (static_cast<long long>(set_of(transfer)) * kNumRanks + rank) * kCountWords + column;
}

// Pair of tagged words: what belongs to choice k of the row in a slot.
__device__ __forceinline__ unsigned long long* beside_words(char* base, unsigned transfer, int slot,
                                                            int k) {
    return reinterpret_cast<unsigned long long*>(base + kBesideAt) +
           ((static_cast<long long>(set_of(transfer)) * kSlots + slot) * (kTopk + 1) + k) * 2;
}

__device__ __forceinline__ char* staged_row(char* base, unsigned transfer, int slot) {
    return base + kRowsAt +
           (static_cast<long long>(set_of(transfer)) * kSlots + slot) * kRowStride;
}

// Word for each step of a row, and one for its scales.
__device__ __forceinline__ unsigned* escape_words(char* base, unsigned transfer, int slot) {
    return reinterpret_cast<unsigned*>(base + kEscapesAt) +
           (static_cast<long long>(set_of(transfer)) * kSlots + slot) * (kMaxSteps + 1);
}

// -- stores and loads -------------------------------------------------------------------------------

__device__ __forceinline__ unsigned long long tagged(unsigned transfer, unsigned value) {
    return static_cast<unsigned long long>(transfer) << 32 | value;
}

__device__ __forceinline__ void store_tagged(unsigned long long* word, unsigned transfer,
                                             unsigned value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(tagged(transfer, value))
                 : "memory");
}

__device__ __forceinline__ void store_tagged_pair(unsigned long long* words, unsigned transfer,
                                                  unsigned first, unsigned second) {
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(words),
                 "l"(tagged(transfer, first)), "l"(tagged(transfer, second))
                 : "memory");
}

__device__ __forceinline__ unsigned long long load_tagged(const unsigned long long* word) {
    unsigned long long value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}

__device__ __forceinline__ ulonglong2 load_tagged_pair(const unsigned long long* words) {
    ulonglong2 value;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(value.x), "=l"(value.y)
                 : "l"(words)
                 : "memory");
    return value;
}

__device__ __forceinline__ void store_piece(char* to, const uint4& piece) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(piece.x),
                 "r"(piece.y), "r"(piece.z), "r"(piece.w)
                 : "memory");
}

__device__ __forceinline__ uint4 load_piece(const char* from) {
    uint4 piece;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
                 : "l"(from)
                 : "memory");
    return piece;
}

__device__ __forceinline__ bool holds_nothing(const uint4& piece) {
    return piece.x == kNothing || piece.y == kNothing || piece.z == kNothing || piece.w == kNothing;
}

__device__ __forceinline__ uint4 nothing() { return make_uint4(kNothing, kNothing, kNothing, kNothing); }

// -- a launch ---------------------------------------------------------------------------------------

// What a slow wait needs beside its Watch.
struct Patience {
    Counters* counters;
    long long* longest_wait_ns;  // [R] statistics, or null
    bool masks_lost;
};

// Static shared memory of a block. What waits need is there too: it would take many registers.
struct Call {
    Watch watch;
    Patience patience;
    char* bases[kNumRanks];
    unsigned masked[kRankWords];  // bit r: rank r is masked
    unsigned sending, receiving;  // transfers of this launch's halves
    int stopped;                  // not 0: give up
};

__device__ __forceinline__ bool is_masked(const Call& call, int rank) {
    return call.masked[rank / 32] >> (rank % 32) & 1u;
}

// Every thread: reads what this launch is. `prepare` needs nothing that an earlier launch has written, so
// it may run beside that one's end; `loads` start right after it. False: an earlier wait has expired.
template <typename Arguments, typename Prepare, typename Loads>
__device__ __forceinline__ bool begin_call(const Arguments& a, Call& call, const Prepare& prepare,
                                           const Loads& loads) {
    const bool is_last = threadIdx.x == blockDim.x - 1;
    char* const base = is_last ? a.bases[a.rank] : nullptr;
#pragma unroll 1
    for (int rank = threadIdx.x; rank < kNumRanks; rank += blockDim.x)
        call.bases[rank] = a.bases[rank];
    prepare();
    wait_for_predecessor();
    unsigned long long sent = 0, received = 0;
    if (is_last) {
        sent = load_tagged(&a.counters->sent);
        received = load_tagged(&a.counters->received);
        call.stopped = load_fresh(reinterpret_cast<const int*>(&a.state->failed)) != 0;
    }
    loads();
    const int lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
#pragma unroll 1
        for (int word = 0; word < kRankWords; ++word) {
            const int rank = word * 32 + lane;
            const bool masked = rank < kNumRanks && load_fresh(reinterpret_cast<const int*>(
                                                        &a.counters->masked[rank])) != 0;
            const unsigned bits = __ballot_sync(kAll, masked);
            if (lane == 0) call.masked[word] = bits;
        }
    }
    if (is_last) {
        call.sending = static_cast<unsigned>(sent >> kUnitBits) + 1;
        call.receiving = static_cast<unsigned>(received >> kUnitBits) + 1;
        call.watch = {a.state, a.control, a.flags & kSend ? call.sending : call.receiving,
                      static_cast<unsigned>(a.operation), ready_word(base, 0), a.rank, a.counters->masked};
        call.patience = {a.counters, a.longest_wait_ns, (a.flags & kMaskLost) != 0};
        // After the loads, so that no block of this launch can read the next number.
        const unsigned long long part = blockIdx.x == 0 ? kUnits - (gridDim.x - 1) : 1;
        if (a.flags & kSend) atomicAdd(&a.counters->sent, part);
        if (a.flags & kReceive) atomicAdd(&a.counters->received, part);
    }
    __syncthreads();
    // The next launch may take its place on the GPU; it waits for the end of this one.
    let_follower_start();
    return !call.stopped;
}

// Block 0, one warp: tells all peers where this rank is. The launches before are over, so the rows of
// all transfers before `receiving` have been read and their memory put back.
template <typename Arguments>
__device__ __forceinline__ void say_where(const Arguments& a, const Call& call) {
    if (blockIdx.x != 0 || threadIdx.x >= 32) return;
#pragma unroll 1
    for (int step = threadIdx.x; step < kNumRanks; step += 32) {
        const int peer = (a.rank + step) % kNumRanks;
        if (is_masked(call, peer)) continue;
        store_release_system(credit_word(call.bases[peer], a.rank), call.receiving - 1);
        if (a.flags & kSend)
            store_relaxed_system(ready_word(call.bases[peer], a.rank), call.sending);
    }
}

// -- waits ------------------------------------------------------------------------------------------

enum Found { kHere, kGone, kStop };  // came; its rank is masked; give up

// What is not inlined takes structs by value and returns one word: pointers would cost a stack.
constexpr unsigned long long kLookedGone = 1, kLookedStop = 2;

// A rank that is only waiting itself must not be taken for lost: tells all peers that this one is there,
// and returns when the awaited one was last heard of.
__device__ __noinline__ unsigned long long listen(const Call* call, int peer, unsigned long long now) {
    const int rank = call->watch.rank;
    Counters* const counters = call->patience.counters;
    for (int r = 0; r < kNumRanks; ++r)
        store_relaxed_system(alive_word(call->bases[r], rank), static_cast<unsigned>(now));
    const unsigned said = load_relaxed_system(alive_word(call->bases[rank], peer));
    // Several warps may do this at once, with the same outcome.
    if (said != load_relaxed_system(&counters->heard[peer])) {
        store_relaxed_system(&counters->heard[peer], said);
        atomicExch(&counters->heard_at[peer], now);
    }
    return load_tagged(&counters->heard_at[peer]);
}

// The slow half of a wait, by one lane or several alike: when it began, or that it is over.
__device__ __noinline__ unsigned long long look_slowly(const Call* call, Phase phase, int peer,
                                                       unsigned expected, unsigned seen, int index,
                                                       unsigned long long since) {
    const Watch& watch = call->watch;
    const Patience& patience = call->patience;
    if (load_relaxed_system(&watch.masked[peer]) != 0) return kLookedGone;
    if (gave_up(watch)) return kLookedStop;
    const unsigned long long now = nanoseconds();
    if (since == 0) since = now;
    const unsigned long long limit =
        *reinterpret_cast<volatile unsigned long long*>(&watch.control->timeout_ns);
    unsigned long long quiet_since = since;
    if (patience.masks_lost) quiet_since = max(since, listen(call, peer, now));
    if (now - min(now, quiet_since) < limit) return since;
    if (patience.masks_lost && peer != watch.rank) {
        // Whoever waits for this rank learns it at the next look.
        atomicExch(&patience.counters->masked[peer], 1u);
        return kLookedGone;
    }
    report(watch, phase, peer, expected, seen, index, now - since);
    return kLookedStop;
}

__device__ __forceinline__ Found look(const Call& call, Phase phase, int peer, unsigned expected,
                                      unsigned seen, int index, unsigned long long& since) {
    since = look_slowly(&call, phase, peer, expected, seen, index, since);
    return since == kLookedGone ? kGone : since == kLookedStop ? kStop : kHere;
}

// Waits for a word that carries its transfer: what it carries, with what was found above it.
__device__ __noinline__ unsigned long long wait_slowly(const Call* call,
                                                       const unsigned long long* word, int peer,
                                                       Phase phase) {
    const unsigned transfer = call->watch.transfer;
    long long* const longest = call->patience.longest_wait_ns;
    const unsigned long long began = nanoseconds();
    unsigned long long since = 0, result = 0;
    for (unsigned spins = 1;; ++spins) {
        const unsigned long long now = load_tagged(word);
        if (static_cast<unsigned>(now >> 32) == transfer) {
            result = tagged(kHere, static_cast<unsigned>(now));
            break;
        }
        if (spins % kSpinsBetweenLooks != 0) continue;
        since = look_slowly(call, phase, peer, transfer, static_cast<unsigned>(now >> 32), 0, since);
        if (since == kLookedGone || since == kLookedStop) {
            result = tagged(since == kLookedGone ? kGone : kStop, 0);
            break;
        }
    }
    if (longest != nullptr)
        atomicMax(&longest[peer], static_cast<long long>(nanoseconds() - began));
    return result;
}

// One lane for itself.
__device__ __forceinline__ Found wait_tagged(const Call& call, const unsigned long long* word, int peer,
                                             Phase phase, unsigned& value) {
    unsigned long long now = load_tagged(word);
    Found found = kHere;
    if (static_cast<unsigned>(now >> 32) != call.watch.transfer) {
        now = wait_slowly(&call, word, peer, phase);
        found = static_cast<Found>(now >> 32);
    }
    value = static_cast<unsigned>(now);
    return found;
}

// Peers have read what this rank sent kSets transfers ago. One warp; false: give up.
__device__ __forceinline__ bool peers_have_room(const Call& call) {
    const int rank = call.watch.rank;
    const unsigned wanted = call.watch.transfer - kSets;
    bool fine = true;
#pragma unroll 1
    for (int peer = threadIdx.x % 32; peer < kNumRanks; peer += 32) {
        if (is_masked(call, peer)) continue;
        const unsigned* const word = credit_word(call.bases[rank], peer);
        unsigned long long since = 0;
        for (unsigned spins = 1;; ++spins) {
            const unsigned now = load_acquire_system(word);
            if (reached(now, wanted)) break;
            if (spins % kSpinsBetweenLooks != 0) continue;
            const Found found = look(call, kPhaseCredit, peer, wanted, now, 0, since);
            if (found == kStop) fine = false;
            if (found != kHere) break;
        }
    }
    return __all_sync(kAll, fine);
}

// Pieces of a staged row as they come in: kDepth steps of one lane's 16 bytes.
template <int kDepth>
struct Pieces {
    uint4 piece[kDepth];

    // First look at the steps from `first` on; those beyond `bytes` do not exist.
    __device__ __forceinline__ void look_at(const char* row, int first, int last, int bytes) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            const int at = (first + i) * kStepBytes + lane * 16;
            piece[i] = make_uint4(0, 0, 0, 0);
            if (first + i < last && at < bytes) piece[i] = load_piece(row + at);
        }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kDepth; ++i) piece[i] = make_uint4(0, 0, 0, 0);
    }

    // Waits until all of them are here; the warp finds the same.
    __device__ __forceinline__ Found settle(const Call& call, const char* row, const unsigned* escapes,
                                            int first, int peer, int index) {
        unsigned missing = 0;
#pragma unroll
        for (int i = 0; i < kDepth; ++i)
            if (holds_nothing(piece[i])) missing |= 1u << i;
        if (!__any_sync(kAll, missing)) return kHere;
        return poll(call, row, escapes, first, missing, peer, index);
    }

    __device__ __forceinline__ Found poll(const Call& call, const char* row, const unsigned* escapes,
                                          int first, unsigned missing, int peer, int index) {
        const int lane = threadIdx.x % 32;
        unsigned long long since = 0;
        long long* const longest = call.patience.longest_wait_ns;
        const unsigned long long began = longest != nullptr ? nanoseconds() : 0;
        Found found = kHere;
        // Looks keep the memory system from what is awaited: only one step is looked at until it is here,
        // then all.
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
            // The data themselves may look like nothing; then the sender has said that they are here.
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
            atomicMax(&longest[peer],
                      static_cast<long long>(nanoseconds() - began));
        return found;
    }

    // The memory is free again; who may write it next has to be told first.
    __device__ __forceinline__ void put_back(char* row, int first, int last, int bytes) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            const int at = (first + i) * kStepBytes + lane * 16;
            if (first + i < last && at < bytes) *reinterpret_cast<uint4*>(row + at) = nothing();
        }
    }
};

// After stores of a warp to a peer: bit i of `steps` says that the data of step `first` + i look like
// nothing; the same in all lanes.
__device__ __forceinline__ void escape_steps(unsigned* escapes, unsigned transfer, int first,
                                             unsigned steps) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    fence_system();  // the word says that all lanes' bytes are there
    if (steps >> lane & 1u) store_relaxed_system(escapes + first + lane, transfer);
}

// -- rows to peers ----------------------------------------------------------------------------------

// Steps of a warp to the row of a peer.
template <int kDepth>
__device__ __forceinline__ void store_steps(char* row, const uint4 (&piece)[kDepth], int first, int last,
                                            int bytes) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
        if (first + i >= last) break;
        const int at = (first + i) * kStepBytes + lane * 16;
        if (at < bytes) store_piece(row + at, piece[i]);
    }
}

// The same in all lanes: steps whose data look like nothing.
template <int kDepth>
__device__ __forceinline__ unsigned strange_steps(const uint4 (&piece)[kDepth], int first, int last) {
    unsigned strange = 0;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
        if (first + i >= last) break;
        if (holds_nothing(piece[i])) strange |= 1u << i;
    }
    return __reduce_or_sync(kAll, strange);
}

// -- shares of the work -----------------------------------------------------------------------------

// Items of a half are dealt out to the blocks in turn, and inside a block to whoever is free.
__device__ __forceinline__ int next_item(int* counter) {
    int taken = 0;
    if (threadIdx.x % 32 == 0) taken = atomicAdd(counter, 1);
    return __shfl_sync(kAll, taken, 0) * gridDim.x + blockIdx.x;
}

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

__device__ __forceinline__ Steps steps_of(int part, const Divider& parts, int steps) {
    return {parts(part * steps), parts((part + 1) * steps)};
}

constexpr int kMostSteps = 8;  // of a part: the last ones to be begun must not take long

// Into how many parts rows are cut, so that there is work for all warps.
__device__ __forceinline__ int parts_of(int rows, int steps, int warps) {
    if (rows == 0 || steps == 0) return 1;
    return max((steps + kMostSteps - 1) / kMostSteps, min(steps, Divider(rows)(warps)));
}
