"""A differentiable MoE layer on every rank, and the dense layer it must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expertlink import DispatchLayout, DispatchOutput, MoECommunicator
from expertlink.launch import RankContext
from support import oracle
from support.jobs import config_of, counted, poison_memory, rows_for, same_bits
from support.oracle import Case, inputs_of


def expert_weights(case: Case) -> Tensor:
    """`[E, H, H]` one matrix per expert, the same on all ranks."""
    gen = torch.Generator().manual_seed(case.seed + 77)
    shape = (case.experts, case.hidden, case.hidden)
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(case.dtype) / case.hidden**0.5


def experts_of(out: DispatchOutput, weights: Tensor) -> Tensor:
    """The rank's experts (`weights [E_loc, H, H]`) over received rows of any layout."""
    if out.layout is DispatchLayout.FLAT:
        assert out.expert_offsets is not None
        ends = out.expert_offsets.tolist()
        groups = [
            torch.tanh(out.tokens[ends[e] : ends[e + 1]] @ weights[e]) for e in range(len(weights))
        ]
        return torch.cat([*groups, out.tokens[ends[-1] :]])
    if out.layout is DispatchLayout.EXPERT_MAJOR:
        return torch.tanh(torch.bmm(out.tokens, weights))
    assert out.topk_ids is not None
    assert out.topk_weights is not None
    total = out.tokens * 0.0
    for e in range(len(weights)):
        share = (out.topk_weights * (out.topk_ids == e)).sum(-1, keepdim=True)
        total = total + share.to(out.tokens.dtype) * torch.tanh(out.tokens @ weights[e])
    return total


def layer(
    comm: MoECommunicator,
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts_EHH: Tensor,
    combines: int = 1,
    at_combine: bool = False,
) -> Tensor:
    """Combines of 1, 2, ... times the experts' rows, all of one dispatch, added up.

    `at_combine`: the weights are given to the combines, and to the dispatch others or none.
    """
    late: dict[str, Any] = {"topk_weights": weights_TK} if at_combine else {}
    early = weights_TK if not at_combine else torch.ones_like(weights_TK) if combines > 1 else None
    out, handle = comm.dispatch(x_TH, ids_TK, early)
    rows = experts_of(out, experts_EHH)
    total = comm.combine(rows, handle, **late)
    for times in range(2, combines + 1):
        total = total + comm.combine(times * rows, handle, **late)
    return total


def dense(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts_EHH: Tensor) -> Tensor:
    """The same layer on one process: every token through its experts."""
    all_ETH = torch.tanh(torch.einsum("th,ehg->etg", x_TH, experts_EHH))
    chosen = torch.nn.functional.one_hot(ids_TK + 1, len(experts_EHH) + 1)[..., 1:]
    share_TE = (weights_TK.unsqueeze(-1) * chosen).sum(1)
    return torch.einsum("te,eth->th", share_TE.to(x_TH.dtype), all_ETH)


def gradients(
    ctx: RankContext, case: Case, combines: int = 1, at_combine: bool = False, **fields: Any
) -> dict[str, float]:
    """Largest differences to the dense layer: outputs, and gradients of rows, weights, experts."""
    with MoECommunicator(config_of(case, ctx.device, **fields)) as comm:
        return gradients_on(comm, case, combines, at_combine)


