"""Checks of arguments. Every message names the argument, its value and what is accepted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from expertlink.config import MoECommunicatorConfig
from expertlink.errors import InputError, TooManyTokensError
from expertlink.quantization import scale_form
from expertlink.types import BlockFormat, QuantScales, RowKind

# Dtypes of one-byte rows: e4m3 or e5m2 values, or bytes that only the experts interpret.
PACKED_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8)

transform_level: Any = torch._C._functorch.maybe_current_level  # pyright: ignore
"""Not None under torch.vmap and the transforms of torch.func."""


def check_transform() -> None:
    """Refuses calls under torch.vmap and the transforms of torch.func."""
    if transform_level() is not None:
        raise InputError(
            "dispatch and combine cannot be transformed by torch.vmap or torch.func (grad, vjp, "
            "jvp, ...): every call takes part in an exchange with the other ranks. Call them on "
            "whole batches, and use autograd (backward, torch.autograd.grad)"
        )


def check_tensor(
    name: str,
    value: object,
    *,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = (),
    shape: tuple[int | None, ...] | None = None,
    contiguous: bool = False,
) -> Tensor:
    """Returns `value` if it is such a tensor. None in `shape` matches any size."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if value.layout is not torch.strided:
        raise InputError(f"{name} must be a dense tensor, not {value.layout}")
    if is_traceable_wrapper_subclass(value):
        value = _plain(name, value, in_place=contiguous)
    if value.device != device:
        raise InputError(f"{name} is on {value.device}; this communicator works on {device}")
    if dtypes and value.dtype not in dtypes:
        accepted = " or ".join(map(str, dtypes))
        message = f"{name} has dtype {value.dtype}; accepted: {accepted}"
        if torch.is_autocast_enabled(device.type) and value.dtype.is_floating_point:
            message += (
                f". torch.autocast is on here and changes what operations return: pass "
                f"{name}.to({dtypes[0]})"
            )
        raise InputError(message)
    if shape is not None:
        fits = value.dim() == len(shape) and all(
            want is None or have == want for have, want in zip(value.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise InputError(f"{name} has shape {tuple(value.shape)}; expected ({wanted})")
    if contiguous and not value.is_contiguous():
        raise InputError(f"{name} must be contiguous: it is written in place")
    return value


def _plain(name: str, value: Tensor, *, in_place: bool) -> Tensor:
    """The plain tensor of one that only stands for others, and has no memory that can be named."""
    if not in_place and hasattr(value, "trigger_wait"):  # of a functional collective
        return value.clone()  # waits, and keeps the graph of autograd
    raise InputError(
        f"{name} must be a plain tensor, not {type(value).__name__}, which stands for others: pass "
        "what this rank has of it, such as DTensor.to_local()"
    )


def check_rows(
    config: MoECommunicatorConfig, x: object, scales: object, *, device: torch.device, rank: int
) -> tuple[Tensor, QuantScales | None]:
    """Checks `input` and `scales` of a dispatch; returns them contiguous."""
    if scales is None:
        rows = check_tensor(
            "input", x, device=device, dtypes=(config.dtype,), shape=(None, config.hidden_size)
        )
        _check_num_tokens(config, rows, rank)
        return rows.contiguous(), None
    rows = check_tensor("input", x, device=device, dtypes=PACKED_DTYPES, shape=(None, None))
    _check_num_tokens(config, rows, rank)
    if rows.dtype.is_floating_point and rows.shape[1] != config.hidden_size:
        raise InputError(
            f"input has shape {tuple(rows.shape)}; {rows.dtype} rows have "
            f"hidden_size={config.hidden_size} elements"
        )
    if rows.shape[1] == 0:
        raise InputError("input has rows of 0 bytes")
    given = scales if isinstance(scales, QuantScales) else None
    tensor = check_tensor(
        "scales",
        scales if given is None else given.tensor,
        device=device,
        shape=(rows.shape[0], None),
    )
    if tensor.shape[1] == 0:
        raise InputError(f"scales have shape {tuple(tensor.shape)}: no scale per row")
    block_format = config.block_format if given is None else given.format
    if block_format is not None:
        _check_scales(config, rows, tensor, block_format)
    return rows.contiguous(), QuantScales(tensor.contiguous(), block_format)


def plain_kind(config: MoECommunicatorConfig) -> RowKind:
    """The rows that arrive where callers pass unquantized ones."""
    block_format = config.block_format
    if block_format is None:
        return RowKind(config.dtype, config.hidden_size)
    scales = scale_form(config.hidden_size, block_format)
    return RowKind(torch.float8_e4m3fn, config.hidden_size, *scales, block_format)


def kind_of(rows: Tensor, scales: QuantScales) -> RowKind:
    """The rows that arrive where the caller has quantized them."""
    tensor = scales.tensor
    return RowKind(rows.dtype, rows.shape[1], tensor.dtype, tensor.shape[1], scales.format)


def _check_num_tokens(config: MoECommunicatorConfig, rows: Tensor, rank: int) -> None:
    most = config.max_tokens_per_rank
    if rows.shape[0] > most:
        raise TooManyTokensError.of(rank=rank, num_tokens=rows.shape[0], capacity=most)


def _check_scales(
    config: MoECommunicatorConfig, rows: Tensor, scales: Tensor, block_format: BlockFormat
) -> None:
    dtype, columns = scale_form(config.hidden_size, block_format)
    if rows.dtype is not torch.float8_e4m3fn:
        raise InputError(f"input has dtype {rows.dtype}; {block_format.value} rows are e4m3")
    if scales.dtype is not dtype or scales.shape[1] != columns:
        raise InputError(
            f"scales have dtype {scales.dtype} and shape {tuple(scales.shape)}; "
            f"{block_format.value} at hidden_size={config.hidden_size} needs {dtype} "
            f"({rows.shape[0]}, {columns})"
        )


def check_output_buffer(
    config: MoECommunicatorConfig,
    buffer: Tensor,
    kind: RowKind,
    *,
    num_ranks: int,
    num_local: int,
    device: torch.device,
) -> None:
    """Checks dtype and shape of `output_buffer`. Whether all rows fit is known later."""
    shape: list[int | None] = [None, kind.width]
    if config.layout.padded:
        per_rank = config.max_tokens_per_rank
        shape = [num_ranks, per_rank, kind.width]
        if config.layout.expanded:
            shape = [num_local, num_ranks * per_rank, kind.width]
    check_tensor(
        "output_buffer",
        buffer,
        device=device,
        dtypes=(kind.dtype,),
        shape=tuple(shape),
        contiguous=True,
    )


def check_routing(
    config: MoECommunicatorConfig,
    topk_ids: object,
    weights: object,
    num_tokens: int,
    *,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """Checks dtype and shape of `topk_ids` and `weights`, where given; returns them contiguous."""
    shape = (num_tokens, config.topk)
    ids_TK = weights_TK = None
    if topk_ids is not None:
        ids_TK = check_tensor(
            "topk_ids", topk_ids, device=device, dtypes=(torch.int64, torch.int32), shape=shape
        ).contiguous()
    if weights is not None:
        weights_TK = check_tensor(
            "weights", weights, device=device, dtypes=(config.weight_dtype,), shape=shape
        ).contiguous()
    return ids_TK, weights_TK
