"""Handles that outlive their communicator, or are used in another one.

Jobs compare with the oracle. Those of the first section take communicators that exist, so they run
on hosted ranks as well.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertlink import DispatchHandle, DispatchOutput, MoECommunicator
from expertlink.launch import RankContext
from support.faults import good, outcome, small, works
from support.hosted import Fleet, HostedCommunicator
from support.jobs import (
    check_output,
    combine_case,
    config_of,
    counts_stay_on_device,
    dispatch_case,
    filled_up,
    same_bits,
)
from support.oracle import (
    Case,
    combined_of,
    expected_of,
    expert_rows,
    inputs_of,
    received_of,
    returned_grads,
    slot_grads,
)

WIDTH = 16  # elements of a row in the narrow communicator


def narrow_of(case: Case, dtype: torch.dtype) -> Case:
    """What the other communicator of a case is configured for: short rows, and just enough room."""
    limit = case.max_tokens if case.layout.padded else max(*case.tokens, 1)
    return dataclasses.replace(case, hidden=WIDTH, dtype=dtype, limit=limit, precision="wire")


def narrow_rows(case: Case, rank: int, dtype: torch.dtype) -> Tensor:
    """`[T, WIDTH]` rows of a rank."""
    gen = torch.Generator().manual_seed(case.seed * 1000 + 300 + rank)
    return torch.randn((case.tokens[rank], WIDTH), generator=gen).to(dtype)


def dispatch_narrow(
    comm: MoECommunicator, case: Case, handle: DispatchHandle | None = None
) -> tuple[DispatchOutput, DispatchHandle]:
    """Short rows with the routing of the case, compared with the oracle."""
    rank, config = comm.rank, comm.config
    own = inputs_of(case, rank)
    weights = None
    if own.weights_TK is not None:
        weights = own.weights_TK.to(comm.device, config.weight_dtype)
    x = narrow_rows(case, rank, config.dtype).to(comm.device)
    if handle is None:
        out, handle = comm.dispatch(x, own.ids_TK.to(comm.device), weights)
    else:
        out, handle = comm.dispatch(x, None, previous_handle=handle)
    received = received_of(case, rank)
    rows = [narrow_rows(case, source, config.dtype) for source in range(case.ranks)]
    tokens = out.tokens.cpu()[: expected_of(case, rank).shape[0]]
    same_bits(tokens[received.filled], received.gather(rows), "narrow tokens")
    return out, handle


def two_communicators(narrow: MoECommunicator, wide: MoECommunicator, case: Case) -> None:
    """Short rows there, the case's rows back; and the other way round. `case` is of `wide`."""
    static = counts_stay_on_device(wide)
    out, handle = dispatch_narrow(narrow, case)
    del out
    for round_ in range(2):
        combine_case(wide, case, handle, "combine in another one", round_=round_)
    x_TH = inputs_of(case, wide.rank).x_TH.to(wide.device)
    out, cached = wide.dispatch(x_TH, None, previous_handle=handle)
    check_output(case, wide.rank, out, static=static)
    rows = filled_up(expert_rows(case, wide.rank), cached.rows_shape[:-1], wide.device)
    grads = filled_up(slot_grads(case, wide.rank), cached.rows_shape[:-1], wide.device)
    for used in (cached, handle):
        sums, grads_TK = wide.combine(rows, used, weight_grads=grads)
        same_bits(sums, combined_of(case, wide.rank), "combine with gradients")
        same_bits(grads_TK, returned_grads(case, wide.rank), "weight gradients")
    # The first one goes on, with its own handle and with those of the other.
    dispatch_narrow(narrow, case, handle)
    dispatch_narrow(narrow, case, cached)
    out, back = dispatch_case(wide, case)
    check_output(case, wide.rank, out, static=static)
    dispatch_narrow(narrow, case, back)
    combine_case(wide, case, back, "combine of its own")
    assert wide.wire_rows(handle) == wide.wire_rows(back) == narrow.wire_rows(back)


def on_hosted_ranks(wide: MoECommunicator, narrow: Fleet, cases: Sequence[Case]) -> None:
    """`two_communicators` with another fleet's; `wide` is a hosted one."""
    with torch.no_grad():
        with HostedCommunicator(narrow, wide.rank) as comm:
            for case in cases:
                two_communicators(comm, wide, case)
            kept = [dispatch_narrow(comm, case)[1] for case in cases]
        for case, handle in zip(cases, kept, strict=True):
            combine_case(wide, case, handle, "combine after the end")


# -- on CPUs --------------------------------------------------------------------------------------


def contract(ctx: RankContext, case: Case, dtype: torch.dtype) -> bool:
    """`two_communicators`, and a third one after both are gone."""
    narrow_config = config_of(narrow_of(case, dtype), ctx.device)
    grown = config_of(case, ctx.device)
    if not case.layout.padded:
        grown = dataclasses.replace(grown, max_tokens_per_rank=case.max_tokens + 9)
    with torch.no_grad():
        narrow, wide = MoECommunicator(narrow_config), MoECommunicator(grown)
        two_communicators(narrow, wide, case)
        _, handle = dispatch_narrow(narrow, case)
        engine: Any = narrow._engine
        seen = weakref.ref(narrow), weakref.ref(engine)
        narrow.close()
        wide.close()
        del narrow, engine
        gc.collect()
        assert [ref() for ref in seen] == [None, None], "a handle keeps its communicator"
        with MoECommunicator(grown) as third:
            combine_case(third, case, handle, "combine after the end")
            x_TH = inputs_of(case, ctx.rank).x_TH
            out, cached = third.dispatch(x_TH, None, previous_handle=handle)
            check_output(case, ctx.rank, out)
            combine_case(third, case, cached, "combine of a cached dispatch")
    return True