def gradients_on(
    comm: MoECommunicator, case: Case, combines: int = 1, at_combine: bool = False
) -> dict[str, float]:
    """`gradients` with a communicator that is there already."""
    own, device = inputs_of(case, comm.rank), comm.device
    assert own.weights_TK is not None
    experts_EHH = expert_weights(case).to(device)
    x_TH = own.x_TH.to(device, copy=True).requires_grad_()
    weights_TK = own.weights_TK.to(device).requires_grad_()
    mine = experts_EHH[comm.local_experts].clone().requires_grad_()
    result = layer(comm, x_TH, own.ids_TK.to(device), weights_TK, mine, combines, at_combine)
    times = combines * (combines + 1) / 2
    probe = torch.cos(torch.arange(case.hidden, device=device, dtype=result.dtype))
    (result * probe).sum().backward()
    local = comm.local_experts

    worst: dict[str, float] = {"experts": 0.0}
    full = experts_EHH.clone().requires_grad_()
    for rank in range(case.ranks):
        theirs = inputs_of(case, rank)
        assert theirs.weights_TK is not None
        xd = theirs.x_TH.to(device).requires_grad_()
        wd = theirs.weights_TK.to(device).requires_grad_()
        expected = times * dense(xd, theirs.ids_TK.to(device).long(), wd, full)
        (expected * probe).sum().backward()  # gradients of the experts add up over all ranks
        if rank == comm.rank:
            worst["result"] = gap(result, expected)
            worst["rows"] = gap(x_TH.grad, xd.grad)
            worst["weights"] = gap(weights_TK.grad, wd.grad)
    if local:
        assert full.grad is not None
        worst["experts"] = gap(mine.grad, full.grad[local])
    return worst


def gap(actual: Tensor | None, expected: Tensor | None) -> float:
    if actual is None or expected is None:
        raise AssertionError(f"missing gradient: {actual}, {expected}")
    if actual.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp(min=1.0)
    return float(((actual - expected).abs().max() / scale).item())


def gradcheck(ctx: RankContext, case: Case) -> bool:
    """torch's numerical check of the whole layer, in float64.

    Perturbing one rank's inputs changes only that rank's results as long as experts are fixed, so
    every rank checks its own slice while all make the same calls: all ranks have equal T and K.
    """
    own = inputs_of(case, ctx.rank)
    assert own.weights_TK is not None
    with MoECommunicator(config_of(case, ctx.device)) as comm:
        experts = expert_weights(case)[comm.local_experts].to(ctx.device)

        def run(x_TH: Tensor, weights_TK: Tensor) -> Tensor:
            return layer(comm, x_TH, own.ids_TK.to(ctx.device), weights_TK, experts)

        return torch.autograd.gradcheck(
            run,
            (
                own.x_TH.to(ctx.device).requires_grad_(),
                own.weights_TK.to(ctx.device).requires_grad_(),
            ),
            # Other ranks take part in every evaluation: their number must not depend on data.
            fast_mode=False,
            raise_exception=True,
        )


def weight_grads(ctx: RankContext, case: Case, **fields: Any) -> bool:
    """Per-slot numbers come back to their choice, with the combine and by themselves."""
    with MoECommunicator(config_of(case, ctx.device, **fields)) as comm:
        return weight_grads_on(comm, case)


def weight_grads_on(comm: MoECommunicator, case: Case) -> bool:
    """`weight_grads` with a communicator that is there already."""
    # The weights themselves serve as numbers: each must return to where it came from.
    own, device = inputs_of(case, comm.rank), comm.device
    given = own.weights_TK
    assert given is not None
    given = given.to(device)
    ids_TK = own.ids_TK.to(device)
    out, handle = comm.dispatch(own.x_TH.to(device), ids_TK, given)
    engine: Any = comm._engine
    marks = engine.slot_weights(handle.state) if case.layout.expanded else out.topk_weights
    rows = torch.zeros(handle.rows_shape, dtype=case.dtype, device=device)
    _, back = comm.combine(rows, handle, weight_grads=marks)
    alone = engine.weight_grads(handle.state, marks)
    expected = torch.where(ids_TK >= 0, given, 0.0)
    return torch.equal(back, expected) and torch.equal(alone, expected)


def backward_bits(ctx: RankContext, cases: Sequence[Case], **fields: Any) -> None:
    """`backward_bits_on` for each case."""
    for case in cases:
        with MoECommunicator(config_of(case, ctx.device, **fields)) as comm:
            backward_bits_on(comm, case)


