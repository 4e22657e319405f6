"""What tests run on every rank: each job compares one rank's results with the oracle.

Jobs raise on the first difference. They know nothing of devices or process groups beyond what the
context gives them, so the same jobs judge gloo on CPU and NCCL on GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from oracle import Case, combined_of, expected_of, expert_rows, inputs_of
from torch import Tensor

from expertlink import (
    DispatchHandle,
    DispatchLayout,
    DispatchOutput,
    MoECommunicator,
    MoECommunicatorConfig,
)
from expertlink.launch import RankContext


def config_of(case: Case, device: Any, **fields: Any) -> MoECommunicatorConfig:
    placement: dict[str, Any] = {}
    if case.placement != "even":
        placement["expert_map"] = case.rank_of_expert()
    defaults: dict[str, Any] = {
        "num_experts": case.experts,
        "hidden_size": case.hidden,
        "topk": case.topk,
        "max_tokens_per_rank": case.max_tokens,
        "dtype": case.dtype,
        "output_layout": case.layout,
        "expert_alignment": case.alignment,
        "device": device,
        "timeout_s": 30.0,
        "startup_timeout_s": 60.0,
        **placement,
    }
    return MoECommunicatorConfig(**{**defaults, **fields})


def same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Bitwise equality, NaNs and signs of zero included."""
    actual = actual.detach().cpu().contiguous()
    expected = expected.detach().cpu().contiguous()
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: {actual.dtype} {tuple(actual.shape)}, "
            f"expected {expected.dtype} {tuple(expected.shape)}"
        )
    if actual.numel() and not torch.equal(actual.view(torch.uint8), expected.view(torch.uint8)):
        raise AssertionError(f"{what} differs:\n{actual}\nexpected\n{expected}")


def check_output(case: Case, rank: int, out: DispatchOutput) -> None:
    """Everything a dispatch returned, against the oracle."""
    expected = expected_of(case, rank)
    sources = [inputs_of(case, source) for source in range(case.ranks)]
    tokens = out.tokens.cpu()
    assert tuple(tokens.shape) == (*expected.shape, case.hidden), f"{tokens.shape}, {expected}"
    filled = torch.zeros(expected.shape, dtype=torch.bool)
    for copy in expected.copies:
        same_bits(tokens[copy.slot], sources[copy.source].x_TH[copy.token], f"row {copy}")
        filled[copy.slot] = True
    if case.layout is DispatchLayout.FLAT:
        assert (tokens[~filled] == 0).all(), "alignment gaps must be zero"
        assert out.expert_offsets is not None
        assert out.expert_offsets.tolist() == expected.offsets
    assert out.num_tokens_per_expert.tolist() == expected.counts
    assert out.num_tokens_per_expert.dtype is torch.int32
    assert out.num_tokens_per_expert_list == expected.counts
    assert out.num_tokens_per_rank is not None
    assert out.num_tokens_per_rank.tolist() == expected.rows_per_rank
    if case.layout.expanded:
        assert out.topk_ids is None
        assert out.topk_weights is None
    else:
        _check_choices(case, rank, out, filled)


def _check_choices(case: Case, rank: int, out: DispatchOutput, filled: Tensor) -> None:
    local = {expert: index for index, expert in enumerate(case.local_experts(rank))}
    ids = torch.full((*filled.shape, case.topk), -1, dtype=torch.int64)
    weights = torch.zeros((*filled.shape, case.topk), dtype=case.weight_dtype)
    for copy in expected_of(case, rank).copies:
        source = inputs_of(case, copy.source)
        for choice, expert in enumerate(source.ids_TK[copy.token].tolist()):
            if expert in local:
                ids[(*copy.slot, choice)] = local[expert]
                if source.weights_TK is not None:
                    weights[(*copy.slot, choice)] = source.weights_TK[copy.token, choice]
    assert out.topk_ids is not None
    same_bits(out.topk_ids, ids, "topk_ids")
    if case.weighted:
        assert out.topk_weights is not None
        same_bits(out.topk_weights, weights, "topk_weights")
    else:
        assert out.topk_weights is None


def dispatch_case(
    comm: MoECommunicator, case: Case, **options: Any
) -> tuple[DispatchOutput, DispatchHandle]:
    own = inputs_of(case, comm.rank)
    weights = None if own.weights_TK is None else own.weights_TK.to(comm.device)
    return comm.dispatch(own.x_TH.to(comm.device), own.ids_TK.to(comm.device), weights, **options)


def contract(ctx: RankContext, cases: list[Case], **fields: Any) -> int:
    """Dispatch and combine, twice, then cached, then into given buffers; all against the oracle."""
    for case in cases:
        with MoECommunicator(config_of(case, ctx.device, **fields)) as comm:
            check_contract(comm, case)
    return len(cases)


def check_contract(comm: MoECommunicator, case: Case) -> None:
    """`contract` of one case on a communicator that is there already."""
    try:
        _contract(comm, case, comm.rank)
    except AssertionError as error:
        raise AssertionError(f"{error}\nin {case}") from error


def _contract(comm: MoECommunicator, case: Case, rank: int) -> None:
    expected = combined_of(case, rank)
    rows = expert_rows(case, rank).to(comm.device)
    handle = None
    for _ in range(2):
        out, handle = dispatch_case(comm, case)
        check_output(case, rank, out)
        same_bits(comm.combine(rows, handle), expected, "combine")
    assert handle is not None

    own = inputs_of(case, rank)
    out, cached = comm.dispatch(
        own.x_TH.to(comm.device), own.ids_TK.to(comm.device), previous_handle=handle
    )
    check_output(case, rank, out)
    same_bits(comm.combine(rows, cached), expected, "combine after a cached dispatch")

    buffer = _poisoned_buffer(case, rank, comm)
    out, handle = dispatch_case(comm, case, output_buffer=buffer)
    assert out.tokens.data_ptr() == buffer.data_ptr() or out.tokens.numel() == 0
    check_output(case, rank, out)
    result = torch.full_like(own.x_TH, float("nan")).to(comm.device)
    again = comm.combine(expert_rows(case, rank, round_=1).to(comm.device), handle, out=result)
    assert again is result
    same_bits(result, combined_of(case, rank, round_=1), "combine into out")


def _poisoned_buffer(case: Case, rank: int, comm: MoECommunicator) -> Tensor:
    shape = expected_of(case, rank).shape
    if not case.layout.padded:
        shape = (shape[0] + 3,)
    return torch.full((*shape, case.hidden), float("nan"), dtype=case.dtype, device=comm.device)
