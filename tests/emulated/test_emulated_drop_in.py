"""The drop-in for `deep_ep` over several hosts, on the kernels of the engine `hybrid`.

Jobs are those that ranks in processes run too; their first ones say most.
"""

from __future__ import annotations

from typing import Any

import pytest

from support import emulator
from support.depth import deep
from support.drop_in import decode, elastic, internode, normal, refusals
from support.drop_in.inputs import Shapes
from support.drop_in.place import Job, run_on

pytestmark = emulator.needs_compiler()
TWO, TWO_BY_TWO = (0, 1), (0, 0, 1, 1)
SMALL = Shapes(tokens=6, hidden=128, experts=8, topk=3, fewer=1, masked=0.2)
LARGER = Shapes(tokens=70, hidden=128, experts=8, topk=3, fewer=30, seed=1)
DECODE = Shapes(tokens=4, hidden=512, experts=8, topk=3, fewer=1, masked=0.2)
EVEN = Shapes(tokens=6, hidden=256, experts=8, topk=3)
JOBS: list[tuple[Job, tuple[int, ...], tuple[Any, ...]]] = [
    (normal.shapes_on_one_buffer, TWO, ([SMALL, LARGER],)),
    (decode.low_latency, TWO_BY_TWO, (DECODE,)),
    (internode.internode, TWO_BY_TWO, (EVEN,)),
    (elastic.elastic, TWO_BY_TWO, (Shapes(6, 256, 8, 3, fewer=1, masked=0.3), {})),
    (normal.sums_with_weights_and_biases, TWO_BY_TWO, (SMALL,)),
    (normal.long_lived_handles, TWO_BY_TWO, (SMALL,)),
    (normal.kinds_of_rows, TWO, (SMALL,)),
    (normal.odd_ids, TWO, (SMALL,)),
    (decode.micro_batches, TWO, ([DECODE, DECODE],)),
    (refusals.normal, TWO, (SMALL, 1)),
    (refusals.constructors, TWO, (1,)),
    (elastic.handles_that_outlive_communicators, TWO, (SMALL,)),
    (decode.handles_that_outlive_buffers, TWO_BY_TWO, (DECODE,)),
]


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    emulator.emulate(monkeypatch)


@pytest.mark.parametrize(
    ("job", "hosts", "args"), JOBS[: deep(1)], ids=[job.__name__ for job, *_ in JOBS[: deep(1)]]
)
def test_drop_in(job: Job, hosts: tuple[int, ...], args: tuple[Any, ...]) -> None:
    assert all(run_on(None, "hosted", hosts, job, *args))
