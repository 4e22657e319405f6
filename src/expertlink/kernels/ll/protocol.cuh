// What the launches of mode `ll` share: numbers of transfers, and the memory that peers write.
//
// Rows carry their own arrival flag. Staging memory that nobody has written holds kSentinel in
// every word. A reader polls the row itself until no word of it is kSentinel, and puts kSentinel
// back. A sender whose data contain such a word writes an escape word, after a fence. Small words
// (counts, ids, weights) are stored together with the number of their transfer, eight bytes at a
// time, and need no putting back. docs/protocol/ll.md says who writes what and when.
#pragma once

#include "common/sync.cuh"
#include "common/words.cuh"
#include "ll/sources.cuh"

namespace ll {

constexpr unsigned kSentinel = kSentinelByte * 0x01010101u;
constexpr unsigned kAll = 0xffffffffu;  // lanes of a warp
constexpr int kRankWords = (kNumPeers + 31) / 32;

// Transfers are numbered 1 ... kLastNumber, then from 1 again. None is 0, which memory holds before
// anyone has written it. Neighbours never share a set. Differences modulo 2^32 say which of two
// numbers is the later one, unless 2^30 transfers lie between them.
static_assert(kLastNumber % kSets == 0);

__device__ __forceinline__ unsigned number_of(unsigned long long count) {
    return count <= kLastNumber ? static_cast<unsigned>(count)
                                : static_cast<unsigned>((count - 1) % kLastNumber) + 1;
}

constexpr int kUnitBits = 16;
constexpr unsigned long long kUnits = 1ull << kUnitBits;

// -- memory that peers write ----------------------------------------------------------------------

// Where a rank that waits for others shows now and then that it is alive.
__device__ __forceinline__ unsigned* alive_word(char* base, int rank) {
    return reinterpret_cast<unsigned*>(base + kAliveAt) + rank;
}

// The set of a transfer: rows are staged in kSets sets in turn.
__device__ __forceinline__ int set_of(unsigned transfer) { return transfer % kSets; }

// Staging slots: rows of a source lie in slots of its own, in the order of their tokens. Rows of
// exact sums have the slot of their token and choice, among those of the rank that sends them if
// ranks can be left out: one that comes back writes into no slot of others.
__device__ __forceinline__ int staging_slot(int source, int position) {
    return source * kRankSlots + position;
}

__device__ __forceinline__ int slot_of_choice(int rank, int token, int k) {
    return (kMaskLost ? rank * kRankSlots : 0) + token * kTopk + k;
}
static_assert(kRankSlots == (kExact && kMaskLost ? kMaxTokens * kTopk : kMaxTokens));
static_assert(!kSpansHosts || !(kExact || kMaskLost));

constexpr int kDropped = -2;  // slot of a choice whose row found no room; reported as overflow

// Tagged word: a column of the count row of a source.
__device__ __forceinline__ unsigned long long* count_word(char* base, unsigned transfer, int source,
                                                          int column) {
    return reinterpret_cast<unsigned long long*>(base + kCountsAt) +
           (static_cast<long long>(set_of(transfer)) * kNumSources + source) * kCountWords + column;
}

// Pair of tagged words: metadata of choice k of the row in a slot.
__device__ __forceinline__ unsigned long long* metadata_words(char* base, unsigned transfer,
                                                              int slot, int k) {
    return reinterpret_cast<unsigned long long*>(base + kMetadataAt) +
           ((static_cast<long long>(set_of(transfer)) * kSlots + slot) * (kTopk + 1) + k) * 2;
}

__device__ __forceinline__ char* staged_row(char* base, unsigned transfer, int slot) {
    return base + kRowsAt + (static_cast<long long>(set_of(transfer)) * kSlots + slot) * kRowStride;
}

// Escape words: one for each step of a row, and one for its scales.
__device__ __forceinline__ unsigned* escape_words(char* base, unsigned transfer, int slot) {
    return reinterpret_cast<unsigned*>(base + kEscapesAt) +
           (static_cast<long long>(set_of(transfer)) * kSlots + slot) * (kMaxSteps + 1);
}

// -- stores and loads -----------------------------------------------------------------------------

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

__device__ __forceinline__ bool has_sentinel(const uint4& piece) {
    return piece.x == kSentinel || piece.y == kSentinel || piece.z == kSentinel ||
           piece.w == kSentinel;
}

__device__ __forceinline__ uint4 sentinel_piece() {
    return make_uint4(kSentinel, kSentinel, kSentinel, kSentinel);
}

// -- a launch -------------------------------------------------------------------------------------

// What the slow path of a wait needs beyond its Watch.
struct WaitPolicy {
    Counters* counters;
    long long* longest_wait_ns;  // [G] statistics, or null
};

// Static shared memory of a block. What waits need is there too: it would take many registers.
struct Call {
    Watch watch;
    WaitPolicy policy;
    char* bases[kNumPeers];
    unsigned masked[kRankWords];  // bit p: peer p is masked
    unsigned sending, receiving;  // transfers of this launch's halves
    unsigned received;            // the last one whose rows this rank has put back
    int stopped;                  // not 0: a wait was ended
};

__device__ __forceinline__ bool is_masked(const Call& call, int peer) {
    return call.masked[peer / 32] >> (peer % 32) & 1u;
}

}  // namespace ll
