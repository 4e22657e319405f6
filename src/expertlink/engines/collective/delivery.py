"""The receiving half of a dispatch: what it returns, and placing what arrives.

In: rows and metadata under way. Out: a filled `DispatchOutput`, and a route that knows the ids,
weights and slots of the rows received.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink import layouts
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import DispatchCall
from expertlink.engines.collective.route import Route
from expertlink.engines.collective.tally import Tally
from expertlink.engines.outputs import OutputTensors, PublicCounts, into_buffers
from expertlink.engines.ranks import metadata
from expertlink.engines.ranks.wire import Transfer
from expertlink.types import DispatchOutput
from expertlink.workspace import Workspace


@dataclass(frozen=True)
class Flight:
    """Rows and metadata under way.

    Attributes:
        tokens: `tokens` of the dispatch's output.
        rows_out: packed rows, borrowed.
        rows_in: `[N, W]` in order of arrival; `tokens` itself, or borrowed.
        rows_move: transfer of the rows.
        metadata_in: `[N, bytes]` uint8, or None where rows travel without metadata.
        metadata_move: transfer of the metadata.
    """

    tokens: Tensor
    rows_out: Tensor
    rows_in: Tensor
    rows_move: Transfer
    metadata_in: Tensor | None
    metadata_move: Transfer | None


class Delivery:
    """Receives one dispatch.

    Args:
        config: the communicator's.
        call: the dispatch.
        route: its routing; gets the ids and weights that arrive, and the slots.
        flight: rows and metadata under way.
        workspace: where the flight's memory was borrowed.
        tally: counts the call.

    Attributes:
        returned: what the call returns; readable once `finish` has succeeded.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        call: DispatchCall,
        route: Route,
        flight: Flight,
        *,
        workspace: Workspace,
        tally: Tally,
    ) -> None:
        self._config, self._call, self._route, self._flight = config, call, route, flight
        self._workspace, self._tally = workspace, tally
        self._output = self.returned = allocate(config, call, route, flight.tokens)
        self._source_tokens_N: Tensor | None = None
        self._fill_buffers: Callable[[], None] | None = None
        if call.buffers is not None:
            self.returned, self._fill_buffers = into_buffers(call.buffers, self._output)
        self._loans = [flight.rows_out]
        if flight.rows_in is not flight.tokens:
            self._loans.append(flight.rows_in)

    def finish(self) -> None:
        """Waits for the rows and places them; can be repeated after a failure."""
        call, route, flight = self._call, self._route, self._flight
        # Expanded layouts find the slots by the ids; the others wait for metadata last.
        expanded = self._config.layout.expanded
        scales = self._receive_metadata() if expanded else None
        plan = self._plan()
        flight.rows_move.wait()
        if flight.rows_in is not flight.tokens:
            layouts.place(plan, flight.rows_in, flight.tokens, zero_gaps=call.zero_padding)
        self._workspace.settle(self._loans)
        if not expanded:
            scales = self._receive_metadata()
        self._place_metadata(plan, scales)
        if self._fill_buffers is not None:
            self._fill_buffers()
        row_bytes = metadata.row_bytes(call.x_TW)
        if call.scales is not None:
            row_bytes += metadata.row_bytes(call.scales)
        self._tally.add(
            route.splits,
            row_bytes,
            route=route,
            tokens_per_expert=self._output.num_tokens_per_expert,
        )

    def _receive_metadata(self) -> Tensor | None:
        """Moves ids and weights that arrived into the route; returns the scales, if any came."""
        flight, route = self._flight, self._route
        if flight.metadata_in is None or flight.metadata_move is None:
            return None
        flight.metadata_move.wait()
        ids_NK, weights_NK, scales = metadata.unpack(
            self._call, flight.metadata_in, self._config.topk
        )
        if ids_NK is not None:
            route.local_ids_NK = ids_NK
        if weights_NK is not None:
            route.weights_NK = weights_NK
        if self._config.source_tokens:
            self._source_tokens_N = metadata.source_tokens(flight.metadata_in)
        return scales

    def _plan(self) -> layouts.LayoutPlan:
        """The slots of the rows; made once for all dispatches of a routing."""
        config, route = self._config, self._route
        if route.plan is None:
            route.plan = layouts.plan_layout(
                config.layout,
                route.local_ids_NK,
                device=self._flight.tokens.device,
                tokens_per_expert=route.tokens_per_expert,
                rows_per_source=route.splits.receive,
                max_tokens_per_rank=config.max_tokens_per_rank,
                alignment=config.expert_alignment,
            )
        return route.plan

    def _place_metadata(self, plan: layouts.LayoutPlan, scales: Tensor | None) -> None:
        """Places scales, ids and weights in the slots of their rows."""
        output, route = self._output, self._route
        if output.scales is not None and scales is not None:
            tensor = output.scales.tensor
            placed = tensor
            if not tensor.is_contiguous():  # column-major: place rows first, then transpose
                placed = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            layouts.place(plan, scales, placed, zero_gaps=self._call.zero_padding)
            if placed is not tensor:
                tensor.copy_(placed)
        if output.topk_ids is not None:
            assert route.local_ids_NK is not None
            output.topk_ids.fill_(-1)
            layouts.place(plan, route.local_ids_NK.to(torch.int64), output.topk_ids)
        if output.topk_weights is not None:
            assert route.weights_NK is not None
            layouts.place(plan, route.weights_NK, output.topk_weights, zero_gaps=True)
        if output.source_tokens is not None:
            assert self._source_tokens_N is not None
            layouts.place_source_tokens(plan, self._source_tokens_N, output.source_tokens)


def allocate(
    config: MoECommunicatorConfig, call: DispatchCall, route: Route, tokens: Tensor
) -> DispatchOutput:
    """Everything a dispatch returns; ids, weights and scales are filled by `Delivery.finish`."""
    scales = call.scales
    tensors = OutputTensors.around(
        config,
        tokens,
        shape=tuple(tokens.shape[:-1]),
        weighted=call.weights_TK is not None or route.weights_NK is not None,
        scale_dtype=None if scales is None else scales.dtype,
        scale_columns=0 if scales is None else scales.shape[1],
        scale_format=call.scale_format,
    )
    # The host knows all counts: they go to the device in one piece.
    counts, received = route.tokens_per_expert, route.splits.receive
    offsets = layouts.expert_offsets(counts, config.expert_alignment)
    memory = torch.tensor([*counts, *offsets, *received], dtype=torch.int32, device="cpu")
    memory = memory.to(tokens.device, non_blocking=True)
    public = PublicCounts.within(memory, [len(counts), len(offsets), len(received)])
    return tensors.output(config.layout, public, counts)
