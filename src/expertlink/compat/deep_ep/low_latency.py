"""Low-latency calls of `Buffer`: decode.

Rows are moved by EXPERT_MAJOR communicators of mode "ll", one for every (M, H, E, K, format of
rows). The routing weights come with combine: they go to the ranks of the experts, which add up what
they return. What depends on shapes alone is made once and kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from expertlink.communicator import MoECommunicator
from expertlink.compat.deep_ep.errors import CallError, UnsupportedError, expect
from expertlink.compat.deep_ep.events import EventOverlap
from expertlink.compat.deep_ep.handles import TensorTuple, known_of
from expertlink.compat.deep_ep.pool import Pool, refuse_through
from expertlink.compat.deep_ep.streams import Streams, on, without_tracking
from expertlink.errors import ExpertlinkError
from expertlink.handles import tables_of
from expertlink.quantization import BLOCK
from expertlink.types import DispatchHandle, DispatchOutput

Rows = Tensor | tuple[Tensor, Tensor]
"""Rows, or quantized rows and their scales."""

Hook = Callable[[], None]

_IDS = (torch.int64, torch.int32)


@dataclass(eq=False)
class Form:
    """What calls of the same shapes share.

    Attributes:
        comm: their communicator.
        rows_shape: `[E_loc, R * M, H]` what combine takes.
        source_tokens: dispatches bring them.
        scratch: memory that experts write to for `zero_copy`, once it was asked for.
    """

    comm: MoECommunicator
    rows_shape: tuple[int, int, int]
    source_tokens: bool
    scratch: Tensor | None = None


@dataclass(eq=False)
class Received:
    """What a low-latency dispatch leaves for its combines. Not frozen, which takes longer.

    Attributes:
        form: its shapes.
        handle: the library's own.
    """

    form: Form
    handle: DispatchHandle


class LowLatencyHandle(TensorTuple):
    """`(src_info, layout_range, M, H, E)` of a low-latency dispatch.

    0. `[E_loc, R * M]` int32: source token of every row, -1 where there is none.
    1. `[E_loc, R]` int64: where the rows of each source rank begin (high 32 bits), and how many
       there are (low 32 bits).
    """

    KEY = 0
    LENGTH = 5

    known: Received

    @staticmethod
    def of(received: Received, output: DispatchOutput) -> LowLatencyHandle:
        """The handle of a dispatch; of its output at most the source tokens are kept."""
        handle = LowLatencyHandle(_FIVE)
        handle.known = received
        handle.kept, handle._made = (), {}
        if received.form.source_tokens:
            assert output.source_tokens is not None
            handle.kept = (output.source_tokens,)
        return handle

    def _make(self, position: int) -> Tensor | int:
        config, handle = self.known.form.comm.config, self.known.handle
        if position == 0:
            return self.kept[0] if self.kept else self._source_tokens()
        if position == 1:
            starts, counts = tables_of(handle).expert_ranges(config.layout, config.expert_alignment)
            return counts.long() | (starts.long() << 32)
        return (config.max_tokens_per_rank, config.hidden_size, config.num_experts)[position - 2]

    def _source_tokens(self) -> Tensor:
        handle = self.known.handle
        tokens = tables_of(handle).source_tokens(handle.rows_shape[:-1])
        assert tokens is not None
        return tokens


_FIVE = (None,) * LowLatencyHandle.LENGTH


class ReceivingHalf:
    """Launches the receiving half of a call, on the stream on which the call was made.

    Args:
        hook: launches it on the current stream.
        streams: the buffer's.
        afterwards: called once it has been launched.
    """

    __slots__ = ("_afterwards", "_hook", "_stream", "_streams")

    def __init__(self, hook: Hook, streams: Streams, afterwards: Hook | None) -> None:
        self._hook, self._afterwards = hook, afterwards
        self._streams, self._stream = streams, streams.current()

    def __call__(self) -> None:
        """Safe to repeat."""
        current = self._streams.current()
        if current is self._stream or current == self._stream:
            self._launch()
        else:
            with on(self._stream):
                self._launch()

    def _launch(self) -> None:
        self._hook()
        if self._afterwards is not None:
            afterwards, self._afterwards = self._afterwards, None
            afterwards()


class LowLatencyCalls:
    """Low-latency calls of one buffer.

    Args:
        pool: the buffer's communicators.
        streams: the buffer's.
        num_ranks: R.
        masks: ranks that do not come in time are left out, where the engine can do that.
    """

    def __init__(self, pool: Pool, streams: Streams, *, num_ranks: int, masks: bool) -> None:
        self._pool, self._streams, self._num_ranks = pool, streams, num_ranks
        self._on_gpu = pool.device.type == "cuda"
        self._on_one_host = pool.domains.num_hosts == 1
        self._masks = masks and self._on_gpu and self._on_one_host
        self._forms: dict[tuple[object, ...], Form] = {}
        self._masked: set[int] = set()  # what new communicators are told

    # -- dispatch ---------------------------------------------------------------------------------

    def form(
        self,
        x: Tensor,
        topk_ids: Tensor,
        num_max_tokens: int,
        num_experts: int,
        quantization: str | None,
    ) -> Form:
        """What a dispatch needs. Collective where its shapes have not been seen before.

        Raises:
            CallError: there is nothing for such shapes.
        """
        key = (num_max_tokens, x.shape[-1], num_experts, topk_ids.shape[-1], quantization)
        form = self._forms.get(key)
        return self._make_form(key, x, topk_ids) if form is None else form

    def dispatch(
        self,
        form: Form,
        x: Tensor,
        topk_ids: Tensor,
        *,
        received_stats: Tensor | None,
        async_finish: bool,
        return_recv_hook: bool,
    ) -> tuple[Rows, Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """See `Buffer.low_latency_dispatch`."""
        comm = form.comm
        if return_recv_hook:
            output, handle, launch = without_tracking(
                lambda: comm.dispatch(x, topk_ids, return_recv_hook=True)
            )
            count = None
            if received_stats is not None:
                per_expert = output.num_tokens_per_expert
                count = lambda: _add(received_stats, per_expert)  # noqa: E731
            hook = ReceivingHalf(launch, self._streams, count)
            event = EventOverlap()
        else:
            hook = None
            call: Callable[[], tuple[DispatchOutput, DispatchHandle]] = functools.partial(
                comm.dispatch_in_line, x, topk_ids, None, None, None, None
            )
            if received_stats is not None:
                call = functools.partial(_count_after, call, received_stats)
            (output, handle), event = self._streams.run(call, (x, topk_ids), None, async_finish)
            if async_finish:
                event.extra_tensors = (x, topk_ids)
        rows, scales = output.tokens, output.scales
        received: Rows = rows if scales is None else (rows, scales.tensor)
        known = LowLatencyHandle.of(Received(form, handle), output)
        return received, output.num_tokens_per_expert, known, event, hook

    def refuse_dispatch(
        self,
        error: ExpertlinkError,
        x: object,
        topk_ids: object,
        num_max_tokens: int,
        num_experts: int,
    ) -> NoReturn:
        """Raises `error` in place of a dispatch with these arguments; tells the other ranks."""
        hidden = topk = None
        if isinstance(x, Tensor) and x.dim() == 2 and x.is_contiguous():
            hidden = x.shape[1] if x.shape[1] % BLOCK == 0 else None
        if isinstance(topk_ids, Tensor) and topk_ids.dim() == 2 and topk_ids.is_contiguous():
            topk = topk_ids.shape[1]
        experts = num_experts if num_experts % self._num_ranks == 0 else None
        known = (num_max_tokens, hidden, experts, topk)
        for key, form in reversed(self._forms.items()):
            if all(value in (None, own) for value, own in zip(known, key, strict=False)):
                refuse_through(form.comm, "dispatch", error)
        self._pool.refuse_new(error)

    def _make_form(self, key: tuple[Any, ...], x: Tensor, topk_ids: Tensor) -> Form:
        """The communicator of shapes that have not been seen before. Collective."""
        tokens, hidden, num_experts, topk, quantization = key
        expect(x.dim() == 2 and x.dtype is torch.bfloat16, "x must be [T, H] bfloat16")
        expect(
            topk_ids.dim() == 2 and topk_ids.dtype in _IDS,
            "topk_idx must be [T, K], int64 or int32",
        )
        expect(hidden % BLOCK == 0, f"H={hidden} is not a multiple of {BLOCK}")
        expect(
            quantization is None or hidden % (4 * BLOCK) == 0,
            f"H={hidden} is not a multiple of {4 * BLOCK}, which use_fp8 needs",
        )
        expect(
            num_experts > 0 and num_experts % self._num_ranks == 0,
            f"num_experts={num_experts} is not a multiple of {self._num_ranks} ranks",
        )
        expect(
            self._num_ranks * tokens % 4 == 0,
            f"{self._num_ranks} ranks of {tokens} tokens: a multiple of 4 in all is needed",
        )
        afterwards = self._on_gpu and self._on_one_host  # nvlink tells source tokens then
        fields: dict[str, Any] = {
            "num_experts": num_experts,
            "hidden_size": hidden,
            "topk": topk,
            "max_tokens_per_rank": tokens,
            "mode": "ll",
            "output_layout": "expert_major",
            "quantization": quantization,
            "scale_order": "column_major",
            "combine_precision": "wire",
            "mask_lost_peers": self._masks,
            "source_tokens": not afterwards,
        }
        # Formats of the same shapes take turns in the memory of the first one.
        first = next((f for k, f in self._forms.items() if k[:-1] == key[:-1]), None)
        share = None
        if first is not None and first.comm.engine_name != "collective":
            share = first.comm
        comm = self._pool.fixed(key, fields, share)
        if afterwards and comm.engine_name != "nvlink":
            comm = self._pool.fixed((*key, "source tokens"), {**fields, "source_tokens": True})
        num_local = num_experts // self._num_ranks
        shape = (num_local, self._num_ranks * tokens, hidden)
        form = Form(comm, shape, comm.config.source_tokens)
        self._forms[key] = form
        for rank in sorted(self._masked):
            comm.mask_peer(rank)
        return form

    # -- combine ----------------------------------------------------------------------------------

    def combine(
        self,
        x: Tensor,
        topk_weights: Tensor,
        known: Received,
        *,
        async_finish: bool,
        return_recv_hook: bool,
        out: Tensor | None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """See `Buffer.low_latency_combine`."""
        comm = known.form.comm
        if return_recv_hook:
            combined, launch = without_tracking(
                lambda: comm.combine(
                    x, known.handle, out=out, topk_weights=topk_weights, return_recv_hook=True
                )
            )
            assert isinstance(combined, Tensor)
            return combined, EventOverlap(), ReceivingHalf(launch, self._streams, None)
        combined, event = self._streams.run(
            lambda: comm.combine(x, known.handle, out=out, topk_weights=topk_weights),
            (x, topk_weights, out, known.handle),
            None,
            async_finish,
        )
        if async_finish:
            event.extra_tensors = (x, topk_weights)
        return combined, event, None

    def refuse_combine(self, error: ExpertlinkError, handle: object) -> NoReturn:
        """Raises `error` in place of a combine; tells the other ranks."""
        try:
            form = known_low_latency(handle).form
        except CallError:
            if not self._forms:
                raise error from None  # no dispatch was made, so nobody combines
            form = next(reversed(self._forms.values()))
        refuse_through(form.comm, "combine", error)

    def combine_buffer(self, handle: object) -> Tensor:
        """`[E_loc, R * M, H]` bfloat16 that `zero_copy` combines read."""
        form = known_low_latency(handle).form
        if form.scratch is None:
            form.scratch = torch.empty(
                form.rows_shape, dtype=torch.bfloat16, device=self._pool.device
            )
        return form.scratch

    # -- masks ------------------------------------------------------------------------------------

    def query_mask(self) -> Tensor:
        """`[R]` bool: ranks that some communicator leaves out."""
        masked = torch.zeros(self._num_ranks, dtype=torch.bool, device=self._pool.device)
        if self._masks:
            for form in self._forms.values():
                masked |= form.comm.query_mask()
        return masked

    def mask(self, rank: int) -> None:
        """Leaves out a rank from now on."""
        if not self._masks:
            raise UnsupportedError(
                f"rank {rank} cannot be masked: peers can be masked on GPUs of one NVLink domain"
            )
        self._masked.add(rank)
        for form in self._forms.values():
            form.comm.mask_peer(rank)

    def clear_mask(self) -> None:
        """All ranks take part again. Collective where there are masks to clear."""
        self._masked.clear()
        if self._masks:
            for form in self._forms.values():
                form.comm.clear_mask()


def known_low_latency(handle: object) -> Received:
    """What the library knows of a low-latency dispatch's handle."""
    return known_of(Received, handle, key=LowLatencyHandle.KEY, length=LowLatencyHandle.LENGTH)


