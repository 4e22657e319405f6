"""The types of the public API: layouts, scales, outputs, handles, overlap settings."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class DispatchLayout(str, enum.Enum):
    """How the rows that a rank receives are arranged (see docs/contract.md, "Layouts").

    N rows are received; T_max is `max_tokens_per_rank`, R the ranks, E_loc the local experts.
    """

    FLAT = "flat"
    """`[N, H]`: a row per (token, local expert), grouped by expert. Combine applies weights."""

    TOKEN_MAJOR = "token_major"
    """`[N, H]`: a row per token, with its local ids and weights. The MLP applies weights."""

    RANK_MAJOR = "rank_major"
    """`[R, T_max, H]`: as TOKEN_MAJOR, padded per source rank. The MLP applies weights."""

    EXPERT_MAJOR = "expert_major"
    """`[E_loc, R * T_max, H]`: as FLAT, padded per expert. Combine applies weights."""

    @property
    def expanded(self) -> bool:
        """True where a token has one row per local expert, False where it has one per rank."""
        return self in (DispatchLayout.FLAT, DispatchLayout.EXPERT_MAJOR)

    @property
    def padded(self) -> bool:
        """True where the shape of `tokens` does not depend on the routing."""
        return self in (DispatchLayout.RANK_MAJOR, DispatchLayout.EXPERT_MAJOR)


class BlockFormat(str, enum.Enum):
    """Block-scaled e4m3 rows: 128 consecutive elements share a scale (see quantization.py)."""

    E4M3_FLOAT32 = "e4m3_float32"
    """float32 scales `[T, ceil(H / 128)]`."""

    E4M3_POW2 = "e4m3_pow2"
    """float32 scales that are powers of two `[T, ceil(H / 128)]`."""

    E4M3_UE8M0 = "e4m3_ue8m0"
    """power-of-two scales, four biased exponents packed in an int32
    `[T, ceil(ceil(H / 128) / 4)]`, lowest block in the lowest byte."""


@dataclass(frozen=True)
class QuantScales:
    """Scales of quantized rows. They travel with their rows, as bytes that nobody interprets.

    Attributes:
        tensor: `[T, S]` (or the leading shape of the received tokens), any dtype, contiguous.
        format: the block format; None for formats that the library does not know.
    """

    tensor: Tensor
    format: BlockFormat | None = None


@dataclass(frozen=True)
class DispatchOutput:
    """What a rank received. Owned by the caller, valid for as long as it is referenced.

    On the nvlink engine all but `tokens` and `scales` is made when it is first read.

    Views of `DispatchBuffers` are valid until the next dispatch into them.

    Attributes:
        tokens: received rows, in the shape of the layout (`DispatchLayout`).
        num_tokens_per_expert: `[E_loc]` int32 on the device: rows of each local expert, padding
            not counted.
        layout: arrangement of `tokens`.
        scales: scales of quantized rows, with the leading shape of `tokens`; else None.
        num_tokens_per_expert_list: the same counts where the host knows them, else None.
        expert_offsets: FLAT only, `[E_loc + 1]` int32 on the device: rows of local expert `e` start
            at `expert_offsets[e]`; group ends (`expert_offsets[1:]`) are multiples of
            `expert_alignment`, and rows between a group's count and its end are zero.
        topk_ids: TOKEN_MAJOR and RANK_MAJOR only, leading shape of `tokens` + `[K]`, int64: local
            expert index of each choice, -1 for choices of other ranks and for padding.
        topk_weights: same shape, float32: routing weight, 0 where the id is -1; None when
            dispatch was given no weights.
        num_tokens_per_rank: `[R]` int32 on the device: rows received from each rank, each token
            counted once.
        source_tokens: with `source_tokens=True` in the configuration, leading shape of `tokens`,
            int32: index of the row's token in the input of the rank that it came from, -1 where
            no row is; else None.
    """

    tokens: Tensor
    num_tokens_per_expert: Tensor
    layout: DispatchLayout
    scales: QuantScales | None = None
    num_tokens_per_expert_list: list[int] | None = None
    expert_offsets: Tensor | None = None
    topk_ids: Tensor | None = None
    topk_weights: Tensor | None = None
    num_tokens_per_rank: Tensor | None = None
    source_tokens: Tensor | None = None


@dataclass(frozen=True)
class RowKind:
    """The rows that `DispatchBuffers` are made for.

    Attributes:
        dtype: of the received rows.
        width: elements of a received row.
        scale_dtype: of the received scales; None: rows without scales.
        scale_columns: scales of a row.
        scale_format: block format of the scales, or None.
        weighted: dispatches may carry weights.
    """

    dtype: torch.dtype
    width: int
    scale_dtype: torch.dtype | None = None
    scale_columns: int = 0
    scale_format: BlockFormat | None = None
    weighted: bool = True

    def __str__(self) -> str:
        text = f"{self.dtype} rows of {self.width} elements"
        if self.scale_dtype is not None:
            text += f" with {self.scale_columns} {self.scale_dtype} scales"
        return text


@dataclass(eq=False)
class DispatchBuffers:
    """Memory for everything that a dispatch returns, made once by `create_buffers`.

    A dispatch into them (`output_buffer=`) returns nothing but views of them. From its start, the
    outputs and handles of earlier dispatches into the same buffers are invalid. Two calls at a
    time, or a call while experts still read, need two of them.

    Attributes:
        output: tensors of the largest shape that any dispatch can return.
        tables: what the engine keeps of the routing.
        kind: the rows that they are made for.
        owner: identity of the communicator that they belong to.
        generation: number of dispatches into them; the handles of all but the last are stale.
    """

    output: DispatchOutput
    tables: object
    kind: RowKind
    owner: int = 0
    generation: int = 0


@dataclass(frozen=True)
class CallStatistics:
    """Running totals of a rank's dispatches and combines, those of backward included.

    int64 tensors on the device whose addresses never change. Read them on the stream of the calls
    or after it; `zero_()` them between calls. r is the other rank; the own one counts as well.

    Attributes:
        tokens_per_expert: `[E_loc]` rows received for each local expert in dispatches.
        rows_sent: `[R]` rows sent to rank r: a dispatch sends a row per (token, rank), a combine
            one per (token, rank) or, with `combine_precision="exact"`, per (token, choice).
        rows_received: `[R]` rows received from rank r, counted in the same way.
        bytes_sent: `[R]` bytes of those rows and of their scales; 0 for the own rank, whose rows
            stay on the GPU. Ids and weights do not count.
        bytes_received: `[R]` likewise.
        rail_bytes: `[N]` with N hosts (`domains`, or those of the engine "hybrid"): bytes that the
            calls of this rank need between hosts, by the other host; 0 for the own one. A dispatch
            needs a row, with scales, per (token, host), a combine a sum per (token, host), or with
            `combine_precision="exact"` a row per (token, choice). Mode "ll", `static_shapes` and
            `collective` move more.
        longest_wait_ns: `[R]` longest time that a call waited for rank r, in nanoseconds; 0 where
            the engine does not measure it.
    """

    tokens_per_expert: Tensor
    rows_sent: Tensor
    rows_received: Tensor
    bytes_sent: Tensor
    bytes_received: Tensor
    longest_wait_ns: Tensor
    rail_bytes: Tensor

    @staticmethod
    def zeros(
        *, num_local: int, num_ranks: int, device: torch.device, num_hosts: int = 1
    ) -> CallStatistics:
        """Totals of no call."""
        sizes = [num_local, *[num_ranks] * 5, num_hosts]
        memory = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        return CallStatistics(*memory.split_with_sizes(sizes))


@dataclass(eq=False)
class Anchor:
    """A tensor in the graph of a dispatch; None once backward has come through it."""

    tensor: Tensor | None


@dataclass(frozen=True)
class RoutingScope:
    """What a routing depends on. Communicators of equal scope can use each other's handles.

    Ranks agree on all of it: the processes and the configuration are exchanged in the handshake,
    and the placement and the engine follow from that. `owner` is a rank's own number, but ranks
    that pass corresponding handles find it equal, or not, alike.

    Attributes:
        ranks: the processes of all ranks.
        engine: form in which the engine keeps a routing.
        mode: as configured.
        output_layout: as configured.
        num_experts: E.
        topk: K.
        expert_alignment: as configured.
        experts_of_rank: global ids of every rank's experts.
        static_shapes: as configured.
        max_recv_tokens_per_rank: as configured.
        max_tokens_per_rank: T_max where rows are numbered by it, as in padded layouts; else None.
        owner: identity of the communicator, where its handles are of use to no other; else None.
    """

    ranks: tuple[object, ...]
    engine: str
    mode: str
    output_layout: str
    num_experts: int
    topk: int
    expert_alignment: int
    experts_of_rank: tuple[tuple[int, ...], ...]
    static_shapes: bool
    max_recv_tokens_per_rank: int | None
    max_tokens_per_rank: int | None
    owner: int | None


@dataclass(eq=False, repr=False)
class DispatchHandle:
    """The routing of a dispatch. Opaque to the model: pass it on and read nothing inside.

    Any number of combines, cached dispatches (`previous_handle`) and backward passes may use it:
    of its communicator, and of any other of equal `scope`, whatever their hidden sizes and dtypes,
    also once its own one is closed. The handle of a dispatch into `DispatchBuffers` is good for
    its own communicator, until the next dispatch into them.

    Attributes:
        owner: identity of the communicator that issued it.
        scope: which communicators can use it.
        call: sequence number of the dispatch that issued it.
        num_tokens: T of that dispatch, the number of rows combine returns.
        layout: arrangement of the rows that combine expects.
        rows_shape: shape that combine expects of the expert output; the last dimension is that of
            the communicator that combines.
        topk_ids: `[T, K]` the routing, the handle's own copy.
        topk_weights: `[T, K]` float32 as given by the caller (gradients flow to it), or None.
        state: what the engine keeps of the routing.
    """

    owner: int
    scope: RoutingScope
    call: int
    num_tokens: int
    layout: DispatchLayout
    rows_shape: tuple[int, ...]
    _topk_ids: Tensor | Callable[[], Tensor]  # a tensor, or what makes it when it is first read
    topk_weights: Tensor | None
    state: object
    # The caller's own id tensor and its version: tells "unchanged" without reading the device.
    ids_seen: tuple[Tensor, int] | None = None
    # Buffers that `state` lies in, each with the generation in which the handle is valid.
    leases: tuple[tuple[DispatchBuffers, int], ...] = ()
    _finish: Callable[[], object] | None = None
    # Connects combines to their dispatch in the graph, where autograd tracks the dispatch.
    _anchor: Anchor | None = None

    @property
    def topk_ids(self) -> Tensor:
        """`[T, K]` the routing, the handle's own copy."""
        if callable(self._topk_ids):
            self._topk_ids = self._topk_ids()
        return self._topk_ids

    def wait(self) -> None:
        """Makes the results of the handle's last call readable on the current stream.

        After `async_finish=True` it orders the current stream after the call. After
        `return_recv_hook=True` it launches the receiving half. Before that, the tensors that the
        call returned must not be read. Safe to repeat.
        """
        if torch.compiler.is_dynamo_compiling():
            from expertlink.uncompiled import uncompiled

            uncompiled(self.wait)
            return
        if self._finish is not None:
            self._finish()
            self._finish = None  # a failed wait stays failed

    def plain(self) -> DispatchHandle:
        """This handle, or for one that a graph returned, that of its dispatch."""
        return self

    def __repr__(self) -> str:
        return (
            f"DispatchHandle(dispatch #{self.call}, {self.num_tokens} tokens, "
            f"{self.layout.value} rows {list(self.rows_shape)})"
        )


@dataclass(frozen=True)
class CommOverlapConfig:
    """Where an asynchronous dispatch or combine runs.

    Built by `MoECommunicator.create_overlap_config`.

    Attributes:
        operation: "dispatch" or "combine".
        stream: CUDA stream that carries the operation; None on CPU, where the transfer runs in
            the process group's own threads.
        wait_events: CUDA events that the operation waits for, besides the caller's current stream.
        num_sms: SMs the operation may use; None leaves it to the engine. Engines that cannot
            bound their SMs (`collective`) ignore it.
    """

    operation: str
    stream: torch.cuda.Stream | None = None
    wait_events: Sequence[torch.cuda.Event] = ()
    num_sms: int | None = None
