// Which rows a transfer moves. On one host: all rows of a call, from all sources. Across hosts: a
// chunk, which is a range of every source's tokens, either of the sources of this host or of the
// others. Rows of other hosts come from the peer that has the source's number on its host.
#pragma once

#include "ht/ring.cuh"

namespace ht {

constexpr int kBounds = kNumChunks + 1;  // of chunks: where each begins, and where the last ends

// Sources that are on other hosts. (1 where there are none: it divides.)
constexpr int kNumOthers = kSpansHosts ? kNumSources - kNumPeers : 1;

// A count row goes on behind its columns: for each chunk but the first it says how many rows the
// chunks before have for each rank and for each host.
constexpr int kBoundWords = kNumSources + kNumHosts;

__device__ __forceinline__ int bounds_at(int chunk) {
    return kCountWords + (chunk - 1) * kBoundWords;
}

struct TokenRange {
    int begin, end;
};

// Rows of every source, by its seat. In shared memory.
struct Sources {
    int rows[kNumSources];                      // that this transfer brings
    int before[kSpansHosts ? kNumSources : 1];  // that earlier chunks brought
};

// A row of a transfer: the seat of its source, and its index among those that the source sends.
struct Turn {
    int seat, index;
};

template <typename Arguments>
__device__ __forceinline__ bool is_of_own_host(const Arguments& a, int seat) {
    return seat / kNumPeers == own_seat(a) / kNumPeers;
}

template <typename Arguments>
__device__ __forceinline__ void load_source(const Arguments& a, Sources& sources, int seat) {
    if constexpr (kSpansHosts) {
        const int* const before = a.rows_before + seat * kBounds + a.chunk;
        const bool moves = is_of_own_host(a, seat) == ((a.flags & kWithinHost) != 0);
        sources.before[seat] = before[0];
        sources.rows[seat] = moves ? before[1] - before[0] : 0;
    } else {
        sources.rows[seat] = load_fresh(&a.rows_from[seat]);
    }
}

// Sources of a transfer.
template <typename Arguments>
__device__ __forceinline__ int num_sources(const Arguments& a) {
    if constexpr (kSpansHosts) return a.flags & kWithinHost ? kNumPeers : kNumOthers;
    return kNumSources;
}

// The nth row of a transfer, in the order in which rows are sent: the first one of every source,
// the second one, and so on. Every rank begins with another source.
template <typename Arguments>
__device__ __forceinline__ Turn turn_at(const Arguments& a, int nth) {
    if constexpr (kSpansHosts) {
        const int first = own_seat(a) - own_peer(a);  // seat of this host
        if (a.flags & kWithinHost)
            return {first + (nth + own_peer(a)) % kNumPeers, nth / kNumPeers};
        const int other = (nth + own_seat(a)) % kNumOthers;
        return {other < first ? other : other + kNumPeers, nth / kNumOthers};
    } else {
        return {(nth + a.rank) % kNumSources, nth / kNumSources};
    }
}

// The slot, among those of its writer, for the nth row of a source in a transfer.
__device__ __forceinline__ int writer_slot(int seat, int index) {
    return kSpansHosts ? seat / kNumPeers * kChunkRows + index : index;
}

// The slot of a row that a source's peer has staged here.
__device__ __forceinline__ int staged_slot(int seat, int index) {
    return (kSpansHosts ? seat % kNumPeers : seat) * kWriterSlots + writer_slot(seat, index);
}

// The tokens of this rank whose rows this transfer sends.
template <typename Arguments>
__device__ __forceinline__ TokenRange tokens_of_chunk(const Arguments& a) {
    if constexpr (kSpansHosts)
        return {min(a.chunk_begin, a.num_tokens), min(a.chunk_end, a.num_tokens)};
    return {0, a.num_tokens};
}

// Where a row of this host's own token goes, of which `code` is rank * kMaxTokens + position:
// peer * kWriterSlots + slot there, or -1 for a rank of another host.
template <typename Arguments>
__device__ __forceinline__ int chunk_code(const Arguments& a, int code) {
    const int seat = seat_of(a, code / kMaxTokens), peer = seat % kNumPeers;
    const int host = own_seat(a) / kNumPeers;
    if (seat / kNumPeers != host) return -1;
    const int before = a.relayed_before[(host * kBounds + a.chunk) * kNumPeers + peer];
    return peer * kWriterSlots + writer_slot(seat, code % kMaxTokens - before);
}

}  // namespace ht