def gradients(ctx: RankContext, case: Case) -> dict[str, float]:
    """Largest differences from a dense layer whose rows come through two communicators.

    Rows of both are routed alike: y = sum over experts of weight * (a @ M + b).
    """
    own = inputs_of(case, ctx.rank)
    assert own.weights_TK is not None
    gen = torch.Generator().manual_seed(case.seed + ctx.rank)
    count = case.tokens[ctx.rank]
    leaves = {
        "a": torch.randn((count, WIDTH), generator=gen, dtype=case.dtype),
        "b": own.x_TH,
        "weights": own.weights_TK,
    }
    matrix = torch.ones((WIDTH, case.hidden), dtype=case.dtype).tril()
    upstream = torch.randn((count, case.hidden), generator=gen, dtype=case.dtype)

    def through_ranks(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
        out, handle = narrow.dispatch(a, own.ids_TK, weights)
        other, _ = wide.dispatch(b, None, previous_handle=handle)
        rows = out.tokens @ matrix + other.tokens
        if out.topk_weights is not None and other.topk_weights is not None:
            # The weights come with the rows of both; each has its share of the gradients.
            sums = out.topk_weights.sum(-1, keepdim=True) / 4
            rows = rows * (sums + 3 * other.topk_weights.sum(-1, keepdim=True) / 4)
        return wide.combine(rows, handle)

    def dense(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
        valid = (own.ids_TK >= 0).to(case.dtype)
        return (a @ matrix + b) * (weights * valid).sum(1, keepdim=True)

    results = []
    with (
        MoECommunicator(config_of(narrow_of(case, case.dtype), ctx.device)) as narrow,
        MoECommunicator(config_of(case, ctx.device)) as wide,
    ):
        for layer in (through_ranks, dense):
            copies = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
            result = layer(**copies)
            (result * upstream).sum().backward()
            grads = {name: copy.grad for name, copy in copies.items()}
            results.append({"result": result.detach(), **grads})
    mine, theirs = results
    worst = {}
    for name, value in mine.items():
        reference = theirs[name]
        assert value is not None, f"{name} has no gradient"
        assert reference is not None
        worst[name] = float((value - reference).abs().max()) if value.numel() else 0.0
    return worst


def two_dispatches(ctx: RankContext) -> Any:
    """Ranks pass handles of equal numbers of two communicators; then all pass the same one."""
    with small(ctx) as first, small(ctx, hidden_size=4) as second, small(ctx) as third:
        mine = good(first)
        out, one = first.dispatch(**mine)
        other = {**mine, "input": mine["input"][:, :4]}
        _, two = second.dispatch(**other)
        third.dispatch(**mine)
        assert one.call == two.call
        rows = out.tokens
        used = two if ctx.rank else one
        seen = [
            outcome(lambda: third.combine(rows, used)),
            outcome(lambda: third.dispatch(mine["input"], None, previous_handle=used)),
        ]
        third.combine(rows, two)
        return seen, works(third)


MISFITS: dict[str, dict[str, Any]] = {
    "topk": {"topk": 1},
    "num_experts": {"num_experts": 6},
    "output_layout": {"output_layout": "token_major"},
    "mode": {"mode": "ll", "output_layout": "flat"},
    "expert_alignment": {"expert_alignment": 4},
    "max_recv_tokens_per_rank": {"max_recv_tokens_per_rank": 99},
    "experts are placed": {"expert_map": (1, 1, 1, 1, 0, 0, 0, 0)},
}


def misfits(ctx: RankContext) -> Any:
    """Handles that do not suit a communicator; what is refused leaves it as it was."""
    seen = {}
    with small(ctx) as maker:
        mine = good(maker)
        out, handle = maker.dispatch(**mine)
        for name, fields in MISFITS.items():
            with small(ctx, **fields) as comm:
                comm.initialize()
                cached = {"input": mine["input"], "topk_ids": None, "previous_handle": handle}
                seen[name] = [
                    outcome(lambda: comm.combine(out.tokens, handle)),
                    outcome(lambda: comm.dispatch(**cached)),  # noqa: B023
                ]
        with small(ctx, max_tokens_per_rank=3) as comm:
            comm.initialize()
            seen["tokens"] = [outcome(lambda: comm.combine(out.tokens, handle))]
        assert works(maker)
        with small(ctx, output_layout="rank_major") as padded:
            out, handle = padded.dispatch(**mine)
        with small(ctx, output_layout="rank_major", max_tokens_per_rank=9) as comm:
            comm.initialize()
            seen["max_tokens_per_rank"] = [outcome(lambda: comm.combine(out.tokens, handle))]
    return seen


def asked_later(ctx: RankContext, case: Case) -> bool:
    """Source tokens in a cached dispatch of a handle whose communicator does not have them."""
    own = inputs_of(case, ctx.rank)
    plain = config_of(narrow_of(case, case.dtype), ctx.device)
    asking = config_of(case, ctx.device, source_tokens=True)
    with torch.no_grad(), MoECommunicator(plain) as maker, MoECommunicator(asking) as comm:
        out, handle = dispatch_narrow(maker, case)
        assert out.source_tokens is None
        out, _ = comm.dispatch(own.x_TH.to(ctx.device), None, previous_handle=handle)
        assert out.source_tokens is not None
        check_output(case, ctx.rank, out, static=counts_stay_on_device(comm))
        combine_case(comm, case, handle, "combine")
    return True
