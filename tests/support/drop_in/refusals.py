"""Calls that one rank alone gets wrong: every rank raises soon, and the next good call works."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from expertlink.compat.deep_ep import Buffer, ElasticBuffer
from expertlink.compat.deep_ep.errors import REFUSALS
from expertlink.errors import ConfigurationError, PeerError
from support.drop_in.decode import buffer_for
from support.drop_in.inputs import Shapes, all_tokens
from support.drop_in.place import Place

_SOON_S = 8.0  # less than the time-outs of the ranks of tests

Call = Callable[[], Any]


def _refused(place: Place, bad_rank: int, *, good: Call, bad: Call, says: str) -> str:
    """One rank makes the bad call, the others the good one; returns what is said here."""
    began = time.monotonic()
    raised: Exception | None = None
    try:
        bad() if place.rank == bad_rank else good()
    except (*REFUSALS, PeerError) as error:
        raised = error
    assert isinstance(raised, REFUSALS if place.rank == bad_rank else PeerError), (says, raised)
    assert says in str(raised), raised
    took = time.monotonic() - began
    assert took < _SOON_S, f"rank {place.rank} waited {took:.1f} s ({says})"
    return str(raised)


def constructors(place: Place, bad_rank: int) -> bool:
    """Constructors: what is wrong on one rank, and what differs between ranks."""
    group: Any = place.group
    odd = place.rank == bad_rank

    def buffer() -> Any:
        return Buffer(group)

    def without_depth() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NVSHMEM_QP_DEPTH", "deep")
            return Buffer(group, low_latency_mode=True)

    def elastic_buffer(**fields: Any) -> Any:
        return ElasticBuffer(group, **{"num_bytes": 2 << 20, **fields})

    bad_ones: list[tuple[Call, Call, str]] = [
        (buffer, lambda: Buffer(group, comm=object()), "MPI communicators are not supported"),
        (elastic_buffer, lambda: ElasticBuffer(group), "either num_bytes, or"),
        (elastic_buffer, lambda: elastic_buffer(num_bytes=1000), "a multiple of 2 MiB"),
        (elastic_buffer, lambda: elastic_buffer(num_cpu_bytes=1), "buffers on the host"),
    ]
    if not place.kernels:  # ranks that are threads have one environment
        bad_ones.append(
            (lambda: Buffer(group, low_latency_mode=True), without_depth, "is no whole")
        )
    for good, bad, says in bad_ones:
        said = _refused(place, bad_rank, good=good, bad=bad, says=says)
        assert odd or f"rank {bad_rank} refused it" in said, said
    for call, says in (
        (lambda: Buffer(group, low_latency_mode=odd), "low_latency_mode"),
        (lambda: Buffer(group, low_latency_mode=True, enable_shrink=odd), "enable_shrink"),
        (lambda: elastic_buffer(num_max_tokens_per_rank=8 + odd), "num_max_tokens_per_rank"),
        (lambda: elastic_buffer(allow_multiple_reduction=odd), "allow_multiple_reduction"),
        (lambda: buffer() if odd else elastic_buffer(), "made by"),
    ):
        began = time.monotonic()
        with pytest.raises(ConfigurationError) as error:
            call()
        assert f"{says}: " in str(error.value), error.value
        assert f"on rank {bad_rank}" in str(error.value), error.value
        assert time.monotonic() - began < _SOON_S
    elastic_buffer().barrier()
    return True


def normal(place: Place, shapes: Shapes, bad_rank: int) -> bool:
    """New dispatches, on CPUs cached ones and combines too, of `Buffer`."""
    own = all_tokens(shapes, place)[place.rank]
    x, experts = own.x, shapes.experts

    buffer: Any = Buffer(place.group)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(own.ids, experts)
    counts = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert}
    usual: dict[str, Any] = {
        **counts,
        "is_token_in_rank": in_rank,
        "topk_idx": own.ids,
        "topk_weights": own.weights,
    }

    def dispatch(rows: Any = x, **changed: Any) -> Any:
        return buffer.dispatch(rows, **{**usual, **changed})

    def refused(good: Call, bad: Call, says: str) -> None:
        _refused(place, bad_rank, good=good, bad=bad, says=says)

    bad_dispatches: list[tuple[Call, str]] = [
        (lambda: dispatch(topk_idx=own.ids.float()), "not int64"),
        (lambda: dispatch(topk_weights=own.weights.half()), "must be float32"),
        (lambda: dispatch(is_token_in_rank=in_rank[:, :1]), "is_token_in_rank has shape"),
        (lambda: dispatch(num_tokens_per_expert=per_expert[:-1]), "not a multiple"),
        (lambda: dispatch(num_tokens_per_rank=None), "get_dispatch_layout returns"),
        (lambda: dispatch(x.t()), "contiguous"),
        (lambda: dispatch(x[:, :3].contiguous()), "a multiple of 16 is needed"),
        (lambda: dispatch((x, own.weights)), "must be bytes"),
        (lambda: dispatch(is_token_in_rank=in_rank.int()), "not bool"),
        (lambda: dispatch(previous_event=own.ids), "an EventOverlap or an EventHandle"),
        (lambda: dispatch(expert_alignment=0), "expert_alignment=0"),
        (lambda: dispatch(num_worst_tokens=-1), "num_worst_tokens=-1"),
    ]
    for bad, says in bad_dispatches[:2]:  # there is no communicator yet
        refused(dispatch, bad, says)
    rows, _, weights, _, handle, _ = dispatch()
    before = rows.clone()
    for bad, says in bad_dispatches:
        refused(dispatch, bad, says)
    assert torch.equal(dispatch()[0], before)
    if place.kernels:
        return True  # there ranks agree before new dispatches alone

    def cached(given: Any = x, **changed: Any) -> Any:
        return buffer.dispatch(given, **{"handle": handle, **changed})

    refused(cached, lambda: cached(x.t()), "contiguous")
    refused(cached, lambda: cached(handle=(1,) * 6), "a handle is expected")
    refused(cached, lambda: cached(previous_event=own.ids), "an EventOverlap or an EventHandle")
    refused(cached, lambda: cached(topk_idx=own.ids), "exclude each other")
    assert torch.equal(cached()[0], before)

    def combine(given: Any = rows, **changed: Any) -> Any:
        return buffer.combine(given, **{"handle": handle, **changed})

    def weighted(given: Any = weights) -> Any:
        return combine(topk_weights=given)

    def biased(given: Any = x) -> Any:
        return combine(bias=given)

    total = combine()[0]
    refused(combine, lambda: combine(before[:-1]), "x must be")
    refused(combine, lambda: combine(before.float()), "combine takes bfloat16")
    refused(combine, lambda: combine(previous_event=own.ids), "an EventOverlap or an EventHandle")
    refused(combine, lambda: combine(handle=None), "a handle is expected")
    refused(weighted, lambda: weighted(own.ids), "must be float32")  # makes a communicator
    sums = weighted()[1]
    refused(weighted, lambda: weighted(own.ids), "must be float32")
    refused(biased, lambda: biased(x.float()), "a bias must be")
    biased()
    refused(biased, lambda: biased((x, x, x)), "at most two")
    refused(biased, lambda: biased(x.to("meta")), "a bias is on meta")
    assert torch.equal(combine()[0], total)
    assert torch.equal(weighted()[1], sums)
    # More tokens than there is room for: the others are about to make a larger communicator.
    many = x.new_zeros((100, x.shape[1]))
    ids = own.ids.new_zeros((100, 1)).expand(100, own.ids.shape[1]).contiguous()
    ids[:, 1:] = -1
    layout = buffer.get_dispatch_layout(ids, experts)
    more = {
        "num_tokens_per_rank": layout[0],
        "num_tokens_per_expert": layout[2],
        "is_token_in_rank": layout[3],
        "topk_idx": ids,
        "topk_weights": None,
    }
    refused(
        lambda: dispatch(many, **more),
        lambda: dispatch(topk_weights=own.weights.half()),
        "must be float32",
    )
    assert torch.equal(dispatch()[0], before)
    return True


def low_latency(place: Place, shapes: Shapes, bad_rank: int) -> bool:
    """Low-latency dispatches and combines."""
    own = all_tokens(shapes, place)[place.rank]
    x, most, experts = own.x, shapes.tokens, shapes.experts
    buffer: Any = buffer_for(place, shapes)

    def dispatch(rows: Any = x, ids: Any = own.ids, **options: Any) -> Any:
        options = {"use_fp8": False, **options}
        return buffer.low_latency_dispatch(rows, ids, most, experts, **options)

    def refused(good: Call, bad: Call, says: str) -> None:
        _refused(place, bad_rank, good=good, bad=bad, says=says)

    bad_dispatches: list[tuple[Call, str]] = [
        (lambda: dispatch(use_nvfp4=True), "e4m3 rows"),
        (lambda: dispatch(use_ue8m0=True), "needs round_scale"),
        (lambda: dispatch(x[:, :100].contiguous()), "not a multiple of 128"),
        (lambda: dispatch(async_finish=True, return_recv_hook=True), "exclude each other"),
        (lambda: dispatch(ids=own.ids.view(-1)), "topk_idx must be"),
        (lambda: dispatch(cumulative_local_expert_recv_stats=own.ids[0]), "recv_stats must be"),
        (lambda: dispatch(x.float()), "float32; accepted: torch.bfloat16"),
    ]
    for bad, says in bad_dispatches[:2]:  # there is no communicator yet
        refused(dispatch, bad, says)
    rows, counts, handle, _, _ = dispatch()
    for bad, says in bad_dispatches:
        refused(dispatch, bad, says)
    assert torch.equal(dispatch()[1], counts)

    def combine(given: Any = handle, **options: Any) -> Any:
        args = rows, own.ids, own.weights, given
        return buffer.low_latency_combine(*args, **options)

    total = combine()[0]
    refused(combine, lambda: combine(use_logfmt=True), "travel as bfloat16")
    refused(combine, lambda: combine(None), "a handle is expected")
    refused(combine, lambda: combine(zero_copy=True), "ask for the combine buffer")
    refused(combine, lambda: combine(out=rows[0]), "out has shape")
    assert torch.equal(combine()[0], total)
    return True


def elastic(place: Place, shapes: Shapes, bad_rank: int) -> bool:
    """The same calls of `ElasticBuffer`, in both layouts."""
    own = all_tokens(shapes, place)[place.rank]
    x, experts = own.x, shapes.experts
    expand = bad_rank == 1
    buffer: Any = ElasticBuffer(
        place.group, num_max_tokens_per_rank=shapes.tokens, hidden=shapes.hidden
    )
    usual = {"topk_idx": own.ids, "num_experts": experts, "do_expand": expand}

    def dispatch(given: Any = x, **changed: Any) -> Any:
        return buffer.dispatch(given, **{**usual, **changed})

    def refused(good: Call, bad: Call, says: str) -> None:
        _refused(place, bad_rank, good=good, bad=bad, says=says)

    bad_dispatches: list[tuple[Call, str]] = [
        (lambda: dispatch(topk_idx=None), "are needed without a handle"),
        (lambda: dispatch(num_experts=experts + 1), "not a multiple"),
        (lambda: dispatch(x.t()), "contiguous"),
        (lambda: dispatch(torch.cat([x, x, x])), "num_max_tokens_per_rank="),
        (lambda: dispatch(topk_weights=own.ids), "must be float32"),
        (lambda: dispatch(expert_alignment=0), "expert_alignment=0"),
        (lambda: dispatch(previous_event=own.ids), "an EventOverlap or an EventHandle"),
        (lambda: dispatch(previous_event_before_epilogue=own.ids), "or an EventHandle is"),
        (lambda: dispatch(cumulative_local_expert_recv_stats=own.ids[0]), "recv_stats must be"),
    ]
    for bad, says in bad_dispatches[:2]:  # there is no communicator yet
        refused(dispatch, bad, says)
    rows, _, _, handle, _ = dispatch()
    before = rows.clone()
    for bad, says in bad_dispatches:
        refused(dispatch, bad, says)
    assert torch.equal(dispatch()[0], before)
    if place.kernels:
        return True  # there ranks agree before new dispatches alone

    def cached(given: Any = x, **changed: Any) -> Any:
        return buffer.dispatch(
            given,
            **{"handle": handle, "do_expand": expand, **changed},
        )

    def turned(**changed: Any) -> Any:
        return cached(do_expand=not expand, **changed)

    refused(cached, lambda: cached(num_experts=experts + 1), "the handle's is")
    refused(cached, lambda: cached(handle=()), "an EPHandle is expected")
    refused(turned, lambda: turned(num_experts=experts + 1), "the handle's is")
    turned()
    refused(turned, lambda: turned(num_experts=experts + 1), "the handle's is")
    assert torch.equal(cached()[0], before)

    def combine(given: Any = rows, **changed: Any) -> Any:
        return buffer.combine(given, **{"handle": handle, **changed})

    def biased(bias: Any = x) -> Any:
        return combine(bias=bias)

    total = combine()[0]
    refused(combine, lambda: combine(before.float()), "must be [rows, H]")
    refused(combine, lambda: combine(previous_event=own.ids), "an EventOverlap or an EventHandle")
    refused(combine, lambda: combine(handle=None), "an EPHandle is expected")
    refused(biased, lambda: biased(x.float()), "a bias must be")
    biased()
    refused(biased, lambda: biased(x.float()), "a bias must be")
    assert torch.equal(combine()[0], total)
    return True
