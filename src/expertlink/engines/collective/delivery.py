"""The receiving half of a dispatch: the outputs, and what came beside the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink import layouts
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import DispatchCall
from expertlink.engines.collective.route import Route
from expertlink.engines.outputs import empty_scales
from expertlink.engines.ranks import metadata
from expertlink.types import DispatchLayout, DispatchOutput, QuantScales

_ROWS = torch.contiguous_format


def allocate(
    config: MoECommunicatorConfig, call: DispatchCall, route: Route, tokens: Tensor
) -> DispatchOutput:
    """Everything a dispatch returns; ids, weights and scales are filled by `place_beside`."""
    shape = tokens.shape[:-1]
    ids = weights = scales = None
    if not config.layout.expanded:
        ids = tokens.new_empty((*shape, config.topk), dtype=torch.int64)
        if call.weights_TK is not None or route.weights_NK is not None:
            weights = tokens.new_empty((*shape, config.topk), dtype=config.weight_dtype)
    if call.scales is not None:
        like = call.scales
        tensor = empty_scales(config, shape, like.shape[1], dtype=like.dtype, device=like.device)
        scales = QuantScales(tensor, call.scale_format)
    # The host knows all counts: they go to the device in one piece.
    counts, received = route.tokens_per_expert, route.splits.receive
    offsets = layouts.expert_offsets(counts, config.expert_alignment)
    packed = torch.tensor([*counts, *received, *offsets], dtype=torch.int32, device="cpu")
    packed = packed.to(tokens.device, non_blocking=True)
    counts_E, received_R, offsets_E = packed.split([len(counts), len(received), len(offsets)])
    return DispatchOutput(
        tokens=tokens,
        num_tokens_per_expert=counts_E,
        layout=config.layout,
        scales=scales,
        num_tokens_per_expert_list=list(counts),
        expert_offsets=offsets_E if config.layout is DispatchLayout.FLAT else None,
        topk_ids=ids,
        topk_weights=weights,
        num_tokens_per_rank=received_R,
    )


def unpack(
    config: MoECommunicatorConfig, call: DispatchCall, route: Route, extras_in: Tensor | None
) -> Tensor | None:
    """Moves ids and weights that arrived into the route; returns the scales, if any came."""
    if extras_in is None:
        return None
    local_ids_NK, weights_NK, scales = metadata.unpack(call, extras_in, config.topk)
    route.local_ids_NK = route.local_ids_NK if local_ids_NK is None else local_ids_NK
    route.weights_NK = route.weights_NK if weights_NK is None else weights_NK
    return scales


def plan(config: MoECommunicatorConfig, route: Route, device: torch.device) -> layouts.LayoutPlan:
    """The slots of the rows; made once for all dispatches of a routing."""
    if route.plan is None:
        route.plan = layouts.plan_layout(
            config.layout,
            route.local_ids_NK,
            device=device,
            tokens_per_expert=route.tokens_per_expert,
            rows_per_source=route.splits.receive,
            max_tokens_per_rank=config.max_tokens_per_rank,
            alignment=config.expert_alignment,
        )
    return route.plan


def place_beside(
    call: DispatchCall, route: Route, output: DispatchOutput, scales: Tensor | None
) -> None:
    """Places what belongs beside the rows."""
    assert route.plan is not None
    if output.scales is not None and scales is not None:
        tensor = output.scales.tensor
        placed = tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=_ROWS)
        layouts.place(route.plan, scales, placed, zero_gaps=call.zero_padding)
        if placed is not tensor:  # column by column
            tensor.copy_(placed)
    if output.topk_ids is not None:
        assert route.local_ids_NK is not None
        output.topk_ids.fill_(-1)
        layouts.place(route.plan, route.local_ids_NK.to(torch.int64), output.topk_ids)
    if output.topk_weights is not None:
        assert route.weights_NK is not None
        layouts.place(route.plan, route.weights_NK, output.topk_weights, zero_gaps=True)
