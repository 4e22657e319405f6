"""The `collective` engine: torch.distributed all-to-alls, on any device, over any number of hosts.

A row crosses the wire once per (token, destination rank), together with its local expert ids,
weights and scales; combine sends one partial sum per (token, rank) back. This engine defines the
bits that every other engine reproduces.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from expertlink import layouts, routing
from expertlink.config import MoECommunicatorConfig
from expertlink.engines import extras
from expertlink.engines.agreement import UNBOUNDED, Agreement, Operation, Table
from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched
from expertlink.engines.route import Route, finished
from expertlink.engines.wire import Transfer, Wire
from expertlink.reduction import ordered_sum
from expertlink.routing import Placement
from expertlink.types import DispatchLayout, DispatchOutput, QuantScales
from expertlink.validation import explain_ids
from expertlink.workspace import Workspace


class CollectiveEngine:
    """See the module's docstring; the contract is `engines.base.Engine`."""

    name = "collective"

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        wire: Wire,
        placement: Placement,
        check_inputs: bool,
    ) -> None:
        self._config = config
        self._layout = config.layout
        self._device = wire.device
        self._placement = placement
        self._check = check_inputs
        self._wire = wire
        experts = placement.experts_of_rank[wire.rank]
        self._experts = torch.tensor(experts, dtype=torch.int64)
        self._experts_device = self._experts.to(self._device)
        self._workspace = Workspace(self._device)
        self._call = 0

    def set_timeout(self, timeout_s: float) -> None:
        """Bounds later waits, in seconds."""
        self._wire.timeout_s = timeout_s

    def close(self) -> None:
        """Frees the workspace; the group belongs to the caller."""
        self._workspace.clear()

    def memory_estimate(self) -> dict[str, int]:
        """Bytes by region of the largest possible call, beyond inputs and outputs."""
        config, ranks = self._config, self._wire.num_ranks
        copies = min(ranks, config.topk)
        sent = config.max_tokens_per_rank * copies
        received = config.max_tokens_per_rank * ranks
        row = config.hidden_size * config.dtype.itemsize
        meta = config.topk * (extras.ID_BYTES + config.weight_dtype.itemsize)
        return {
            "rows sent": sent * row,
            "rows received": received * row,
            "ids and weights": (sent + received) * meta,
            "headers": 4 * ranks * (ranks + config.num_experts + 8) * 2,
        }

    def wire_rows(self, state: object) -> tuple[list[int], list[int]]:
        """Rows sent to and received from each rank, own rank included."""
        assert isinstance(state, Route)
        return list(state.send_splits), list(state.receive_splits)

    def refuse(self, operation: str, error: Exception) -> NoReturn:
        """Raises `error` here and `PeerError` on the ranks that exchange headers in this call."""
        kind = Operation[operation.upper()]
        if self._check or kind is Operation.DISPATCH:
            self._enter(kind)
            self._agree(kind, refused=error).conclude()
        raise error

    # -- dispatch ---------------------------------------------------------------------------------

    def dispatch(self, call: DispatchCall) -> Dispatched:
        """Starts a dispatch: agrees on counts (waits for peers), then rows are on their way."""
        if call.previous is not None:
            return self._cached_dispatch(call)
        assert call.topk_ids_TK is not None
        self._enter(Operation.DISPATCH)
        ids_TK = call.topk_ids_TK
        suspect = None
        if self._check:
            faulty = routing.out_of_range(ids_TK, self._placement.num_experts)
            suspect = (faulty | routing.has_duplicates(ids_TK)).any()
        send = routing.plan_send(ids_TK, self._placement)
        agreement = self._agree(
            Operation.DISPATCH,
            rows_per_rank=send.rows_per_rank,
            choices=send.tokens_per_expert,
            suspect=suspect,
            capacity=self._capacity(call.output_buffer),
            row_bytes=extras.row_bytes(call.x_TW),
            extra_bytes=extras.width(call),
        )
        # Own rows are packed while the headers travel.
        send_splits = send.rows_per_rank.tolist()
        count = sum(send_splits)
        token_of_row = send.token_of_row[:count].clone()
        local_ids_nK = routing.local_ids_of_rows(send, count, self._placement)
        rows_out = self._pack_rows(call.x_TW, token_of_row)
        extras_out = extras.pack(call, token_of_row, local_ids_nK)

        table = agreement.conclude(lambda: explain_ids(ids_TK, self._placement.num_experts))
        agreement.check_capacity(self._rows_needed(table))
        choices = table.choices_device.sum(dim=0, dtype=torch.int32)
        route = Route(
            num_tokens=call.x_TW.shape[0],
            send_splits=send_splits,
            receive_splits=table.rows[:, self._wire.rank].tolist(),
            token_of_row=token_of_row,
            rows_of_token=send.rows_of_token,
            row_of_choice=send.row_of_choice,
            tokens_per_expert=choices.index_select(0, self._experts_device),
            tokens_per_expert_list=table.choices[:, self._experts].sum(dim=0).tolist(),
            rows_per_rank=table.rows[:, self._wire.rank].to(self._device, non_blocking=True),
        )
        return self._send(call, route, rows_out, extras_out)

    def _cached_dispatch(self, call: DispatchCall) -> Dispatched:
        """Same routing as before: nothing is counted, ids do not travel again."""
        previous = call.previous
        assert isinstance(previous, Route)
        self._enter(Operation.CACHED_DISPATCH)
        agreement = None
        if self._check:
            agreement = self._agree(
                Operation.CACHED_DISPATCH,
                row_bytes=extras.row_bytes(call.x_TW),
                extra_bytes=extras.width(call),
            )
        route = dataclasses.replace(finished(previous))
        rows_out = self._pack_rows(call.x_TW, route.token_of_row)
        row = torch.arange(len(route.token_of_row), device=self._device)[:, None]
        here_nK = route.row_of_choice[route.token_of_row] == row
        extras_out = extras.pack(call, route.token_of_row, here_nK.to(torch.int32) - 1)
        if agreement is not None:
            agreement.conclude()
        return self._send(call, route, rows_out, extras_out)

    def _send(
        self, call: DispatchCall, route: Route, rows_out: Tensor, extras_out: Tensor | None
    ) -> Dispatched:
        """Puts packed rows on the wire and allocates what they arrive in."""
        received = sum(route.receive_splits)
        shape = layouts.leading_shape(
            self._layout,
            tokens_per_expert=route.tokens_per_expert_list,
            rows_per_source=route.receive_splits,
            max_tokens_per_rank=self._config.max_tokens_per_rank,
            alignment=self._config.expert_alignment,
        )
        width = call.x_TW.shape[1]
        if call.output_buffer is None:
            tokens = torch.empty((*shape, width), dtype=call.x_TW.dtype, device=self._device)
        else:
            tokens = call.output_buffer
            if not self._layout.padded:
                tokens = tokens[: shape[0]]
        output = self._allocate(call, route, tokens, received)

        # TOKEN_MAJOR is the order of arrival: rows are received where they belong.
        in_place = self._layout is DispatchLayout.TOKEN_MAJOR
        rows_in = tokens
        if not in_place:
            rows_in = self._workspace.take((received, width), tokens.dtype)
        moves = [self._exchange_rows(rows_out, rows_in, route)]
        extras_in = None
        if extras_out is not None:
            extras_in = extras_out.new_empty((received, extras_out.shape[1]))
            moves.append(self._exchange_rows(extras_out, extras_in, route))

        def finish() -> None:
            for move in moves[::-1]:
                move.wait()
            self._workspace.give_back(rows_out)
            self._arrive(call, route, output, rows_in, extras_in)
            if not in_place:
                self._workspace.give_back(rows_in)

        return Dispatched(output=output, state=route, finish=finish)

    def _allocate(
        self, call: DispatchCall, route: Route, tokens: Tensor, received: int
    ) -> DispatchOutput:
        """Everything a dispatch returns; rows, ids, weights and scales are filled on arrival."""
        shape = tokens.shape[:-1]
        weighted = call.weights_TK is not None or route.weights_NK is not None
        ids = weights = scales = None
        if not self._layout.expanded:
            local_shape = (*shape, self._config.topk)
            ids = torch.empty(local_shape, dtype=torch.int64, device=self._device)
            if weighted:
                dtype = self._config.weight_dtype
                weights = torch.empty(local_shape, dtype=dtype, device=self._device)
        if call.scales is not None:
            tensor = call.scales.new_empty((*shape, call.scales.shape[1]))
            scales = QuantScales(tensor, call.scale_format)
        offsets = None
        if self._layout is DispatchLayout.FLAT:
            offsets = layouts.expert_offsets(route.tokens_per_expert, self._config.expert_alignment)
        return DispatchOutput(
            tokens=tokens,
            num_tokens_per_expert=route.tokens_per_expert,
            layout=self._layout,
            scales=scales,
            num_tokens_per_expert_list=list(route.tokens_per_expert_list),
            expert_offsets=offsets,
            topk_ids=ids,
            topk_weights=weights,
            num_tokens_per_rank=route.rows_per_rank,
        )

    def _arrive(
        self,
        call: DispatchCall,
        route: Route,
        output: DispatchOutput,
        rows_in: Tensor,
        extras_in: Tensor | None,
    ) -> None:
        """Places rows and what came beside them."""
        scales_in = None
        if extras_in is not None:
            local_ids_NK, weights_NK, scales_in = extras.unpack(call, extras_in, self._config.topk)
            route.local_ids_NK = route.local_ids_NK if local_ids_NK is None else local_ids_NK
            route.weights_NK = route.weights_NK if weights_NK is None else weights_NK
        assert route.local_ids_NK is not None
        if route.plan is None:
            route.plan = layouts.plan_layout(
                self._layout,
                route.local_ids_NK,
                tokens_per_expert=route.tokens_per_expert,
                tokens_per_expert_list=route.tokens_per_expert_list,
                rows_per_source=route.receive_splits,
                max_tokens_per_rank=self._config.max_tokens_per_rank,
                alignment=self._config.expert_alignment,
            )
        if rows_in is not output.tokens:
            layouts.place(route.plan, rows_in, output.tokens, zero_gaps=call.zero_padding)
        if output.scales is not None and scales_in is not None:
            layouts.place(route.plan, scales_in, output.scales.tensor, zero_gaps=call.zero_padding)
        if output.topk_ids is not None:
            output.topk_ids.fill_(-1)
            layouts.place(route.plan, route.local_ids_NK.to(torch.int64), output.topk_ids)
        if output.topk_weights is not None:
            assert route.weights_NK is not None
            layouts.place(route.plan, route.weights_NK, output.topk_weights, zero_gaps=True)

    # -- combine ----------------------------------------------------------------------------------

    def combine(self, call: CombineCall) -> Combined:
        """Starts a combine: partial sums are on their way to the tokens' ranks."""
        route = finished(call.state)
        self._enter(Operation.COMBINE)
        agreement = None
        if self._check:
            grads = call.weight_grads
            grad_bytes = 0 if grads is None else grads.element_size() * self._config.topk
            agreement = self._agree(Operation.COMBINE, extra_bytes=grad_bytes)
        partial_NH, borrowed = self._partial_sums(call, route)
        if agreement is not None:
            agreement.conclude()
        back_shape = (sum(route.send_splits), partial_NH.shape[1])
        back_nH = self._workspace.take(back_shape, partial_NH.dtype)
        move = self._exchange_rows(partial_NH, back_nH, route, backward=True)
        finish_grads, grads_TK = None, None
        if call.weight_grads is not None:
            grads_TK, finish_grads = self._return_grads(route, call.weight_grads)

        def finish() -> None:
            move.wait()
            if borrowed:
                self._workspace.give_back(partial_NH)
            ordered_sum(back_nH, route.rows_of_token, out=call.out_TH, workspace=self._workspace)
            self._workspace.give_back(back_nH)
            if finish_grads is not None:
                finish_grads()

        return Combined(out_TH=call.out_TH, weight_grads_TK=grads_TK, finish=finish)

    def weight_grads(self, state: object, weight_grads: Tensor) -> Tensor:
        """Returns per-slot weight gradients to the tokens' ranks: `[T, K]` float32."""
        route = finished(state)
        self._enter(Operation.WEIGHT_GRADS)
        if self._check:
            self._agree(Operation.WEIGHT_GRADS).conclude()
        grads_TK, finish = self._return_grads(route, weight_grads)
        finish()
        return grads_TK

    def slot_weights(self, state: object) -> Tensor | None:
        """Expanded layouts: routing weight of every slot, 0 where none is filled."""
        return finished(state).slot_weights()

    def _partial_sums(self, call: CombineCall, route: Route) -> tuple[Tensor, bool]:
        """`[N, H]` one row per arrival, in the wire type; and whether its memory is borrowed."""
        assert route.plan is not None
        if self._layout is DispatchLayout.TOKEN_MAJOR:
            return call.rows, False  # the caller's rows are the partial sums, in arrival order
        shape = (sum(route.receive_splits), call.rows.shape[-1])
        partial_NH = self._workspace.take(shape, call.rows.dtype)
        if not self._layout.expanded:
            layouts.collect(route.plan, call.rows, out=partial_NH)
            return partial_NH, True
        ordered_sum(
            call.rows.view(math.prod(call.rows.shape[:-1]), shape[1]),
            route.plan.slots_of_row,
            route.weights_NK if call.weighted else None,
            out=partial_NH,
            workspace=self._workspace,
        )
        return partial_NH, True

    def _return_grads(self, route: Route, grads: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Sends `[N, K]` gradients back and picks, for every choice, the one of its rank."""
        assert route.plan is not None
        if self._layout.expanded:
            slots = route.plan.slots_of_row
            padded = torch.nn.functional.pad(grads.reshape(-1), (0, 1))  # slot -1 reads the zero
            grads_NK = padded[slots]
        else:
            grads_NK = grads.new_empty((sum(route.receive_splits), self._config.topk))
            layouts.collect(route.plan, grads, out=grads_NK)
        topk = self._config.topk
        back_nK = grads_NK.new_empty((sum(route.send_splits), topk))
        move = self._exchange_rows(grads_NK, back_nK, route, backward=True)
        grads_TK = grads.new_zeros((route.num_tokens, topk))

        def finish() -> None:
            move.wait()
            if back_nK.numel():
                row = route.row_of_choice
                picked = back_nK.gather(0, row.clamp(min=0)) if row.numel() else grads_TK
                grads_TK.copy_(torch.where(row >= 0, picked, 0.0))

        return grads_TK, finish

    # -- shared -----------------------------------------------------------------------------------

    def _enter(self, operation: Operation) -> None:
        self._wire.enter(operation.title, self._call + 1)
        self._call += 1

    def _agree(
        self,
        operation: Operation,
        *,
        rows_per_rank: Tensor | None = None,
        choices: Tensor | None = None,
        refused: Exception | None = None,
        suspect: Tensor | None = None,
        capacity: int = UNBOUNDED,
        row_bytes: int = 0,
        extra_bytes: int = 0,
    ) -> Agreement:
        return Agreement(
            self._wire,
            operation,
            num_experts=self._placement.num_experts,
            rows_per_rank=rows_per_rank,
            choices=choices,
            refused=refused,
            suspect=suspect,
            capacity=capacity,
            row_bytes=row_bytes,
            extra_bytes=extra_bytes,
        )

    def _capacity(self, output_buffer: Tensor | None) -> int:
        limits = []
        if self._config.max_recv_tokens_per_rank is not None:
            limits.append(self._config.max_recv_tokens_per_rank)
        if output_buffer is not None and not self._layout.padded:
            limits.append(output_buffer.shape[0])
        return min(limits, default=UNBOUNDED)

    def _rows_needed(self, table: Table) -> list[int]:
        """First dimension of `tokens` on every rank."""
        per_expert = table.choices.sum(dim=0)
        needed = []
        for rank, experts in enumerate(self._placement.experts_of_rank):
            shape = layouts.leading_shape(
                self._layout,
                tokens_per_expert=per_expert[list(experts)].tolist() if experts else [],
                rows_per_source=table.rows[:, rank].tolist(),
                max_tokens_per_rank=self._config.max_tokens_per_rank,
                alignment=self._config.expert_alignment,
            )
            needed.append(shape[0])
        return needed

    def _pack_rows(self, x_TW: Tensor, token_of_row: Tensor) -> Tensor:
        """`[n, words]` the rows to send, in borrowed memory."""
        words = layouts.as_words(x_TW)
        packed = self._workspace.take((len(token_of_row), words.shape[1]), words.dtype)
        return torch.index_select(words, 0, token_of_row, out=packed)

    def _exchange_rows(
        self, send: Tensor, receive: Tensor, route: Route, backward: bool = False
    ) -> Transfer:
        """All-to-all of whole rows as bytes, forward or along the way back."""
        splits = (route.send_splits, route.receive_splits)
        if backward:
            splits = splits[::-1]
        return self._wire.exchange(layouts.as_bytes(send), layouts.as_bytes(receive), *splits)
