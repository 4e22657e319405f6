"""High-throughput dispatch and combine of one rank: outputs, arguments, launches.

Knows addresses and nothing of process groups, so that several ranks can live in one process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines import capacity
from expertlink.engines.base import CombineCall, DispatchCall
from expertlink.engines.header import Operation
from expertlink.engines.nvlink.arena import Arena, RowShape, round_up, row_limit
from expertlink.engines.nvlink.arguments import COMBINE, DISPATCH, Flag
from expertlink.engines.nvlink.kernels import HOME_STRIDE, BlockShape, Launch, Run, split_blocks
from expertlink.engines.nvlink.route import Route
from expertlink.engines.nvlink.watchdog import FINE, Mail, Watchdog
from expertlink.errors import InputError
from expertlink.routing import Placement
from expertlink.types import DispatchLayout, DispatchOutput, QuantScales

_SLACK = 32  # outputs are made a 32nd larger than the last call needed
DEFAULT_SMS = 24  # docs/architecture.md, "How many SMs"
_SENDERS = {True: 0.34, False: 0.4}  # share of dispatch's blocks that send, expanded or not
_RETURNERS = {True: 0.6, False: 0.4}  # share of combine's blocks that send


@dataclass(frozen=True)
class Started:
    """A dispatch that has been queued.

    Attributes:
        output: what the rank receives; None where the ranks do not agree or one has no room.
        route: its tables; None likewise.
        mail: what the host learned of an uncached dispatch, unless shapes are static.
    """

    output: DispatchOutput | None
    route: Route | None
    mail: Mail | None


class HighThroughput:
    """Builds and queues the calls of one rank.

    Args:
        config: the communicator's.
        rank: this rank.
        placement: where the experts live, on this rank's GPU.
        arena: memory shared with the other ranks.
        watchdog: host memory that the kernels write.
        run: queues a kernel.
        num_sms: multiprocessors of the GPU.
        communicator: tells communicators apart, the same on all ranks.
        check: look for faulty ids.
        blocks: shape of the blocks.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        rank: int,
        placement: Placement,
        arena: Arena,
        watchdog: Watchdog,
        run: Run,
        num_sms: int,
        communicator: int,
        check: bool,
        blocks: BlockShape | None = None,
    ) -> None:
        self._config, self._rank, self._arena = config, rank, arena
        self._watchdog, self._run, self._check = watchdog, run, check
        self._num_ranks = placement.num_ranks
        self._layout = config.layout
        self._shape = RowShape.of(config)
        experts = placement.experts_of_rank[rank]
        self._num_local = len(experts)
        self._max_rows = self._num_ranks * config.max_tokens_per_rank
        self._limit = row_limit(config, self._num_ranks, self._num_local)
        self._num_sms = num_sms
        self._blocks = blocks or BlockShape(
            config, num_ranks=self._num_ranks, num_local=self._num_local
        )
        device = arena.device
        homes = placement.rank_of_E[:-1] * HOME_STRIDE + placement.local_of_E[:-1]
        self._home_of = homes.to(torch.int32)
        self._experts = torch.tensor(experts or (0,), dtype=torch.int32, device=device)
        columns = self._num_ranks + config.num_experts
        self._histogram = torch.empty(num_sms * columns, dtype=torch.int32, device=device)
        self._ordinals = torch.empty(
            config.max_tokens_per_rank * config.topk, dtype=torch.int32, device=device
        )
        self._guess = 0  # rows that the next uncached dispatch is expected to receive
        self._faulty = torch.zeros(1, dtype=torch.int32, device=device)
        common: dict[str, int] = {
            "bases": arena.bases.data_ptr(),
            "state": arena.state.data_ptr(),
            "control": watchdog.address,
            "rank": rank,
            "communicator": communicator,
            "home_of": self._home_of.data_ptr(),
        }
        self._dispatch: Any = DISPATCH.new(
            **common,
            experts=self._experts.data_ptr(),
            num_local=self._num_local,
            histogram=self._histogram.data_ptr(),
            ordinals=self._ordinals.data_ptr(),
            faulty=self._faulty.data_ptr(),
        )
        self._combine: Any = COMBINE.new(**common)

    # -- dispatch ---------------------------------------------------------------------------------

    def dispatch(self, call: DispatchCall, *, number: int) -> Started:
        """Queues a dispatch; an uncached one waits for the counts unless shapes are static."""
        self._check_rows(call)
        if call.previous is not None:
            return self._cached_dispatch(call, call.previous)
        config, a = self._config, self._dispatch
        route, output = self._tables(call)
        mails = not config.static_shapes
        flags = Flag.COUNT | Flag.SEND
        if self._check:
            flags |= Flag.CHECK_IDS
        if mails:
            flags |= Flag.WANTS_MAIL
        self._set(call, route, output, Operation.DISPATCH, flags=flags)
        a.call = number & 0x7FFFFFFF if mails else 0
        a.capacity = capacity.announced(config, call.output_buffer)
        if config.static_shapes and a.capacity < 0 and not self._layout.padded:
            a.capacity = self._limit
        shape = self._expected_shape(call)
        tokens = scales = None
        if shape is not None:
            a.flags |= Flag.PLACE
            if config.static_shapes and self._layout is DispatchLayout.TOKEN_MAJOR:
                a.flags |= Flag.CLEAR_REST
            tokens, scales = self._outputs(call, shape)
        before = self._watchdog.mail_number
        self._launch_dispatch(call, sends=True)
        mail = counts = None
        if mails:
            mail = self._watchdog.wait_for_mail(before, call=number, num_local=self._num_local)
            if mail.verdict != FINE:
                if tokens is None:
                    self._discard()
                return Started(None, None, mail)
            counts = mail.counts
            if not self._layout.padded:
                shape = (mail.slots if self._layout.expanded else mail.arrivals,)
                self._guess = shape[0] + shape[0] // _SLACK
                if tokens is None or len(tokens) < shape[0]:
                    tokens, scales = self._outputs(call, shape)
                    a.flags = Flag.PLACE | (a.flags & (Flag.WIDE_IDS | Flag.NEW_WEIGHTS))
                    self._launch_dispatch(call, sends=False)
                tokens = tokens[: shape[0]]
                scales = None if scales is None else scales[: shape[0]]
        assert tokens is not None
        assert shape is not None
        return self._finished(call, route, output, tokens, scales, shape, counts, mail)

    def _cached_dispatch(self, call: DispatchCall, previous: object) -> Started:
        old = as_route(previous)
        a, route = self._dispatch, old
        if call.weights_TK is not None:
            route = replace(
                old, weights_of_row=torch.empty_like(old.choices_of_row, dtype=torch.float32)
            )
        output = _Beside(None, None, old.tokens_per_expert, old.expert_offsets, old.per_rank[0])
        if not self._layout.expanded:
            output = replace(output, **self._choices(route.weights_of_row is not None))
        flags = Flag.SEND | Flag.PLACE | Flag.CACHED
        self._set(call, route, output, Operation.CACHED_DISPATCH, flags=flags)
        a.call = 0
        shape = old.shape
        tokens, scales = self._outputs(call, shape)
        self._launch_dispatch(call, sends=True)
        if not self._layout.padded and call.output_buffer is not None:
            tokens = tokens[: shape[0]]
        return self._finished(call, route, output, tokens, scales, shape, old.counts, None)

    def refuse(self, operation: Operation, *, number: int) -> Mail | None:
        """Takes part in an uncached dispatch only to say that this rank refuses it."""
        config, a = self._config, self._dispatch
        device = self._arena.device
        call = DispatchCall(
            x_TW=torch.empty((0, config.hidden_size), dtype=config.dtype, device=device),
            topk_ids_TK=torch.empty((0, config.topk), dtype=torch.int64, device=device),
        )
        route, output = self._tables(call)
        mails = not config.static_shapes
        flags = Flag.COUNT | Flag.SEND | (Flag.WANTS_MAIL if mails else Flag(0))
        self._set(call, route, output, operation, flags=flags)
        a.call = number & 0x7FFFFFFF if mails else 0
        a.capacity, a.status = capacity.UNBOUNDED, 1
        before = self._watchdog.mail_number
        self._launch_dispatch(call, sends=True)
        a.status = 0
        mail = (
            self._watchdog.wait_for_mail(before, call=number, num_local=self._num_local)
            if mails
            else None
        )
        self._discard()
        return mail

    def _tables(self, call: DispatchCall) -> tuple[Route, _Beside]:
        """Memory for what an uncached dispatch finds out, in one allocation, and its outputs."""
        assert call.topk_ids_TK is not None
        ids_TK, ranks, local = call.topk_ids_TK, self._num_ranks, self._num_local
        num_tokens, topk = ids_TK.shape
        copies = min(ranks, topk)
        sizes = (num_tokens * copies, num_tokens, 3 * ranks, ranks * local, self._max_rows * topk)
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + round_up(size, 4))
        blob = torch.empty(starts[-1], dtype=torch.int32, device=self._arena.device)
        parts = [blob[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        weighted = call.weights_TK is not None
        flat = self._layout is DispatchLayout.FLAT
        public = torch.empty(2 * local + 1 + ranks, dtype=torch.int32, device=self._arena.device)
        counts, offsets = public[:local], public[local : 2 * local + 1] if flat else None
        self._dispatch.first_slot = parts[3].data_ptr()
        route = Route(
            shape=(),
            expanded=self._layout.expanded,
            max_tokens=self._config.max_tokens_per_rank,
            num_ranks=ranks,
            ids_TK=torch.empty_like(ids_TK),
            slots_of_token=parts[0].view(num_tokens, copies),
            own_tokens=parts[1],
            per_rank=parts[2].view(3, ranks),
            choices_of_row=parts[4].view(self._max_rows, topk),
            weights_of_row=blob.new_empty((self._max_rows, topk), dtype=torch.float32)
            if weighted
            else None,
            tokens_per_expert=counts,
            expert_offsets=offsets,
            counts=None,
        )
        beside = _Beside(None, None, counts, offsets, public[2 * local + 1 :])
        if not self._layout.expanded:
            beside = replace(beside, **self._choices(weighted))
        return route, beside

    def _choices(self, weighted: bool) -> dict[str, Tensor | None]:
        """Output ids and weights of the deduplicated layouts, with room for all rows."""
        shape, device = (self._max_rows, self._config.topk), self._arena.device
        weights = torch.empty(shape, dtype=torch.float32, device=device) if weighted else None
        return {"ids": torch.empty(shape, dtype=torch.int64, device=device), "weights": weights}

    def _set(
        self,
        call: DispatchCall,
        route: Route,
        output: _Beside,
        operation: Operation,
        *,
        flags: Flag,
    ) -> None:
        """Everything that does not depend on the outputs' sizes."""
        a, ids = self._dispatch, call.topk_ids_TK
        x, scales, weights = call.x_TW, call.scales, call.weights_TK
        if ids is not None:
            a.ids = ids.data_ptr()
            if ids.dtype is torch.int64:
                flags |= Flag.WIDE_IDS
        if self._config.zero_copy:
            flags |= Flag.ZERO_COPY
        if weights is not None:
            flags |= Flag.NEW_WEIGHTS
        scale_bytes = 0 if scales is None else scales.shape[1] * scales.element_size()
        beside = 0
        if not flags & Flag.CACHED or weights is not None:
            beside = self._shape.scales_at
        if scale_bytes:
            beside = self._shape.scales_at + round_up(scale_bytes, 16)
        a.operation, a.flags, a.beside_bytes = operation, flags, beside
        a.row_bytes = x.shape[1] * x.element_size()
        a.num_tokens = x.shape[0]
        a.x = x.data_ptr()
        a.weights = None if weights is None else weights.data_ptr()
        a.scales, a.scale_bytes = None if scales is None else scales.data_ptr(), scale_bytes
        a.slots_of_token = route.slots_of_token.data_ptr()
        a.own_tokens = route.own_tokens.data_ptr()
        a.ids_copy = route.ids_TK.data_ptr()
        per_rank, step = route.per_rank.data_ptr(), 4 * self._num_ranks
        a.rows_from, a.first_row, a.first_sent = per_rank, per_rank + step, per_rank + 2 * step
        a.choices_of_row = route.choices_of_row.data_ptr()
        kept = route.weights_of_row
        a.weights_of_row = None if kept is None else kept.data_ptr()
        a.tokens_per_expert = output.counts.data_ptr()
        a.expert_offsets = None if output.offsets is None else output.offsets.data_ptr()
        a.tokens_per_rank = output.rows_from.data_ptr()
        a.topk_ids = None if output.ids is None else output.ids.data_ptr()
        a.topk_weights = None if output.weights is None else output.weights.data_ptr()
        a.pool_at = self._arena.next_pool() if self._config.zero_copy else 0

    def _expected_shape(self, call: DispatchCall) -> tuple[int, ...] | None:
        """Leading dimensions of a `tokens` that rows can go to before they are counted, or None.

        Where the host will learn their number it is made as large as the last call suggests. Should
        more rows arrive, the kernel leaves placing them to a second launch.
        """
        config, ranks = self._config, self._num_ranks
        if self._layout is DispatchLayout.RANK_MAJOR:
            return (ranks, config.max_tokens_per_rank)
        if self._layout is DispatchLayout.EXPERT_MAJOR:
            return (self._num_local, self._max_rows)
        if call.output_buffer is not None:
            return (call.output_buffer.shape[0],)
        if config.static_shapes or config.zero_copy:
            return (self._limit,)
        return (min(self._guess, self._limit),) if self._guess else None

    def _outputs(self, call: DispatchCall, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """`tokens` and `scales` of a leading shape, and the kernel told about them."""
        a, x = self._dispatch, call.x_TW
        full = (*shape, x.shape[1])
        if self._config.zero_copy:
            nbytes = math.prod(full) * x.element_size()
            tokens = self._arena.local[a.pool_at : a.pool_at + nbytes].view(x.dtype).view(full)
        elif call.output_buffer is not None:
            tokens = call.output_buffer
        else:
            tokens = x.new_empty(full)
        scales = (
            None if call.scales is None else call.scales.new_empty((*shape, call.scales.shape[1]))
        )
        if call.zero_padding and self._layout.padded:
            tokens.zero_()
            if scales is not None:
                scales.zero_()
        a.tokens = tokens.data_ptr()
        a.scales_out = None if scales is None else scales.data_ptr()
        a.max_slots = math.prod(tokens.shape[:-1])
        return tokens, scales

    def _launch_dispatch(self, call: DispatchCall, *, sends: bool) -> None:
        """Queues one kernel; without `sends` it places what the one before it has sent."""
        a = self._dispatch
        total = self._sms(call.num_sms, self._config.num_sms_dispatch)
        senders, total = split_blocks(total, senders=_SENDERS[self._layout.expanded])
        if self._config.zero_copy:
            senders = max(1, total - max(1, total // 12))
        row_bytes = a.row_bytes
        warps = self._blocks.warps(row_bytes)
        counts = bool(a.flags & Flag.COUNT)
        a.num_senders = senders if sends else 0
        a.slot_bytes = self._blocks.slot_bytes(row_bytes)
        a.groups = self._blocks.groups(warps)
        grid = total if sends else max(1, total - senders)
        self._run(
            "dispatch",
            a,
            Launch(
                grid=grid,
                block=self._blocks.threads(row_bytes),
                shared_bytes=self._blocks.shared_bytes(row_bytes, counts=counts),
                follows=not sends,
            ),
        )

    def _discard(self) -> None:
        """Lets the peers go on after a dispatch that does not happen."""
        a = self._dispatch
        a.flags, a.num_senders = Flag.DISCARD, 0
        self._run("dispatch", a, Launch(grid=1, block=32, shared_bytes=0, follows=True))

    def _finished(
        self,
        call: DispatchCall,
        route: Route,
        beside: _Beside,
        tokens: Tensor,
        scales: Tensor | None,
        shape: tuple[int, ...],
        counts: list[int] | None,
        mail: Mail | None,
    ) -> Started:
        ids, weights = beside.ids, beside.weights
        if ids is not None:
            ids = _shaped(ids, shape)
            weights = None if weights is None else _shaped(weights, shape)
        output = DispatchOutput(
            tokens=tokens,
            num_tokens_per_expert=beside.counts,
            layout=self._layout,
            scales=None if scales is None else QuantScales(scales, call.scale_format),
            num_tokens_per_expert_list=None if counts is None else list(counts),
            expert_offsets=beside.offsets,
            topk_ids=ids,
            topk_weights=weights,
            num_tokens_per_rank=beside.rows_from,
        )
        return Started(output, replace(route, shape=shape, counts=counts), mail)

    # -- combine ----------------------------------------------------------------------------------

    def combine(self, call: CombineCall) -> Tensor | None:
        """Queues a combine; returns the weight gradients if the call asks for them."""
        return self._return(
            as_route(call.state),
            Operation.COMBINE,
            rows=call.rows,
            out_TH=call.out_TH,
            weighted=call.weighted,
            grads=call.weight_grads,
            num_sms=call.num_sms,
        )

    def weight_grads(self, route: Route, grads: Tensor) -> Tensor:
        """Queues the return of per-slot gradients: `[T, K]` float32."""
        returned = self._return(
            route,
            Operation.WEIGHT_GRADS,
            rows=None,
            out_TH=None,
            weighted=False,
            grads=grads,
            num_sms=None,
        )
        assert returned is not None
        return returned

    def _return(
        self,
        route: Route,
        operation: Operation,
        *,
        rows: Tensor | None,
        out_TH: Tensor | None,
        weighted: bool,
        grads: Tensor | None,
        num_sms: int | None,
    ) -> Tensor | None:
        a, config = self._combine, self._config
        row_bytes = 0
        if rows is not None and out_TH is not None:
            rows = _aligned(rows)
            row_bytes = config.hidden_size * config.dtype.itemsize
            a.rows, a.out = rows.data_ptr(), out_TH.data_ptr()
        grads_TK = None
        flags = Flag.WIDE_IDS if route.ids_TK.dtype is torch.int64 else Flag(0)
        if grads is not None:
            grads = grads.to(torch.float32).contiguous()
            grads_TK = torch.empty(
                (route.num_tokens, config.topk), dtype=torch.float32, device=self._arena.device
            )
            a.slot_grads, a.grads_out = grads.data_ptr(), grads_TK.data_ptr()
            flags |= Flag.GRADS
        a.operation, a.row_bytes = operation, row_bytes
        a.flags = flags
        a.num_tokens = route.num_tokens
        a.max_slots = math.prod(route.shape)
        a.ids = route.ids_TK.data_ptr()
        a.slots_of_token = route.slots_of_token.data_ptr()
        per_rank = route.per_rank.data_ptr()
        a.rows_from, a.first_row = per_rank, per_rank + 4 * self._num_ranks
        a.choices_of_row = route.choices_of_row.data_ptr()
        kept = route.weights_of_row if weighted else None
        a.weights_of_row = None if kept is None else kept.data_ptr()
        total = self._sms(num_sms, config.num_sms_combine)
        senders, total = split_blocks(total, senders=_RETURNERS[self._layout.expanded])
        a.num_senders = senders
        a.slot_bytes = self._blocks.slot_bytes(row_bytes)
        self._run(
            "combine",
            a,
            Launch(
                grid=total,
                block=self._blocks.threads(row_bytes),
                shared_bytes=self._blocks.shared_bytes(row_bytes, counts=False),
            ),
        )
        return grads_TK

    # -- shared -----------------------------------------------------------------------------------

    def _sms(self, wanted: int | None, configured: int | None) -> int:
        return min(self._num_sms, wanted or configured or DEFAULT_SMS)

    def _check_rows(self, call: DispatchCall) -> None:
        """Refuses rows that bulk copies cannot move or that the arena has no room for."""
        x, scales = call.x_TW, call.scales
        row_bytes = x.shape[1] * x.element_size()
        if row_bytes % 16 or row_bytes > self._shape.row:
            raise InputError(
                f"input has rows of {row_bytes} bytes; the nvlink engine moves multiples of 16 "
                f"bytes up to {self._shape.row} (hidden_size of the configured dtype); "
                "engine='collective' moves any"
            )
        room = self._shape.beside - self._shape.scales_at
        if scales is not None and scales.shape[1] * scales.element_size() > room:
            raise InputError(
                f"scales have {scales.shape[1] * scales.element_size()} bytes per row; the nvlink "
                f"engine has room for {room} at hidden_size={self._config.hidden_size}"
            )


@dataclass(frozen=True)
class _Beside:
    """Outputs other than rows and scales: ids and weights `[max rows, K]`, counts, offsets."""

    ids: Tensor | None
    weights: Tensor | None
    counts: Tensor
    offsets: Tensor | None
    rows_from: Tensor


def as_route(state: object) -> Route:
    """The state of a dispatch of this engine."""
    assert isinstance(state, Route)
    return state


def _shaped(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first rows of `[max rows, K]` in a leading shape."""
    return values[: math.prod(shape)].view(*shape, values.shape[1])


def _aligned(rows: Tensor) -> Tensor:
    """Rows at an address that bulk copies accept."""
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()
