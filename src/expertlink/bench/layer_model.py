"""A whole MoE layer as `expertlink bench --layer` measures it, and the models whose shape it has.

gate -> dispatch (FLAT) -> `nn.GroupedExperts` -> combine, beside an expert that all tokens share.
Every weight is drawn from the seed, the layer and the expert, so that any rank can compute what any
expert would have returned (`dense_layer`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from expertlink.nn import Calls, GroupedExperts, SwiGLU, swiglu
from expertlink.types import DispatchOutput


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model's MoE layers, in elements and experts."""

    hidden: int  # H
    experts: int  # E
    topk: int  # K
    intermediate: int  # I, between the two products of an expert
    shared: int = 0  # the same of the expert that every token goes to; 0: there is none


MODELS = {
    "qwen3-30b-a3b": ModelShape(2048, 128, 8, 768),
    "deepseek-v3": ModelShape(7168, 256, 8, 2048, shared=2048),
    "mixtral-8x7b": ModelShape(4096, 8, 2, 14336),
    "gpt-oss-120b": ModelShape(2880, 128, 4, 2880),
    "kimi-k2": ModelShape(7168, 384, 8, 2048, shared=2048),
    "tiny": ModelShape(64, 8, 2, 32, shared=32),
}
"""As the models' configurations are published; `tiny` is for CPUs and tests."""

ROW_ALIGNMENT = 8
"""Rows of a group are padded to a multiple: grouped products of weight gradients need 16 bytes."""

Mark = Callable[[str], None]
"""Is called with the name of a phase when it begins."""


class Call(NamedTuple):
    """A call that a layer cannot go on without."""

    calls: Any  # who makes it: `Calls`
    name: str  # "dispatch" or "combine"
    args: tuple[Any, ...]

    def make(self) -> Any:
        """What the call returns."""
        return getattr(self.calls, self.name)(*self.args)

    def start(self) -> Any:
        """A request; its `wait()` gives the same. Of communicators only."""
        return getattr(self.calls, f"{self.name}_async")(*self.args)


Parts = Generator[Call, Any, Tensor]
"""Layers in parts: yields each call, is sent what it returns, and returns `[T, H]`."""


def in_one_piece(parts: Parts) -> Tensor:
    """Makes each call when it is due, and returns `[T, H]`."""
    call = _next_call(parts, None)
    while isinstance(call, Call):
        call = _next_call(parts, call.make())
    return call


def in_turn(several: Sequence[Parts], mark: Mark | None = None) -> list[Tensor]:
    """Starts each call when it is due, and goes on with the next one of `several` while rows
    travel. All ranks have to pass equally many. Returns `[T, H]` of each."""
    watch = _Watch(mark)
    started: dict[int, tuple[str, Any]] = {}
    results: dict[int, Tensor] = {}
    while len(results) < len(several):
        for place, parts in enumerate(several):
            if place in results:
                continue
            arrived = None
            if place in started:
                name, request = started.pop(place)
                watch.begin(name)  # what has to be waited for belongs to the call
                arrived = request.wait()
            call = _next_call(parts, arrived)
            if isinstance(call, Call):
                started[place] = call.name, call.start()
            else:
                results[place] = call
    return [results[place] for place in range(len(several))]


