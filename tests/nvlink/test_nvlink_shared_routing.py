"""Handles of the nvlink engine in communicators of other rows and other room, on one GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from expertlink import DispatchLayout, ExpertlinkError
from support import shared_routing
from support.cases import FEW, LAYOUTS, Shape, exact, narrow, usual
from support.hosted import Fleet, fleet_of, run_hosted
from support.side_by_side import Rank, World, inputs_of, is_right, is_sum, run_ranks

pytestmark = pytest.mark.gpu(1)
SECOND = 1000  # first number of the other fleet's communicators


def check(mode: str, shape: Shape, *, max_tokens: int, **fields: Any) -> None:
    """`two_communicators` for several routings of a shape."""
    cases = [
        shape.case(FEW, seed=1),
        shape.case(FEW, masked=0.3, skew=1.5, weighted=False, ids_dtype=torch.int32, seed=2),
        shape.case(FEW, masked=0.6, seed=3),
    ]
    wide = fleet_of(mode, cases[0], **fields)
    short = narrow(shape, max_tokens=max_tokens).case(FEW)
    other = Fleet(
        fleet_of(mode, short, **fields).config,
        shape.ranks,
        max_warps=wide.max_warps,
        first_number=SECOND,
    )
    run_hosted(wide, shared_routing.on_hosted_ranks, other, cases)


@LAYOUTS
@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
def test_another_communicator_of_mode_ht(layout: DispatchLayout, static: bool) -> None:
    """Rows of other length and type; where rows are not padded also with less room there."""
    shape = usual(3, layout)
    rooms = (40,) if layout.padded else (max(FEW), 40)
    for room in rooms:
        check("ht", shape, max_tokens=room, static_shapes=static)


@LAYOUTS
def test_another_communicator_of_mode_ll(layout: DispatchLayout) -> None:
    shape = usual(3, layout)
    check("ll", shape, max_tokens=40)
    if layout.expanded:
        check("ll", exact(shape), max_tokens=40)


def mixed_up(world: World, rank: int, fields: dict[str, Any]) -> Any:
    """Dispatches of two communicators with equal numbers; ranks use different ones."""
    makers = [Rank(world, rank, **fields) for _ in range(2)]
    user = Rank(world, rank, timeout_s=60.0, **fields)
    sent = [comm.dispatch(*inputs_of(comm, 1)) for comm in makers]
    for comm in (*makers, user):
        comm.settle()
    right = [is_right(user, 1, user.combine(out.tokens.clone(), handle)) for out, handle in sent]
    out, handle = sent[rank]
    user.combine(out.tokens.clone(), handle)
    user.settle()
    try:
        user.check_health()
    except ExpertlinkError as error:
        return right, type(error).__name__, str(error)
    return right, "", ""


@pytest.mark.parametrize(
    "fields",
    [
        {"output_layout": "token_major", "static_shapes": True},
        {"mode": "ll", "output_layout": "expert_major"},
    ],
    ids=["ht", "ll"],
)
def test_dispatches_of_two_communicators_are_told_apart(fields: dict[str, Any]) -> None:
    first, second = run_ranks(2, mixed_up, fields)
    assert first == second
    right, kind, text = first
    assert all(right)
    assert kind == "PeerError", text
    assert "combine #3 of dispatch #1" in text


def captured(world: World, rank: int) -> Any:
    """A routing of less room in a graph: its slots are made for the other one in each replay."""
    fields: dict[str, Any] = {"output_layout": "token_major", "static_shapes": True}
    small = Rank(world, rank, hidden_size=16, max_tokens_per_rank=16, **fields)
    large = Rank(world, rank, **fields)
    x, ids, weights = inputs_of(small, 1)
    wide = torch.zeros(16, 64, dtype=x.dtype, device=x.device)
    static = [tensor.clone() for tensor in (x, ids, weights)]

    def step(between: Callable[[], None] = lambda: None) -> torch.Tensor:
        _, handle = small.dispatch(*static)
        between()
        out, _ = large.dispatch(wide, None, previous_handle=handle)
        return large.combine(out.tokens, handle)

    # The first kernels that number slots anew are loaded, which waits for all others: nobody may
    # be waiting for a rank then.
    step(world.meet)
    small.settle()
    world.meet()
    with large.capture() as graph:
        y = step()
    world.meet()
    right = []
    for seed in (2, 3):
        _, new_ids, new_weights = inputs_of(small, seed)
        rows, *_ = inputs_of(large, seed, 16)
        for target, source in zip(static[1:], (new_ids, new_weights), strict=True):
            target.copy_(source)
        wide.copy_(rows)
        graph.replay()
        large.settle()
        right.append(is_sum(large, y, rows, new_ids, new_weights))
    small.check_health()
    large.check_health()
    return all(right)


def test_slots_for_another_room_in_a_graph() -> None:
    assert all(run_ranks(2, captured))
