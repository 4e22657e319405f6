"""`expertlink.nn` on every rank, and the dense layer that it must equal."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from expertlink import DispatchOutput, InputError, MoECommunicator, MoECommunicatorConfig
from expertlink.launch import RankContext
from expertlink.nn import GroupedExperts, MoELayer, merge_state_dicts, sum_copies_gradients
from expertlink.ops import COMBINE_OPS, DISPATCH_OPS
from expertlink.placement import ExpertPlacement
from support.training import gap

EXPERTS, HIDDEN, WIDTH, TOPK, SHARED = 5, 8, 16, 2, 8


@dataclass(frozen=True)
class LayerCase:
    """One layer on several ranks.

    Attributes:
        tokens: of every rank.
        placement: of physical slots; None: logical ids, placed evenly.
        fields: of the communicator.
    """

    tokens: tuple[int, ...]
    placement: ExpertPlacement | None = None
    dtype: torch.dtype = torch.float64
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)

    def config(self, device: torch.device) -> MoECommunicatorConfig:
        fields: dict[str, Any] = {"num_experts": EXPERTS, "device": device, "dtype": self.dtype}
        fields |= {"hidden_size": HIDDEN, "topk": TOPK, "timeout_s": 30.0}
        fields |= {"max_tokens_per_rank": max(*self.tokens, 1), **self.fields}
        if self.placement is not None:
            fields["num_experts"] = self.placement.num_physical
            fields["expert_map"] = self.placement.expert_map
        return MoECommunicatorConfig(**fields)


def weights_of_all(dtype: torch.dtype) -> dict[str, Tensor]:
    """A dense checkpoint, the same on all ranks."""
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (values * shape[-2] ** -0.5).to(dtype)

    return {
        "experts.gate_up": drawn(EXPERTS, HIDDEN, 2 * WIDTH),
        "experts.down": drawn(EXPERTS, WIDTH, HIDDEN),
        "shared.gate_up": drawn(HIDDEN, 2 * SHARED),
        "shared.down": drawn(SHARED, HIDDEN),
    }


def inputs_of(case: LayerCase, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, ids with some -1, weights. Expert 3 is nobody's choice."""
    generator = torch.Generator().manual_seed(rank)
    tokens = case.tokens[rank]
    x_TH = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(case.dtype)
    scores_TE = torch.rand(tokens, EXPERTS, generator=generator)
    scores_TE[:, 3] = -1
    ids_TK = scores_TE.topk(TOPK).indices
    ids_TK[torch.rand(tokens, TOPK, generator=generator) < 0.2] = -1
    weights_TK = torch.rand(tokens, TOPK, generator=generator, dtype=torch.float64)
    return x_TH, ids_TK, weights_TK if case.dtype is torch.float64 else weights_TK.float()


