"""A layer around dispatch and combine, compiled and not: its results, its number of graphs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from expertlink import DispatchLayout, DispatchOutput, MoECommunicator, graph_names
from expertlink.demo.model import LanguageModel, ModelConfig
from expertlink.launch import RankContext
from support.jobs import config_of, same_bits
from support.oracle import Case

Results = Sequence[Tensor | None]


def scaled(out: DispatchOutput, weight: Tensor) -> Tensor:
    """Experts of elementary operations, which round alike whoever compiles them."""
    tokens = out.tokens
    if out.expert_offsets is not None:
        # With static shapes there are rows behind the last group, and gradients, that nobody wrote.
        number_N1 = torch.ones_like(tokens[:, :1], dtype=torch.int32).cumsum(0)
        has_come = number_N1 <= out.expert_offsets[-1]
        return (tokens.where(has_come, 0) * weight).where(has_come, 0)
    rows = tokens * weight
    if out.topk_weights is None:
        return rows
    assert out.topk_ids is not None
    share = (out.topk_weights * (out.topk_ids + 1)).sum(-1, keepdim=True)
    return rows * share.to(rows.dtype)


class Layer(nn.Module):
    """Rows before and after a dispatch, experts and a combine are part of the graph."""

    def __init__(self, comm: MoECommunicator, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        hidden, dtype = comm.config.hidden_size, comm.config.dtype
        whole = torch.randint(-4, 5, (hidden,), generator=generator)
        self.comm = comm
        self.weight = nn.Parameter(whole.to(comm.device, dtype))

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        out, handle = self.comm.dispatch(x_TH * 2, ids_TK, weights_TK * 3)
        return self.comm.combine(self.experts(out), handle) + x_TH

    def experts(self, out: DispatchOutput) -> Tensor:
        if self.comm.num_local_experts == 0:  # nothing that depends on a parameter
            return torch.zeros_like(out.tokens).detach()
        return scaled(out, self.weight)


@dataclass
class Counted:
    """What torch.compile did."""

    graphs: int
    breaks: int


@contextlib.contextmanager
def counting() -> Iterator[Counted]:
    """Counts graphs and breaks of a block, from a clean start. No handle may outlive it."""
    torch.compiler.reset()
    counters.clear()
    gc.collect()
    before = len(graph_names._handles)
    counted = Counted(0, 0)
    yield counted
    counted.graphs = counters["stats"]["unique_graphs"]
    counted.breaks = sum(counters["graph_break"].values())
    gc.collect()
    assert len(graph_names._handles) == before, "handles outlive their graphs"


def compiled(model: Any, **options: Any) -> Any:
    """A model as one graph."""
    return torch.compile(model, **{"backend": "aot_eager", "fullgraph": True, **options})


def inputs(
    comm: MoECommunicator, count: int, *, seed: int = 0, dynamic: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and weights that require grad, and a routing, of any number of tokens.

    Small whole numbers, so that sums are exact in whatever order compiled code adds them up.
    """
    config, device = comm.config, comm.device
    generator = torch.Generator().manual_seed(100 * (comm.rank + 10 * seed) + count)

    def whole(columns: int) -> Tensor:
        return torch.randint(-4, 5, (count, columns), generator=generator).to(device)

    ids_TK = torch.rand(count, config.num_experts, generator=generator).topk(config.topk).indices
    x_TH = whole(config.hidden_size).to(config.dtype).requires_grad_()
    weights_TK = whole(config.topk).to(config.weight_dtype).requires_grad_()
    tensors = x_TH, ids_TK.to(device), weights_TK
    for tensor in tensors if dynamic else ():
        maybe_mark_dynamic(tensor, 0)  # where a graph ends, handles hold numbers
    return tensors


def trained(
    model: Any,
    tensors: tuple[Tensor, Tensor, Tensor],
    parameters: Sequence[Tensor],
    passes: int = 1,
) -> Results:
    """Result and all gradients, of so many backward passes."""
    x_TH, ids_TK, weights_TK = tensors
    for leaf in (x_TH, weights_TK, *parameters):
        leaf.grad = None
    result = model(x_TH, ids_TK, weights_TK)
    loss = result.square().sum()
    for left in reversed(range(passes)):
        loss.backward(retain_graph=left > 0)
    return [result.detach(), *(leaf.grad for leaf in (x_TH, weights_TK, *parameters))]


def equal(actual: Results, expected: Results, what: str) -> None:
    for one, other in zip(actual, expected, strict=True):
        if one is None or other is None:
            assert one is other, what
        else:
            same_bits(one, other, what)


def agree(
    plain: Any,
    fast: Any,
    comm: MoECommunicator,
    parameters: Sequence[Tensor],
    counts: Sequence[int],
    passes: int = 1,
) -> None:
    """Both give the same bits, for all numbers of tokens."""
    for count in counts:
        expected = trained(plain, inputs(comm, count), parameters, passes)
        actual = trained(fast, inputs(comm, count), parameters, passes)
        equal(actual, expected, f"{count} tokens on rank {comm.rank}")


# -- on several ranks -----------------------------------------------------------------------------


def steps(
    ctx: RankContext, cases: Sequence[Case], backend: str, **fields: Any
) -> list[tuple[int, int]]:
    """Graphs and breaks of a layer that sees ten numbers of tokens, which differ between ranks."""
    found = []
    for case in cases:
        with MoECommunicator(config_of(case, ctx.device)) as comm, counting() as counted:
            layer = Layer(comm)
            # Other ones on every rank, and never 1, which torch compiles for itself.
            counts = [2 + (3 * i + 5 * ctx.rank) % (case.max_tokens - 2) for i in range(10)]
            agree(layer, compiled(layer, backend=backend), comm, [layer.weight], counts)
        found.append((counted.graphs, counted.breaks))
    return found


