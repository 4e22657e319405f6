"""Products of groups of rows with a matrix each, where torch has one and where it has none.

In: rows that lie grouped, a matrix for every group, and where groups end. Out: the products; what
stands behind the last group, nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_BYTES = 16
"""Of rows and, on CUDA for gradients of matrices, of groups: what torch's product asks for."""

GroupedProduct = Callable[..., Tensor]
"""`product(rows [N, H], matrices [E, H, F], offs=ends [E] int32)` to `[N, F]`; differentiable."""


def find_grouped_product(device: torch.device, dtype: torch.dtype) -> GroupedProduct | None:
    """Torch's own, where it works on such tensors, forward and backward; else None."""
    product = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None:
        return None
    style: dict[str, Any] = {"device": device, "dtype": dtype, "requires_grad": True}
    try:
        with torch.inference_mode(False), torch.enable_grad():
            rows, matrices = torch.ones(16, 16, **style), torch.ones(2, 16, 16, **style)
            ends = torch.tensor([8, 16], dtype=torch.int32, device=device)
            out = product(rows, matrices, offs=ends)
            torch.autograd.grad(out, (rows, matrices), torch.ones_like(out))
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    return product


def looped_product(rows: Tensor, matrices: Tensor, *, offs: Tensor) -> Tensor:
    """One product after the other, of any rows. Reads the ends on the host.

    For torch.compile it is one operation, whose work the graph does not see.
    """
    return torch.ops.expertlink.looped_product(rows, matrices, offs)


def is_traceable(dtype: torch.dtype) -> bool:
    """Whether torch.compile takes torch's own product: in other types only eager mode does."""
    return dtype is torch.bfloat16


@torch.library.custom_op(
    "expertlink::looped_product",
    mutates_args=(),
    schema="(Tensor rows, Tensor matrices, Tensor ends) -> Tensor",
)
def _looped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    out = rows.new_zeros((rows.shape[0], matrices.shape[2]))
    for matrix, (begin, end) in zip(matrices, _groups(ends), strict=True):
        torch.mm(rows[begin:end], matrix, out=out[begin:end])
    return out


@torch.library.custom_op(
    "expertlink::looped_outer_product",
    mutates_args=(),
    schema="(Tensor rows, Tensor grads, Tensor ends) -> Tensor",
)
def _looped_outer_product(rows: Tensor, grads: Tensor, ends: Tensor) -> Tensor:
    """`[E, H, F]` rows of a group, transposed, times their gradients."""
    out = rows.new_zeros((ends.shape[0], rows.shape[1], grads.shape[1]))
    for matrix, (begin, end) in zip(out, _groups(ends), strict=True):
        torch.mm(rows[begin:end].t(), grads[begin:end], out=matrix)
    return out


def _groups(ends: Tensor) -> list[tuple[int, int]]:
    at: list[int] = ends.tolist()
    return list(zip([0, *at[:-1]], at, strict=True)) if at else []


@_looped_product.register_fake
def _(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], matrices.shape[2]))


@_looped_outer_product.register_fake
def _(rows: Tensor, grads: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty((ends.shape[0], rows.shape[1], grads.shape[1]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, matrices, ends = ctx.saved_tensors
    of_rows = of_matrices = None
    if ctx.needs_input_grad[0]:
        of_rows = looped_product(grads, matrices.transpose(1, 2), offs=ends)
    if ctx.needs_input_grad[1]:
        of_matrices = torch.ops.expertlink.looped_outer_product(rows, grads, ends)
    return of_rows, of_matrices, None


_looped_product.register_autograd(_backward, setup_context=_keep)
