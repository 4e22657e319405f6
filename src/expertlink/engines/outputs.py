"""Memory for what a dispatch returns: its largest shape, the order of scales, filling buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import DispatchCall
from expertlink.engines.ranks import capacity
from expertlink.types import (
    DispatchBuffers,
    DispatchLayout,
    DispatchOutput,
    QuantScales,
    RowKind,
)


def empty_scales(
    config: MoECommunicatorConfig,
    shape: tuple[int, ...],
    columns: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`[*shape, columns]` uninitialised, in the memory order of the configuration."""
    if config.scale_order == "row_major":
        return torch.empty((*shape, columns), dtype=dtype, device=device)
    memory = torch.empty((*shape[:-1], columns, shape[-1]), dtype=dtype, device=device)
    return memory.transpose(-1, -2)


def in_scale_order(config: MoECommunicatorConfig, output: DispatchOutput) -> DispatchOutput:
    """The output of a dispatch that has row-major scales, in the order of the configuration."""
    if output.scales is None or config.scale_order == "row_major":
        return output
    tensor = output.scales.tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    return dataclasses.replace(output, scales=QuantScales(tensor, output.scales.format))


def largest_output(
    config: MoECommunicatorConfig,
    rows: RowKind,
    *,
    num_ranks: int,
    num_local: int,
    device: torch.device,
    tokens: Tensor | None = None,
) -> DispatchOutput:
    """Tensors of the largest shape that any dispatch of such rows can return, or for `tokens`."""
    layout = config.layout
    shape = capacity.largest_shape(config, num_ranks=num_ranks, num_local=num_local)
    if tokens is None:
        tokens = torch.empty((*shape, rows.width), dtype=rows.dtype, device=device)
    shape = tuple(tokens.shape[:-1])
    scales = ids = weights = offsets = None
    if rows.scale_dtype is not None:
        tensor = empty_scales(
            config, shape, rows.scale_columns, dtype=rows.scale_dtype, device=device
        )
        scales = QuantScales(tensor, rows.scale_format)
    if not layout.expanded:
        ids = torch.empty((*shape, config.topk), dtype=torch.int64, device=device)
        if rows.weighted:
            weights = torch.empty_like(ids, dtype=config.weight_dtype)
    sizes = [num_local, num_local + 1, num_ranks]
    counts = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    per_expert, offsets, per_rank = counts.split_with_sizes(sizes)
    return DispatchOutput(
        tokens=tokens,
        num_tokens_per_expert=per_expert,
        layout=layout,
        scales=scales,
        expert_offsets=offsets if layout is DispatchLayout.FLAT else None,
        topk_ids=ids,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
    )


def into_tokens(call: DispatchCall) -> DispatchCall:
    """The same call with the `tokens` of its buffers, if it has any, as output buffer."""
    if call.buffers is None:
        return call
    return dataclasses.replace(call, output_buffer=call.buffers.output.tokens)


def into_buffers(
    buffers: DispatchBuffers, output: DispatchOutput
) -> tuple[DispatchOutput, Callable[[], None]]:
    """Views of the buffers for an output whose tokens lie there, and what copies the rest."""
    largest = buffers.output

    def view(buffer: Tensor | None, tensor: Tensor | None) -> Tensor | None:
        return None if buffer is None or tensor is None else buffer[: len(tensor)]

    scales = None
    if output.scales is not None and largest.scales is not None:
        tensor = largest.scales.tensor[: len(output.scales.tensor)]
        scales = QuantScales(tensor, output.scales.format)
    views = dataclasses.replace(
        output,
        num_tokens_per_expert=largest.num_tokens_per_expert,
        scales=scales,
        expert_offsets=largest.expert_offsets,
        topk_ids=view(largest.topk_ids, output.topk_ids),
        topk_weights=view(largest.topk_weights, output.topk_weights),
        num_tokens_per_rank=largest.num_tokens_per_rank,
    )

    def fill() -> None:
        pairs = zip(_tensors_beside(views), _tensors_beside(output), strict=True)
        for target, source in pairs:
            target.copy_(source)

    return views, fill


def _tensors_beside(output: DispatchOutput) -> Iterator[Tensor]:
    """Everything but the rows."""
    scales = None if output.scales is None else output.scales.tensor
    for tensor in (
        output.num_tokens_per_expert,
        scales,
        output.expert_offsets,
        output.topk_ids,
        output.topk_weights,
        output.num_tokens_per_rank,
    ):
        if tensor is not None:
            yield tensor