def dense(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The layer on one process: every token through every expert, and through the shared one."""

    def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        width = down.shape[-2]
        hidden = x @ gate_up
        return (F.silu(hidden[..., :width]) * hidden[..., width:]) @ down

    all_ETH = mlp(x_TH, weights["experts.gate_up"], weights["experts.down"])
    chosen_TKE = F.one_hot(ids_TK + 1, EXPERTS + 1)[..., 1:]
    share_TE = (weights_TK[..., None] * chosen_TKE).sum(1).to(x_TH.dtype)
    own_TH = torch.einsum("te,eth->th", share_TE, all_ETH)
    return own_TH + mlp(x_TH, weights["shared.gate_up"], weights["shared.down"])


def layer_of(
    comm: MoECommunicator, case: LayerCase, *, loaded: dict[str, Tensor] | None = None, **more: Any
) -> MoELayer:
    layer = MoELayer(
        comm,
        intermediate_size=WIDTH,
        shared_intermediate_size=SHARED,
        placement=case.placement,
        **more,
    )
    layer.load_state_dict(weights_of_all(case.dtype) if loaded is None else loaded)
    return layer


def gradients(ctx: RankContext, cases: Sequence[LayerCase]) -> list[float]:
    """Largest difference to the dense layer of each case: results and all gradients."""
    return [_gradients(ctx, case) for case in cases]


def _gradients(ctx: RankContext, case: LayerCase) -> float:
    with MoECommunicator(case.config(ctx.device)) as comm:
        layer = layer_of(comm, case)
        probe = torch.cos(torch.arange(HIDDEN, dtype=case.dtype, device=ctx.device))
        x_TH, ids_TK, weights_TK = (part.to(ctx.device) for part in inputs_of(case, ctx.rank))
        x_TH, weights_TK = x_TH.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        y_TH = layer(x_TH, ids_TK, weights_TK)
        (y_TH * probe).sum().backward()

        full = {
            name: value.to(ctx.device).requires_grad_()
            for name, value in weights_of_all(case.dtype).items()
        }
        worst = 0.0
        for rank in range(ctx.num_ranks):
            xd, idsd, wd = (part.to(ctx.device) for part in inputs_of(case, rank))
            xd, wd = xd.clone().requires_grad_(), wd.clone().requires_grad_()
            shared = {name: value.detach() for name, value in full.items() if "shared" in name}
            used = full if rank == ctx.rank else {**full, **shared}  # replicated: own tokens only
            expected = dense(xd, idsd, wd, used)
            (expected * probe).sum().backward()
            if rank == ctx.rank:
                worst = max(worst, gap(y_TH.detach(), expected.detach()))
                worst = max(worst, gap(x_TH.grad, xd.grad), gap(weights_TK.grad, wd.grad))
        for name, parameter in layer.named_parameters():
            grad, expected = parameter.grad, full[name].grad
            if name.startswith("experts."):
                expected = expected if expected is not None else torch.zeros_like(full[name])
                if len(layer.experts.expert_ids) == 0:
                    continue
                grad, expected = _over_copies(ctx, layer, grad), expected
                expected = expected[list(layer.experts.expert_ids)]
            worst = max(worst, gap(grad, expected))
        return worst


def _over_copies(ctx: RankContext, layer: MoELayer, grad: Tensor | None) -> Tensor | None:
    """Gradients of experts, added up over their copies."""
    if layer.placement.num_physical == EXPERTS or grad is None:
        return grad
    full = grad.new_zeros((EXPERTS, *grad.shape[1:]))
    full[list(layer.experts.expert_ids)] = grad
    dist.all_reduce(full)
    return full[list(layer.experts.expert_ids)]


def gradcheck(ctx: RankContext, layouts: Sequence[str]) -> bool:
    """torch's numerical check of rows and weights, with experts fixed: see `training.gradcheck`."""
    for layout in layouts:
        case = LayerCase((2, 2), fields={"output_layout": layout})
        with MoECommunicator(case.config(ctx.device)) as comm:
            layer = layer_of(comm, case).requires_grad_(False)
            x_TH, ids_TK, weights_TK = inputs_of(case, ctx.rank)

            def run(
                x_TH: Tensor, weights_TK: Tensor, layer: MoELayer = layer, ids_TK: Tensor = ids_TK
            ) -> Tensor:
                return layer(x_TH, ids_TK, weights_TK)

            assert torch.autograd.gradcheck(
                run, (x_TH.requires_grad_(), weights_TK.requires_grad_()), fast_mode=False
            )
    return True


def moves(ctx: RankContext, layout: str, mode: str = "ht") -> None:
    """Experts move: without copies, where all rows of an expert stay together, and with them."""
    plain = ExpertPlacement(EXPERTS, ((0, 1, 2), (3, 4)))
    copies = ExpertPlacement(EXPERTS, ((0, 1, 2, 3), (0, 2, 4)))
    dtype = torch.bfloat16 if ctx.device.type == "cuda" else torch.float32
    fields: dict[str, Any] = {"output_layout": layout, "mode": mode}
    if layout in ("flat", "expert_major") and (ctx.device.type == "cpu" or mode == "ll"):
        fields["combine_precision"] = "exact"  # no rounding of combine depends on the placement
    same_bits = "combine_precision" in fields and ctx.device.type == "cpu"
    _moves(ctx, LayerCase((6, 4), plain, dtype, fields), ((0, 3, 4), (1, 2)), same_bits)
    _moves(ctx, LayerCase((6, 4), copies, dtype, fields), ((0, 2, 3, 4), (0, 1, 4)), False)


def _moves(
    ctx: RankContext, case: LayerCase, experts_of_rank: tuple[tuple[int, ...], ...], same_bits: bool
) -> None:
    """The same results, parameters at their addresses, states of the optimizer along."""
    placement, other = case.placement, ExpertPlacement(EXPERTS, experts_of_rank)
    assert placement is not None
    with MoECommunicator(case.config(ctx.device)) as comm:
        layer = layer_of(comm, case)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        x_TH, ids_TK, weights_TK = (part.to(ctx.device) for part in inputs_of(case, ctx.rank))

        def results() -> Tensor:
            with torch.no_grad():
                return layer(x_TH, ids_TK, weights_TK)

        for parameter in layer.parameters():  # alike on all copies of an expert
            parameter.grad = parameter.detach().sin()
        layer.mark_copies_summed()
        optimizer.step()
        before = results()
        saved = {name: value.clone() for name, value in layer.state_dict().items()}
        moments = optimizer.state[layer.experts.down]["exp_avg"].clone()
        addresses = [parameter.data_ptr() for parameter in layer.parameters()]
        layer.rebalance(other, optimizer=optimizer)
        assert layer.experts.expert_ids == other.experts_of_rank[ctx.rank]
        assert [parameter.data_ptr() for parameter in layer.parameters()] == addresses
        # AdamW's first moments after a step are a tenth of the gradients.
        moved = optimizer.state[layer.experts.down]["exp_avg"]
        full = weights_of_all(case.dtype)["experts.down"][list(layer.experts.expert_ids)]
        torch.testing.assert_close(moved, 0.1 * full.to(ctx.device).sin())
        assert not torch.equal(moved, moments)
        after = results()
        assert not same_bits or torch.equal(after, before)
        rounding = 0.05 if case.dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(after, before, rtol=rounding, atol=rounding)
        layer.rebalance(placement, optimizer=optimizer)
        assert torch.equal(results(), before)
        assert torch.equal(optimizer.state[layer.experts.down]["exp_avg"], moments)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, saved[name])


