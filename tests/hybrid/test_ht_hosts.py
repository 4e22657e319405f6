"""Mode "ht" across hosts, all ranks on one GPU, bit for bit against the oracle with domains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from expertlink import DispatchLayout, MoECommunicator
from support import decode, jobs, payloads, training
from support.cases import LAYOUTS, Shape, routings, special
from support.hosted import run_cases, run_hosted
from support.hosted_hosts import HostsFleet, hosts_fleet_of
from support.oracle import Case

pytestmark = pytest.mark.gpu(1)

CHUNK = 16  # tokens of a chunk
HOSTS = {
    "2x1": (0, 1),
    "2x2": (0, 0, 1, 1),
    "3x2": (0, 0, 1, 1, 2, 2),
    "2x4": (0,) * 4 + (1,) * 4,
    "woven": (0, 1, 1, 0),
}
HOSTS_OF = pytest.mark.parametrize("hosts", HOSTS)


def shape_of(hosts: str, layout: DispatchLayout, **fields: Any) -> Shape:
    return Shape(len(HOSTS[hosts]), layout, **fields)


def across(hosts: str, cases: list[Case]) -> list[Case]:
    """The same cases on several hosts."""
    return [dataclasses.replace(case, domains=HOSTS[hosts]) for case in cases]


def fleet_of(case: Case, **fields: Any) -> HostsFleet:
    return hosts_fleet_of(case, mode="ht", chunk_rows=CHUNK, **fields)


def edges(shape: Shape) -> list[Case]:
    """T at the edges of chunks, and hosts to which nothing goes."""
    ranks = shape.ranks
    return [
        shape.case(tuple((CHUNK, CHUNK + 1, CHUNK - 1, 0)[r % 4] for r in range(ranks)), seed=11),
        shape.case(tuple((2 * CHUNK, 0, 1, 40)[r % 4] for r in range(ranks)), seed=12),
        shape.case((CHUNK,) * ranks, only_rank=0, seed=13),
        shape.case((CHUNK + 1,) * ranks, only_rank=ranks - 1, masked=0.3, seed=14),
        shape.case((0,) * (ranks - 1) + (33,), seed=15),
        shape.case((40,) * ranks, masked=0.97, seed=16),
    ]


@LAYOUTS
@HOSTS_OF
@pytest.mark.parametrize("fields", [{}, {"static_shapes": True}], ids=["", "static"])
def test_contract(fields: dict[str, Any], hosts: str, layout: DispatchLayout) -> None:
    """Dispatches, cached ones with and without new weights, combines with weights and gradients."""
    shape = shape_of(hosts, layout)
    cases = across(hosts, [*routings(shape), *edges(shape)])
    run_hosted(fleet_of(cases[0], **fields), jobs.contracts, cases)


@LAYOUTS
@HOSTS_OF
@pytest.mark.parametrize("fields", [{}, {"static_shapes": True}], ids=["", "static"])
def test_statistics(fields: dict[str, Any], hosts: str, layout: DispatchLayout) -> None:
    case = across(hosts, edges(shape_of(hosts, layout)))[1]
    run_cases(fleet_of(case, **fields), decode.statistics, [case])


@LAYOUTS
@HOSTS_OF
@pytest.mark.parametrize("fields", [{}, {"static_shapes": True}], ids=["", "static"])
def test_a_rank_without_memory(fields: dict[str, Any], hosts: str, layout: DispatchLayout) -> None:
    """With the kernels of `test_contract`."""
    cases = across(hosts, edges(shape_of(hosts, layout)))[:4]
    run_cases(fleet_of(cases[0], **fields), jobs.without_memory, cases)


@LAYOUTS
@pytest.mark.parametrize("name", ["narrow", "all_lanes", "one_choice", "many_experts"])
def test_contract_at_the_edges(name: str, layout: DispatchLayout) -> None:
    shape = special(name, layout)
    hosts = tuple(2 * rank // (shape.ranks + shape.ranks % 2) for rank in range(shape.ranks))
    if shape.ranks % 2:
        hosts = tuple(range(shape.ranks))
    cases = [
        dataclasses.replace(case, domains=hosts)
        for case in (shape.case(seed=1), shape.case(masked=0.4, seed=2))
    ]
    run_hosted(fleet_of(cases[0]), jobs.contracts, cases)


@LAYOUTS
@HOSTS_OF
def test_one_chunk(hosts: str, layout: DispatchLayout) -> None:
    """All tokens at once."""
    shape = shape_of(hosts, layout)
    cases = across(hosts, routings(shape)[:3])
    run_hosted(hosts_fleet_of(cases[0], mode="ht"), jobs.contracts, cases)


@pytest.mark.parametrize("hosts", ["2x2", "3x2"])
@pytest.mark.parametrize("alignment", [1, 16])
def test_gradients(alignment: int, hosts: str) -> None:
    """Backward of dispatch and combine, with the gradients of the routing weights."""
    shape = shape_of(hosts, DispatchLayout.FLAT, alignment=alignment)
    cases = across(hosts, [shape.case(seed=1), *edges(shape)[:2]])

    def job(comm: MoECommunicator) -> None:
        # Torch has one thread of backward passes for a GPU, and rails between threads wait.
        with torch.autograd.set_multithreading_enabled(False):
            for case in cases:
                training.backward_bits_on(comm, case)
                training.weight_grads_on(comm, case)

    run_hosted(fleet_of(cases[0]), job)


@LAYOUTS
@pytest.mark.parametrize("kind", ["e4m3_float32", "e4m3_ue8m0", "opaque"])
def test_rows_with_scales(kind: str, layout: DispatchLayout) -> None:
    hosts = "2x2"
    shape = shape_of(hosts, layout)
    for case in across(hosts, [shape.case(seed=1), shape.case(masked=0.4, seed=2)]):
        run_hosted(fleet_of(case), payloads.packed_rows, case, kind)


@LAYOUTS
def test_source_tokens(layout: DispatchLayout) -> None:
    hosts = "2x2"
    shape = shape_of(hosts, layout)
    cases = across(hosts, [shape.case(seed=1), *edges(shape)])
    for static in (False, True):
        fleet = fleet_of(cases[0], source_tokens=True, static_shapes=static)
        run_hosted(fleet, jobs.contracts, cases)


def without_gradients_of(comm: MoECommunicator, job: Callable[[MoECommunicator], None]) -> None:
    """Gradient modes are those of a thread."""
    with torch.no_grad():
        job(comm)


@LAYOUTS
def test_many_calls_in_turn(layout: DispatchLayout) -> None:
    """Memory of messages and slots is used again and again, by calls of all kinds."""
    hosts = "2x2"
    shape = shape_of(hosts, layout)
    cases = across(hosts, [*routings(shape)[:3], *edges(shape)])

    def job(comm: MoECommunicator) -> None:
        handles = []
        for round_ in range(4):
            some = cases[round_ % 2 :: 2]
            handles += [(case, jobs.dispatch_case(comm, case)[1]) for case in some]
            for case, handle in handles[-3:]:
                jobs.combine_case(comm, case, handle, "combine")
        torch.cuda.synchronize()

    run_hosted(fleet_of(cases[0]), without_gradients_of, job)
