"""Hosts that are network namespaces: a slow NIC, a cut cable, a rank that is killed.

Who is named, how soon, and whether the ranks that are left can go on. Rails are over gloo, so no
GPU is needed; the monitor and its posts are the same with NCCL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest

from support import namespaces
from support.depth import depth
from support.namespaces import Network

pytestmark = pytest.mark.preload("support.namespaces")
TIMEOUT_S = 0.5
BOUND_S = TIMEOUT_S + 1.0
SLACK_S = 10.0  # for a machine with other things to do
HOSTS = 3
EVERY = range(HOSTS)
SLOW, LONG = "2mbit", 1 << 20  # four seconds
PHASES = ("gather", "exchange", "under way")


@cache
def reason() -> str | None:
    return namespaces.reason_against()


@pytest.fixture(autouse=True)
def _possible() -> None:
    why = reason()
    if why is not None:
        pytest.skip(why)


def lose(network: Network, phase: str, lost: int, *, cut: bool) -> list[int]:
    """A host is lost before a step or under way; the others wait for it, and name it.

    Returns:
        The others.
    """
    left = [host for host in EVERY if host != lost]
    end = network.cut if cut else network.kill
    if phase == "under way":
        network.limit(lost, SLOW)
        network.start(EVERY if cut else left, "exchange", LONG)
        if not cut:
            network.hosts[lost].start("step", "exchange", LONG)
        end(lost)
    else:
        end(lost)
        network.start(left, phase, 64)
        if cut:
            network.hosts[lost].start("step", phase, 64)
    for kind, missing, text, waited in network.results(left):
        assert kind == "PeerTimeoutError", text
        # The store is on host 0: who has lost that knows of nobody.
        assert missing == (() if lost == 0 else (lost,)), text
        assert ("store does not answer" if lost == 0 else f"on node-{lost}") in text
        assert waited < BOUND_S + SLACK_S, text
    if cut:
        kind, missing, text, waited = network.hosts[lost].result()
        assert kind == "PeerTimeoutError", text
        if lost == 0:
            assert missing == (1, 2), text
        else:
            assert missing == (), text
            assert "store does not answer" in text
        assert waited < BOUND_S + SLACK_S, text
    return left


def go_on(network: Network, hosts: list[int], phase: str = "exchange") -> None:
    """New rails of these hosts work."""
    network.connect(hosts)
    network.start(hosts, phase, 1000)
    assert [result[0] for result in network.results(hosts)] == ["NoneType"] * len(hosts)


def usual(network: Network) -> None:
    """One network after another would take longer."""
    network.limit(1, SLOW)
    network.start(EVERY, "exchange", 20_000)  # 0.2 s
    assert [result[0] for result in network.results(EVERY)] == ["NoneType"] * HOSTS
    network.limit(1, None)
    lose(network, "gather", 2, cut=True)
    network.mend(2)
    network.connect(EVERY)
    go_on(network, lose(network, "under way", 1, cut=False))


def moves_nothing(network: Network, *, cut: bool) -> None:
    """The rail is too slow, or gone, and the store is there: all came, and nobody is named."""
    if cut:
        network.cut(1, ["rail"])
    else:
        network.limit(1, SLOW)
    network.start(EVERY, "exchange", LONG)
    for kind, missing, text, waited in network.results(EVERY):
        assert kind == "PeerTimeoutError"
        assert missing == (), text
        assert "Every rank of the rail came" in text
        assert waited < BOUND_S + SLACK_S
    if cut:
        network.mend(1)
    else:
        network.limit(1, None)
    go_on(network, [*EVERY])


def one_is_lost(network: Network, phase: str, lost: int, *, cut: bool) -> None:
    """The others go on, if they have the store; a link that is mended joins all."""
    left = lose(network, phase, lost, cut=cut)
    if cut:
        network.mend(lost)
        left = [*EVERY]
    if 0 in left:
        go_on(network, left)


def scenarios() -> Iterator[Any]:
    yield pytest.param(usual, id="usual")
    if depth() == 1:
        return
    yield pytest.param(partial(moves_nothing, cut=False), id="too slow")
    yield pytest.param(partial(moves_nothing, cut=True), id="no rail")
    for phase in PHASES:
        for lost in EVERY:
            for cut in (True, False):
                run = partial(one_is_lost, phase=phase, lost=lost, cut=cut)
                yield pytest.param(run, id=f"{phase}-{lost}-{'cut' if cut else 'killed'}")


@pytest.mark.parametrize("scenario", list(scenarios()))
def test_hosts_that_fail(scenario: Callable[[Network], None]) -> None:
    with Network(HOSTS, timeout_s=TIMEOUT_S) as network:
        processes = network.processes
        network.connect(EVERY)
        scenario(network)
    assert namespaces.are_gone(processes)


def test_nothing_is_left_where_a_test_fails() -> None:
    processes: list[int] = []

    def fail() -> None:
        with Network(1, timeout_s=TIMEOUT_S) as network:
            processes.extend(network.processes)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(processes) == 2
    assert namespaces.are_gone(processes)
