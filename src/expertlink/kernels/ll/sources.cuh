// Sources and peers. Sources are all ranks of the group: rows are counted and ordered by them.
// Peers are the ranks of this host, which write into each other's memory.
//
// With one host they are the same. With several, a launch also sends what has come on its rail: the
// tokens of the ranks with its index on the other hosts. So what belongs to a source has one writer
// here, the peer of its rail. A returned row has the slot of the rank on the row's host whose index
// is that of the peer that returns it.
#pragma once

namespace ll {

static_assert(kNumSources == kNumHosts * kNumPeers);

// The peer on whose rail a source is.
__device__ __forceinline__ int peer_of(int source) {
    if constexpr (kSpansHosts)
        return kPeerOf[source];
    else
        return source;
}

__device__ __forceinline__ int host_of(int source) {
    if constexpr (kSpansHosts)
        return kHostOf[source];
    else
        return 0;
}

// The rank of a host with the index of a peer.
__device__ __forceinline__ int source_of(int host, int peer) {
    if constexpr (kSpansHosts)
        return kRankAt[host * kNumPeers + peer];
    else
        return peer;
}

// Of a rank's slots at the peer of `source`, those for what belongs to that source.
__device__ __forceinline__ int returning_source(int source, int peer) {
    return source_of(host_of(source), peer);
}

// -- tokens that a launch sends -------------------------------------------------------------------
//
// With several hosts they are those of the whole rail: `bound` tokens of each host, in messages of
// `message_bytes` one behind the other. The own host's message is the last one. Tokens that a rank
// does not have choose no expert.

// Which host's tokens are in a message.
template <typename Arguments>
__device__ __forceinline__ int host_at(const Arguments& a, int message) {
    if constexpr (kSpansHosts)
        return message == kNumHosts - 1 ? a.host : message + (message >= a.host);
    else
        return 0;
}

// Which message a host's tokens are in.
template <typename Arguments>
__device__ __forceinline__ int message_of(const Arguments& a, int host) {
    if constexpr (kSpansHosts)
        return host == a.host ? kNumHosts - 1 : host - (host > a.host);
    else
        return 0;
}

// The rank whose tokens are in a message.
template <typename Arguments>
__device__ __forceinline__ int source_at(const Arguments& a, int message) {
    return source_of(host_at(a, message), a.rank);
}

// This rank.
template <typename Arguments>
__device__ __forceinline__ int own_source(const Arguments& a) {
    return source_at(a, kNumHosts - 1);
}

// A token by its place: the message that it is in, and its index there.
struct TokenAt {
    int message, index;
};

template <typename Arguments>
__device__ __forceinline__ TokenAt token_at(const Arguments& a, int token) {
    if constexpr (kSpansHosts) {
        const int message = token / a.bound;
        return {message, token - message * a.bound};
    } else {
        return {0, token};
    }
}

// Bytes from the first message's `first` of `bytes` to those of a token.
template <typename Arguments>
__device__ __forceinline__ long long offset_of(const Arguments& a, TokenAt at, int bytes) {
    const long long offset = static_cast<long long>(at.index) * bytes;
    if constexpr (kSpansHosts)
        return offset + at.message * a.message_bytes;
    else
        return offset;
}

}  // namespace ll
