"""Training steps of a soak: forward and backward of experts that return their rows.

Whole numbers, so that every sum is exact: the gradient of a row is that of its token times the
weights of its choices, or times the ranks that it goes to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from support.soak.items import Item
from support.soak.lines import Line

KINDS = ("gradients", "checkpoint", "reentrant checkpoint", "two uses", "cached gradients")


def is_trainable(line: Line) -> bool:
    """Whether gradients can go through a communicator's calls."""
    config = line.comm.config
    return not config.zero_copy and config.quantization is None


def make(line: Line, kind: str, item: Item, what: str) -> int:
    """A training step of one of `KINDS`; returns how many calls it made."""
    if kind == "gradients":
        return _gradients(line, item, what)
    if kind == "two uses":
        return _two_uses(line, item, what)
    if kind == "cached gradients":
        return _cached(line, item, what)
    return _checkpoint(line, item, what, reentrant=kind.startswith("reentrant"))


def _gradients(line: Line, item: Item, what: str) -> int:
    """Forward and backward; ranks without rows do not touch what they received."""
    with torch.enable_grad():
        x_TH = item.whole_TH.clone().requires_grad_()
        out, handle = line.comm.dispatch(x_TH, item.ids_TK, item.whole_weights_TK)
        rows = out.tokens * 1 if len(item.slots) else torch.zeros_like(out.tokens)
        y_TH = line.comm.combine(rows, handle)
        y_TH.backward(item.whole_TH)
    _check(line, item, what, y_TH, x_TH.grad, times=1)
    return 4


def _checkpoint(line: Line, item: Item, what: str, *, reentrant: bool) -> int:
    """Backward makes the calls of forward once more: nothing in between was kept."""
    comm = line.comm

    def layer(x_TH: Tensor) -> Tensor:
        out, handle = comm.dispatch(x_TH, item.ids_TK, item.whole_weights_TK)
        return comm.combine(out.tokens * 1, handle)

    with torch.enable_grad():
        x_TH = item.whole_TH.clone().requires_grad_()
        y_TH = checkpoint(layer, x_TH, use_reentrant=reentrant, preserve_rng_state=False)
        assert isinstance(y_TH, Tensor)
        y_TH.backward(item.whole_TH)
    _check(line, item, what, y_TH, x_TH.grad, times=1)
    return 6


def _two_uses(line: Line, item: Item, what: str) -> int:
    """Two combines of one dispatch, whose backward passes add up."""
    with torch.enable_grad():
        x_TH = item.whole_TH.clone().requires_grad_()
        out, handle = line.comm.dispatch(x_TH, item.ids_TK, item.whole_weights_TK)
        y_TH = line.comm.combine(out.tokens * 1, handle)
        y_TH = y_TH + line.comm.combine(out.tokens * 2, handle)
        y_TH.backward(item.whole_TH)
    _check(line, item, what, y_TH, x_TH.grad, times=3)
    return 6


def _cached(line: Line, item: Item, what: str) -> int:
    """A tracked dispatch by the handle of one that was not, and a combine that uses it twice."""
    comm = line.comm
    _, handle = comm.dispatch(item.x_TH, item.ids_TK, item.whole_weights_TK)
    with torch.enable_grad():
        x_TH = item.whole_TH.clone().requires_grad_()
        out, again = comm.dispatch(x_TH, None, previous_handle=handle)
        y_TH = comm.combine(out.tokens * 1, again)
        y_TH.backward(item.whole_TH)
    _check(line, item, what, y_TH, x_TH.grad, times=1)
    return 5


def _check(
    line: Line, item: Item, what: str, y_TH: Tensor, grad_TH: Tensor | None, *, times: int
) -> None:
    assert grad_TH is not None
    expected_TH = item.whole_result * times
    line.ledger.compare(y_TH.detach(), expected_TH, f"{what}: result")
    line.ledger.compare(grad_TH, expected_TH, f"{what}: gradient")


class RecordedStep:
    """Forward and backward of a communicator with static shapes in one CUDA graph."""

    def __init__(self, line: Line) -> None:
        self._line, first = line, line.items[0]
        self._x_TH = first.whole_TH.clone().requires_grad_()
        self._grad_TH = first.whole_TH.clone()
        self._ids_TK = first.ids_TK.clone()
        self._weights_TK = first.whole_weights_TK.clone().requires_grad_()
        self._run()  # everything has run once before it is captured
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=line.stream, capture_error_mode="thread_local"):
            self._results = self._run()

    def _run(self) -> tuple[Tensor, Tensor]:
        """The result, and the gradient of the tokens."""
        comm, leaves = self._line.comm, (self._x_TH, self._weights_TK)
        with torch.enable_grad():
            out, handle = comm.dispatch(self._x_TH, self._ids_TK, self._weights_TK)
            y_TH = comm.combine(out.tokens * 1, handle)
            # Not backward(), whose accumulation would tie a captured step to earlier ones.
            grad_TH, _ = torch.autograd.grad(y_TH, leaves, self._grad_TH)
        return y_TH.detach(), grad_TH

    def replay(self, item: Item, what: str) -> None:
        """The step of another input with as many tokens."""
        with torch.no_grad():
            self._x_TH.copy_(item.whole_TH)
            self._grad_TH.copy_(item.whole_TH)
            self._ids_TK.copy_(item.ids_TK)
            self._weights_TK.copy_(item.whole_weights_TK)
            for result in self._results:
                result.fill_(float("nan"))
        self._graph.replay()
        y_TH, grad_TH = self._results
        _check(self._line, item, what, y_TH, grad_TH, times=1)