def refuse_halves() -> NoReturn:
    """Refuses a call that is to be both asynchronous and in halves."""
    raise CallError("async_finish and return_recv_hook exclude each other")


def zero_copy_rows(x: Tensor, known: Received) -> Tensor:
    """The rows of a combine with `zero_copy`.

    Raises:
        CallError: the shape of `x` is another one, or nobody asked for the memory.
    """
    form = known.form
    expect(x.shape == form.rows_shape, f"x must be {list(form.rows_shape)}")
    if form.scratch is None:
        raise CallError("zero_copy: ask for the combine buffer first")
    return form.scratch


def quantization_of(*, use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> str | None:
    """The format of rows that a caller asks for.

    Raises:
        CallError: the switches exclude each other.
    """
    if use_ue8m0 and not round_scale:
        raise CallError("use_ue8m0 needs round_scale=True")
    if not use_fp8:
        return None
    if use_ue8m0:
        return "e4m3_ue8m0"
    return "e4m3_pow2" if round_scale else "e4m3_float32"


def _count_after(
    call: Callable[[], tuple[DispatchOutput, DispatchHandle]], totals: Tensor
) -> tuple[DispatchOutput, DispatchHandle]:
    """Makes a dispatch, and adds its counts of rows."""
    made = call()
    _add(totals, made[0].num_tokens_per_expert)
    return made


def _add(totals: Tensor, counts: Tensor) -> None:
    totals += counts
