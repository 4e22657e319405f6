"""Handles used in other communicators: of other rows, of more room, after the end of their own."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from expertlink import DispatchLayout, HandleError
from support import shared_routing
from support.oracle import Case
from support.small_calls import H, good, make

LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@LAYOUTS
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F32, BF16), (F64, F32)], ids=str)
def test_bits_equal_the_oracle(
    rank_pools, layout: DispatchLayout, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Short rows of one type there, long rows of another type back."""
    narrow, wide = dtypes
    case = Case((5, 0, 7), 24, experts=6, topk=3, layout=layout, dtype=wide, masked=0.2, limit=9)
    drawn = [case, dataclasses.replace(case, placement="scattered", seed=1)]
    if layout is DispatchLayout.FLAT:
        drawn.append(dataclasses.replace(case, alignment=4, weighted=False))
    if layout.expanded:
        drawn.append(dataclasses.replace(case, precision="exact"))
    for one in drawn:
        assert all(rank_pools(3).run(shared_routing.contract, one, narrow, timeout_s=60))


@LAYOUTS
def test_gradients_through_two_communicators(rank_pools, layout: DispatchLayout) -> None:
    case = Case((5, 0, 4), 6, experts=5, topk=2, layout=layout, dtype=F64, masked=0.2)
    for worst in rank_pools(3).run(shared_routing.gradients, case, timeout_s=60):
        assert max(worst.values()) < 1e-12, worst


def test_dispatches_of_two_communicators_are_told_apart(rank_pools) -> None:
    """Both are dispatch #1: only the number of their communicators differs."""
    results = rank_pools(2).run(shared_routing.two_dispatches, timeout_s=60)
    assert results[0] == results[1]
    seen, recovered = results[0]
    for kind, text in seen:
        assert kind == "PeerError"
        assert text.count("of dispatch #1 made by communicator") == 2
    assert recovered


def test_handles_that_do_not_suit_are_refused_on_all_ranks(rank_pools) -> None:
    results = rank_pools(2).run(shared_routing.misfits, timeout_s=60)
    assert results[0] == results[1]
    for name, outcomes in results[0].items():
        for kind, text in outcomes:
            assert kind == "HandleError", (name, kind, text)
            assert "another communicator" in text
            assert name in text


def test_handles_of_buffers_stay_with_their_communicator() -> None:
    with make() as comm, make() as other, torch.no_grad():
        out, handle = comm.dispatch(**good(), output_buffer=comm.create_buffers())
        with pytest.raises(HandleError, match="DispatchBuffers belongs to another communicator"):
            other.combine(out.tokens, handle)
        comm.combine(out.tokens, handle)


def test_buffers_without_room_for_the_rows_of_a_handle() -> None:
    """A routing of more rows than the largest output here would be written beyond its end."""
    fields = good()
    with make(max_tokens_per_rank=9) as comm, make(hidden_size=2 * H) as other, torch.no_grad():
        _, handle = comm.dispatch(**fields)
        wide = torch.randn(len(fields["input"]), 2 * H)
        buffers = other.create_buffers()
        out, cached = other.dispatch(wide, None, previous_handle=handle, output_buffer=buffers)
        assert out.tokens.shape == (7, 2 * H)
        assert other.combine(out.tokens, cached).shape == wide.shape
