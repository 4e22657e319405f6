"""The `collective` engine: torch.distributed all-to-alls, on any device, over any number of hosts.

A row crosses the wire once per (token, destination rank), together with its local expert ids,
weights and scales; combine sends one partial sum per (token, rank) back. This engine defines the
bits that every other engine reproduces.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import NoReturn

import torch
from torch import Tensor

from expertlink import layouts
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall, Combined, DispatchCall, Dispatched
from expertlink.engines.collective import delivery
from expertlink.engines.collective.ordered_sum import OrderedSum
from expertlink.engines.collective.returning import WayBack
from expertlink.engines.collective.route import Flight, Packed, Route, Splits, finished
from expertlink.engines.collective.send_order import MAX_RANKS, KernelSender
from expertlink.engines.collective.sending import Sender, Sending, TorchSender
from expertlink.engines.collective.tally import Tally
from expertlink.engines.outputs import into_buffers, into_tokens, largest_output
from expertlink.engines.ranks import capacity, metadata
from expertlink.engines.ranks.agreement import Agreement, Table, begin_agreement
from expertlink.engines.ranks.header import HeaderFields, Operation
from expertlink.engines.ranks.wire import Transfer, Wire
from expertlink.engines.unmasked import Unmasked
from expertlink.jit.compiler import Launcher, unavailable_reason
from expertlink.reduction import SumKernel
from expertlink.routing import Placement
from expertlink.types import CallStatistics, DispatchBuffers, DispatchLayout, RowKind
from expertlink.validation import explain_ids
from expertlink.workspace import Workspace

logger = logging.getLogger("expertlink")


class CollectiveEngine(Unmasked):
    """See the module's docstring; the contract is `engines.base.Engine`."""

    name = "collective"
    quantizes = False

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
        # gloo ends the process when sizes do not match, so there the ranks agree on every call.
        self._agrees = check_inputs or (wire.device.type == "cpu" and wire.num_ranks > 1)
        self._wire = wire
        experts = placement.experts_of_rank[wire.rank]
        self._num_local = len(experts)
        # A block of experts is a slice, which costs less than a selection.
        first = experts[0] if experts else 0
        block = experts == tuple(range(first, first + len(experts)))
        self._experts = slice(first, first + len(experts)) if block else list(experts)
        self._workspace = Workspace(self._device)
        self._sender: Sender = TorchSender(placement)
        self._tally: Tally | None = None
        if config.num_sms_dispatch is not None or config.num_sms_combine is not None:
            logger.warning("num_sms_dispatch and num_sms_combine: torch.distributed decides that")
        self._way_back = WayBack(
            config,
            exchange=self._exchange_rows,
            workspace=self._workspace,
            kernel=self._compile_kernels() if self._device.type == "cuda" else None,
        )

    def _compile_kernels(self) -> SumKernel | None:
        """On GPUs, kernels replace long chains of small operations where they can be compiled."""
        reason = unavailable_reason()
        if reason is not None:
            logger.warning(
                "the collective engine falls back to slower torch operations: %s", reason
            )
            return None
        launcher = Launcher(self._device)
        if self._wire.num_ranks <= MAX_RANKS:
            self._sender = KernelSender(launcher, self._placement)
        return OrderedSum(launcher, dtype=self._config.dtype)

    def set_timeout(self, timeout_s: float) -> None:
        """Bounds later waits, in seconds."""
        self._wire.timeout_s = timeout_s

    def close(self) -> None:
        """Frees the workspace and lets go of the group, which belongs to the caller."""
        self._workspace.clear()
        self._wire.close()

    def memory_estimate(self) -> dict[str, int]:
        """Bytes by region of the largest possible call, beyond inputs and outputs."""
        config, ranks = self._config, self._wire.num_ranks
        copies = min(ranks, config.topk)
        sent = config.max_tokens_per_rank * copies
        received = config.max_tokens_per_rank * ranks
        row = config.hidden_size * config.dtype.itemsize
        meta = config.topk * (metadata.ID_BYTES + config.weight_dtype.itemsize)
        return {
            "rows sent": sent * row,
            "rows received": received * row,
            "ids and weights": (sent + received) * meta,
            "headers": 4 * ranks * (ranks + config.num_experts + 8) * 2,
        }

    def check_health(self) -> None:
        """Calls raise their failures themselves; what is left to say is that one was the last."""
        self._wire.check()

    def abort(self, reason: str) -> None:
        """Gives up: later calls raise ClosedError, ranks that wait for this one AbortError."""
        self._wire.abort(reason)

    def wire_rows(self, state: object) -> tuple[list[int], list[int]]:
        """Rows sent to and received from each rank, own rank included."""
        assert isinstance(state, Route)
        return list(state.splits.send), list(state.splits.receive)

    def expert_ranges(self, state: object) -> tuple[Tensor, Tensor]:
        """Expanded layouts: first slot and rows of each source in each group, `[E_loc, R]`."""
        starts, counts = layouts.source_ranges(
            self._layout, finished(state).tokens_per_source, self._config.expert_alignment
        )
        both = torch.tensor([starts, counts], dtype=torch.int32, device="cpu")
        starts_ER, counts_ER = both.view(2, len(counts), self._wire.num_ranks).to(self._device)
        return starts_ER, counts_ER

    def enable_statistics(self) -> CallStatistics:
        """Counts calls from now on; `longest_wait_ns` stays 0."""
        if self._tally is None:
            self._tally = Tally(
                rank=self._wire.rank,
                num_ranks=self._wire.num_ranks,
                num_local=self._num_local,
                device=self._device,
            )
        return self._tally.totals

    def make_buffers(self, rows: RowKind) -> DispatchBuffers:
        """Outputs of the largest shape; tables and copies of the rest are made by every call."""
        output = largest_output(
            self._config,
            rows,
            num_ranks=self._wire.num_ranks,
            num_local=self._num_local,
            device=self._device,
        )
        return DispatchBuffers(output=output, tables=None, kind=rows)

    def refuse(self, operation: Operation, error: Exception) -> NoReturn:
        """Raises `error` here and `PeerError` on the ranks that exchange headers in this call."""
        if self._agrees or operation is Operation.DISPATCH:
            self._enter(operation)
            with self._wire.whole():
                self._agree(operation, refused=error).conclude()
        raise error

    # -- dispatch ---------------------------------------------------------------------------------

    def dispatch(self, call: DispatchCall) -> Dispatched:
        """Starts a dispatch: agrees on counts (waits for peers), then rows are on their way."""
        call = into_tokens(call)
        kind = Operation.DISPATCH if call.previous is None else Operation.CACHED_DISPATCH
        self._enter(kind)
        with self._wire.whole():
            return self._new_dispatch(call) if call.previous is None else self._again(call)

    def _new_dispatch(self, call: DispatchCall) -> Dispatched:
        assert call.topk_ids_TK is not None
        ids_TK = call.topk_ids_TK
        fields = self._fields(
            Operation.DISPATCH,
            capacity=capacity.announced(self._config, call.output_buffer),
            row_bytes=metadata.row_bytes(call.x_TW),
            metadata_bytes=metadata.width(call),
        )
        sending = self._sender(call, fields, self._check)
        agreement = Agreement(self._wire, Operation.DISPATCH, sending.header)
        sending.order()
        packed = None
        if self._device.type == "cpu":  # own counts are at hand: pack while the headers travel
            packed = self._pack(call, sending, sum(sending.rows_per_rank.tolist()))
        table = agreement.conclude(lambda: explain_ids(ids_TK, self._placement.num_experts))
        capacity.check(self._config, self._placement, table, call=self._wire.call)
        rank = self._wire.rank
        splits = Splits(table.rows[rank], [rows[rank] for rows in table.rows])
        tokens_per_source = table.choices[:, self._experts].tolist()
        packed = packed or self._pack(call, sending, sum(splits.send))
        counts = [sum(column) for column in zip(*tokens_per_source, strict=True)]
        flight = self._send(call, splits, counts, packed.rows, packed.extras)
        # Everything from here on is queued while rows travel.
        paths = sending.paths()
        route = Route(
            call=self._wire.call,
            num_tokens=call.x_TW.shape[0],
            splits=splits,
            token_of_row=packed.token_of_row,
            rows_of_token=paths.rows_of_token,
            row_of_choice=paths.row_of_choice,
            tokens_per_expert=counts,
            tokens_per_source=tokens_per_source,
            choices=self._choices(table, tokens_per_source),
        )
        return self._deliver(call, route, flight)

    def _again(self, call: DispatchCall) -> Dispatched:
        """Same routing as before: nothing is counted, ids do not travel again."""
        cached = finished(call.previous)
        route = dataclasses.replace(cached, call=self._wire.call)
        agreement = None
        if self._agrees:
            agreement = self._agree(
                Operation.CACHED_DISPATCH,
                subject=cached.call,
                row_bytes=metadata.row_bytes(call.x_TW),
                metadata_bytes=metadata.width(call),
            )
        rows_out = self._pack_rows(call.x_TW, route.token_of_row)
        extras_out = None
        if metadata.width(call):
            row = torch.arange(len(route.token_of_row), device=self._device)[:, None]
            here_nK = route.row_of_choice[route.token_of_row] == row
            extras_out = metadata.pack(call, route.token_of_row, here_nK.to(torch.int32) - 1)
        if agreement is not None:
            agreement.conclude()
        counts = route.tokens_per_expert
        flight = self._send(call, route.splits, counts, rows_out, extras_out)
        return self._deliver(call, route, flight)

    def _send(
        self,
        call: DispatchCall,
        splits: Splits,
        tokens_per_expert: list[int],
        rows_out: Tensor,
        extras_out: Tensor | None,
    ) -> Flight:
        """Puts packed rows on the wire, and what travels beside them.

        Expanded layouts need the ids to place the rows, so those go first; others do not.
        """
        received = sum(splits.receive)
        extras_in = extras_move = None
        if extras_out is not None:
            extras_in = extras_out.new_empty((received, extras_out.shape[1]))
            if self._layout.expanded:
                extras_move = self._exchange_rows(extras_out, extras_in, splits)
        tokens = call.output_buffer
        if tokens is None or not self._layout.padded:
            shape = layouts.leading_shape(
                self._layout,
                tokens_per_expert=tokens_per_expert,
                rows_per_source=splits.receive,
                max_tokens_per_rank=self._config.max_tokens_per_rank,
                alignment=self._config.expert_alignment,
            )
            if tokens is None:
                tokens = call.x_TW.new_empty((*shape, call.x_TW.shape[1]))
            else:
                tokens = tokens[: shape[0]]
        rows_in = tokens  # TOKEN_MAJOR is the order of arrival: rows come where they belong
        if self._layout is not DispatchLayout.TOKEN_MAJOR:
            rows_in = self._workspace.take((received, call.x_TW.shape[1]), tokens.dtype)
        rows_move = self._exchange_rows(rows_out, rows_in, splits)
        if extras_out is not None and extras_in is not None and extras_move is None:
            extras_move = self._exchange_rows(extras_out, extras_in, splits)
        return Flight(tokens, rows_out, rows_in, rows_move, extras_in, extras_move)

    def _deliver(self, call: DispatchCall, route: Route, flight: Flight) -> Dispatched:
        """What remains to be done about rows in flight."""
        output = delivery.allocate(self._config, call, route, flight.tokens)
        returned, fill = output, None
        if call.buffers is not None:
            returned, fill = into_buffers(call.buffers, output)

        loans = [flight.rows_out]
        if flight.rows_in is not flight.tokens:
            loans.append(flight.rows_in)

        def receive_extras() -> Tensor | None:
            if flight.extras_move is not None:
                flight.extras_move.wait()
            return delivery.unpack(self._config, call, route, flight.extras_in)

        def finish() -> None:
            scales = receive_extras() if self._layout.expanded else None
            plan = delivery.plan(self._config, route, self._device)
            flight.rows_move.wait()
            if flight.rows_in is not flight.tokens:
                layouts.place(plan, flight.rows_in, flight.tokens, zero_gaps=call.zero_padding)
            self._workspace.settle(loans)
            if not self._layout.expanded:
                scales = receive_extras()
            delivery.place_beside(call, route, output, scales)
            if fill is not None:
                fill()
            if self._tally is not None:
                row_bytes = metadata.row_bytes(call.x_TW)
                if call.scales is not None:
                    row_bytes += metadata.row_bytes(call.scales)
                self._tally.add(route.splits, row_bytes, output.num_tokens_per_expert)

        return Dispatched(output=returned, state=route, finish=finish, call=self._wire.call)

    def _choices(self, table: Table, tokens_per_source: list[list[int]]) -> Splits:
        """Choices exchanged with each rank."""
        own = table.choices[self._wire.rank].tolist()
        sent = [sum(own[e] for e in experts) for experts in self._placement.experts_of_rank]
        return Splits(sent, [sum(theirs) for theirs in tokens_per_source])

    # -- combine ----------------------------------------------------------------------------------

    def combine(self, call: CombineCall) -> Combined:
        """Starts a combine: sums, or rows, are on their way to the tokens' ranks."""
        self._enter(Operation.COMBINE)
        with self._wire.whole():
            return self._combine(call)

    def _combine(self, call: CombineCall) -> Combined:
        route = finished(call.state)
        agreement = None
        if self._agrees:
            beside = self._way_back.bytes_beside(call)
            agreement = self._agree(Operation.COMBINE, subject=route.call, metadata_bytes=beside)
        outgoing = self._way_back.pack(call, route)
        if agreement is not None:
            agreement.conclude()
        finish_rows = self._way_back.start(call, outgoing)
        grads_TK = finish_grads = None
        if call.weight_grads is not None:
            grads_TK, finish_grads = self._way_back.return_grads(route, call.weight_grads)

        def finish() -> None:
            finish_rows()
            if finish_grads is not None:
                finish_grads()
            if self._tally is not None:
                self._tally.add(outgoing.splits, metadata.row_bytes(call.out_TH))

        return Combined(out_TH=call.out_TH, weight_grads_TK=grads_TK, finish=finish)

    def weight_grads(self, state: object, weight_grads: Tensor) -> Tensor:
        """Returns per-slot weight gradients to the tokens' ranks: `[T, K]` float32."""
        self._enter(Operation.WEIGHT_GRADS)
        route = finished(state)
        with self._wire.whole():
            if self._agrees:
                self._agree(Operation.WEIGHT_GRADS, subject=route.call).conclude()
            grads_TK, finish = self._way_back.return_grads(route, weight_grads)
            finish()
        return grads_TK

    def slot_weights(self, state: object) -> Tensor | None:
        """Expanded layouts: routing weight of every slot, 0 where none is filled."""
        return finished(state).slot_weights()

    # -- shared -----------------------------------------------------------------------------------

    def _enter(self, operation: Operation) -> None:
        self._wire.enter(operation.title, self._wire.call + 1)

    def _fields(self, operation: Operation, **fields: int) -> HeaderFields:
        return HeaderFields(
            operation=operation,
            communicator=self._wire.number,
            call=self._wire.call & 0x7FFFFFFF,
            **fields,
        )

    def _agree(
        self,
        operation: Operation,
        *,
        refused: Exception | None = None,
        row_bytes: int = 0,
        metadata_bytes: int = 0,
        subject: int = 0,
    ) -> Agreement:
        """Exchanges headers without counts."""
        return begin_agreement(
            self._wire,
            operation,
            num_experts=self._placement.num_experts,
            refused=refused,
            row_bytes=row_bytes,
            metadata_bytes=metadata_bytes,
            subject=subject,
        )

    def _pack(self, call: DispatchCall, sending: Sending, count: int) -> Packed:
        """The rows to send, and what travels beside them."""
        token_of_row = sending.token_of_row(count)
        rows = self._pack_rows(call.x_TW, token_of_row)
        return Packed(token_of_row, rows, sending.metadata(count))

    def _pack_rows(self, x_TW: Tensor, token_of_row: Tensor) -> Tensor:
        """`[n, words]` the rows to send, in borrowed memory."""
        words = layouts.as_words(x_TW)
        packed = self._workspace.take((len(token_of_row), words.shape[1]), words.dtype)
        return torch.index_select(words, 0, token_of_row, out=packed)

    def _exchange_rows(self, send: Tensor, receive: Tensor, splits: Splits) -> Transfer:
        """All-to-all of whole rows as bytes."""
        return self._wire.exchange(
            layouts.as_bytes(send), layouts.as_bytes(receive), splits.send, splits.receive
        )
