"""The metadata of a row: local expert ids, routing weights and scales, packed as bytes.

Column order: `[K]` int32 ids (not in cached dispatches), `[K]` weights, `[S]` scales, and where
configured the int32 index of the row's token at its source rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink.engines.base import DispatchCall
from expertlink.layouts import as_bytes

ID_BYTES = 4


def row_bytes(x: Tensor) -> int:
    """Bytes of a row of a 2-d tensor."""
    return x.shape[1] * x.element_size()


def width(call: DispatchCall) -> int:
    """Bytes of metadata per row of this call."""
    total = 0
    if call.topk_ids_TK is not None:
        total += call.topk_ids_TK.shape[1] * ID_BYTES
    if call.weights_TK is not None:
        total += row_bytes(call.weights_TK)
    if call.scales is not None:
        total += row_bytes(call.scales)
    return total


def pack(call: DispatchCall, token_of_row: Tensor, local_ids_nK: Tensor) -> Tensor | None:
    """`[n, width]` uint8, or None where rows have no metadata.

    A choice is local to its row's destination if `local_ids_nK` is not negative. Other choices get
    weight 0.
    """
    parts: list[Tensor] = []
    if call.topk_ids_TK is not None:
        parts.append(as_bytes(local_ids_nK))
    if call.weights_TK is not None:
        weights = call.weights_TK.index_select(0, token_of_row)
        parts.append(as_bytes(torch.where(local_ids_nK >= 0, weights, 0.0)))
    if call.scales is not None:
        parts.append(as_bytes(call.scales).index_select(0, token_of_row))
    return torch.cat(parts, dim=1) if parts else None


def unpack(
    call: DispatchCall, metadata_NB: Tensor, topk: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`(local_ids [N, K] int32, weights [N, K], scales [N, S])`, None for what did not travel."""
    ids = weights = scales = None
    begin = 0
    if call.topk_ids_TK is not None:
        ids = _columns(metadata_NB, begin, topk * ID_BYTES, torch.int32)
        begin += topk * ID_BYTES
    if call.weights_TK is not None:
        weights = _columns(metadata_NB, begin, row_bytes(call.weights_TK), call.weights_TK.dtype)
        begin += row_bytes(call.weights_TK)
    if call.scales is not None:
        scales = _columns(metadata_NB, begin, row_bytes(call.scales), call.scales.dtype)
    return ids, weights, scales


def with_source_tokens(packed: Tensor | None, token_of_row: Tensor) -> Tensor:
    """`[n, width + 4]` the metadata of the rows, with the tokens that these are."""
    tokens = as_bytes(token_of_row.to(torch.int32)[:, None])
    return tokens if packed is None else torch.cat([packed, tokens], dim=1)


def source_tokens(metadata_NB: Tensor) -> Tensor:
    """`[N]` int32, of rows whose metadata ends with them."""
    return _columns(metadata_NB, metadata_NB.shape[1] - ID_BYTES, ID_BYTES, torch.int32)[:, 0]


def _columns(metadata_NB: Tensor, begin: int, count: int, dtype: torch.dtype) -> Tensor:
    # A copy: it aligns the columns for their type and frees the packed buffer.
    return (
        metadata_NB[:, begin : begin + count]
        .clone(memory_format=torch.contiguous_format)
        .view(dtype)
    )
