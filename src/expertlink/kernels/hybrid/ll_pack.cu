// ll::pack: what a rank sends on its rail in a dispatch of few tokens: a message for every host.
//
// A message has a header (MessageWord), ids and weights of the tokens, their scales, their rows,
// each where PackArguments say. Ids of experts of other hosts are -1, so are those of tokens that
// the rank does not have. Rows are written for the hosts that they go to. The own host's message
// goes to where the others are received.

#include "hybrid/rail_words.cuh"
#include "ll/send.cuh"

namespace ll {

__device__ __forceinline__ char* message_at(const PackArguments& a, int message) {
    return message == kNumHosts - 1 ? a.own : a.send + message * a.message_bytes;
}

// The rank that has the expert of a choice, or -1.
__device__ __forceinline__ int rank_of_choice(const PackArguments& a, int number) {
    const long long id = a.flags & kWideIds ? static_cast<const long long*>(a.ids)[number]
                                            : static_cast<const int*>(a.ids)[number];
    return id >= 0 && id < kNumExperts ? a.rank_of_expert[id] : -1;
}

// Bit m: a token goes to the host of message m. The same in all lanes.
__device__ __forceinline__ unsigned messages_of(const PackArguments& a, int token) {
    const int lane = threadIdx.x % 32;
    const int rank = lane < kTopk ? rank_of_choice(a, token * kTopk + lane) : -1;
    return __reduce_or_sync(kAll, rank < 0 ? 0u : 1u << message_of(a, host_of(rank)));
}

// Headers, one lane for each message. One warp.
__device__ __forceinline__ void write_headers(const PackArguments& a) {
    const unsigned subject = load_subject(a);
#pragma unroll 1
    for (int message = threadIdx.x % 32; message < kNumHosts; message += 32) {
        unsigned* const said = reinterpret_cast<unsigned*>(message_at(a, message));
        said[kMessageSignature] = a.signature;
        said[kMessageSubject] = subject;
        said[kMessageCommunicator] = a.communicator;
        said[kMessageOverflow] = load_relaxed_system(&a.state->overflow);
        said[kMessageOverflowRows] = load_relaxed_system(&a.state->overflow_rows);
        said[kMessageRoom] = load_relaxed_system(&a.state->overflow_room);
    }
    if (threadIdx.x % 32 != 0) return;
    atomicAdd(a.under_way, 1u);
    // Nothing between here and the rail waits for a rank.
    if (a.mark_counter != nullptr) count_step(a.mark_counter, a.mark_word);
}

// Ids and weights, to all messages, and the handle's copies. All threads.
__device__ __forceinline__ void write_choices(const PackArguments& a) {
    const int choices = a.bound * kTopk, own = a.num_tokens * kTopk;
#pragma unroll 1
    for (int number = blockIdx.x * blockDim.x + threadIdx.x; number < choices;
         number += gridDim.x * blockDim.x) {
        const bool exists = number < own, weighted = exists && a.flags & kNewWeights;
        const int rank = exists ? rank_of_choice(a, number) : -1;
        const int goes = rank < 0 ? -1 : message_of(a, host_of(rank));
        const float weight = weighted ? a.weights[number] : 0.0f;
        int id = -1;
        if (exists && a.flags & kWideIds) {
            const long long wide = static_cast<const long long*>(a.ids)[number];
            static_cast<long long*>(a.ids_copy)[number] = wide;
            id = static_cast<int>(wide);
        } else if (exists) {
            id = static_cast<const int*>(a.ids)[number];
            static_cast<int*>(a.ids_copy)[number] = id;
        }
        if (weighted) a.weights_copy[number] = weight;
#pragma unroll 1
        for (int message = 0; message < kNumHosts; ++message) {
            char* const to = message_at(a, message);
            reinterpret_cast<int*>(to + a.ids_at)[number] = message == goes ? id : -1;
            reinterpret_cast<float*>(to + a.weights_at)[number] = weight;
        }
    }
}

// How many rows go to each rank, for the handle and statistics. One block.
__device__ __forceinline__ void count_rows(const PackArguments& a) {
    __shared__ int rows[kNumSources];
    for (int rank = threadIdx.x; rank < kNumSources; rank += blockDim.x) rows[rank] = 0;
    __syncthreads();
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int token = threadIdx.x / 32; token < a.num_tokens; token += blockDim.x / 32) {
        const int rank = lane < kTopk ? rank_of_choice(a, token * kTopk + lane) : -1;
        const unsigned same = __match_any_sync(kAll, rank);
        if (rank >= 0 && lane == __ffs(same) - 1) atomicAdd(&rows[rank], 1);
    }
    __syncthreads();
    for (int rank = threadIdx.x; rank < kNumSources; rank += blockDim.x) {
        a.rows_to[rank] = rows[rank];
        if (a.rows_sent == nullptr) continue;
        a.rows_sent[rank] += rows[rank];
        // To ranks of this host go rows, to those of the rail messages of one size.
        if (host_of(rank) != a.host && peer_of(rank) == a.rank)
            a.bytes_sent[rank] += a.message_bytes;
        if (host_of(rank) == a.host && peer_of(rank) != a.rank)
            a.bytes_sent[rank] +=
                static_cast<long long>(rows[rank]) * (a.row_bytes + a.scale_bytes);
    }
}