def backward_bits_on(comm: MoECommunicator, case: Case) -> None:
    """Backward of combine, bit for bit: gradients of expert outputs and of routing weights.

    Expert outputs are NaN where no row is, which must not reach any gradient.
    """
    own, rank, device = inputs_of(case, comm.rank), comm.rank, comm.device
    given = oracle.token_grads(case, rank)
    for tracked in (True, False) if case.weighted and case.layout.expanded else (False,):
        weights_TK = None if own.weights_TK is None else own.weights_TK.to(device, copy=True)
        if weights_TK is not None:
            weights_TK.requires_grad_(tracked)
        _, handle = comm.dispatch(own.x_TH.to(device), own.ids_TK.to(device), weights_TK)
        rows = rows_for(case, rank, handle).requires_grad_()
        result = comm.combine(rows, handle)
        for _ in range(2):  # the second time over the same graph
            rows.grad = None
            grads = given.to(device, copy=True)
            poison_memory(comm, case)
            result.backward(grads, retain_graph=True)
            same_bits(grads, given, "the gradients that backward was given")
            assert rows.grad is not None
            actual = counted(case, rank, rows.grad)
            same_bits(actual, oracle.row_grads(case, rank), "gradients of rows")
            if weights_TK is None or not tracked:
                continue
            assert weights_TK.grad is not None
            same_bits(weights_TK.grad, oracle.weight_grads(case, rank), "gradients of weights")
            weights_TK.grad = None


def dispatch_backward_bits(ctx: RankContext, cases: Sequence[Case], **fields: Any) -> None:
    """Backward of dispatch, bit for bit: a combine of the rows' gradients without weights."""
    for case in cases:
        with MoECommunicator(config_of(case, ctx.device, **fields)) as comm:
            own = inputs_of(case, comm.rank)
            x_TH = own.x_TH.to(comm.device).requires_grad_()
            out, handle = comm.dispatch(x_TH, own.ids_TK.to(comm.device))
            out.tokens.backward(rows_for(case, comm.rank, handle))
            assert x_TH.grad is not None
            same_bits(x_TH.grad, oracle.input_grads(case, comm.rank), "gradients of the input")


def repeated_backward(ctx: RankContext, case: Case) -> Any:
    """Backward twice through one graph, and frozen parts: gradients only where asked for."""
    own = inputs_of(case, ctx.rank)
    assert own.weights_TK is not None
    ids_TK, given = own.ids_TK.to(ctx.device), own.weights_TK.to(ctx.device)
    with MoECommunicator(config_of(case, ctx.device)) as comm:
        mine = expert_weights(case)[comm.local_experts].to(ctx.device)
        x_TH = own.x_TH.to(ctx.device, copy=True).requires_grad_()
        result = layer(comm, x_TH, ids_TK, given, mine)
        result.sum().backward(retain_graph=True)
        first = x_TH.grad
        assert first is not None
        first = first.clone()
        x_TH.grad = None
        result.sum().backward()
        assert x_TH.grad is not None
        same = torch.equal(first, x_TH.grad)

        weights_TK = given.clone().requires_grad_()
        result = layer(comm, x_TH.detach(), ids_TK, weights_TK, mine)
        result.sum().backward()
        only_weights = weights_TK.grad is not None
        with torch.no_grad():
            plain = layer(comm, x_TH, ids_TK, weights_TK, mine)
        return same, only_weights, plain.requires_grad, torch.equal(plain, result)


def kept_weights(ctx: RankContext, case: Case, leaves: tuple[str, ...]) -> float:
    """A cached dispatch that keeps the weights: largest difference to a dense layer's gradients."""
    own = inputs_of(case, ctx.rank)
    assert own.weights_TK is not None
    ids_TK, device = own.ids_TK.to(ctx.device), ctx.device
    tracked, expected = (
        [
            own.x_TH.to(device, copy=True).requires_grad_("rows" in leaves),
            own.weights_TK.to(device, copy=True).requires_grad_("weights" in leaves),
        ]
        for _ in range(2)
    )
    full = expert_weights(case).to(device)
    with MoECommunicator(config_of(case, device)) as comm:
        x_TH, weights_TK = tracked
        mine = full[comm.local_experts]
        out, first = comm.dispatch(x_TH, ids_TK, weights_TK)
        once = comm.combine(experts_of(out, mine), first)
        out, again = comm.dispatch(2 * x_TH, None, previous_handle=first)
        twice = comm.combine(experts_of(out, mine), again)
        (once.square().sum() + twice.square().sum()).backward()
    x_TH, weights_TK = expected
    once, twice = (dense(rows, ids_TK.long(), weights_TK, full) for rows in (x_TH, 2 * x_TH))
    (once.square().sum() + twice.square().sum()).backward()
    pairs = zip(tracked, expected, strict=True)
    return max(gap(a.grad, b.grad) for a, b in pairs if b.requires_grad)


