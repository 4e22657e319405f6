"""Outputs of mode "ht", whose tensors are made when they are read; a fake kernel fills them."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from expertlink import DispatchLayout, DispatchOutput, MoECommunicator
from expertlink.engines.nvlink.ht.arguments import Flag
from expertlink.engines.nvlink.launch import KernelName
from expertlink.engines.nvlink.tables import Route
from expertlink.engines.outputs import LazyOutput, MemorySource
from expertlink.jit.kernel import Arguments
from expertlink.overlap import tensors_in
from support.fake_gpu import T_MAX, E, FakeGpu, H, K, inputs
from support.operations import Operations

LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda one: one.value)
SHAPES = pytest.mark.parametrize("static", [False, True], ids=["", "static"])
LAZY = (
    *("num_tokens_per_expert", "expert_offsets", "topk_ids", "topk_weights"),
    "num_tokens_per_rank",
)
ARRIVALS, SLOTS = 5, 9  # rows that "arrive": of tokens, and of an expanded layout


def numbers(start: int, count: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(start, start + count).to(dtype)


def put(address: int | None, values: Tensor) -> None:
    if address:
        ctypes.memmove(address, values.data_ptr(), values.nbytes)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Its dispatches write consecutive numbers to whatever they are given."""
    fake = FakeGpu(monkeypatch)

    def kernel(name: KernelName, a: Arguments, words: Any) -> None:
        if name is not KernelName.DISPATCH:
            return
        put(a.counts_out, numbers(100, E, torch.int32))
        put(a.offsets_out, numbers(200, E + 1, torch.int32))
        put(a.rows_from_out, numbers(300, 1, torch.int32))
        if a.flags & Flag.PLACE and a.max_slots >= ARRIVALS:
            put(a.topk_ids, numbers(1000, ARRIVALS * K, torch.int64))
            put(a.topk_weights, numbers(2000, ARRIVALS * K, torch.float32))
        words.mail_arrivals, words.mail_slots = ARRIVALS, SLOTS

    fake.kernel = kernel
    return fake


def dispatched(
    comm: MoECommunicator, *, weighted: bool = True, **options: Any
) -> tuple[DispatchOutput, Any]:
    x, ids, weights = inputs()
    return comm.dispatch(x, ids, weights if weighted else None, **options)


def check(out: DispatchOutput, layout: DispatchLayout, *, weighted: bool = True) -> None:
    """Everything is where the fake kernel wrote it."""
    assert out.num_tokens_per_expert.tolist() == list(range(100, 100 + E))
    assert out.num_tokens_per_rank is not None
    assert out.num_tokens_per_rank.tolist() == [300]
    assert out.num_tokens_per_expert.dtype is out.num_tokens_per_rank.dtype is torch.int32
    assert (out.expert_offsets is not None) == (layout is DispatchLayout.FLAT)
    if out.expert_offsets is not None:
        assert out.expert_offsets.tolist() == list(range(200, 201 + E))
    assert (out.topk_ids is None) == layout.expanded
    assert (out.topk_weights is None) == (layout.expanded or not weighted)
    for tensor, dtype, first in (
        (out.topk_ids, torch.int64, 1000),
        (out.topk_weights, torch.float32, 2000),
    ):
        if tensor is not None:
            assert (tensor.dtype, tensor.shape) == (dtype, (*out.tokens.shape[:-1], K))
            assert tensor.is_contiguous()
            found = tensor.reshape(-1)[: ARRIVALS * K]
            assert torch.equal(found, numbers(first, ARRIVALS * K, dtype))


@LAYOUTS
@SHAPES
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("buffered", [False, True])
@torch.no_grad()
def test_tensors_are_what_the_kernel_wrote(
    gpu: FakeGpu, layout: DispatchLayout, static: bool, weighted: bool, buffered: bool
) -> None:
    comm = gpu.communicator(output_layout=layout.value, static_shapes=static)
    buffers = comm.create_buffers() if buffered else None
    storages = (
        {t.untyped_storage().data_ptr() for t in tensors_of(buffers.output)} if buffers else ()
    )
    for _ in range(3):  # rows that nobody expected, then as expected
        out, handle = dispatched(comm, weighted=weighted, output_buffer=buffers)
        check(out, layout, weighted=weighted)
        rows = SLOTS if layout.expanded else ARRIVALS
        if not layout.padded and not static:
            assert out.tokens.shape == (rows, H)
        assert out.num_tokens_per_expert_list == (None if static else [0] * E)
        cached, _ = comm.dispatch(inputs()[0], None, previous_handle=handle, output_buffer=buffers)
        check(cached, layout, weighted=weighted)
        assert cached.tokens.shape == out.tokens.shape
        for tensor in tensors_of(out) if buffers else ():
            assert tensor.untyped_storage().data_ptr() in storages
        assert handle.topk_ids.shape == (5, K)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@torch.no_grad()
