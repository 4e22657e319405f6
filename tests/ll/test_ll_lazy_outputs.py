"""Outputs of mode "ll", whose counts are made when they are read; a fake kernel fills them."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import gc
import itertools
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from expertlink import DispatchOutput, MoECommunicator
from expertlink.engines.nvlink.launch import KernelName
from expertlink.engines.nvlink.ll.arguments import Flag
from expertlink.engines.nvlink.ll.tables import LlRoute
from expertlink.engines.outputs import LazyOutput, MemorySource
from expertlink.jit.kernel import Arguments
from support.fake_gpu import CPU, T_MAX, E, FakeGpu, H, K, inputs
from support.operations import Operations

LAYOUTS = pytest.mark.parametrize("layout", ["rank_major", "expert_major"])
COUNTS, PER_RANK = list(range(100, 100 + E)), [300]


def put(address: int | None, values: Tensor) -> None:
    if address:
        ctypes.memmove(address, values.data_ptr(), values.nbytes)


class Kernel:
    """Writes consecutive numbers, from `first` on, to all that a dispatch is given."""

    def __init__(self) -> None:
        self.first = 0
        self.spans: list[list[tuple[int, int]]] = []

    def __call__(self, name: KernelName, a: Arguments, words: Any) -> None:
        if name is KernelName.COMBINE:
            return
        first = self.first
        put(a.counts_out, torch.tensor(COUNTS, dtype=torch.int32, device=CPU) + first)
        put(a.rows_from_out, torch.tensor(PER_RANK, dtype=torch.int32, device=CPU) + first)
        choices = a.max_slots * K
        if a.topk_ids:
            put(a.topk_ids, torch.arange(choices, device=CPU) + first)
        if a.topk_weights:
            put(a.topk_weights, torch.arange(choices, device=CPU).float() + first)
        item = 8 if a.flags & Flag.WIDE_IDS else 4
        self.spans.append(
            [
                (a.counts_out, 4 * E),
                (a.offsets_out, 4 * (E + 1)),
                (a.rows_from_out, 4),
                (a.origin, 4),
                (a.tokens_per_expert, 4 * E),
                (a.rows_from, 4),
                (a.rows_to, 4),
                (a.first_row, 4),
                (a.first_slot, 4 * E),
                (a.choices_of_row, 4 * T_MAX * K),
                (a.weights_of_row, 4 * T_MAX * K),
                (a.tokens_of_row, 4 * T_MAX),
                (a.weights_copy, 4 * T_MAX * K),
                (a.slots_of_token, 4 * 5 * 2),
                (a.ids_copy, item * 5 * K),
                (a.tokens, 2 * H * a.max_slots),
                (a.topk_ids or 0, 8 * choices),
                (a.topk_weights or 0, 4 * choices),
            ]
        )


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> FakeGpu:
    fake = FakeGpu(monkeypatch)
    fake.kernel = kernel
    return fake


def communicator(gpu: FakeGpu, layout: str, **fields: Any) -> MoECommunicator:
    return gpu.communicator(mode="ll", output_layout=layout, **fields)


def check(out: DispatchOutput, *, weighted: bool, first: int = 0) -> None:
    """Everything is where the fake kernel wrote it."""
    assert out.num_tokens_per_expert.tolist() == [number + first for number in COUNTS]
    assert out.num_tokens_per_rank is not None
    assert out.num_tokens_per_rank.tolist() == [number + first for number in PER_RANK]
    assert out.num_tokens_per_expert.dtype is out.num_tokens_per_rank.dtype is torch.int32
    assert out.expert_offsets is None
    assert out.num_tokens_per_expert_list is None
    expanded = out.layout.expanded
    assert (out.topk_ids is None) == expanded
    assert (out.topk_weights is None) == (expanded or not weighted)
    for tensor, dtype in ((out.topk_ids, torch.int64), (out.topk_weights, torch.float32)):
        if tensor is not None:
            assert tensor.shape == (*out.tokens.shape[:-1], K)
            expected = torch.arange(tensor.numel()) + first
            assert torch.equal(tensor.reshape(-1), expected.to(dtype))


@LAYOUTS
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("buffered", [False, True])
@torch.no_grad()
def test_tensors_are_what_the_kernel_wrote(
    gpu: FakeGpu, kernel: Kernel, layout: str, weighted: bool, buffered: bool
) -> None:
    comm = communicator(gpu, layout)
    x, ids, weights = inputs()
    buffers = comm.create_buffers() if buffered else None
    given = weights if weighted else None
    for first in (0, 1000):
        kernel.first = first
        out, handle = comm.dispatch(x, ids, given, output_buffer=buffers)
        check(out, weighted=weighted, first=first)
        kernel.first = first + 500
        cached, _ = comm.dispatch(x, None, previous_handle=handle, output_buffer=buffers)
        check(cached, weighted=weighted, first=first + 500)
        check(out, weighted=weighted, first=first + (500 if buffered else 0))
        assert handle.topk_ids.shape == (5, K)


@LAYOUTS
@torch.no_grad()
def test_operations_of_torch_in_a_call(gpu: FakeGpu, layout: str) -> None:
    """Rows, their ids and weights, and one piece of memory for the rest."""
    gpu.kernel = lambda *_: None
    comm = communicator(gpu, layout)
    x, ids, weights = inputs()
    buffers, result = comm.create_buffers(), torch.empty_like(x)
    for into in (None, buffers):
        made = []
        if into is None:
            made = ["empty", "new_empty"] + ["new_empty"] * (0 if layout == "expert_major" else 2)
        with Operations() as seen:
            out, handle = comm.dispatch(x, ids, weights, output_buffer=into)
            again, cached = comm.dispatch(x, None, previous_handle=handle, output_buffer=into)
        assert seen.names == made * 2
        with Operations() as seen:
            comm.combine(again.tokens, cached, out=result)
        assert seen.names == []
        with Operations() as seen:
            _ = out.num_tokens_per_expert, out.num_tokens_per_expert, out.topk_ids
        assert seen.names == (["slice", "detach"] if into is None else [])  # once


@torch.no_grad()
def test_what_is_not_read_is_not_made(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = communicator(gpu, "rank_major")
    made: list[str] = []
    make = MemorySource.make

    def noted(source: MemorySource, name: str) -> Tensor | None:
        made.append(name)
        return make(source, name)

    monkeypatch.setattr(MemorySource, "make", noted)
    x, ids, weights = inputs()
    out, handle, hook = comm.dispatch(x, ids, weights, return_recv_hook=True)
    hook()
    assert isinstance(out, LazyOutput)
    again, _ = comm.dispatch(x, None, previous_handle=handle)
    comm.combine(again.tokens, handle)
    assert made == []
    assert out.num_tokens_per_expert is out.num_tokens_per_expert
    assert made == ["num_tokens_per_expert"]


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@torch.no_grad()
def test_a_piece_of_memory_has_room_for_all(
    gpu: FakeGpu, kernel: Kernel, layout: str, dtype: torch.dtype
) -> None:
    """Nothing that a launch names lies beyond the memory, or where something else is."""
    comm = communicator(gpu, layout, source_tokens=True)
    x, ids, weights = inputs()
    for into in (None, comm.create_buffers()):
        out, handle = comm.dispatch(x, ids.to(dtype), weights, output_buffer=into)
        assert isinstance(handle.state, LlRoute)
        assert out.source_tokens is not None
        assert out.source_tokens.shape == out.tokens.shape[:-1]
        owned = [t for t in vars(out).values() if isinstance(t, Tensor)]
        owned += [handle.state.block, handle.topk_ids]
        inside = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in owned]
        spans = sorted((start, size) for start, size in kernel.spans.pop() if start)
        for start, size in spans:
            assert any(a <= start and start + size <= a + n for a, n in inside)
            assert start % 4 == 0
        for (start, size), (following, _) in itertools.pairwise(spans):
            assert start + size <= following
        assert handle.topk_ids.dtype is dtype
        assert handle.topk_ids.data_ptr() == handle.state.ids_address


@torch.no_grad()
def test_a_tensor_keeps_its_memory(gpu: FakeGpu, kernel: Kernel) -> None:
    """Also once output and handle are gone and later calls use what was freed."""
    comm = communicator(gpu, "expert_major")
    x, ids, weights = inputs()
    counts = comm.dispatch(x, ids, weights)[0].num_tokens_per_expert
    kernel.first = 5000
    for _ in range(20):
        comm.dispatch(x, ids, weights)
    assert counts.tolist() == COUNTS


@torch.no_grad()
def test_memory_goes_with_the_last_who_needs_it(gpu: FakeGpu) -> None:
    comm = communicator(gpu, "expert_major")
    x, ids, weights = inputs()
    out, handle, hook = comm.dispatch(x, ids, weights, return_recv_hook=True)
    assert isinstance(handle.state, LlRoute)
    block = weakref.ref(handle.state.block)
    del out, handle
    assert block() is not None, "the half that is left writes to it"
    hook()
    del hook
    gc.collect()
    assert block() is None


@torch.no_grad()
def test_rows_that_are_freed_leave_the_rest(gpu: FakeGpu) -> None:
    """Callers free rows, ids and weights, even by force, and combine later."""
    comm = communicator(gpu, "rank_major")
    out, handle = comm.dispatch(*inputs())
    assert out.topk_ids is not None
    assert out.topk_weights is not None
    rows = torch.zeros_like(out.tokens)
    for tensor in (out.tokens, out.topk_ids, out.topk_weights):
        tensor.untyped_storage().resize_(0)
    assert out.num_tokens_per_expert.tolist() == COUNTS
    comm.combine(rows, handle)


@LAYOUTS
@torch.no_grad()
def test_copies_are_ordinary_outputs(gpu: FakeGpu, layout: str) -> None:
    comm = communicator(gpu, layout)

    def fresh() -> DispatchOutput:
        return comm.dispatch(*inputs())[0]

    for one in (
        dataclasses.replace(fresh()),
        copy.copy(fresh()),
        copy.deepcopy(fresh()),
        pickle.loads(pickle.dumps(fresh())),
        DispatchOutput(**vars(fresh())),
    ):
        check(one, weighted=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fresh().tokens = None  # type: ignore[misc, assignment]


@pytest.mark.parametrize("inference", [False, True])
def test_modes_and_devices_of_the_caller(gpu: FakeGpu, inference: bool) -> None:
    """Tensors belong to the mode of the call, and to its device, whatever is the default."""
    comm = communicator(gpu, "rank_major", quantization="e4m3_float32", scale_order="column_major")
    x, ids, weights = inputs()
    with torch.inference_mode(inference), torch.no_grad(), torch.device("meta"):
        out, handle = comm.dispatch(x, ids, weights)
    tensors = [t for t in (*vars(out).values(), handle.topk_ids) if isinstance(t, Tensor)]
    assert out.scales is not None
    for tensor in (*tensors, out.scales.tensor):
        assert tensor.device == CPU
        assert tensor.is_inference() is inference
        assert not tensor._is_view()
    assert out.scales.tensor.shape == (*out.tokens.shape[:-1], 1)
    assert out.scales.tensor.transpose(-1, -2).is_contiguous()


def test_gradients_come_with_lazy_counts(gpu: FakeGpu) -> None:
    comm = communicator(gpu, "rank_major")
    x, ids, weights = inputs()
    out, _ = comm.dispatch(x.requires_grad_(), ids, weights.requires_grad_())
    assert isinstance(out, LazyOutput)
    assert out.tokens.requires_grad
    assert out.topk_weights is not None
    assert out.topk_weights.requires_grad
    assert not out.num_tokens_per_expert.requires_grad
    check(out, weighted=True)


@torch.no_grad()
def test_kinds_of_rows_in_turn(gpu: FakeGpu) -> None:
    """What is said of rows is said anew where they are of another kind, a refusal included."""
    comm = communicator(gpu, "expert_major")
    x, ids, weights = inputs()
    packed, scales = torch.zeros(5, H, dtype=torch.uint8), torch.zeros(5, 4)
    buffers = comm.create_buffers()

    def signatures() -> list[Any]:
        gpu.launched.clear()
        _, handle = comm.dispatch(x, ids, weights)
        comm.dispatch(packed, ids, None, scales)
        comm.dispatch(x, ids)
        comm.dispatch(x, None, previous_handle=handle)
        comm.dispatch(x, ids, weights, output_buffer=buffers)
        comm.dispatch(x, ids, output_buffer=buffers)
        return [launch["signature"] for launch in gpu.launched]

    said = signatures()
    assert len(set(said[:4])) == 4
    assert [said[4], said[5]] == [said[0], said[2]]
    engine: Any = comm._engine
    engine._mode._dispatcher.refuse()
    assert signatures() == said


def test_halves_end_in_the_mode_that_they_began_in(gpu: FakeGpu) -> None:
    """Another call may launch them: source tokens of inference mode are written in no other one."""
    gpu.kernel = lambda *_: None
    comm = communicator(gpu, "rank_major", source_tokens=True)
    x, ids, weights = inputs()
    with torch.inference_mode():
        out, _, hook = comm.dispatch(x, ids, weights, return_recv_hook=True)
    with torch.no_grad():
        comm.dispatch(x, ids, weights)
    hook()
    assert out.source_tokens is not None
    assert out.source_tokens.is_inference()


@torch.no_grad()
def test_offsets_of_flat(gpu: FakeGpu) -> None:
    """What grouped products take; decode has it with static shapes."""
    offsets = torch.arange(E + 1, dtype=torch.int32, device=CPU)
    gpu.kernel = lambda _, a, __: put(a.offsets_out, offsets)
    comm = communicator(gpu, "flat", static_shapes=True)
    out, _ = comm.dispatch(*inputs())
    assert out.expert_offsets is not None
    assert torch.equal(out.expert_offsets, offsets)
    buffered, _ = comm.dispatch(*inputs(), output_buffer=comm.create_buffers())
    assert buffered.expert_offsets is not None
    assert torch.equal(buffered.expert_offsets, offsets)