def followed(ctx: RankContext, case: Case) -> dict[str, bool]:
    """Whether a combine's result requires grad where nothing else does, by the form of the call."""
    own = inputs_of(case, ctx.rank)
    assert own.weights_TK is not None
    x_TH, ids_TK, weights_TK = (
        part.to(ctx.device) for part in (own.x_TH, own.ids_TK, own.weights_TK)
    )
    seen = {}
    with MoECommunicator(config_of(case, ctx.device)) as comm:

        def combine(name: str, output_buffer: Any = None, **options: Any) -> None:
            out, handle = comm.dispatch(x_TH, ids_TK, weights_TK, output_buffer=output_buffer)
            assert not out.tokens.requires_grad
            result = comm.combine(out.tokens, handle, **options)
            handle.wait()
            result = result[0] if isinstance(result, tuple) else result
            seen[name] = result.requires_grad

        combine("plain")
        combine("later", async_finish=True)
        with torch.no_grad():
            combine("no_grad")
        with torch.inference_mode():
            combine("inference")
            with torch.enable_grad():
                combine("inference, gradients enabled")
        combine("out", out=torch.empty_like(x_TH))
        combine("buffers", comm.create_buffers())
        combine("hook", return_recv_hook=True)
        if case.layout.expanded:
            out, _ = comm.dispatch(x_TH, ids_TK, weights_TK)
            combine("weights", weights=torch.ones(out.tokens.shape[:-1], device=ctx.device))
    return seen


def quantized_weights(ctx: RankContext, case: Case) -> bool:
    """Quantized rows carry no gradients, their routing weights do."""
    own = inputs_of(case, ctx.rank)
    assert own.weights_TK is not None
    with MoECommunicator(config_of(case, ctx.device, quantization="e4m3_float32")) as comm:
        weights_TK = own.weights_TK.to(ctx.device).requires_grad_()
        out, handle = comm.dispatch(own.x_TH.to(ctx.device), own.ids_TK.to(ctx.device), weights_TK)
        assert not out.tokens.requires_grad
        rows = torch.ones(handle.rows_shape, dtype=case.dtype, device=ctx.device)
        if out.topk_weights is not None:
            rows = rows * out.topk_weights.sum(-1, keepdim=True)
        comm.combine(rows, handle).sum().backward()
    expected = torch.where(own.ids_TK >= 0, float(case.hidden), 0.0)
    assert weights_TK.grad is not None
    return torch.equal(weights_TK.grad.cpu(), expected)


# -- experts that run over nothing but what has arrived -------------------------------------------


@dataclass(frozen=True)
class Setup:
    """One model.

    Attributes:
        case: sizes and layout; float64.
        routes: routing of each layer: "drawn", or "first": all tokens to experts 0 and 1.
        leaves: what requires grad, of "rows", "weights", "experts".
        recompute: "layers", "experts" or nothing is recomputed in backward.
        form: "plain", "request" or "later": how calls are made.
    """

    case: Case
    routes: tuple[str, ...] = ("first",)
    leaves: tuple[str, ...] = ("rows", "weights", "experts")
    recompute: str = ""
    form: str = "plain"