def test_ids_that_a_handle_keeps(gpu: FakeGpu, dtype: torch.dtype) -> None:
    """Copies that the kernel made, also through cached dispatches and in buffers."""
    x, ids, _ = inputs()
    ids = ids.to(dtype)
    seen: list[int] = []

    def kernel(name: KernelName, a: Arguments, words: Any) -> None:
        if name is KernelName.DISPATCH and a.ids_copy:
            put(a.ids_copy, ids)
        seen.append(a.ids if name is KernelName.COMBINE else 0)

    gpu.kernel = kernel
    comm = gpu.communicator(output_layout="token_major", static_shapes=True)
    for buffers in (None, comm.create_buffers()):
        out, handle = comm.dispatch(x, ids, output_buffer=buffers)
        _, cached = comm.dispatch(x, None, previous_handle=handle)
        assert cached.topk_ids.dtype is dtype
        assert torch.equal(cached.topk_ids, ids)
        assert handle.topk_ids.data_ptr() == cached.topk_ids.data_ptr() != ids.data_ptr()
        comm.combine(out.tokens, cached)
        assert seen[-1] == cached.topk_ids.data_ptr(), "a combine reads the same"


@torch.no_grad()
def test_what_is_not_read_is_not_made(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = gpu.communicator(output_layout="token_major", static_shapes=True)
    made: list[str] = []
    make = MemorySource.make

    def noted(source: MemorySource, name: str) -> Tensor | None:
        made.append(name)
        return make(source, name)

    monkeypatch.setattr(MemorySource, "make", noted)
    out, handle = dispatched(comm)
    assert isinstance(out, LazyOutput)
    again, _ = comm.dispatch(inputs()[0], None, previous_handle=handle)
    comm.combine(again.tokens, handle)
    assert made == []
    assert out.topk_ids is out.topk_ids
    assert out.expert_offsets is None
    assert out.expert_offsets is None
    assert made == ["topk_ids", "expert_offsets"]
    check(out, DispatchLayout.TOKEN_MAJOR)
    assert sorted(made) == sorted(LAZY)


@SHAPES
@LAYOUTS
@torch.no_grad()
def test_operations_of_torch_in_a_call(gpu: FakeGpu, layout: DispatchLayout, static: bool) -> None:
    """Rows, their ids and weights, one piece of memory for the rest; cuts where more rows were
    expected."""
    comm = gpu.communicator(output_layout=layout.value, static_shapes=static)
    x, ids, weights = inputs()
    buffers, result = comm.create_buffers(), torch.empty_like(x)
    _, handle = dispatched(comm)

    def kernel(name: KernelName, a: Arguments, words: Any) -> None:
        words.mail_arrivals, words.mail_slots = ARRIVALS - 1, SLOTS - 1

    gpu.kernel = kernel
    for into in (None, buffers):
        made = ["new_empty"] * 2 if into is None else []
        if into is None and not layout.expanded:
            made += ["new_empty"] * 2
        cut, larger = [], []  # operations, those on buffers
        if not static and not layout.padded:
            larger = ["slice"] if into else []
            cut = larger or ["resize_"] * (1 if layout.expanded else 3)  # makes no tensor
        with Operations() as seen:
            out, handle = comm.dispatch(x, ids, weights, output_buffer=into)
        assert seen.names == [*made, *cut]
        with Operations() as seen:
            out, handle = comm.dispatch(x, None, previous_handle=handle, output_buffer=into)
        assert seen.names == [*made, *larger]
        with Operations() as seen:
            comm.combine(out.tokens, handle, out=result)
        assert seen.names == []
        with Operations() as seen:
            comm.combine(out.tokens, handle)
        assert seen.names == ["new_empty"]


def tensors_of(output: DispatchOutput) -> list[Tensor]:
    return [value for value in vars(output).values() if isinstance(value, Tensor)]


@LAYOUTS
@torch.no_grad()
def test_an_output_is_a_dataclass_like_any_other(gpu: FakeGpu, layout: DispatchLayout) -> None:
    comm = gpu.communicator(output_layout=layout.value, static_shapes=True)

    def fresh() -> DispatchOutput:
        return dispatched(comm)[0]

    names = [field.name for field in dataclasses.fields(DispatchOutput)]
    assert isinstance(fresh(), DispatchOutput)
    for one in (
        fresh(),
        dataclasses.replace(fresh()),
        dataclasses.replace(dataclasses.replace(fresh())),
        copy.copy(fresh()),
        copy.deepcopy(fresh()),
        pickle.loads(pickle.dumps(fresh())),
        DispatchOutput(**vars(fresh())),
        DispatchOutput(**dataclasses.asdict(fresh())),
    ):
        assert isinstance(one, DispatchOutput)
        assert list(vars(one)) == names
        assert set(dataclasses.asdict(one)) == set(names)
        check(one, layout)
        assert "num_tokens_per_expert=tensor(" in repr(one)
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.topk_ids = None  # type: ignore[misc]
    rows = torch.zeros(3, H)
    assert dataclasses.replace(fresh(), tokens=rows).tokens is rows


@pytest.mark.parametrize("inference", [False, True])
def test_lazy_tensors_are_tensors_of_their_own(gpu: FakeGpu, inference: bool) -> None:
    """They can be changed in place, and take part in a graph, as those made at once."""
    comm = gpu.communicator(output_layout="token_major", static_shapes=True)
    with torch.inference_mode(inference), torch.no_grad():
        out, handle = dispatched(comm)
    assert out.topk_weights is not None
    assert out.topk_weights.is_inference() is inference
    assert not out.topk_weights._is_view()
    assert out.topk_weights._base is None
    if inference:
        return
    assert out.num_tokens_per_expert._version == 0
    out.topk_weights.zero_()
    assert out.num_tokens_per_expert._version == 0
    factor = torch.ones(K, requires_grad=True)
    out.topk_weights.mul_(factor)
    assert out.topk_weights.requires_grad
    assert not handle.topk_ids._is_view()


@torch.no_grad()
def test_ids_of_inference_mode(gpu: FakeGpu) -> None:
    comm = gpu.communicator(output_layout="token_major", static_shapes=True)
    with torch.inference_mode():
        out, handle = dispatched(comm)
    read = [out.topk_ids, out.num_tokens_per_expert, handle.topk_ids]
    assert all(tensor is not None and tensor.is_inference() for tensor in read)


def test_weights_of_a_tracked_dispatch_can_be_changed_in_place(gpu: FakeGpu) -> None:
    comm = gpu.communicator(output_layout="token_major", static_shapes=True)
    x, ids, weights = inputs()
    out, handle = comm.dispatch(x.requires_grad_(), ids, weights.requires_grad_())
    assert out.topk_weights is not None
    assert out.tokens.requires_grad
    assert out.topk_weights.requires_grad
    assert out.num_tokens_per_rank is not None
    assert not out.num_tokens_per_rank.requires_grad
    out.topk_weights.mul_(2.0)
    out.tokens.mul_(2.0)
    assert handle.topk_weights is weights
    check(dataclasses.replace(out, topk_weights=out.topk_weights.detach() / 2), out.layout)


def test_memory_of_what_was_not_made_is_kept_for_its_stream(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asynchronous calls record the memory on streams, not tensors that nobody has read."""
    comm = gpu.communicator(output_layout="token_major", static_shapes=True)
    with torch.no_grad():
        out, _ = dispatched(comm)
        fresh, _ = dispatched(comm)
    monkeypatch.setattr(MemorySource, "make", None)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    recorded = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(fresh)}
    monkeypatch.undo()
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors_of(fresh)} == recorded
    assert not {tensor.untyped_storage().data_ptr() for tensor in tensors_of(out)} & recorded


@torch.no_grad()
def test_compiled_code_reads_an_output(gpu: FakeGpu) -> None:
    comm = gpu.communicator(output_layout="token_major", static_shapes=True)
    out, _ = dispatched(comm)

    @torch.compile(backend="eager", fullgraph=True)
    def both(output: DispatchOutput) -> tuple[Tensor, Tensor]:
        assert output.topk_ids is not None
        return output.topk_ids + 1, output.num_tokens_per_expert * 2

    ids, counts = both(out)
    assert out.topk_ids is not None
    assert torch.equal(ids, out.topk_ids + 1)
    assert counts.tolist() == [2 * number for number in range(100, 100 + E)]


@torch.no_grad()
def test_a_cached_dispatch_into_the_same_buffers_has_a_number_of_its_own(gpu: FakeGpu) -> None:
    """And new weights go where the tables of the buffers have them."""
    comm = gpu.communicator(output_layout="flat", static_shapes=True)
    named: list[int | None] = []
    fill = gpu.kernel

    def kernel(name: KernelName, a: Arguments, words: Any) -> None:
        fill(name, a, words)
        named.append(a.weights_of_row)

    gpu.kernel = kernel
    one, other = comm.create_buffers(), comm.create_buffers()
    x, ids, weights = inputs()
    _, handle = comm.dispatch(x, ids, weights, output_buffer=one)
    _, cached = comm.dispatch(x, ids, 2 * weights, previous_handle=handle, output_buffer=one)
    out, through = comm.dispatch(x, None, weights, previous_handle=cached, output_buffer=other)
    comm.combine(out.tokens, through)
    first, second, third, combine = gpu.launched
    assert second["subject"] == first["origin"] != second["origin"]
    assert third["subject"] == second["origin"]
    assert combine["subject"] == third["origin"]
    assert third["origin"] not in (first["origin"], second["origin"])
    assert named[0] == named[1]
    assert named[2] == named[3] != named[0]


def test_a_piece_of_memory_has_room_for_all(gpu: FakeGpu) -> None:
    """Nothing that a launch names lies beyond the memory, or where something else is."""
    spans: list[list[tuple[int, int]]] = []

    def kernel(name: KernelName, a: Arguments, words: Any) -> None:
        words.mail_arrivals, words.mail_slots = ARRIVALS, SLOTS
        wide = 8 if a.flags & Flag.WIDE_IDS else 4
        spans.append(
            [
                (a.counts_out, 4 * E),
                (a.offsets_out, 4 * (E + 1)),
                (a.rows_from_out, 4),
                (a.tokens_per_expert, 4 * E),
                (a.expert_offsets, 4 * (E + 1)),
                (a.rows_from, 4),
                (a.origin, 4),
                (a.first_row, 4),
                (a.first_sent, 4),
                (a.first_slot, 4 * E),
                (a.choices_of_row, 4 * T_MAX * K),
                (a.weights_of_row, 4 * T_MAX * K),
                (a.slots_of_token, 4 * 5),
                (a.own_tokens, 4 * 5),
                (a.ids_copy, wide * 5 * K),
                (a.topk_ids, 8 * a.max_slots * K),
                (a.topk_weights, 4 * a.max_slots * K),
                (a.source_tokens, 4 * a.max_slots),
            ]
        )

    gpu.kernel = kernel
    x, ids, weights = inputs()
    for layout in ("token_major", "rank_major"):
        for kind in (torch.int32, torch.int64):
            comm = gpu.communicator(output_layout=layout, source_tokens=True)
            buffers = comm.create_buffers()
            comm.dispatch(x, ids, weights)  # of rows that nobody expected
            spans.clear()
            owned = [
                comm.dispatch(x, ids.to(kind), weights, output_buffer=into)
                for into in (None, buffers)
            ]
            for (out, handle), named in zip(owned, spans, strict=True):
                assert isinstance(handle.state, Route)
                memory = [*tensors_of(out), handle.state.block]
                inside = [
                    (t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in memory
                ]
                for start, size in named:
                    assert any(a <= start and start + size <= a + n for a, n in inside)
                    assert start % 4 == 0
                starts = sorted(named)
                for (start, size), (following, _) in itertools.pairwise(starts):
                    assert start + size <= following
