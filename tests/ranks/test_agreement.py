"""How messages describe the ranks' headers."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from expertlink.engines.ranks.agreement import difference, judge
from expertlink.engines.ranks.header import HeaderFields, Operation
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import PeerError

OWN = 77


def words(**fields: int) -> list[int]:
    defaults = {"operation": int(Operation.COMBINE), "communicator": OWN, "call": 3, "subject": 1}
    return list(astuple(HeaderFields(**{**defaults, **fields})))


def test_ranks_in_the_same_call_do_not_differ() -> None:
    assert difference([words(), words(capacity=9, row_bytes=4)], communicator=OWN) is None


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"subject": 2}, "rank 0 is in combine #3 of dispatch #1; rank 1 is in combine #3 of disp"),
        ({"call": 4}, "rank 1 is in combine #4 of dispatch #1. "),
        ({"operation": 1, "subject": 0}, "rank 1 is in dispatch #3. "),
        ({"communicator": 5}, "rank 1 is in combine #3 of dispatch #1 of another communicator. "),
        ({"operation": -137644532}, "rank 1 is in an unknown operation (-137644532) #3 "),
        ({"call": 4, "status": 1}, "rank 1 is in combine #4 of dispatch #1, which it refused. "),
    ],
)
def test_a_difference_names_the_call_of_every_rank(other: dict[str, int], text: str) -> None:
    assert text in str(difference([words(), words(**other)], communicator=OWN))


def test_a_refusing_rank_need_not_know_the_dispatch() -> None:
    fields = [words(), words(subject=0, status=1)]
    assert difference(fields, communicator=OWN) == "rank 1 refused combine #3 of dispatch #1"


@pytest.mark.parametrize(
    ("other", "resynchronise", "call"),
    [
        ({"call": 9}, True, 9),
        ({"call": 9}, False, 3),
        ({"subject": 2}, True, 3),
        ({"communicator": 5, "call": 9}, True, 2),
    ],
)
def test_call_numbers_after_a_difference(
    other: dict[str, int], resynchronise: bool, call: int
) -> None:
    wire = Wire(None, device=torch.device("cpu"), timeout_s=1.0)
    wire.number, wire.call = OWN, 3
    with pytest.raises(PeerError) as info:
        judge(
            wire,
            Operation.COMBINE,
            [words(), words(**other)],
            max_tokens=4,
            resynchronise=resynchronise,
        )
    assert info.value.ranks == (1,)
    assert wire.call == call