def trains_with_copies(ctx: RankContext) -> None:
    """Weights after steps with copies are those of a dense model.

    Placements differ from step to step, and the optimizer's states move along.
    """
    placements = (((0, 1, 2, 4), (1, 3, 4), (0, 2)), ((0, 2, 3, 4), (1, 2, 4), (0, 4)))
    case = LayerCase((5, 0, 7), ExpertPlacement(EXPERTS, placements[0]))
    names = ("experts.gate_up", "experts.down")
    everything = weights_of_all(case.dtype)
    full = {name: everything[name].requires_grad_() for name in names}
    fixed = {name: value for name, value in everything.items() if name not in names}
    reference = torch.optim.AdamW(full.values(), lr=1e-2)
    with MoECommunicator(case.config(ctx.device)) as comm:
        layer = layer_of(comm, case)
        assert layer.shared is not None
        layer.shared.requires_grad_(False)
        optimizer = torch.optim.AdamW(layer.experts.parameters(), lr=1e-2)
        for step in range(3):
            for _ in range(2):  # gradients are accumulated
                layer(*inputs_of(case, ctx.rank)).square().sum().backward()
                for rank in range(ctx.num_ranks):
                    given = inputs_of(case, rank)
                    dense(*given, {**full, **fixed}).square().sum().backward()
            sum_copies_gradients(layer)
            optimizer.step()
            reference.step()
            optimizer.zero_grad()
            reference.zero_grad()
            for name in names:
                own = layer.get_parameter(name).detach()
                wanted = full[name].detach()[list(layer.experts.expert_ids)]
                torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-9)
            new = ExpertPlacement(EXPERTS, placements[(step + 1) % 2])
            layer.rebalance(new, optimizer=optimizer)
        parts: list[Any] = [None] * ctx.num_ranks
        dist.all_gather_object(parts, layer.state_dict())
        merge_state_dicts(parts)  # copies are equal, bit for bit


