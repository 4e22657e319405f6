"""Models with calls to other ranks, compiled by torch."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from expertlink import MoECommunicator
from expertlink.launch import RankContext
from support.oracle import Case, inputs_of
from support.rank_jobs import config_of
from support.train_jobs import expert_weights, experts_of, gap


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
    torch._dynamo.reset()
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
