"""The ceilings: what every rank is told to move, and that the kernels move it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import RankPools
from expertlink.bench import ceilings as ceilings_module
from expertlink.bench.cases import Case, Plan
from expertlink.bench.ceilings import (
    BulkCopies,
    Ceilings,
    share_of,
)
from expertlink.bench.clock import Clock
from expertlink.bench.measured import Measured, make_records
from expertlink.bench.records import PHASES
from expertlink.errors import EngineUnavailableError
from expertlink.launch import RankContext


@st.composite
def exchanges(draw: st.DrawFn) -> Tensor:
    """Rows from every rank to every other one."""
    ranks = draw(st.integers(2, 6))
    counts = draw(st.lists(st.integers(0, 9), min_size=ranks**2, max_size=ranks**2))
    return torch.tensor(counts).view(ranks, ranks).fill_diagonal_(0)


def most_rows(rows_SD: Tensor) -> int:
    """Rows that no rank's buffer holds more of, whether it sends or receives."""
    return int(torch.maximum(rows_SD.sum(dim=0), rows_SD.sum(dim=1)).max())


def spans(starts_R: Tensor, rows_R: Tensor) -> list[tuple[int, int]]:
    return list(zip(starts_R.tolist(), (starts_R + rows_R).tolist(), strict=True))


def assert_apart(places: list[tuple[int, int]], room: int) -> None:
    """Filled spans of a buffer do not overlap and stay inside."""
    filled = sorted(span for span in places if span[0] < span[1])
    for (_, end), (start, _) in pairwise(filled):
        assert end <= start
    assert all(start >= 0 and end <= room for start, end in filled)


@given(exchanges())
def test_puts_fill_buffers_without_overlap(rows_SD: Tensor) -> None:
    ranks, room = len(rows_SD), most_rows(rows_SD)
    shares = [share_of("put", rows_SD, rank) for rank in range(ranks)]
    for rank, (near_R, _, rows_R) in enumerate(shares):
        assert rows_R.equal(rows_SD[rank])
        assert_apart(spans(near_R, rows_R), room)
    for peer in range(ranks):
        assert_apart([spans(far_R, rows_R)[peer] for _, far_R, rows_R in shares], room)


@given(exchanges())
def test_gets_read_what_lies_there_to_be_put(rows_SD: Tensor) -> None:
    ranks = len(rows_SD)
    for rank in range(ranks):
        _, far_R, rows_R = share_of("get", rows_SD, rank)
        assert rows_R.equal(rows_SD[:, rank])
        puts = [share_of("put", rows_SD, source) for source in range(ranks)]
        assert far_R.tolist() == [int(near_R[rank]) for near_R, _, _ in puts]


def note_on_a_rank(context: RankContext) -> str | None:
    case = Case(ranks=context.num_ranks, tokens=16, hidden=64, topk=2, experts=4)
    with Ceilings(case, Plan(), Clock(context.device)) as ceilings:
        assert ceilings.moves(context.rank, [[1] * context.num_ranks] * 2) == [{}, {}]
        return ceilings.note


def test_where_there_is_no_wire_the_reason_is_noted(rank_pools: RankPools) -> None:
    assert rank_pools(1).run(note_on_a_rank) == ["one rank sends nothing to others"]
    assert rank_pools(2).run(note_on_a_rank) == ["rows do not cross a wire between cpu ranks"] * 2


class NotedCopies:
    """Stands for `BulkCopies` on a CPU: prepared calls say what they would move."""

    def __init__(self, device: torch.device, *, row_bytes: int, num_sms: int) -> None:
        self.row_bytes = row_bytes

    def prepare(self, kind: str, share_3R: Tensor, **places: Any) -> Callable[[], Any]:
        rows = share_3R[2].tolist()
        return lambda: (kind, self.row_bytes, rows, places["near"], places["far"])


class NotedMemory:
    """Stands for `WireMemory`."""

    source, addresses = 7, (8, 9)

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes

    def close(self) -> None:
        self.nbytes = 0


def prepared_on_a_rank(context: RankContext, prepared: bool) -> tuple[Any, ...]:
    rank = context.rank
    values: dict[str, Any] = {"ranks": 2, "tokens": 16, "hidden": 64, "topk": 2, "experts": 4}
    case = Case(**values, quantization="e4m3_float32")
    if prepared:
        case = replace(case, mode="ll", variant="eager", max_tokens_per_rank=32)
    floor = ceilings_module.Floor(350.0, 1.2)
    with (
        mock.patch.object(ceilings_module, "BulkCopies", NotedCopies),
        mock.patch.object(ceilings_module, "WireMemory", NotedMemory),
        mock.patch.object(ceilings_module, "measure_floor", return_value=floor),
        Ceilings(case, Plan(), Clock(context.device)) as ceilings,
    ):
        assert ceilings.note is None
        assert (ceilings.floor == floor) == prepared
        [moves] = ceilings.moves(rank, [[5, 6] if rank == 0 else [3, 4]])
        room = ceilings._memory
        assert room is not None
        return room.nbytes, {key: move() for key, move in moves.items()}


