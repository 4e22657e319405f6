"""Normal calls of `Buffer` beyond DeepEP's own test: shapes, handles, sums, bad input."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
from typing import Any

import torch
from torch import Tensor

from expertlink.compat.deep_ep import Buffer, EventOverlap
from expertlink.domains import Domains
from expertlink.errors import HandleError
from support.drop_in.inputs import (
    Arrivals,
    Shapes,
    Tokens,
    all_tokens,
    arrivals,
    column_major,
    members,
    to_fp8,
)
from support.drop_in.place import Place


def dispatched(buffer: Buffer, tokens: Tokens, experts: int, **options: Any) -> Any:
    """Layout and dispatch, as most callers make them."""
    layout = buffer.get_dispatch_layout(tokens.ids, experts)
    per_rank, per_rdma_rank, per_expert, in_rank, event = layout
    return buffer.dispatch(
        tokens.x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=tokens.ids,
        topk_weights=tokens.weights,
        previous_event=event,
        **options,
    )


def check_received(place: Place, expected: Arrivals, result: Any, alignment: int = 1) -> None:
    """Rows, ids, weights, counts and the handle's true tensors."""
    x, ids, weights, counts, handle, event = result
    assert torch.equal(x, expected.x)
    assert torch.equal(ids.long(), expected.ids)
    assert torch.equal(weights, expected.weights)
    assert isinstance(counts, list)
    assert all(type(count) is int for count in counts)
    assert counts == [-(-count // alignment) * alignment for count in expected.per_expert]
    assert event.event is None
    assert isinstance(handle, tuple)
    assert len(handle) == num_elements(place)
    assert torch.equal(source_tokens(handle), expected.source_token)
    prefixes = handle[-4] if len(handle) == 10 else handle[0][:, place.rank]
    assert prefixes.dtype is torch.int32
    for source in range(place.num_ranks):
        assert int(prefixes[source]) == int((expected.source_rank <= source).sum())
    if len(handle) == 10:
        host_R = torch.tensor(place.domains.host_of, device=x.device)
        hosts = handle[7].view(torch.int32)[:, 0]
        assert handle[7].dtype is torch.uint8
        assert torch.equal(hosts, host_R[expected.source_rank].int())
        for host in range(place.domains.num_hosts):
            assert int(handle[4][host]) == int((hosts <= host).sum())


def num_elements(place: Place) -> int:
    """Of a handle."""
    return 6 if place.domains.num_hosts == 1 else 10


def source_tokens(handle: Any) -> Tensor:
    """`[N]` int64, of a handle of one host or of several."""
    tokens = handle[3] if len(handle) == 6 else handle[7].view(torch.int32)[:, 1]
    return tokens.long()


def sums(
    rows_TH: list[Tensor], member_TR: Tensor, domains: Domains, first_TH: Tensor | None = None
) -> Tensor:
    """float32 sums from `first` or +0.0 over ranks in ascending order, rounded once.

    Over several hosts: those of each host, rounded, are added up likewise.
    """
    if domains.num_hosts > 1:
        of_host = [domains.ranks_of(host) for host in range(domains.num_hosts)]
        one = Domains.one(1)
        rows_TH = [
            sums([rows_TH[r] for r in ranks], member_TR[:, list(ranks)], one) for ranks in of_host
        ]
        member_TR = torch.stack([member_TR[:, list(r)].any(dim=1) for r in of_host], dim=1)
    total = torch.zeros_like(rows_TH[0], dtype=torch.float32) if first_TH is None else first_TH
    for rank, rows in enumerate(rows_TH):
        total = torch.where(member_TR[:, rank, None], total + rows.float(), total)
    return total.to(torch.bfloat16)


def outputs(x: Tensor, rank: int) -> Tensor:
    """What the experts of a rank make of a row."""
    return (x.float() * (0.37 + rank) + 0.11 * rank).to(torch.bfloat16)


def shapes_on_one_buffer(place: Place, all_shapes: list[Shapes]) -> bool:
    """T grows and differs, N may be 0, H and E and K change: always the reference's bits."""
    buffer: Any = Buffer(place.group, 1 << 20)
    kept = []
    for shapes in all_shapes:
        everyone = all_tokens(shapes, place)
        own = everyone[place.rank]
        result = dispatched(buffer, own, shapes.experts, expert_alignment=4)
        check_received(place, arrivals(everyone, shapes, place.rank), result, 4)
        kept.append((shapes, own, result[0], result[4]))
        check_sums(place, buffer, *kept[-1])
    for case in reversed(kept):  # handles of communicators that have been replaced since
        check_sums(place, buffer, *case)
    return True


def check_sums(
    place: Place, buffer: Any, shapes: Shapes, own: Tokens, rows: Tensor, handle: Any
) -> None:
    """Combine and cached dispatch of a handle, bit for bit."""
    member_TR = members(own.ids, shapes, place.num_ranks)
    of_ranks = [outputs(own.x, rank) for rank in range(place.num_ranks)]
    combined, weights, _ = buffer.combine(outputs(rows, place.rank), handle)
    assert weights is None
    assert torch.equal(combined, sums(of_ranks, member_TR, place.domains))
    assert torch.equal(buffer.dispatch(own.x, handle=handle)[0], rows)


def sums_with_weights_and_biases(place: Place, shapes: Shapes) -> bool:
    """Weights are added up over all ranks, lanes of -1 included; biases come first in the sum."""
    buffer: Any = Buffer(place.group)
    everyone = all_tokens(shapes, place)
    own = everyone[place.rank]
    rows, ids, _, _, handle, _ = dispatched(buffer, own, shapes.experts)
    member_TR = members(own.ids, shapes, place.num_ranks)
    lanes = torch.arange(ids.shape[1], dtype=torch.float32, device=place.device)
    sources = source_tokens(handle).float()[:, None]
    numbers = torch.sin(sources * 7 + lanes * 3 + place.rank * 11)
    tokens = torch.arange(len(own.x), device=place.device, dtype=torch.float32)[:, None]
    total = torch.zeros((len(own.x), shapes.topk), dtype=torch.float32, device=place.device)
    for rank in range(place.num_ranks):
        term = torch.sin(tokens * 7 + lanes * 3 + rank * 11)
        total = torch.where(member_TR[:, rank, None], total + term, total)
    for bias in (None, own.x, (own.x, (own.x.float() * 0.3).to(torch.bfloat16))):
        combined, weights, _ = buffer.combine(
            outputs(rows, place.rank), handle, topk_weights=numbers, bias=bias
        )
        assert weights is not None
        torch.testing.assert_close(weights, total, rtol=0, atol=1e-6)
        first = None
        if bias is not None:
            parts = bias if isinstance(bias, tuple) else (bias,)
            first = parts[0].float() + (parts[1].float() if len(parts) == 2 else 0)
        of_ranks = [outputs(own.x, rank) for rank in range(place.num_ranks)]
        assert torch.equal(combined, sums(of_ranks, member_TR, place.domains, first))
    return True


def long_lived_handles(place: Place, shapes: Shapes) -> bool:
    """Handles outlive buffers and received tensors, serve other widths, and survive copying."""
    old = Buffer(place.group, 1 << 20, explicitly_destroy=True)
    everyone = all_tokens(shapes, place)
    own = everyone[place.rank]
    rows, _, _, _, handle, _ = dispatched(old, own, shapes.experts)
    kept = rows.clone()
    rows.set_()  # as SGLang disposes of what it has permuted
    member_TR = members(own.ids, shapes, place.num_ranks)
    of_ranks = [outputs(own.x, rank) for rank in range(place.num_ranks)]
    expected = sums(of_ranks, member_TR, place.domains)
    old.destroy()
    old.destroy()
    del old
    gc.collect()
    new: Any = Buffer(place.group, 2 << 20)
    assert torch.equal(new.combine(outputs(kept, place.rank), handle)[0], expected)
    plain = tuple(handle)
    assert type(plain) is tuple
    assert len(plain) == len(handle[:]) == num_elements(place)
    del handle
    gc.collect()
    assert torch.equal(new.combine(outputs(kept, place.rank), plain)[0], expected)
    assert torch.equal(new.dispatch(own.x, handle=copy.copy(plain))[0], kept)
    for width in (16, 8, 3 * shapes.hidden):  # H of a handle is not fixed
        narrow = own.x.repeat(1, 3)[:, :width].contiguous()
        received = new.dispatch(narrow, handle=plain)[0]
        assert isinstance(received, Tensor)
        assert torch.equal(received, kept.repeat(1, 3)[:, :width])
        combined, _, _ = new.combine(received, plain)
        assert torch.equal(combined, sums([narrow] * place.num_ranks, member_TR, place.domains))
    return True


def narrow_rows_of_a_large_dispatch(place: Place, small: Shapes, large: Shapes) -> bool:
    """A handle of many tokens, where rows of another width have been few so far."""
    buffer: Any = Buffer(place.group)
    for shapes in (small, large):
        everyone = all_tokens(shapes, place)
        own, expected = everyone[place.rank], arrivals(everyone, shapes, place.rank)
        handle = dispatched(buffer, own, shapes.experts)[4]
        received = buffer.dispatch(own.x[:, :16].contiguous(), handle=handle)[0]
        assert torch.equal(received, expected.x[:, :16])
    return True


def kinds_of_rows(place: Place, shapes: Shapes) -> bool:
    """Any dtype; scales of float32 and int32, in either order of memory."""
    buffer: Any = Buffer(place.group)
    everyone = all_tokens(shapes, place)
    own = everyone[place.rank]
    expected = arrivals(everyone, shapes, place.rank)
    _, _, _, _, handle, _ = dispatched(buffer, own, shapes.experts)
    for dtype in (torch.float32, torch.float16, torch.int32, torch.uint8, torch.float64):
        x = (own.x.float() * 10).to(dtype)
        received = buffer.dispatch(x, handle=handle)[0]
        assert isinstance(received, Tensor)
        assert received.dtype is dtype
        assert torch.equal(received, (expected.x.float() * 10).to(dtype))
    rows, scales = to_fp8(own.x)
    expected_rows, expected_scales = to_fp8(expected.x)
    for dtype in (torch.float32, torch.int32):
        for order in (torch.Tensor.contiguous, column_major):
            given = order(scales.view(dtype) if dtype is torch.int32 else scales)
            fp8 = Tokens((rows, given), own.ids, own.weights)  # type: ignore[arg-type]
            for result in (
                dispatched(buffer, fp8, shapes.experts)[0],
                buffer.dispatch((rows, given), handle=handle)[0],
            ):
                assert torch.equal(result[0].view(torch.uint8), expected_rows.view(torch.uint8))
                assert result[1].is_contiguous()
                assert result[1].dtype is dtype
                assert torch.equal(result[1].view(torch.float32), expected_scales)
    return True


def odd_ids(place: Place, shapes: Shapes) -> bool:
    """Ids out of range are none; a token that names an expert twice is one row per rank."""
    buffer: Any = Buffer(place.group)
    drawn = all_tokens(shapes, place)
    everyone, known = [], []
    for tokens in drawn:
        ids = tokens.ids.clone()
        ids[0, 0], ids[1, 1] = -7, shapes.experts + 3
        ids[2, 1] = ids[2, 0]
        everyone.append(Tokens(tokens.x, ids, tokens.weights))
        outside = (ids < 0) | (ids >= shapes.experts)
        known.append(Tokens(tokens.x, torch.where(outside, -1, ids), tokens.weights))
    own = everyone[place.rank]
    result = dispatched(buffer, own, shapes.experts)
    expected = arrivals(known, shapes, place.rank)
    if place.kernels:  # they count tokens of an expert, not choices
        counts = [
            int((expected.ids == expert).any(dim=1).sum())
            for expert in range(len(expected.per_expert))
        ]
        expected = dataclasses.replace(expected, per_expert=counts)
    check_received(place, expected, result)
    check_sums(place, buffer, shapes, known[place.rank], result[0], result[4])
    int32 = Tokens(own.x, own.ids.to(torch.int32), own.weights)
    assert dispatched(buffer, int32, shapes.experts)[1].dtype is torch.int32
    return True


def odd_surroundings(place: Place, shapes: Shapes) -> bool:
    """Defaults of device and dtype, inference mode and tracked inputs change nothing."""
    everyone = all_tokens(shapes, place)
    own, expected = everyone[place.rank], arrivals(everyone, shapes, place.rank)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            buffer: Any = Buffer(place.group)
            result = dispatched(buffer, own, shapes.experts)
            torch.set_default_dtype(torch.float32)
            check_received(place, expected, result)
    finally:
        torch.set_default_dtype(torch.float32)
    x = own.x.clone().requires_grad_()
    received = dispatched(buffer, Tokens(x, own.ids, own.weights), shapes.experts)
    assert not received[0].requires_grad
    assert not buffer.combine(received[0].requires_grad_(), received[4])[0].requires_grad
    return True


def life(place: Place, shapes: Shapes) -> list[str]:
    """What callers do with a buffer itself; what is said of wrong calls, in words."""
    import weakref

    assert weakref.ref(Buffer(place.group))() is None, "a buffer without calls is not kept"
    buffer: Any = Buffer(place.group, 123 * 128, 0, explicitly_destroy=True)
    assert buffer.group is place.group
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (123 * 128, 0)
    assert (buffer.rank, buffer.group_size) == (place.rank, place.num_ranks)
    assert buffer.get_local_buffer_tensor(torch.int8).shape == (123 * 128,)
    assert buffer.get_local_buffer_tensor(torch.int32, torch.Size((2, 3))).shape == (2, 3)
    own = all_tokens(shapes, place)[place.rank]
    rows, _, weights, _, handle, _ = dispatched(buffer, own, shapes.experts)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(own.ids, shapes.experts)
    new = {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }
    said: list[str] = []

    def refused(kind: type[BaseException], call: Any) -> None:
        try:
            call()
        except kind as error:
            said.append(str(error))
        else:
            raise AssertionError(f"call {len(said)} was not refused")

    x, topk = own.x, {"topk_idx": own.ids, "topk_weights": own.weights}
    refused(AssertionError, lambda: buffer.dispatch(x, **topk))
    refused(AssertionError, lambda: buffer.dispatch(x, handle=handle, **topk))
    refused(AssertionError, lambda: buffer.dispatch(x.t(), handle=handle))
    refused(AssertionError, lambda: buffer.dispatch(x[:, :6].contiguous(), handle=handle))
    refused(AssertionError, lambda: buffer.dispatch(x, handle=(1, 2, 3, 4, 5, 6)))
    refused(AssertionError, lambda: buffer.dispatch(x, topk_weights=own.weights, **new))
    refused(AssertionError, lambda: buffer.dispatch(x, topk_idx=own.ids.float(), **new))
    refused(AssertionError, lambda: buffer.dispatch(x, num_worst_tokens=99, **new))
    refused(AssertionError, lambda: buffer.dispatch((x, x), handle=handle))
    refused(AssertionError, lambda: buffer.combine(rows[:-1], handle))
    refused(AssertionError, lambda: buffer.combine(rows.float(), handle))
    refused(AssertionError, lambda: buffer.combine(rows, handle, topk_weights=weights[:, :1]))
    refused(AssertionError, lambda: buffer.combine(rows, handle, bias=(x, x, x)))
    refused(AssertionError, lambda: buffer.combine(rows, handle, bias=x.float()))
    refused(AssertionError, lambda: buffer.get_dispatch_layout(own.ids, shapes.experts + 1))
    refused(AssertionError, lambda: Buffer(place.group).destroy())
    refused(AssertionError, lambda: Buffer.set_num_sms(3))
    refused(AssertionError, EventOverlap().current_stream_wait)
    refused(TypeError, lambda: Buffer(place.group, quant_mode=1))  # type: ignore[call-arg]
    refused(TypeError, lambda: buffer.dispatch(x, handle=handle, nonsense=1))  # type: ignore
    refused(AssertionError, lambda: buffer.internode_dispatch(x))
    refused(NotImplementedError, lambda: Buffer(None, comm=object()))
    refused(ValueError, lambda: Buffer(None))
    refused(AssertionError, lambda: buffer.low_latency_dispatch(x, own.ids, 8, shapes.experts))
    assert torch.equal(buffer.dispatch(x, handle=handle)[0], rows), "refusals leave no trace"
    buffer.destroy()
    refused(AssertionError, lambda: buffer.dispatch(x, handle=handle))
    buffer.destroy()
    assert buffer.runtime is None
    return said


def handle_of_another_group(place: Place, shapes: Shapes) -> str:
    """A handle of a group is refused by a buffer of another one, on every rank."""
    dist = importlib.import_module("torch.distributed")
    other = dist.new_group(list(reversed(range(place.num_ranks))))
    own = all_tokens(shapes, place)[place.rank]
    rows, _, _, _, handle, _ = dispatched(Buffer(place.group), own, shapes.experts)
    alone = [dist.new_group([rank]) for rank in range(place.num_ranks)][place.rank]
    try:
        Buffer(alone).combine(rows, handle)
    except HandleError as error:
        del other
        return str(error)
    raise AssertionError("it was taken")


def after_the_process_group(place: Place, shapes: Shapes) -> bool:
    """destroy() and dropping a buffer after `destroy_process_group()`."""
    dist = importlib.import_module("torch.distributed")
    group = dist.new_group(list(range(place.num_ranks)))
    buffers = [Buffer(group, explicitly_destroy=True) for _ in range(2)]
    own = all_tokens(shapes, place)[place.rank]
    dispatched(buffers[0], own, shapes.experts)
    dispatched(buffers[1], own, shapes.experts)
    dist.destroy_process_group(group)
    buffers[0].destroy()
    del buffers
    gc.collect()
    return True
