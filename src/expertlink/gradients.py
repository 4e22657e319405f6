"""Gradient and inference mode of a call: what is tracked, how it finishes. Below autograd.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.engines.base import Dispatched
from expertlink.types import Anchor, DispatchHandle


@dataclass(eq=False)
class TrackedDispatch(Dispatched):
    """A dispatch that autograd tracks.

    Attributes:
        anchor: `[0]` float32; an input of its combines, whose backward then precedes this one's.
    """

    anchor: Anchor | None = None


def anchor_of(handle: DispatchHandle) -> Tensor | None:
    """What connects combines to the handle's dispatch in the graph, before its backward."""
    return None if handle._anchor is None else handle._anchor.tensor


def needs_grad(*tensors: Tensor | None) -> bool:
    """True where autograd has to track a call on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # a generator would take longer than the comparisons
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def without_gradients(finish: Callable[[], None]) -> None:
    """Finishes a call. Gradients, if any, are the business of autograd.py."""
    if torch.is_grad_enabled():
        with torch.no_grad():
            finish()
    else:  # entering no_grad takes longer than most calls of `finish`
        finish()


def in_current_mode(finish: Callable[[], None]) -> Callable[[], None]:
    """`finish`, to be called later in the inference mode of now.

    Tensors made in inference mode can be written to nowhere else.
    """
    if not torch.is_inference_mode_enabled():
        return finish

    def finish_in_inference_mode() -> None:
        with torch.inference_mode():
            finish()

    return finish_in_inference_mode