// Copies the scales that the caller made of a token. One warp.
__device__ __forceinline__ void copy_scales(const PackArguments& a, char* to, int token) {
    const char* const from = a.scales + static_cast<long long>(token) * a.scale_bytes;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < a.scale_bytes; i += 32) to[i] = from[i];
}

// Rows, in parts, to the messages of their hosts; quantized on the way with kQuantized. All warps.
template <bool kQuantized>
__device__ __forceinline__ void write_rows(const PackArguments& a) {
    constexpr int kDepth = Part<kQuantized>::kDepth;
    const int warps = blockDim.x / 32 * gridDim.x;
    if (a.num_tokens == 0) return;
    const Cut cut(a.num_tokens, a.row_bytes, warps, kDepth);
#pragma unroll 1
    for (int item = first_item(); item < a.num_tokens * cut.parts; item += warps) {
        const int token = item / cut.parts, number = item - token * cut.parts;
        const StepRange steps = cut.part(number);
        const LanePieces mine = lane_pieces(steps.first, steps.last, a.row_bytes);
        Part<kQuantized> part;
        part.load(a.x + static_cast<long long>(token) * a.input_bytes, mine);
        unsigned messages = messages_of(a, token);
        PartScales scales;
        if constexpr (kQuantized) {
            float scale[kDepth];
            quantize_pieces(part.piece, part.rest, a.scale_kind, scale);
            scales.gather(scale, steps.first, steps.last - steps.first,
                          a.scale_kind == kPackedScales);
        }
#pragma unroll 1
        for (; messages; messages &= messages - 1) {
            char* const to = message_at(a, __ffs(messages) - 1);
            write_steps(to + a.rows_at + static_cast<long long>(token) * a.row_bytes, part.piece,
                        mine);
            char* const beside = to + a.scales_at + static_cast<long long>(token) * a.scale_bytes;
            if (kQuantized && scales.index >= 0)
                reinterpret_cast<unsigned*>(beside)[scales.index] = scales.word;
            if (!kQuantized && a.scales != nullptr && number == cut.parts - 1)
                copy_scales(a, beside, token);
        }
    }
}

template <bool kQuantized>
__device__ __forceinline__ void pack_rank(const PackArguments& a) {
    wait_for_predecessor();
    if (blockIdx.x == 0 && threadIdx.x < 32) write_headers(a);
    write_choices(a);
    write_rows<kQuantized>(a);
    if (blockIdx.x == gridDim.x - 1) count_rows(a);
}

// kQuantized: the kernel makes e4m3 rows of the input.
template <bool kQuantized>
__global__ void __launch_bounds__(kDispatchWarps * 32, 1)
    pack(const __grid_constant__ PackArguments arguments) {
    pack_rank<kQuantized>(arguments);
}

// Several ranks on one GPU, each a row of the grid.
template <bool kQuantized>
__global__ void __launch_bounds__(kDispatchWarps * 32, 1)
    pack_hosted(const PackArguments* arguments) {
    pack_rank<kQuantized>(arguments[blockIdx.y]);
}

}  // namespace ll