def steps_without_sums(ctx: RankContext) -> list[str]:
    """What a step says without sums, with them, after them, and with the caller's own."""
    case = LayerCase((3, 3), ExpertPlacement(EXPERTS, ((0, 1, 2), (0, 3, 4))))
    said: list[str] = []
    with MoECommunicator(case.config(ctx.device)) as comm:
        layer = copy.deepcopy(layer_of(comm, case))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

        def step() -> None:
            before = layer.experts.down.detach().clone()
            try:
                optimizer.step()
                said.append("")
            except InputError as error:
                assert torch.equal(layer.experts.down, before)
                said.append(str(error))

        step()  # there are no gradients
        for prepare in (lambda: None, layer.sum_copies_gradients, layer.mark_copies_summed):
            layer(*inputs_of(case, ctx.rank)).sum().backward()
            prepare()
            step()
        step()
    return said


def steps_that_are_left_out(ctx: RankContext) -> list[str]:
    """What steps without sums say after sums whose step never came, and of closures."""
    case = LayerCase((3, 3), ExpertPlacement(EXPERTS, ((0, 1, 2), (0, 3, 4))))
    said: list[str] = []
    with MoECommunicator(case.config(ctx.device)) as comm:
        layer = layer_of(comm, case)
        optimizer = torch.optim.SGD(layer.experts.parameters(), lr=0.1)

        def backward(*, sums: bool) -> None:
            layer(*inputs_of(case, ctx.rank)).sum().backward()
            if sums:
                layer.sum_copies_gradients()

        def step(**options: Any) -> None:
            try:
                optimizer.step(**options)
                said.append("")
            except InputError as error:
                said.append(str(error))

        backward(sums=True)  # as where a scaler of gradients has found an overflow
        optimizer.zero_grad()
        backward(sums=False)
        step()
        layer.sum_copies_gradients()
        backward(sums=False)  # more than what was added up
        step()
        for sums in (True, True, False):

            def closure(sums: bool = sums) -> float:
                optimizer.zero_grad()
                backward(sums=sums)
                return 0.0

            step(closure=closure)
        backward(sums=True)
        layer.rebalance(layer.placement)
        layer.experts.down.grad = torch.ones_like(layer.experts.down)
        step()
        layer.experts.gate_up.requires_grad_(False)
        optimizer.zero_grad()
        backward(sums=True)
        assert layer.experts.gate_up.grad is None, "it is frozen: decay would change it"
        step()
    return said


class Mixed(nn.Module):
    """Replicated weights before and in a layer; `recompute` runs the layer."""

    def __init__(self, layer: MoELayer, recompute: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.before, self.layer = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64), layer
        self._run = recompute or (lambda run, *given: run(*given))
        with torch.no_grad():
            for parameter in self.before.parameters():
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter).cos())

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self._run(self.layer, self.before(x_TH), ids_TK, weights_TK)


def save_communication(ctx: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    """A policy by the names of operators."""
    saved = op in DISPATCH_OPS or op in COMBINE_OPS
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


FORMS: dict[str, Callable[..., Any] | None] = {
    "plain": None,
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "selective": functools.partial(
        checkpoint,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, save_communication),
    ),
}


def wrapped(ctx: RankContext, wrapper: str) -> dict[str, int]:
    """DDP or FSDP2 around a layer, with checkpoints of all kinds: gradients of a dense model.

    Returns:
        For every kind of checkpoint the rows that a step sends.
    """
    case = LayerCase((5, 3))
    sent: dict[str, int] = {}
    full = {name: value.requires_grad_() for name, value in weights_of_all(case.dtype).items()}
    reference = Mixed(cast("MoELayer", nn.Identity()))
    total = torch.zeros((), dtype=case.dtype)
    for rank in range(ctx.num_ranks):
        x_TH, ids_TK, weights_TK = inputs_of(case, rank)
        y_TH = dense(reference.before(x_TH), ids_TK, weights_TK, full)
        total = total + y_TH.square().mean() / ctx.num_ranks
    total.backward()
    with MoECommunicator(case.config(ctx.device)) as comm:
        counted = comm.enable_statistics()
        for name, recompute in FORMS.items():
            layer = layer_of(comm, case)
            model = Mixed(layer, recompute)
            outer: nn.Module = model
            if wrapper == "ddp":
                own = [f"layer.experts.{name}" for name, _ in layer.experts.named_parameters()]
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own)
                outer = DistributedDataParallel(model)
            else:
                fully_shard(model, ignored_params=set(layer.experts.parameters()))
            counted.rows_sent.zero_()
            outer(*inputs_of(case, ctx.rank)).square().mean().backward()
            sent[name] = int(counted.rows_sent.sum())
            for parameter in layer.experts.parameters():
                assert parameter.grad is not None
                parameter.grad /= ctx.num_ranks
            for key, parameter in model.named_parameters():
                if key.startswith("before."):
                    wanted = reference.get_parameter(key).grad
                else:
                    wanted = full[key.removeprefix("layer.")].grad
                found = parameter.grad
                if isinstance(found, DTensor):
                    found = found.full_tensor()
                assert wanted is not None
                if ".experts." in key:
                    wanted = wanted[list(layer.experts.expert_ids)]
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    return sent


