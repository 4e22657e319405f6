"""Handles that are tables on the device: the launches of compiled calls are those of plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from expertlink import HandleError, MoECommunicator
from expertlink.engines.nvlink.ht.arguments import Flag as HtFlag
from expertlink.engines.nvlink.ll.arguments import Flag as LlFlag
from expertlink.engines.nvlink.tables import Route
from expertlink.ops import COMBINE_OPS, DISPATCH_OPS
from support.compiled import compiled
from support.fake_gpu import FakeGpu, inputs

HT: dict[str, Any] = {"output_layout": "flat", "static_shapes": True}
LL: dict[str, Any] = {"mode": "ll", "output_layout": "expert_major"}
DEDUPLICATED: dict[str, Any] = {"output_layout": "rank_major", "static_shapes": True}
QUANTIZED: dict[str, Any] = {
    "mode": "ll",
    "output_layout": "expert_major",
    "quantization": "e4m3_ue8m0",
    "scale_order": "column_major",
}
FIELDS = pytest.mark.parametrize(
    "fields",
    [HT, LL, DEDUPLICATED, QUANTIZED],
    ids=["ht", "ll", "ht-deduplicated", "ll-quantized"],
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


def launches(gpu: FakeGpu) -> list[tuple[Any, ...]]:
    """What was launched, and of which earlier launch each is."""
    origins = [launch["origin"] for launch in gpu.launched]
    found = []
    for i, launch in enumerate(gpu.launched):
        subject = launch["subject"]
        of = max((j for j in range(i) if origins[j] == subject), default=None) if subject else None
        same = ("name", "grid", "operation", "communicator", "maker", "flags", "signature")
        found.append((*(launch[name] for name in same), of))
        assert subject is None or of is not None, "of no dispatch"
    return found


def step(comm: MoECommunicator, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A dispatch, cached ones with its weights and with others, and combines of all of them."""
    out, first = comm.dispatch(x, ids, weights)
    again, second = comm.dispatch(x * 2, ids, previous_handle=first)
    late, third = comm.dispatch(x, None, weights * 2, previous_handle=second)
    last, fourth = comm.dispatch(x, None, previous_handle=third)
    y = torch.zeros_like(x)
    for received, handle in ((late, third), (out, first), (last, fourth), (again, second)):
        y = y + comm.combine(received.tokens.to(x.dtype), handle)
    return y


@FIELDS
def test_calls_are_of_their_dispatch(gpu: FakeGpu, fields: dict[str, Any]) -> None:
    """Forward, in graphs and not."""
    comm = gpu.communicator(**fields)
    torch.compiler.reset()
    noted = []
    with torch.no_grad():
        for model in (step, compiled(step)):
            gpu.launched.clear()
            model(comm, *inputs())
            noted.append(launches(gpu))
    plain, fast = noted
    assert len(plain) == 8
    assert fast == plain


@pytest.mark.parametrize("fields", [HT, LL, DEDUPLICATED], ids=["ht", "ll", "ht-deduplicated"])
def test_backward_is_of_its_dispatch(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    # Tables that no kernel has written name no slots.
    monkeypatch.setattr(Route, "slot_weights", lambda route: torch.ones(route.shape))
    comm = gpu.communicator(**fields)
    torch.compiler.reset()
    noted = []

    def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, handle = comm.dispatch(x, ids, weights)
        rows = out.tokens * 2
        if out.topk_weights is not None:
            rows = rows * out.topk_weights.sum(-1, keepdim=True).to(rows.dtype)
        return comm.combine(rows, handle)

    for model in (layer, compiled(layer)):
        x, ids, weights = inputs()
        gpu.launched.clear()
        model(x.requires_grad_(), ids, weights.requires_grad_()).sum().backward()
        noted.append(launches(gpu))
    plain, fast = noted
    assert len(plain) >= 4
    assert fast == plain


@pytest.mark.parametrize(
    ("fields", "wide_ids"), [(HT, HtFlag.WIDE_IDS), (LL, LlFlag.WIDE_IDS)], ids=["ht", "ll"]
)
def test_ids_of_both_types_in_one_communicator(
    gpu: FakeGpu, fields: dict[str, Any], wide_ids: int
) -> None:
    """A combine reads the ids of its dispatch, in their type."""
    comm = gpu.communicator(**fields)
    x, ids, weights = inputs()
    form = comm._graph_form
    assert form is not None
    ops: Any = torch.ops.expertlink
    made = [
        ops.dispatch_static(form.name, x, some, weights, None, "", False)
        for some in (ids, ids.to(torch.int32))
    ]
    gpu.launched.clear()
    for tensors in made:
        rows = torch.zeros_like(tensors[0])
        rest = (None, None, False, len(x), True)
        ops.combine_static(form.name, form.name, rows, tensors[-1:], *rest)
    wide = [bool(launch["flags"] & wide_ids) for launch in gpu.launched]
    assert wide == [True, False]


def test_a_handle_of_another_process_is_refused(gpu: FakeGpu) -> None:
    """Its tensors do not say all: the rest is known where its dispatch was made."""
    comm = gpu.communicator(**HT)
    x, _, _ = inputs()
    form = comm._graph_form
    assert form is not None
    assert form.static
    tensors = [torch.zeros(100, dtype=torch.int32)]
    rows = torch.zeros(64, x.shape[1], dtype=x.dtype)
    with pytest.raises(HandleError, match="no such dispatch"):
        torch.ops.expertlink.combine_static(
            form.name, form.name, rows, tensors, None, None, False, 5, True
        )


def test_which_operators_graphs_of_cuda_may_hold() -> None:
    for op in (*DISPATCH_OPS, *COMBINE_OPS):
        unsafe = torch.Tag.cudagraph_unsafe in op.tags
        assert unsafe != op.name().endswith("_static")


@FIELDS
@pytest.mark.parametrize("source_tokens", [False, True])
def test_results_have_the_shapes_that_graphs_are_told(
    gpu: FakeGpu, fields: dict[str, Any], source_tokens: bool
) -> None:
    """Inductor checks that on GPUs alone."""
    comm = gpu.communicator(**fields, source_tokens=source_tokens)
    form = comm._graph_form
    assert form is not None
    x, ids, weights = inputs()
    ops: Any = torch.ops.expertlink
    first = (form.name, x, ids, weights, None, "", False)
    made = ops.dispatch_static(*first)
    handle = made[-1:]
    later = (handle, len(x), len(made[0]), True)
    same = (form.name, form.name, x, None, None, False, None, "", False, *later)
    others = (form.name, form.name, x, None, weights, True, None, "", False, *later)
    calls: list[tuple[Any, Any, Any]] = [(ops.dispatch_static, first, made)]
    for arguments in (same, others):
        op = ops.cached_dispatch_static
        calls.append((op, arguments, op(*arguments)))
    for op, arguments, real in calls:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = tree_map_only(Tensor, mode.from_tensor, arguments)
            told = op(*fakes)
        forms = [[(t.shape, t.stride(), t.dtype) for t in some] for some in (told, real)]
        assert forms[0] == forms[1], op