def on_gpus(ctx: RankContext, cases: Sequence[Case], **fields: Any) -> list[tuple[int, int]]:
    """`steps` with kernels of inductor, for an engine on GPUs."""
    with exact_kernels():
        return steps(ctx, cases, "inductor", **fields)


def exact_kernels() -> Any:
    """Compiled kernels round where operations of torch do."""
    return inductor_config.patch(emulate_precision_casts=True)


def replayed(comm: MoECommunicator, count: int) -> int:
    """Training steps in CUDA graphs, with another routing in every step; graphs recorded."""
    from torch._inductor.cudagraph_trees import get_container

    with exact_kernels(), counting():
        layer = Layer(comm)
        fast = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
        for step in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            expected = trained(layer, inputs(comm, count, seed=step, dynamic=False), [layer.weight])
            actual = trained(fast, inputs(comm, count, seed=step, dynamic=False), [layer.weight])
            equal(actual, expected, f"step {step}")
        assert counters["inductor"]["cudagraph_skips"] == 0
        manager = get_container(comm.device.index).tree_manager
        assert manager is not None
        recorded = manager.new_graph_id().id
    comm.check_health()
    return recorded


def replayed_on_ranks(ctx: RankContext, case: Case, **fields: Any) -> int:
    with MoECommunicator(config_of(case, ctx.device, engine="nvlink", **fields)) as comm:
        return replayed(comm, case.tokens[ctx.rank])


def quantized(ctx: RankContext, case: Case) -> tuple[int, int]:
    """Rows that the caller has quantized: only the weights have gradients."""
    with MoECommunicator(config_of(case, ctx.device)) as comm, counting() as counted:

        def layer(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            rows = x_TH.detach().to(torch.float8_e4m3fn)
            scales = x_TH.detach()[:, :2].contiguous()
            out, handle = comm.dispatch(rows, ids_TK, weights_TK, scales)
            assert out.scales is not None
            plain = out.tokens.to(case.dtype) * out.scales.tensor.sum(-1, keepdim=True)
            if out.topk_weights is not None:
                plain = plain * out.topk_weights.sum(-1, keepdim=True)
            return comm.combine(plain, handle)

        agree(layer, compiled(layer), comm, [], (2, 5, 3))
    return counted.graphs, counted.breaks


def language_model(ctx: RankContext, layout: DispatchLayout) -> tuple[list[float], list[float]]:
    """Losses of a few training steps of the demo's model, and of the same model compiled."""
    shape = ModelConfig(
        hidden_size=16, num_layers=2, num_heads=2, sequence=8, num_experts=4, expert_width=8
    )
    case = Case((32,) * ctx.num_ranks, 16, experts=4, topk=2, layout=layout, dtype=torch.float32)
    losses: list[list[float]] = []
    for is_compiled in (False, True):
        with MoECommunicator(config_of(case, ctx.device)) as comm:
            model = LanguageModel(shape, comm)
            forward: Any = model
            if is_compiled:
                torch.compiler.reset()
                forward = torch.compile(model, backend="aot_eager")
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            losses.append([])
            for step in range(3):
                generator = torch.Generator().manual_seed(10 * step + ctx.rank)
                bytes_BS = torch.randint(0, 256, (4, 9), generator=generator)
                logits, _ = forward(bytes_BS[:, :-1])
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), bytes_BS[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
    return losses[0], losses[1]


class Mixed(nn.Module):
    """A replicated product before a layer of experts."""

    def __init__(self, comm: MoECommunicator) -> None:
        super().__init__()
        hidden = comm.config.hidden_size
        generator = torch.Generator().manual_seed(3)
        whole = torch.randint(-2, 3, (hidden, hidden), generator=generator)
        self.inner = Layer(comm, seed=comm.rank)
        self.dense = nn.Parameter(whole.to(comm.config.dtype))

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.inner(x_TH @ self.dense, ids_TK, weights_TK)


def wrapped(ctx: RankContext, case: Case, wrapper: str) -> None:
    """DDP or FSDP2 around a layer: compiled and eager give the same."""

    def around(model: Mixed, form: Callable[[Any], Any]) -> Any:
        if wrapper == "ddp":
            names = [name for name, _ in model.named_parameters() if name.startswith("inner.")]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
            return form(DistributedDataParallel(model))
        fully_shard(model, ignored_params={model.inner.weight})
        return form(model)

    def results(form: Callable[[Any], Any], comm: MoECommunicator) -> list[Results]:
        model = Mixed(comm)
        outer = around(model, form)
        found = []
        for count in (4, 6):
            own = inputs(comm, count)
            outer.zero_grad()
            result = trained(outer, own, [])
            dense = model.dense.grad
            assert dense is not None
            local = dense.to_local() if wrapper == "fsdp" else dense  # pyright: ignore
            assert model.inner.weight.grad is not None
            found.append([*result, local.clone(), model.inner.weight.grad.clone()])
        return found

    torch.compiler.reset()
    with MoECommunicator(config_of(case, ctx.device)) as comm:
        plain = results(lambda model: model, comm)
        fast = results(lambda model: compiled(model, fullgraph=False), comm)
    for one, other in zip(fast, plain, strict=True):
        equal(one, other, wrapper)
    dist.barrier()
