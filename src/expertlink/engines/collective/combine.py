"""One combine of the collective engine, from expert outputs to the sum at every token.

    pack      partial sums, or single rows, in the order in which tokens arrived
    agree     headers to all ranks, where ranks agree on such calls     ranks/agreement.py
    send      one all-to-all of rows, one of weights where they travel  exchange.py
    add up    what comes back for every token, in a fixed order         reduction.py

With `combine_precision="wire"` a rank sends one partial sum per arrival, in order of arrival. With
"exact" it sends every row as it is, ordered by (arrival, choice), and its weight as metadata.
Weights that a combine is given at the tokens' ranks travel ahead of "wire" sums; "exact" ones stay.

Hosts change what is rounded, not what travels: the sums of each host are made at the token's rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink import layouts, routing
from expertlink.config import MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.base import CombineCall, Combined
from expertlink.engines.collective.exchange import Splits, exchange_rows
from expertlink.engines.collective.route import Route, finished
from expertlink.engines.collective.tally import Tally
from expertlink.engines.ranks import metadata
from expertlink.engines.ranks.agreement import agree, begin_agreement
from expertlink.engines.ranks.header import Operation
from expertlink.engines.ranks.wire import Transfer, Wire
from expertlink.reduction import SumKernel, ordered_sum
from expertlink.types import DispatchLayout
from expertlink.workspace import Workspace


@dataclass(frozen=True)
class Outgoing:
    """Rows ready to be sent back.

    Attributes:
        rows: `[m, H]`.
        borrowed: their memory is the workspace's.
        weights: `[m, 1]` weights that travel with them, or None.
        splits: rows exchanged with each rank.
        hosts: int32 host of every row that will come back, or None: all from one.
        terms_TC: `[T, C]` for every token of this rank the rows that will come back for it, as
            positions among all that do, in the order in which they are added; -1: none.
    """

    rows: Tensor
    borrowed: bool
    weights: Tensor | None
    splits: Splits
    hosts: Tensor | None
    terms_TC: Tensor


@dataclass(frozen=True)
class Incoming:
    """Rows on their way back.

    Attributes:
        rows: `[m, H]`, borrowed.
        rows_move: their transfer.
        weights: `[m, 1]`, or None.
        weights_move: their transfer.
    """

    rows: Tensor
    rows_move: Transfer
    weights: Tensor | None
    weights_move: Transfer | None


class Returns:
    """Combines of one communicator.

    Args:
        config: the communicator's.
        wire: the ranks' connection.
        domains: hosts of the ranks.
        workspace: where memory is borrowed.
        kernel: adds up on a GPU, where it could be compiled.
        tally: counts calls.
        agrees: ranks exchange headers before every combine.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        wire: Wire,
        domains: Domains,
        workspace: Workspace,
        kernel: SumKernel | None,
        tally: Tally,
        agrees: bool,
    ) -> None:
        self._config, self._wire, self._workspace = config, wire, workspace
        self._kernel, self._tally, self._agrees = kernel, tally, agrees
        self._exact = config.combine_precision == "exact"
        self._host_of_R: Tensor | None = None
        if domains.num_hosts > 1 and not self._exact:
            self._host_of_R = torch.tensor(domains.host_of, dtype=torch.int32, device=wire.device)

    def combine(self, call: CombineCall) -> Combined:
        """Waits until all ranks have agreed, and sends. Collective."""
        route = finished(call.state, self._config.weight_dtype)
        weights_TK = call.weights_TK
        agreement = None
        if self._agrees:
            agreement = begin_agreement(
                self._wire,
                Operation.COMBINE,
                num_experts=self._config.num_experts,
                max_tokens=self._config.max_tokens_per_rank,
                device=self._wire.device,
                subject=route.call,
                maker=route.maker,
                row_bytes=0 if weights_TK is None else metadata.row_bytes(weights_TK),
                metadata_bytes=self._metadata_bytes(call),
            )
        if self._exact:
            outgoing = self._single_rows(call, route)
        else:
            if agreement is not None and weights_TK is not None:  # they travel before the rows
                agreement.conclude()
                agreement = None
            outgoing = self._sums(call, route)
        if agreement is not None:
            agreement.conclude()
        finish_rows = self._send(call, outgoing)
        grads_TK = finish_grads = None
        if call.weight_grads is not None:
            grads_TK, finish_grads = self._send_grads(route, call.weight_grads)

        def finish() -> None:
            finish_rows()
            if finish_grads is not None:
                finish_grads()
            row_bytes = metadata.row_bytes(call.out_TH)
            self._tally.add(outgoing.splits, row_bytes, route=route, single=self._exact)

        return Combined(out_TH=call.out_TH, weight_grads_TK=grads_TK, finish=finish)

    def weight_grads(self, route: Route, grads: Tensor) -> Tensor:
        """Returns per-slot weight gradients to the tokens' ranks: `[T, K]`. Collective."""
        if self._agrees:
            agree(
                self._wire,
                Operation.WEIGHT_GRADS,
                num_experts=self._config.num_experts,
                max_tokens=self._config.max_tokens_per_rank,
                device=self._wire.device,
                subject=route.call,
                maker=route.maker,
            )
        grads_TK, finish = self._send_grads(route, grads)
        finish()
        return grads_TK

    # -- pack -------------------------------------------------------------------------------------

    def _metadata_bytes(self, call: CombineCall) -> int:
        """Bytes that travel with a row; all ranks must agree."""
        grads = call.weight_grads
        total = 0 if grads is None else grads.element_size() * self._config.topk
        if self._exact and call.weighted and call.weights_TK is None:
            total += self._config.weight_dtype.itemsize
        return total

    def _sums(self, call: CombineCall, route: Route) -> Outgoing:
        """One row per arrival, in the wire type."""
        assert route.plan is not None
        splits, terms_TC = route.splits.reversed(), route.rows_of_token
        hosts = self._hosts_of_rows(route)
        if self._config.layout is DispatchLayout.TOKEN_MAJOR:
            # The caller's rows are the partial sums, in order of arrival.
            return Outgoing(call.rows, False, None, splits, hosts, terms_TC)
        shape = (sum(splits.send), call.rows.shape[-1])
        sums_NH = self._workspace.take(shape, call.rows.dtype)
        if not self._config.layout.expanded:
            layouts.collect(route.plan, call.rows, out=sums_NH)
        else:
            ordered_sum(
                _as_slots(call.rows),
                route.plan.slots_of_row,
                self._weights_of_arrivals(call, route),
                out=sums_NH,
                workspace=self._workspace,
                kernel=self._kernel,
            )
        return Outgoing(sums_NH, True, None, splits, hosts, terms_TC)

    def _hosts_of_rows(self, route: Route) -> Tensor | None:
        """`[n]` int32 host of every row that comes back, in their order; None: all of one."""
        if self._host_of_R is None:
            return None
        return self._host_of_R.repeat_interleave(
            route.rows_per_rank, output_size=sum(route.splits.send)
        )

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
        weights_NK = None  # those of the tokens' ranks stay there
        if call.weights_TK is None:
            weights_NK = _weights_of_choices(call, route)
        weights = None if weights_NK is None else weights_NK.reshape(-1, 1)[present]
        return Outgoing(
            rows=rows.view(call.rows.dtype),
            borrowed=True,
            weights=weights,
            splits=splits,
            hosts=None,  # single rows are rounded once, whatever hosts they come from
            terms_TC=routing.order_of_choices(route.row_of_choice),
        )

    def _weights_of_arrivals(self, call: CombineCall, route: Route) -> Tensor | None:
        """`[N, K]` what rows are multiplied with before they are added up here, or None.

        Weights of the combine come from the tokens' ranks first.
        """
        if call.weights_TK is None:
            return _weights_of_choices(call, route)
        splits, token = route.splits, route.token_of_row
        row = torch.arange(len(token), device=token.device)[:, None]
        here_nK = route.row_of_choice[token] == row
        weights_nK = torch.where(here_nK, call.weights_TK[token], 0.0)
        weights_NK = weights_nK.new_empty((sum(splits.receive), self._config.topk))
        exchange_rows(self._wire, weights_nK, weights_NK, splits).wait()
        return weights_NK

    # -- send, add up -----------------------------------------------------------------------------

    def _send(self, call: CombineCall, outgoing: Outgoing) -> Callable[[], None]:
        """Starts sending; returns what waits for the other ranks' rows and adds them up."""
        hidden, splits = outgoing.rows.shape[1], outgoing.splits
        rows = self._workspace.take((sum(splits.receive), hidden), outgoing.rows.dtype)
        rows_move = exchange_rows(self._wire, outgoing.rows, rows, splits)
        weights = weights_move = None
        if outgoing.weights is not None:
            weights = outgoing.weights.new_empty((len(rows), 1))
            weights_move = exchange_rows(self._wire, outgoing.weights, weights, splits)
        incoming = Incoming(rows, rows_move, weights, weights_move)
        sent, received = [outgoing.rows] if outgoing.borrowed else [], [rows]

        def finish() -> None:
            incoming.rows_move.wait()
            self._workspace.settle(sent)
            self._add_up(call, outgoing, incoming)
            self._workspace.settle(received)

        return finish

    def _add_up(self, call: CombineCall, outgoing: Outgoing, incoming: Incoming) -> None:
        weights_TC = call.weights_TK if self._exact else None
        if incoming.weights is not None and incoming.weights_move is not None:
            incoming.weights_move.wait()
            weights_TC = _by_position(incoming.weights, outgoing.terms_TC)
        ordered_sum(
            incoming.rows,
            outgoing.terms_TC,
            weights_TC,
            out=call.out_TH,
            hosts_S=outgoing.hosts,
            workspace=self._workspace,
            kernel=self._kernel,
        )

    def _send_grads(self, route: Route, grads: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Sends `[N, K]` gradients back; finished, every choice has the one of its rank."""
        assert route.plan is not None
        topk = self._config.topk
        if self._config.layout.expanded:
            grads_NK = _by_position(grads, route.plan.slots_of_row)
        else:
            grads_NK = grads.new_empty((sum(route.splits.receive), topk))
            layouts.collect(route.plan, grads, out=grads_NK)
        back_nK = grads_NK.new_empty((sum(route.splits.send), topk))
        move = exchange_rows(self._wire, grads_NK, back_nK, route.splits.reversed())
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
