"""One dispatch of the collective engine, from the caller's rows to rows under way.

count     rows for each rank and choices of each expert            sending.py
agree     headers to all ranks, so that all see the same counts    ranks/agreement.py
pack      the rows that leave, and their metadata                  sending.py, ranks/metadata.py
send      two all-to-alls: rows and metadata                       exchange.py
place     what arrives goes to its slots, when the call finishes   delivery.py
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink import layouts
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import DispatchCall, Dispatched
from expertlink.engines.collective.delivery import Delivery, Flight
from expertlink.engines.collective.exchange import Splits, exchange_rows
from expertlink.engines.collective.route import Route, finished
from expertlink.engines.collective.sending import Sender, Sending
from expertlink.engines.collective.tally import Tally
from expertlink.engines.ranks import capacity, metadata
from expertlink.engines.ranks.agreement import Agreement, Table, begin_agreement, header_fields
from expertlink.engines.ranks.header import Operation
from expertlink.engines.ranks.wire import Wire
from expertlink.routing import Placement, explain_ids
from expertlink.types import DispatchLayout
from expertlink.workspace import Workspace


@dataclass(frozen=True)
class Counts:
    """What all headers together say of this rank.

    Attributes:
        splits: rows exchanged with each rank.
        tokens_per_source: `[R][E_loc]` choices of each local expert by the tokens of each rank.
        tokens_per_expert: `[E_loc]` choices of each local expert.
    """

    splits: Splits
    tokens_per_source: list[list[int]]
    tokens_per_expert: list[int]


@dataclass(frozen=True)
class Packed:
    """Rows ready to be sent.

    Attributes:
        token_of_row: `[n]` source token of every row.
        rows: `[n, words]`, borrowed.
        metadata: `[n, bytes]` uint8, or None where nothing travels with the rows.
    """

    token_of_row: Tensor
    rows: Tensor
    metadata: Tensor | None


class Dispatcher:
    """Dispatches of one communicator.

    Args:
        config: the communicator's.
        wire: the ranks' connection.
        placement: where the experts live.
        workspace: where memory is borrowed.
        sender: counts and orders the rows that leave.
        tally: counts calls.
        check_inputs: faulty ids are refused.
        agrees: ranks exchange headers before a cached dispatch too.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        wire: Wire,
        placement: Placement,
        workspace: Workspace,
        sender: Sender,
        tally: Tally,
        check_inputs: bool,
        agrees: bool,
    ) -> None:
        self._config, self._wire, self._placement = config, wire, placement
        self._workspace, self._sender, self._tally = workspace, sender, tally
        self._check, self._agrees = check_inputs, agrees
        experts = placement.experts_of_rank[wire.rank]
        # A block of experts is a slice, which costs less than a selection.
        first = experts[0] if experts else 0
        block = experts == tuple(range(first, first + len(experts)))
        self._experts = slice(first, first + len(experts)) if block else list(experts)

    def dispatch(self, call: DispatchCall) -> Dispatched:
        """Waits until all ranks have agreed, and sends. Collective."""
        route, flight = self._send_new(call) if call.previous is None else self._send_cached(call)
        delivery = Delivery(
            self._config, call, route, flight, workspace=self._workspace, tally=self._tally
        )
        return Dispatched(
            output=delivery.returned, state=route, finish=delivery.finish, call=self._wire.call
        )

    def _send_new(self, call: DispatchCall) -> tuple[Route, Flight]:
        """A new routing: ranks tell each other how many rows to expect."""
        ids_TK = call.topk_ids_TK
        assert ids_TK is not None
        sending = self._count(call)
        agreement = Agreement(
            self._wire,
            Operation.DISPATCH,
            sending.header,
            max_tokens=self._config.max_tokens_per_rank,
        )
        sending.order()
        packed = None
        if self._wire.device.type == "cpu":  # own counts are known: pack while headers travel
            packed = self._pack(call, sending, sum(sending.rows_per_rank.tolist()))
        table = agreement.conclude(lambda: explain_ids(ids_TK, self._placement.num_experts))
        capacity.check(self._config, self._placement, table, call=self._wire.call)
        counts = self._read_counts(table)
        if packed is None:
            packed = self._pack(call, sending, sum(counts.splits.send))
        flight = self._send(call, packed, counts.splits, counts.tokens_per_expert)
        # From here on, all work is queued while rows travel.
        paths = sending.paths()
        route = Route(
            call=self._wire.call,
            maker=self._wire.number,
            num_tokens=call.x_TW.shape[0],
            splits=counts.splits,
            rows_per_rank=sending.rows_per_rank,
            token_of_row=packed.token_of_row,
            rows_of_token=paths.rows_of_token,
            row_of_choice=paths.row_of_choice,
            tokens_per_expert=counts.tokens_per_expert,
            tokens_per_source=counts.tokens_per_source,
            choices=self._choices(table, counts.tokens_per_source),
        )
        return route, flight

    def _send_cached(self, call: DispatchCall) -> tuple[Route, Flight]:
        """The routing of an earlier dispatch: nothing is counted, ids do not travel again."""
        cached = finished(call.previous, self._config.weight_dtype)
        route = dataclasses.replace(cached, call=self._wire.call, maker=self._wire.number)
        agreement = None
        if self._agrees:
            agreement = begin_agreement(
                self._wire,
                Operation.CACHED_DISPATCH,
                num_experts=self._placement.num_experts,
                max_tokens=self._config.max_tokens_per_rank,
                device=self._wire.device,
                subject=cached.call,
                maker=cached.maker,
                row_bytes=metadata.row_bytes(call.x_TW),
                metadata_bytes=metadata.width(call),
            )
        packed = self._pack_cached(call, route)
        if agreement is not None:
            agreement.conclude()
        return route, self._send(call, packed, route.splits, route.tokens_per_expert)

    # -- count ------------------------------------------------------------------------------------

    def _count(self, call: DispatchCall) -> Sending:
        """Queues the counting of this rank's rows and choices, and the header that has them."""
        fields = header_fields(
            self._wire,
            Operation.DISPATCH,
            capacity=capacity.announced(self._config, call.output_buffer),
            row_bytes=metadata.row_bytes(call.x_TW),
            metadata_bytes=metadata.width(call),
        )
        return self._sender(call, fields, self._check)

    def _read_counts(self, table: Table) -> Counts:
        rank = self._wire.rank
        tokens_per_source = table.choices[:, self._experts].tolist()
        return Counts(
            splits=Splits(table.rows[rank], [rows[rank] for rows in table.rows]),
            tokens_per_source=tokens_per_source,
            tokens_per_expert=[sum(column) for column in zip(*tokens_per_source, strict=True)],
        )

    def _choices(self, table: Table, tokens_per_source: list[list[int]]) -> Splits:
        """Choices exchanged with each rank."""
        own = table.choices[self._wire.rank].tolist()
        sent = [sum(own[e] for e in experts) for experts in self._placement.experts_of_rank]
        return Splits(sent, [sum(theirs) for theirs in tokens_per_source])

    # -- pack -------------------------------------------------------------------------------------

    def _pack(self, call: DispatchCall, sending: Sending, num_rows: int) -> Packed:
        token_of_row = sending.token_of_row(num_rows)
        rows = self._pack_rows(call.x_TW, token_of_row)
        packed = sending.metadata(num_rows)
        if self._config.source_tokens:
            packed = metadata.with_source_tokens(packed, token_of_row)
        return Packed(token_of_row, rows, packed)

    def _pack_cached(self, call: DispatchCall, route: Route) -> Packed:
        rows = self._pack_rows(call.x_TW, route.token_of_row)
        packed = None
        if metadata.width(call):
            count = len(route.token_of_row)
            row = torch.arange(count, dtype=torch.int64, device=rows.device)[:, None]
            here_nK = route.row_of_choice[route.token_of_row] == row
            packed = metadata.pack(call, route.token_of_row, here_nK.to(torch.int32) - 1)
        if self._config.source_tokens:
            packed = metadata.with_source_tokens(packed, route.token_of_row)
        return Packed(route.token_of_row, rows, packed)

    def _pack_rows(self, x_TW: Tensor, token_of_row: Tensor) -> Tensor:
        """`[n, words]` the rows to send, in borrowed memory."""
        words = layouts.as_words(x_TW)
        packed = self._workspace.take((len(token_of_row), words.shape[1]), words.dtype)
        return torch.index_select(words, 0, token_of_row, out=packed)

    # -- send -------------------------------------------------------------------------------------

    def _send(
        self, call: DispatchCall, packed: Packed, splits: Splits, tokens_per_expert: list[int]
    ) -> Flight:
        """Starts both all-to-alls. Expanded layouts need ids to find slots: metadata goes first."""
        layout, wire = self._config.layout, self._wire
        num_rows = sum(splits.receive)
        metadata_in = metadata_move = None
        if packed.metadata is not None:
            metadata_in = packed.metadata.new_empty((num_rows, packed.metadata.shape[1]))
            if layout.expanded:
                metadata_move = exchange_rows(wire, packed.metadata, metadata_in, splits)
        tokens = self._tokens(call, splits, tokens_per_expert)
        rows_in = tokens  # TOKEN_MAJOR is the order of arrival: rows arrive in their slots
        if layout is not DispatchLayout.TOKEN_MAJOR:
            rows_in = self._workspace.take((num_rows, call.x_TW.shape[1]), tokens.dtype)
        rows_move = exchange_rows(wire, packed.rows, rows_in, splits)
        if packed.metadata is not None and metadata_in is not None and metadata_move is None:
            metadata_move = exchange_rows(wire, packed.metadata, metadata_in, splits)
        return Flight(tokens, packed.rows, rows_in, rows_move, metadata_in, metadata_move)

    def _tokens(self, call: DispatchCall, splits: Splits, tokens_per_expert: list[int]) -> Tensor:
        """The tensor in which the call returns its rows: the caller's, or a new one."""
        buffer, config = call.output_buffer, self._config
        if buffer is not None and config.layout.padded:
            return buffer
        shape = layouts.leading_shape(
            config.layout,
            tokens_per_expert=tokens_per_expert,
            rows_per_source=splits.receive,
            max_tokens_per_rank=config.max_tokens_per_rank,
            alignment=config.expert_alignment,
        )
        if buffer is not None:
            return buffer[: shape[0]]
        return call.x_TW.new_empty((*shape, call.x_TW.shape[1]))