def hit_experts(out: DispatchOutput, weights_EHH: Tensor) -> Tensor:
    """Zeros to which only experts with rows add: without rows, no graph leads to their input."""
    rows_NH = out.tokens.flatten(0, -2)
    total_NH = torch.zeros_like(rows_NH)
    for expert, weight_HH in enumerate(weights_EHH):
        if out.topk_ids is None:
            assert out.num_tokens_per_expert_list is not None
            count = out.num_tokens_per_expert_list[expert]
            start = expert * out.tokens.shape[-2]
            if out.expert_offsets is not None:
                start = int(out.expert_offsets[expert])
            hit_N, share_N = torch.arange(start, start + count), None
        else:
            assert out.topk_weights is not None
            hit_N, choice_N = (out.topk_ids.flatten(0, -2) == expert).nonzero(as_tuple=True)
            share_N = out.topk_weights.flatten(0, -2)[hit_N, choice_N, None]
        if len(hit_N) == 0:
            continue
        result_NH = torch.tanh(rows_NH[hit_N] @ weight_HH)
        if share_N is not None:
            result_NH = result_NH * share_N
        total_NH.index_add_(0, hit_N, result_NH)
    return total_NH.view_as(out.tokens)


def hit_layer(
    comm: MoECommunicator,
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts_EHH: Tensor,
    *,
    form: str = "plain",
    recompute_experts: bool = False,
) -> Tensor:
    def experts(out: DispatchOutput) -> Tensor:
        if recompute_experts:
            return checkpoint(hit_experts, out, experts_EHH, use_reentrant=False)  # type: ignore[return-value]
        return hit_experts(out, experts_EHH)

    if form == "request":
        out, handle = comm.dispatch_async(x_TH, ids_TK, weights_TK).wait()
        result = comm.combine_async(experts(out), handle).wait()
        assert isinstance(result, Tensor)
        return result
    later = form == "later"
    out, handle = comm.dispatch(x_TH, ids_TK, weights_TK, async_finish=later)
    handle.wait()
    y_TH = comm.combine(experts(out), handle, async_finish=later)
    handle.wait()
    return y_TH


def ids_of(setup: Setup, rank: int, route: str) -> Tensor:
    ids_TK = inputs_of(setup.case, rank).ids_TK
    return (
        torch.arange(setup.case.topk).expand_as(ids_TK).contiguous() if route == "first" else ids_TK
    )


def largest_gaps(ctx: RankContext, setups: Sequence[Setup]) -> list[float]:
    """For every model the largest difference to dense layers, of results and all gradients."""
    return [_largest_gap(ctx, setup) for setup in setups]