def checkpoints(ctx: RankContext) -> None:
    """What ranks save makes one checkpoint, which other placements load."""
    placement = ExpertPlacement(EXPERTS, ((0, 1, 2), (2, 3, 4)))
    dense = weights_of_all(torch.float64)
    case = LayerCase((3, 3), placement)
    with MoECommunicator(case.config(ctx.device)) as comm:
        own = layer_of(comm, case).state_dict()
    assert own["experts.expert_ids"].tolist() == list(placement.experts_of_rank[ctx.rank])
    parts: list[Any] = [None] * ctx.num_ranks
    dist.all_gather_object(parts, own)
    merged = merge_state_dicts(parts)
    assert merged.keys() == dense.keys()
    assert all(torch.equal(merged[name], value) for name, value in dense.items())
    other = LayerCase((3, 3), fields={"expert_map": [1, 0, 1, 0, 1]})
    with MoECommunicator(other.config(ctx.device)) as comm:
        layer = layer_of(comm, other, loaded=merged)
        mine = list(layer.experts.expert_ids)
        assert mine == comm.local_experts
        assert torch.equal(layer.experts.down, dense["experts.down"][mine])


def refusals(ctx: RankContext) -> dict[str, str]:
    """What this rank says where rank 0 alone, or every rank, is wrong."""
    said: dict[str, str] = {}
    case = LayerCase((3, 3))
    with MoECommunicator(case.config(ctx.device)) as comm:
        layer = layer_of(comm, case)
        x_TH, ids_TK, weights_TK = inputs_of(case, ctx.rank)

        def attempt(name: str, call: Any) -> None:
            try:
                call()
            except (ValueError, RuntimeError) as error:
                said[name] = f"{type(error).__name__}: {error}"

        given = weights_TK if ctx.rank else None
        attempt("weights", lambda: layer(x_TH, ids_TK, given))
        more = ExpertPlacement(EXPERTS, ((0, 1, 2), (0, 3, 4)))
        attempt("slots", lambda: layer.rebalance(more))
        attempt("made", lambda: MoELayer(comm, intermediate_size=8, placement=more))
        layer(x_TH, ids_TK, weights_TK)
    return said


def received_of(
    layout: str, tokens: int, dtype: torch.dtype, alignment: int = 1, device: str = "cpu"
) -> tuple[DispatchOutput, GroupedExperts]:
    """What one rank alone receives, and its experts, on a device."""
    fields: dict[str, Any] = {"output_layout": layout, "expert_alignment": alignment}
    case = LayerCase((tokens,), dtype=dtype, fields=fields)
    with MoECommunicator(case.config(torch.device("cpu"))) as comm:
        received, _ = comm.dispatch(*inputs_of(case, 0))
    there = {
        name: value.to(device) for name, value in vars(received).items() if torch.is_tensor(value)
    }
    experts = GroupedExperts(
        HIDDEN,
        WIDTH,
        expert_ids=range(EXPERTS),
        num_experts=EXPERTS,
        expert_alignment=alignment,
        dtype=dtype,
        device=device,
    )
    return dataclasses.replace(received, **there), experts