@pytest.mark.parametrize("prepared", [False, True])
def test_every_phase_moves_its_rows_of_its_size(rank_pools: RankPools, prepared: bool) -> None:
    first, second = rank_pools(2).run(prepared_on_a_rank, prepared)
    places = (7, (8, 9))
    for nbytes, _ in (first, second):
        # e4m3 rows of 64 elements with one scale take 68 bytes, bfloat16 ones 128.
        assert nbytes == (ceilings_module.LARGE_BYTES if prepared else 16 * 128)
    assert first[1] == {
        ("dispatch", "put"): ("put", 68, [0, 6], *places),
        ("dispatch", "get"): ("get", 68, [0, 3], *places),
        ("combine", "put"): ("put", 128, [0, 3], *places),
        ("combine", "get"): ("get", 128, [0, 6], *places),
    }
    assert second[1]["dispatch", "put"] == ("put", 68, [3, 0], *places)


def test_a_record_compares_with_the_right_ceiling() -> None:
    medians = {
        ("uncached", "dispatch", "time"): 100.0,
        ("", "dispatch", "put"): 80.0,
        ("", "dispatch", "get"): 70.0,
        ("uncached", "combine", "time"): 120.0,
        ("", "combine", "put"): 90.0,
        ("", "combine", "get"): 60.0,
        ("uncached", "pair", "time"): 200.0,
    }
    for phase in PHASES:
        medians["uncached", phase, "host"] = medians["", phase, "raw"] = 10.0
    measured = Measured(
        device=torch.device("cpu"),
        engine="nvlink",
        num_inputs=1,
        times={key: torch.tensor([[value / 2], [value]]) for key, value in medians.items()},
        traffic=torch.full((2, 3, 3), 8000.0),
        ceiling_note=None,
    )
    case = Case(ranks=2, tokens=16, hidden=64, topk=2, experts=4)
    dispatch, combine, pair = make_records(case, Plan(), measured)
    assert (dispatch.ceiling, dispatch.ceiling_ratio) == ("put", 0.8)
    assert (combine.ceiling, combine.ceiling_ratio) == ("get", 0.5)
    assert (combine.put_ratio, combine.get_ratio) == (0.75, 0.5)
    assert (pair.ceiling, pair.ceiling_ratio) == ("put+get", 0.7)
    assert pair.put_us is not None
    assert pair.put_us.median == 170.0
    assert dispatch.ceiling_gbps == 0.1
    assert dispatch.ceiling_num_sms == Plan().ceiling_sms


@pytest.mark.gpu
@pytest.mark.parametrize("num_sms", [1, 24])
@pytest.mark.parametrize("row_bytes", [16, 7392, 14336, 100_000])
def test_puts_move_every_row_to_its_place(num_sms: int, row_bytes: int) -> None:
    """All ranks in one process, one after the other: they need not meet."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("bulk copies need sm_90 or later")
    device = torch.device("cuda", torch.cuda.current_device())
    rows_SD = torch.tensor([[0, 5, 40], [1, 0, 0], [17, 300, 0]])
    ranks, room = len(rows_SD), most_rows(rows_SD)
    copies = BulkCopies(device, row_bytes=row_bytes, num_sms=num_sms)
    numbers = torch.randint(256, (ranks, room, row_bytes), dtype=torch.uint8, device=device)
    arrived = torch.zeros_like(numbers)
    expected = torch.zeros_like(numbers)
    for rank in range(ranks):
        share = share_of("put", rows_SD, rank)
        far = [arrived[peer].data_ptr() for peer in range(ranks)]
        near = numbers[rank].data_ptr()
        copies.prepare("put", share, rank=rank, near=near, far=far)()
        gets = share_of("get", rows_SD, rank)
        sources = [numbers[peer].data_ptr() for peer in range(ranks)]
        copies.prepare("get", gets, rank=rank, near=0, far=sources)()
        for peer, (here, there, rows) in enumerate(share.T.tolist()):
            expected[peer, there : there + rows] = numbers[rank, here : here + rows]
    torch.cuda.synchronize()
    torch.testing.assert_close(arrived, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_rows_that_do_not_fit_are_refused() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    with pytest.raises(EngineUnavailableError, match="1000000 bytes"):
        BulkCopies(device, row_bytes=10**6, num_sms=1)