def _next_call(parts: Parts, arrived: Any) -> Call | Tensor:
    """What `parts` yields next, or returns."""
    try:
        return parts.send(arrived)
    except StopIteration as end:
        return end.value


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Draws the weights of one layer.

    The gate has the number 0 and the shared expert 1, then come the experts of the model.
    """

    shape: ModelShape
    layer: int
    seed: int
    dtype: torch.dtype
    device: torch.device

    def gate(self) -> Tensor:
        """`[H, E]`."""
        return self._draw(0, (self.shape.hidden, self.shape.experts))[0]

    def shared(self) -> tuple[Tensor, Tensor]:
        """As `expert`, of the expert that every token goes to."""
        return self._expert(1, self.shape.shared)

    def expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """`[H, 2I]` gate and up projection side by side, and `[I, H]` down projection."""
        return self._expert(2 + expert, self.shape.intermediate)

    def _expert(self, number: int, width: int) -> tuple[Tensor, Tensor]:
        hidden = self.shape.hidden
        gate_up, down = self._draw(number, (hidden, 2 * width), (width, hidden))
        return gate_up, down

    def _draw(self, number: int, *shapes: tuple[int, int]) -> list[Tensor]:
        generator = torch.Generator(self.device)
        generator.manual_seed((self.seed * 1009 + self.layer) * 100_003 + number)
        style: dict[str, Any] = {"device": self.device, "dtype": torch.float32}
        drawn = [torch.randn(shape, generator=generator, **style) for shape in shapes]
        # Outputs are about as large as inputs.
        return [one.mul_(one.shape[0] ** -0.5).to(self.dtype) for one in drawn]


class MoELayer(nn.Module):
    """The layer, with this rank's experts.

    Args:
        weights: draws them.
        local_experts: global ids in local order.
    """

    def __init__(self, weights: LayerWeights, local_experts: Sequence[int]) -> None:
        super().__init__()
        shape, style = weights.shape, {"dtype": weights.dtype, "device": weights.device}
        self.gate_HE = nn.Parameter(weights.gate())
        self.experts = GroupedExperts(
            shape.hidden,
            shape.intermediate,
            expert_ids=local_experts,
            num_experts=shape.experts,
            expert_alignment=ROW_ALIGNMENT,
            **style,
        )
        self.shared = SwiGLU(shape.hidden, shape.shared, **style) if shape.shared else None
        with torch.no_grad():
            for place, expert in enumerate(local_experts):
                self.experts.gate_up[place], self.experts.down[place] = weights.expert(expert)
            if self.shared is not None:
                for parameter, drawn in zip(
                    self.shared.parameters(), weights.shared(), strict=True
                ):
                    parameter.copy_(drawn)

    def forward(
        self, x_TH: Tensor, ids_TK: Tensor, calls: Calls, mark: Mark | None = None
    ) -> Tensor:
        """`[T, H]`, see `parts`."""
        return in_one_piece(self.parts(x_TH, ids_TK, calls, mark))

    def parts(self, x_TH: Tensor, ids_TK: Tensor, calls: Calls, mark: Mark | None = None) -> Parts:
        """The layer. The gate makes its choice, and `ids_TK` take its place: the routing is that of
        the benchmark, the work is that of a gate."""
        watch = _Watch(mark)
        watch.begin("gate")
        scores_TE = (x_TH @ self.gate_HE).softmax(dim=-1, dtype=torch.float32)
        scores_TE.topk(ids_TK.shape[1])
        weights_TK = _weights_of(scores_TE, ids_TK)
        watch.begin("dispatch")
        given_TH = watch.backward_begins("gate_backward", x_TH)
        received, handle = yield Call(calls, "dispatch", (given_TH, ids_TK, weights_TK))
        watch.begin("products")
        tokens = watch.backward_begins("dispatch_backward", received.tokens)
        rows = self.experts(replace(received, tokens=tokens))
        rows = watch.backward_begins("products_backward", rows)
        shared_TH = None
        if self.shared is not None:
            watch.begin("shared")
            shared_TH = self.shared(x_TH)
            shared_TH = watch.backward_begins("shared_backward", shared_TH)
        watch.begin("combine")
        y_TH = yield Call(calls, "combine", (rows, handle))
        y_TH = watch.backward_begins("combine_backward", y_TH)
        watch.begin("rest")
        return y_TH if shared_TH is None else y_TH + shared_TH


@dataclass(frozen=True)
class LayerStack:
    """Layers one after the other, each added to what it was given."""

    layers: Sequence[MoELayer]
    ids_LTK: Sequence[Tensor]  # each layer's routing on this rank

    def __call__(self, x_TH: Tensor, calls: Sequence[Calls], mark: Mark | None = None) -> Tensor:
        """`[T, H]`; `calls` has those of every layer."""
        return in_one_piece(self.parts(x_TH, calls, mark))

    def parts(self, x_TH: Tensor, calls: Sequence[Calls], mark: Mark | None = None) -> Parts:
        """The layers; `calls` as above."""
        for layer, ids_TK, own in zip(self.layers, self.ids_LTK, calls, strict=True):
            x_TH = x_TH + (yield from layer.parts(x_TH, ids_TK, own, mark))
        return x_TH

    def parameters(self) -> list[Tensor]:
        """Of all layers."""
        return [weight for layer in self.layers for weight in layer.parameters()]


class _Watch:
    """Tells where phases begin; without a `mark` it does nothing."""

    def __init__(self, mark: Mark | None) -> None:
        self._mark = mark

    def begin(self, name: str) -> None:
        if self._mark is not None:
            self._mark(name)

    def backward_begins(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor whose gradient is complete when a phase of the backward pass begins."""
        mark = self._mark
        if mark is None or not torch.is_grad_enabled():
            return tensor
        tensor = tensor.view_as(tensor)  # its gradient is that of this use alone
        if tensor.requires_grad:
            tensor.register_hook(lambda _: mark(name))
        return tensor