def _largest_gap(ctx: RankContext, setup: Setup) -> float:
    case = setup.case
    with MoECommunicator(config_of(case, ctx.device, timeout_s=8.0)) as comm:
        mine = expert_weights(case)[comm.local_experts].clone()
        mine.requires_grad_("experts" in setup.leaves)
        x_TH, weights_TK = _leaves(setup, ctx.rank)

        def whole(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            return hit_layer(
                comm,
                x_TH,
                ids_TK,
                weights_TK,
                mine,
                form=setup.form,
                recompute_experts=setup.recompute == "experts",
            )

        y_TH = x_TH
        for route in setup.routes:
            args = (y_TH, ids_of(setup, ctx.rank, route), weights_TK)
            if setup.recompute == "layers":
                y_TH = y_TH + checkpoint(whole, *args, use_reentrant=False)  # type: ignore[operator]
            else:
                y_TH = y_TH + whole(*args)
        y_TH.square().sum().backward()
        return max(_gaps(setup, comm, y_TH, x_TH.grad, weights_TK.grad, mine.grad))


def _leaves(setup: Setup, rank: int) -> tuple[Tensor, Tensor]:
    own = inputs_of(setup.case, rank)
    assert own.weights_TK is not None
    own.x_TH.requires_grad_("rows" in setup.leaves)
    own.weights_TK.requires_grad_("weights" in setup.leaves)
    return own.x_TH, own.weights_TK


def _gaps(
    setup: Setup,
    comm: MoECommunicator,
    y_TH: Tensor,
    x_grad: Tensor | None,
    weights_grad: Tensor | None,
    mine_grad: Tensor | None,
) -> list[float]:
    gaps = []
    full = expert_weights(setup.case).requires_grad_("experts" in setup.leaves)
    for rank in range(setup.case.ranks):
        x_TH, weights_TK = _leaves(setup, rank)
        expected_TH = x_TH
        for route in setup.routes:
            ids_TK = ids_of(setup, rank, route)
            expected_TH = expected_TH + dense(expected_TH, ids_TK, weights_TK, full)
        expected_TH.square().sum().backward()
        if rank == comm.rank:
            gaps.append(gap(y_TH, expected_TH))
            if "rows" in setup.leaves:
                gaps.append(gap(x_grad, x_TH.grad))
            if "weights" in setup.leaves:
                gaps.append(gap(weights_grad, weights_TK.grad))
    if "experts" in setup.leaves and comm.local_experts:
        assert full.grad is not None
        expected = full.grad[comm.local_experts]
        # An expert that nothing reached has no gradient, or zeros.
        gaps.append(gap(torch.zeros_like(expected) if mine_grad is None else mine_grad, expected))
    return gaps


# -- models compiled by torch ---------------------------------------------------------------------


class Layer(nn.Module):
    """Dense work before and after dispatch, experts and combine."""

    def __init__(self, comm: MoECommunicator, case: Case, form: str) -> None:
        super().__init__()
        self.comm, self.form = comm, form
        self.experts = nn.Parameter(expert_weights(case)[comm.local_experts])

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        comm, x_TH = self.comm, torch.sin(x_TH)
        if self.form == "request":
            out, handle = comm.dispatch_async(x_TH, ids_TK, weights_TK).wait()
            y_TH: Any = comm.combine_async(experts_of(out, self.experts), handle).wait()
        elif self.form == "later":
            out, handle = comm.dispatch(x_TH, ids_TK, weights_TK, async_finish=True)
            handle.wait()
            y_TH = comm.combine(experts_of(out, self.experts), handle, async_finish=True)
            handle.wait()
        elif self.form == "hook":
            out, handle, hook = comm.dispatch(x_TH, ids_TK, weights_TK, return_recv_hook=True)
            hook()
            rows = experts_of(out, self.experts)
            y_TH, hook = comm.combine(rows, handle, return_recv_hook=True)
            hook()
        else:
            out, handle = comm.dispatch(x_TH, ids_TK, weights=weights_TK)
            y_TH = comm.combine(experts_of(out, self.experts), handle)
        return torch.cos(y_TH)


def compiled(ctx: RankContext, case: Case, backend: str, form: str) -> float:
    """Largest difference to the model that is not compiled, for several numbers of tokens."""
    torch.compiler.reset()
    gaps = [0.0]
    with (
        MoECommunicator(config_of(case, ctx.device)) as comm,
        torch.set_grad_enabled(form != "hook"),
    ):
        model = Layer(comm, case, form)
        fast: Any = torch.compile(model, backend=backend)
        for count in (case.tokens[ctx.rank], 1):
            plain, quick, again = (
                _results(layer, case, ctx.rank, count) for layer in (model, fast, model)
            )
            gaps += [gap(one, other) for one, other in zip(plain, quick, strict=True)]
            gaps += [gap(one, other) for one, other in zip(plain, again, strict=True)]
    return max(gaps)


def _results(model: Any, case: Case, rank: int, count: int) -> list[Tensor | None]:
    """Result and gradients."""
    own = inputs_of(case, rank)
    assert own.weights_TK is not None
    leaves = [own.x_TH[:count].clone(), own.weights_TK[:count].clone()]
    if not torch.is_grad_enabled():
        return [model(leaves[0], own.ids_TK[:count], leaves[1])]
    x_TH, weights_TK = (leaf.requires_grad_() for leaf in leaves)
    model.zero_grad()
    y_TH = model(x_TH, own.ids_TK[:count], weights_TK)
    y_TH.square().sum().backward()
    experts = next(iter(model.parameters()))
    grads = [x_TH.grad, weights_TK.grad, experts.grad]
    return [y_TH.detach(), *(None if grad is None else grad.clone() for grad in grads)]
