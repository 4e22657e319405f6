"""What the host makes of a routing's tables, also for other communicators; needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expertlink import HandleError, MoECommunicatorConfig
from expertlink.engines.nvlink.ll.tables import LlRoute, LlTableLayout
from expertlink.engines.nvlink.tables import Route, TableLayout
from support.fake_gpu import FakeGpu, inputs

LL: dict[str, Any] = {"mode": "ll", "output_layout": "expert_major"}
STATIC: dict[str, Any] = {"output_layout": "token_major", "static_shapes": True}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


@pytest.mark.parametrize("most", [5, 40])
def test_slots_for_a_communicator_of_other_room(most: int) -> None:
    """`rank * T_max + position` of that communicator; made once, -1 stays."""
    config = MoECommunicatorConfig(
        num_experts=8, hidden_size=16, topk=3, max_tokens_per_rank=9, device="cpu"
    )
    layout = TableLayout(config, num_ranks=4, num_local=2)
    block = torch.full((layout.words(5),), -7, dtype=torch.int32)
    places = [[(0, 0), (1, 4), (3, 2)], [(2, 3)], [], [(1, 0), (2, 4)], [(3, 1)]]

    def slots(room: int) -> torch.Tensor:
        codes = [[rank * room + at for rank, at in token] for token in places]
        return torch.tensor([(code + [-1] * 3)[:3] for code in codes], dtype=torch.int32)

    layout.view(block, "slots", 5).copy_(slots(9))
    route = Route((1,), 5, torch.zeros(5, 3), layout, block, None, False, None, 0)
    made = route.slots_for(most)
    assert made is not None
    assert made.dtype is torch.int32
    assert torch.equal(made, slots(most))
    assert route.slots_for(most) is made
    assert route.slots_for(9) is None
    assert torch.equal(route.table("slots"), slots(9))


@torch.no_grad()
def test_calls_with_a_routing_of_other_room(gpu: FakeGpu) -> None:
    """Kernels read slots of their own room, and say whose dispatch it is."""
    fields: dict[str, Any] = {**STATIC, "hidden_size": 64}
    small = gpu.communicator(**fields, max_tokens_per_rank=8)
    large = gpu.communicator(**fields)
    for number, comm in enumerate((small, large), 1):
        engine: Any = comm._engine
        engine._mode._dispatcher._number = number
    x, ids, weights = inputs()
    _, handle = small.dispatch(x, ids, weights)
    out, cached = large.dispatch(x, None, previous_handle=handle)
    large.combine(out.tokens, handle)
    large.combine(out.tokens, cached)
    small.close()
    large.combine(out.tokens, handle)
    route: Any = handle.state
    own = route.block.data_ptr() + route.layout.at["slots"]
    (made,) = route.other_slots.values()
    first, *others = gpu.launched
    assert (first["maker"], first["slots_of_token"]) == (0, own)
    assert [launch["maker"] for launch in others] == [1, 1, 2, 1]
    assert {launch["slots_of_token"] for launch in others} == {made.data_ptr()}


@torch.no_grad()
def test_low_latency_calls_say_whose_dispatch_they_use(gpu: FakeGpu) -> None:
    first, second = gpu.communicator(**LL), gpu.communicator(**LL)
    for number, comm in enumerate((first, second), 11):
        engine: Any = comm._engine
        for part in (engine._mode._dispatcher, engine._mode._combiner):
            part._number = part.arguments.communicator = number
    x, ids, weights = inputs()
    out, handle = first.dispatch(x, ids, weights)
    _, own = second.dispatch(x, ids, weights)
    first.clear_mask()
    with pytest.raises(HandleError, match="clear_mask"):
        second.combine(out.tokens, handle)
    out, handle = first.dispatch(x, ids, weights)
    second.combine(out.tokens, handle)
    second.dispatch(x, None, previous_handle=handle)
    second.combine(out.tokens, own)
    second.dispatch(x, ids, weights)
    said = [launch["communicator"] for launch in gpu.launched]
    assert said[:3] == [11, 12, 11]
    assert said[3] == said[4]
    assert said[3] not in (11, 12)
    assert said[5:] == [12, 12]


def test_slot_weights_under_another_default_dtype() -> None:
    """They are float32, whatever torch makes by default."""
    config = MoECommunicatorConfig(
        num_experts=2, hidden_size=16, topk=1, max_tokens_per_rank=3, device="cpu"
    )
    layout = TableLayout(config, num_ranks=1, num_local=2)
    block = torch.zeros(layout.words(2), dtype=torch.int32)
    layout.view(block, "rows_from").fill_(2)
    layout.view(block, "choices").copy_(torch.tensor([[1], [0], [9]]))
    weights = torch.tensor([[1.1], [2.3], [9.0]])
    layout.view(block, "weights").view(torch.float32).copy_(weights)
    route = Route((2,), 2, torch.zeros(2, 1), layout, block, None, True, None, 0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = route.slot_weights()
    finally:
        torch.set_default_dtype(torch.float32)
    assert made is not None
    assert made.dtype is torch.float32
    assert made.tolist() == weights[[1, 0], 0].tolist()


@pytest.mark.parametrize("layout", ["token_major", "rank_major", "expert_major"])
def test_source_tokens_from_the_tables_of_low_latency(layout: str) -> None:
    """Two ranks of 3 and 1 rows; what lies in tables behind the last row is never used."""
    config = MoECommunicatorConfig(
        num_experts=4,
        hidden_size=16,
        topk=2,
        max_tokens_per_rank=4,
        mode="ll",
        output_layout=layout,  # type: ignore[arg-type]
        device="cpu",
    )
    tables = LlTableLayout(config, num_ranks=2, num_local=2)
    block = torch.full((tables.words(0),), 7, dtype=torch.int32)
    tables.view(block, "rows_from").copy_(torch.tensor([3, 1]))
    tables.view(block, "first_row").copy_(torch.tensor([0, 3]))
    tables.view(block, "tokens").copy_(torch.tensor([0, 2, 3, 9, 1, 9, 9, 9]))
    choices = [[0, 8], [1, -1], [-1, -2], [5, 5], [9, 2], [5, 5], [5, 5], [5, 5]]
    tables.view(block, "choices").copy_(torch.tensor(choices))
    expected = {
        "token_major": [0, 2, 3, 1, -1, -1, -1, -1],
        "rank_major": [[0, 2, 3, -1], [1, -1, -1, -1]],
        "expert_major": [[0, 2, 1, -1, -1, -1, -1, -1], [0, 1, -1, -1, -1, -1, -1, -1]],
    }[layout]
    out = torch.full_like(torch.tensor(expected, dtype=torch.int32), 5)
    route = LlRoute((8,), 0, torch.zeros(0, 2), tables, block, None, False, None, 0)
    route.write_source_tokens(out)
    assert out.tolist() == expected
