"""What a launch tells the kernels ll::pack and ll::sum_hosts."""

from __future__ import annotations

from expertlink.jit.kernel import Field, Struct

# What both begin with.
_COMMON = (
    Field("State*", "state", "this rank's"),
    Field("Control*", "control", "this rank's, in host memory"),
    Field("int", "host", "this rank's"),
    Field("int", "rank", "this one, among the ranks of its host"),
    Field("int", "operation", "header.Operation"),
    Field("int", "flags", "Flag"),
    Field("int", "num_tokens", "T"),
    Field("int", "row_bytes", "bytes of a row on the wire"),
    Field("const int*", "rank_of_expert", "[E]"),
    Field("const void*", "ids", "[T, K] global expert ids"),
    Field("unsigned*", "under_way", "calls whose messages are in this memory"),
    Field("long long", "message_bytes", "bytes from one message to the next"),
    Field("unsigned*", "mark_counter", "rail steps begun (pack) or done (sum_hosts), or null"),
    Field("unsigned*", "mark_word", "the same for the host"),
    Field("long long", "rows_at", "of the rows in a message"),
)

PACK = Struct(
    "PackArguments",
    (
        *_COMMON,
        Field("char*", "send", "[N - 1] messages, hosts ascending, without the own one"),
        Field("char*", "own", "the message of the own host, which stays"),
        Field("int", "bound", "tokens of a message"),
        Field("long long", "ids_at", "of the ids in a message"),
        Field("long long", "weights_at", "of the weights"),
        Field("long long", "scales_at", "of the scales"),
        Field("unsigned", "communicator", "tells communicators apart"),
        Field("unsigned", "signature", "what must be the same on all ranks"),
        Field("const int*", "subject", "transfer of the dispatch that the call refers to, or null"),
        Field("const char*", "x", "[T] rows"),
        Field("int", "input_bytes", "bytes of a row of x"),
        Field("int", "scale_kind", "ScaleKind: what the kernel quantizes to"),
        Field("int", "scale_bytes", "bytes of a row's scales"),
        Field("const char*", "scales", "[T] the caller's scales, or null"),
        Field("const float*", "weights", "[T, K] weights"),
        Field("void*", "ids_copy", "[T, K] the ids, kept"),
        Field("float*", "weights_copy", "[T, K] the weights, kept"),
        Field("int*", "rows_to", "[R] rows sent to each rank"),
        Field("long long*", "rows_sent", "[R] statistics, or null"),
        Field("long long*", "bytes_sent", "[R] statistics"),
    ),
)

SUM = Struct(
    "SumArguments",
    (
        *_COMMON,
        Field("const char*", "receive", "[N - 1] messages, hosts ascending, without the own one"),
        Field("const char*", "own", "the message of the own host"),
        Field("long long", "grads_at", "of the gradients in a message"),
        Field("void*", "out", "[T] rows"),
        Field("float*", "grads_out", "[T, K]"),
    ),
)
