// Messages of a rail: what ranks of one number, one on every host, send each other for a chunk.
//
// A message to a host is `head_rows` rows that say which call it is of, then the chunk's rows. Rows
// are `rail_stride` bytes. Messages lie one behind the other, in the order of the hosts, without
// one for the own host. Where lengths cannot follow from counts, all have `message_bytes` bytes.
#pragma once

#include "ht/chunk.cuh"

namespace ht {

constexpr int kPeerCopies = kTopk < kNumPeers ? kTopk : kNumPeers;  // of a token in a host
constexpr int kHostCopies = kTopk < kNumHosts ? kTopk : kNumHosts;  // of a token, one per host

__device__ __forceinline__ int host_of_seat(int seat) { return seat / kNumPeers; }

template <typename Arguments>
__device__ __forceinline__ int own_host(const Arguments& a) {
    return host_of_seat(own_seat(a));
}

// The nth host that is not this one.
template <typename Arguments>
__device__ __forceinline__ int other_host(const Arguments& a, int nth) {
    return nth < own_host(a) ? nth : nth + 1;
}

// Tokens of this rank that go to a host, in the chunk.
template <typename Arguments>
__device__ __forceinline__ int rows_out(const Arguments& a, int host) {
    const int* const sent = a.sent + a.chunk * kNumHosts + host;
    return sent[kNumHosts] - sent[0];
}

// Tokens of the host's rank of this rail that come to this host, in the chunk.
template <typename Arguments>
__device__ __forceinline__ int rows_in(const Arguments& a, int host) {
    const int* const relayed = a.relayed + host * kBounds + a.chunk;
    return relayed[1] - relayed[0];
}

// Messages of a chunk. In shared memory.
struct Messages {
    int rows[kNumHosts];        // none for the own host
    long long at[kNumHosts];    // bytes before the first row of the chunk
    long long head[kNumHosts];  // bytes before the message
    int most;                   // rows of the longest one
};

// Every thread of the block. `rows_with(host)` is rows_out or rows_in.
template <typename Arguments, typename RowsWith>
__device__ __forceinline__ void load_messages(const Arguments& a, Messages& messages,
                                              const RowsWith& rows_with) {
    for (int h = threadIdx.x; h < kNumHosts; h += blockDim.x)
        messages.rows[h] = h == own_host(a) ? 0 : min(max(rows_with(h), 0), kChunkRows);
    __syncthreads();
    if (threadIdx.x == 0) {
        const long long stride = a.rail_stride;
        long long at = 0;
        messages.most = 0;
        for (int h = 0; h < kNumHosts; ++h) {
            messages.head[h] = at;
            messages.at[h] = at + a.head_rows * stride;
            messages.most = max(messages.most, messages.rows[h]);
            if (h == own_host(a)) continue;
            at += a.message_bytes ? a.message_bytes : (a.head_rows + messages.rows[h]) * stride;
        }
    }
    __syncthreads();
}

// A word of the header of this rank's messages. Transfers are counted inside a host; a message has
// the number of its chunk.
template <typename Arguments>
__device__ __forceinline__ int rail_word(const Arguments& a, const Watch& watch, int word) {
    return word == kCall ? a.chunk : header_word(a, watch, word);
}

// Writes the headers of this rank's messages. One block.
template <typename Arguments>
__device__ __forceinline__ void write_heads(const Arguments& a, const Watch& watch,
                                            const Messages& messages) {
    for (int i = threadIdx.x; i < kNumHosts * kHeaderWords; i += blockDim.x) {
        const int host = i / kHeaderWords, word = i % kHeaderWords;
        if (host == own_host(a)) continue;
        reinterpret_cast<int*>(a.rail_send + messages.head[host])[word] = rail_word(a, watch, word);
    }
}

// Whether all messages are of this very call. Every thread of the block.
template <typename Arguments>
__device__ __forceinline__ bool check_heads(const Arguments& a, const Watch& watch,
                                            const Messages& messages) {
    const auto word_of = [&](int host, int word) {
        return load_fresh(reinterpret_cast<const int*>(a.rail_receive + messages.head[host]) +
                          word);
    };
    bool same = true;
    for (int h = threadIdx.x; h < kNumHosts; h += blockDim.x) {
        if (h == own_host(a)) continue;
        same &= word_of(h, kStatus) == 0;
        for (int i :
             {kOperation, kCommunicator, kCall, kRowBytes, kMetadataBytes, kSubject, kMaker, kForm})
            same &= word_of(h, i) == rail_word(a, watch, i);
    }
    if (__syncthreads_and(same)) return true;
    if (threadIdx.x == 0)
        report_headers(watch, own_peer(a), [&](int rank, int word) {
            const int seat = seat_of(a, rank);
            // Of other hosts, what this rail says is known here.
            const bool known = seat % kNumPeers == own_peer(a) && host_of_seat(seat) != own_host(a);
            return known ? word_of(host_of_seat(seat), word) : rail_word(a, watch, word);
        });
    return false;
}

}  // namespace ht
