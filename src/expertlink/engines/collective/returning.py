"""The way back of the `collective` engine: what a combine sends, and adding up what comes back.

With `combine_precision="wire"` a rank sends one partial sum per arrival, in arrival order. With
"exact" it sends every row as it is, ordered by (arrival, choice), and its weight beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink import layouts, routing
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall
from expertlink.engines.collective.route import Route, Splits
from expertlink.engines.ranks.wire import Transfer
from expertlink.reduction import SumKernel, ordered_sum
from expertlink.types import DispatchLayout
from expertlink.workspace import Workspace

Exchange = Callable[[Tensor, Tensor, Splits], Transfer]


@dataclass(frozen=True)
class Outgoing:
    """Rows ready to be sent back.

    Attributes:
        rows: `[m, H]`.
        borrowed: their memory is the workspace's.
        weights: `[m, 1]` weights that travel beside them, or None.
        splits: rows exchanged with each rank.
        terms_TC: `[T, C]` for every token of this rank the rows that will come back for it, as
            positions among all that do, in the order in which they are added; -1: none.
    """

    rows: Tensor
    borrowed: bool
    weights: Tensor | None
    splits: Splits
    terms_TC: Tensor


class WayBack:
    """Combines of one communicator.

    Args:
        config: the communicator's.
        exchange: starts an all-to-all of whole rows.
        workspace: where memory is borrowed from.
        kernel: adds up on a GPU, where there is one.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        exchange: Exchange,
        workspace: Workspace,
        kernel: SumKernel | None,
    ) -> None:
        self._layout, self._topk = config.layout, config.topk
        self._weight_bytes = config.weight_dtype.itemsize
        self._exact = config.combine_precision == "exact"
        self._exchange, self._workspace, self._kernel = exchange, workspace, kernel

    def bytes_beside(self, call: CombineCall) -> int:
        """Bytes that travel beside a row; all ranks must agree."""
        grads = call.weight_grads
        total = 0 if grads is None else grads.element_size() * self._topk
        if self._exact and call.weighted:
            total += self._weight_bytes
        return total

    def pack(self, call: CombineCall, route: Route) -> Outgoing:
        """What this rank sends back."""
        return self._single_rows(call, route) if self._exact else self._partial_sums(call, route)

    def start(self, call: CombineCall, outgoing: Outgoing) -> Callable[[], None]:
        """Sends; what is returned waits for the others' rows and adds them up."""
        hidden, splits = outgoing.rows.shape[1], outgoing.splits
        rows_in = self._workspace.take((sum(splits.receive), hidden), outgoing.rows.dtype)
        rows_move = self._exchange(outgoing.rows, rows_in, splits)
        weights_in = weights_move = None
        if outgoing.weights is not None:
            weights_in = outgoing.weights.new_empty((len(rows_in), 1))
            weights_move = self._exchange(outgoing.weights, weights_in, splits)

        sent, received = [outgoing.rows] if outgoing.borrowed else [], [rows_in]

        def finish() -> None:
            rows_move.wait()
            self._workspace.settle(sent)
            weights_TC = None
            if weights_in is not None and weights_move is not None:
                weights_move.wait()
                weights_TC = _by_position(weights_in, outgoing.terms_TC)
            ordered_sum(
                rows_in,
                outgoing.terms_TC,
                weights_TC,
                out=call.out_TH,
                workspace=self._workspace,
                kernel=self._kernel,
            )
            self._workspace.settle(received)

        return finish

    def _partial_sums(self, call: CombineCall, route: Route) -> Outgoing:
        """One row per arrival, in the wire type."""
        assert route.plan is not None
        splits, terms_TC = route.splits.reversed(), route.rows_of_token
        if self._layout is DispatchLayout.TOKEN_MAJOR:
            # The caller's rows are the partial sums, in arrival order.
            return Outgoing(call.rows, False, None, splits, terms_TC)
        shape = (sum(splits.send), call.rows.shape[-1])
        partial_NH = self._workspace.take(shape, call.rows.dtype)
        if not self._layout.expanded:
            layouts.collect(route.plan, call.rows, out=partial_NH)
        else:
            ordered_sum(
                _as_slots(call.rows),
                route.plan.slots_of_row,
                _weights_of_choices(call, route),
                out=partial_NH,
                workspace=self._workspace,
                kernel=self._kernel,
            )
        return Outgoing(partial_NH, True, None, splits, terms_TC)

    def _single_rows(self, call: CombineCall, route: Route) -> Outgoing:
        """One row per (arrival, choice), untouched."""
        assert route.plan is not None
        splits = route.choices.reversed()
        slots = route.plan.slots_of_row.reshape(-1)
        # Present choices first, in order; their number is known, so the host need not wait for it.
        present = (slots < 0).sort(stable=True).indices[: sum(splits.send)]
        words = layouts.as_words(_as_slots(call.rows))
        rows = self._workspace.take((len(present), words.shape[1]), words.dtype)
        torch.index_select(words, 0, slots[present], out=rows)
        weights_NK = _weights_of_choices(call, route)
        weights = None if weights_NK is None else weights_NK.reshape(-1, 1)[present]
        return Outgoing(
            rows=rows.view(call.rows.dtype),
            borrowed=True,
            weights=weights,
            splits=splits,
            terms_TC=routing.order_of_choices(route.row_of_choice),
        )

    def return_grads(self, route: Route, grads: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Sends `[N, K]` gradients back and picks, for every choice, the one of its rank."""
        assert route.plan is not None
        topk = self._topk
        if self._layout.expanded:
            grads_NK = _by_position(grads, route.plan.slots_of_row)
        else:
            grads_NK = grads.new_empty((sum(route.splits.receive), topk))
            layouts.collect(route.plan, grads, out=grads_NK)
        back_nK = grads_NK.new_empty((sum(route.splits.send), topk))
        move = self._exchange(grads_NK, back_nK, route.splits.reversed())
        grads_TK = grads.new_zeros((route.num_tokens, topk))

        def finish() -> None:
            move.wait()
            if back_nK.numel():
                row = route.row_of_choice
                picked = back_nK.gather(0, row.clamp(min=0)) if row.numel() else grads_TK
                grads_TK.copy_(torch.where(row >= 0, picked, 0.0))

        return grads_TK, finish


def _as_slots(rows: Tensor) -> Tensor:
    """`[S, H]`: rows with their leading dimensions flattened."""
    return rows.view(math.prod(rows.shape[:-1]), rows.shape[-1])


def _weights_of_choices(call: CombineCall, route: Route) -> Tensor | None:
    """`[N, K]` what rows are multiplied with, or None."""
    if not call.weighted:
        return None
    if call.slot_weights is None:
        return route.weights_NK
    assert route.plan is not None
    return _by_position(call.slot_weights, route.plan.slots_of_row)


def _by_position(values: Tensor, positions: Tensor) -> Tensor:
    """The value at every position; 0 at position -1, which reads the one appended."""
    return torch.nn.functional.pad(values.reshape(-1), (0, 1))[positions]
