"""MoE layers whose experts run over nothing but what has arrived, on ranks that receive nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from expertlink import DispatchOutput, MoECommunicator
from expertlink.launch import RankContext
from support.oracle import Case, inputs_of
from support.rank_jobs import config_of
from support.train_jobs import dense, expert_weights, gap


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


def layer(
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
            return layer(
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