def _weights_of(scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """`[T, K]`: scores of the chosen experts, which add up to 1; -1 has one that nobody reads."""
    # For every -1 another one: two gradients at most meet in a score, so their order is no matter.
    columns_K = torch.arange(ids_TK.shape[1], device=ids_TK.device)
    chosen_TK = scores_TE.gather(1, torch.where(ids_TK < 0, columns_K, ids_TK))
    return chosen_TK / chosen_TK.sum(dim=1, keepdim=True)


def dense_layer(weights: LayerWeights, x_TH: Tensor, ids_TK: Tensor) -> Tensor:
    """`[T, H]` float32: the layer, token by token and expert by expert. For a few tokens."""
    x_TH = x_TH.float()
    weights_TK = _weights_of((x_TH @ weights.gate().float()).softmax(dim=-1), ids_TK)

    def mlp(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return swiglu(rows @ gate_up.float()) @ down.float()

    y_TH = torch.zeros_like(x_TH)
    if weights.shape.shared:
        y_TH = y_TH + mlp(x_TH, *weights.shared())
    for expert in ids_TK[ids_TK >= 0].unique().tolist():
        weight_T1 = torch.where(ids_TK == expert, weights_TK, 0.0).sum(dim=1, keepdim=True)
        y_TH = y_TH + weight_T1 * mlp(x_TH, *weights.expert(expert))
    return y_TH


class Timeline:
    """Times of a run's phases. `mark` begins the next one; on CUDA by events of the stream."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """The phase of that name begins."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def phases_us(self) -> dict[str, float]:
        """Microseconds by phase, summed over the layers. CUDA: the work has to be done."""
        found: dict[str, float] = {}
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            took = begin.elapsed_time(end) * 1e3 if self._on_gpu else (end - begin) * 1e6
            found[name] = found.get(name, 0.0) + took
        return found


# -- compute alone --------------------------------------------------------------------------------


class Recorder:
    """Calls of a communicator whose results are kept, layer by layer."""

    def __init__(self, comm: Calls) -> None:
        self._comm = comm
        self.handles: list[Any] = []
        self._received: list[DispatchOutput] = []
        self._combined: list[Tensor] = []

    def dispatch(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[DispatchOutput, Any]:
        """A dispatch."""
        received, handle = self._comm.dispatch(x_TH, ids_TK, weights_TK)
        self._received.append(received)
        self.handles.append(handle)
        return received, handle

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """A combine."""
        self._combined.append(self._comm.combine(rows, handle))
        return self._combined[-1]

    def stand_ins(self) -> list[StandIn]:
        """What returns the same again, for every layer."""
        return [StandIn(*kept) for kept in zip(self._received, self._combined, strict=True)]


@dataclass(frozen=True)
class StandIn:
    """Dispatch and combine that return what the real ones returned, without any work.

    Gradients are the next best tensors of their shape: real numbers, as the power that products
    take depends on them.
    """

    received: DispatchOutput
    combined_TH: Tensor

    def dispatch(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[DispatchOutput, Tensor]:
        """The rows that were received; the weights are the handle."""
        del ids_TK
        tokens = _Given.apply(self.received.tokens, (self.combined_TH,), x_TH)
        return replace(self.received, tokens=tokens), weights_TK

    def combine(self, rows: Tensor, weights_TK: Tensor) -> Tensor:
        """The sums that were returned."""
        gradients = (self.received.tokens, weights_TK.detach())
        out_TH: Any = _Given.apply(self.combined_TH, gradients, rows, weights_TK)
        return out_TH


class _Given(torch.autograd.Function):
    """Returns a given tensor, and in the backward pass given gradients of its other arguments."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, gradients: tuple[Tensor, ...], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return result.detach()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *ctx.gradients
