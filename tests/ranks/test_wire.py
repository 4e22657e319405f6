"""What a rank can find out after a lost connection, and a call that is finished twice."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from expertlink import (
    AbortError,
    ClosedError,
    MoECommunicatorConfig,
    PeerTimeoutError,
    layouts,
)
from expertlink.engines.ranks import handshake, status
from expertlink.engines.ranks.wire import Peer, Wire
from expertlink.launch import RankPool
from support import words
from support.small_calls import good, make

CPU = torch.device("cpu")


class Store:
    """A store whose every answer is that of a function."""

    def __init__(self, answer: Callable[[], object]) -> None:
        self._answer = answer

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *args: self._answer()


class LostGroup:
    """A process group of two ranks that has lost its connections."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def rank(self) -> int:
        return 1

    def size(self) -> int:
        return 2

    def get_group_store(self) -> Store:
        return self._store

    def alltoall_base(self, *args: object) -> object:
        raise RuntimeError("connection closed")


def lost() -> object:
    raise RuntimeError("broken pipe")


def exchange(wire: Wire) -> None:
    wire.enter("dispatch", 1)
    wire.exchange(torch.zeros(2, 1, device=CPU), torch.zeros(2, 1, device=CPU)).wait()


@pytest.mark.parametrize("exited", [True, False])
def test_without_the_store_ended_processes_are_found(exited: bool) -> None:
    """A rank may host the store. On one host, a rank can see which processes have ended."""
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        if exited:
            other.kill()
        wire = Wire(LostGroup(Store(lost)), device=CPU, timeout_s=5.0)
        wire.peers = [Peer(Peer.here().host, other.pid), Peer.here()]
        with pytest.raises(PeerTimeoutError, match="store does not answer") as info:
            exchange(wire)
        assert info.value.missing == ((0,) if exited else ())
        assert ("has exited" in str(info.value)) == exited
    finally:
        other.kill()
        other.communicate()


def test_a_wait_for_a_silent_store_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a rank that has been stopped."""
    monkeypatch.setattr(status, "ANSWER_S", 0.2)
    over = threading.Event()
    try:
        wire = Wire(LostGroup(Store(over.wait)), device=CPU, timeout_s=5.0)
        started = time.monotonic()
        with pytest.raises(PeerTimeoutError, match="store does not answer"):
            exchange(wire)
        wire.abort("no hope")
        assert time.monotonic() - started < 20.0
    finally:
        over.set()


class Racing:
    """A store in which a name that was just seen is removed before it is read."""

    def __init__(self) -> None:
        self._store = dist.HashStore()

    def check(self, names: list[str]) -> bool:
        there = self._store.check(names)
        if there:
            status.StatusStore(self._store).remove(names[0].removeprefix("expertlink/"))
        return there

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


def test_a_name_may_be_removed_while_others_read_it() -> None:
    """A store waits minutes for a name that is not there, and all other queries wait for it."""
    texts = status.StatusStore(Racing(), answer_s=1.0)
    texts.publish("abort", "1:boom")
    assert texts.read("abort") is None
    texts.publish("abort", "2:boom")
    assert texts.missing(["abort", "sign"]) == ["abort", "sign"]
    texts.publish_first("abort", "3:boom")
    texts.remove("never")
    assert texts.read("never") is None


class Late:
    """A store whose first answer is late."""

    def __init__(self) -> None:
        self._store, self._delay_s = dist.HashStore(), 0.5

    def check(self, names: list[str]) -> bool:
        delay_s, self._delay_s = self._delay_s, 0.0
        time.sleep(delay_s)
        return self._store.check(names)

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


def test_a_late_store_does_not_end_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bound is the time-out of the start, not that of one answer."""
    monkeypatch.setattr(status, "ANSWER_S", 0.1)
    store = Late()
    wire = Wire(LostGroup(store), device=CPU, timeout_s=10.0)  # type: ignore[arg-type]
    wire.enter("start", 0)
    other = status.StatusStore(store._store)
    other.key = "expertlink/handshake 0"
    other.publish("0/start/0/0", "0.000")
    wire.wait_for_all()


@pytest.mark.parametrize("layout", ["flat", "token_major", "rank_major", "expert_major"])
def test_a_call_that_failed_to_finish_can_be_finished_later(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its borrowed memory is returned once."""
    with make(output_layout=layout) as comm:
        fields = good()
        request = comm.dispatch_async(fields["input"], fields["topk_ids"], fields["weights"])
        with monkeypatch.context() as patch:
            patch.setattr(layouts, "place", lambda *args, **options: lost())
            with pytest.raises(RuntimeError, match="broken pipe"):
                request.wait()
        request.wait()
        engine: Any = comm._engine
        free = [storage.data_ptr() for storage in engine._workspace._free]
        assert len(set(free)) == len(free)


def test_words_of_a_gpu_that_is_not_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event that says they have come is one of the stream that copies them."""
    recorded: list[object] = []

    class Event:
        def record(self, stream: object = "of the current device") -> None:
            recorded.append(stream)

        def query(self) -> bool:
            return True

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("of", device))
    wire = Wire(LostGroup(Store(lost)), device=torch.device("cuda", 1), timeout_s=5.0)
    values = SimpleNamespace(shape=(2,), dtype=torch.int32, device=wire.device, is_cuda=True)
    host: Any = SimpleNamespace(copy_=lambda source, non_blocking: None)
    wire._pinned[values.shape, values.dtype] = host  # type: ignore[index]
    assert wire.to_host(values) is host  # type: ignore[arg-type]
    assert recorded == [("of", wire.device)]


# -- handshakes -----------------------------------------------------------------------------------


def test_handshakes_are_those_of_the_store_not_of_the_process() -> None:
    """A process that makes a new group may meet processes that have just been started."""

    def meet(store: dist.Store, number: int, attempt: int = 0) -> None:
        other = status.StatusStore(store)
        other.key = f"expertlink/handshake {number}"
        other.publish(f"{number}/initialize/{attempt}/0", "0.000")
        handshake._meet(Wire(LostGroup(store), device=CPU, timeout_s=0.5))  # type: ignore[arg-type]

    store = dist.HashStore()
    meet(store, 0)
    meet(store, 1)
    meet(dist.HashStore(), 0)
    meet(store, 2)
    with pytest.raises(PeerTimeoutError, match="missing: rank 0"):
        meet(store, 4)
    meet(store, 3, attempt=1)


class RankGroup(LostGroup):
    """One rank's group, as far as handshakes go."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        super().__init__(store)
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class Paused:
    """A store that lets a test act just before a word is replaced, once it is armed."""

    def __init__(self, store: dist.Store, act: Callable[[], object]) -> None:
        self._store, self._act = store, act
        self.armed = False

    def compare_set(self, name: str, before: str, text: str) -> bytes:
        if self.armed:
            self.armed = False
            self._act()
        return self._store.compare_set(name, before, text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


def handshake_wire(store: Any, rank: int, size: int, timeout_s: float) -> Wire:
    group: Any = RankGroup(store, rank, size)
    wire = Wire(group, device=CPU, timeout_s=timeout_s)
    wire.enter("initialize", 0)
    return wire


def meet_all(store: Any, size: int) -> list[int]:
    """Numbers of the handshake that all ranks make together."""
    wires = [handshake_wire(store, rank, size, 5.0) for rank in range(size)]
    with ThreadPoolExecutor(size) as threads:
        list(threads.map(Wire.wait_for_all, wires))
    return [wire.call for wire in wires]


def test_a_rank_that_gives_up_as_the_last_one_comes_has_met_it() -> None:
    """Or no rank has: their counts of handshakes must not come apart."""
    plain = dist.HashStore()
    last = handshake_wire(plain, 1, 2, 5.0)
    threads = ThreadPoolExecutor(1)
    came: list[Any] = []

    def come() -> None:
        came.append(threads.submit(last.wait_for_all))
        came[0].result(5)

    store = Paused(plain, come)
    store.armed = True
    handshake_wire(store, 0, 2, 0.05).wait_for_all()  # its time is over, and then rank 1 comes
    assert came
    assert meet_all(plain, 2) == [1, 1]
    threads.shutdown()


def test_ranks_do_not_pass_a_handshake_that_another_one_has_left() -> None:
    """Rank 0 leaves before rank 2 comes; rank 1 has seen it, and must not go on with rank 2."""
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as threads:
        seen = threads.submit(handshake_wire(store, 1, 3, 0.6).wait_for_all)
        with pytest.raises(PeerTimeoutError, match="missing: rank 2"):
            handshake_wire(store, 0, 3, 0.2).wait_for_all()
        last = threads.submit(handshake_wire(store, 2, 3, 0.6).wait_for_all)
        for future in (seen, last):
            with pytest.raises(PeerTimeoutError, match="missing: rank 0"):
                future.result(10)
    assert meet_all(store, 3) == [0, 0, 0]
    assert meet_all(store, 3) == [1, 1, 1]


def test_ranks_that_wait_in_turn_name_the_one_that_never_came() -> None:
    """Not those that have given up before."""
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        futures = [
            threads.submit(handshake_wire(store, rank, 3, 0.1 + 0.1 * rank).wait_for_all)
            for rank in range(2)
        ]
        for future in futures:
            with pytest.raises(PeerTimeoutError, match="missing: rank 2$"):
                future.result(10)


def stores() -> Iterator[dist.Store]:
    yield dist.HashStore()
    yield dist.PrefixStore("a", dist.HashStore())
    yield dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_one_of_several_ranks_publishes_first(tmp_path: Path) -> None:
    """All learn the same text, whatever the store; none is found between look and set."""
    for store in (*stores(), dist.FileStore(str(tmp_path / "store"), 1)):
        texts = status.StatusStore(store)
        assert texts.publish_first("failed", "1:a") == "1:a"
        assert texts.publish_first("failed", "2:b") == "1:a"
        texts.remove("failed")
        assert texts.publish_first("failed", "3:c") == "3:c"
        assert texts.replace("failed", "1:a", "4:d") == "3:c"
        assert texts.replace("failed", "3:c", "4:d") == texts.read("failed") == "4:d"


def test_two_ranks_at_once_do_not_both_publish_first() -> None:
    """The other one publishes after this one has looked."""

    class Looking(Paused):
        def check(self, names: list[str]) -> bool:
            there = self._store.check(names)
            self._store.set(names[0], "other")
            return there

    texts = status.StatusStore(Looking(dist.HashStore(), lambda: None))
    texts.publish_first("failed", "mine")
    plain = status.StatusStore(texts._store._store)
    assert texts.publish_first("failed", "late") == plain.read("failed") == "mine"


def test_a_store_that_cannot_compare_and_set() -> None:
    class Plain:
        def __init__(self) -> None:
            self._store = dist.HashStore()
            self.set, self.get, self.check = self._store.set, self._store.get, self._store.check

    texts = status.StatusStore(Plain())
    assert texts.publish_first("failed", "1:a") == "1:a"
    assert texts.publish_first("failed", "2:b") == "1:a"
    assert texts.replace("failed", "1:a", "2:b") == "2:b"


def test_configurations_of_many_ranks_fit_into_a_handshake() -> None:
    """Texts are cut; the hosts of a thousand ranks are longer than all that there is room for."""
    config = MoECommunicatorConfig(
        num_experts=4096,
        hidden_size=8,
        topk=2,
        max_tokens_per_rank=4,
        domains=[rank // 8 for rank in range(4096)],
        expert_map=[0] * 4096,
    )
    wire = Wire(None, device=CPU, timeout_s=5.0)
    placement = handshake.handshake(wire, config, engine="auto", check_inputs=True)
    assert placement.num_ranks == 1


# -- groups of other owners -----------------------------------------------------------------------


class Owned(LostGroup):
    """A group that must be left alone."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"{name} of a group that belongs to its owner")

    def _get_backend(self, device: torch.device) -> object:
        if device.type == "cpu":
            raise RuntimeError("no backend for the host")
        return object()


@pytest.mark.parametrize("device", [CPU, torch.device("cuda", 0)])
def test_a_group_is_not_aborted(device: torch.device) -> None:
    """Neither when this rank aborts nor when an error stops it in a call."""
    answered = dist.HashStore()
    group = Owned(answered)  # type: ignore[arg-type]
    wire = Wire(group, device=device, timeout_s=1.0)
    with pytest.raises(ValueError, match="boom"), wire.abort_on_error():
        raise ValueError("boom")
    wire.abort("twice")
    with pytest.raises(ClosedError, match="boom"):
        wire.check()
    other = Wire(group, device=device, timeout_s=0.2)
    other.enter("dispatch", 1)
    error = other._diagnose(TimeoutError("late"), phase="dispatch", call=1, started=0.0)
    assert isinstance(error, AbortError)


def test_words_of_gpu_communicators_over_gloo(rank_pools) -> None:
    """Handshake, texts and headers never touch the communicator's device."""
    results = rank_pools(2).run(words.over_gloo, timeout_s=60)
    for texts, placed, _ in results:
        assert texts == ["rank 0", "rank 1"]
        assert placed == ("meta", (0, 0, 1, 1, 2))
    text = "combine #2 did not happen: rank 1 refused it: ValueError: no"
    assert [refused for *_, refused in results] == [("PeerError", text), ("ValueError", "no")]


def test_lost_words_over_gloo_end_in_time() -> None:
    with RankPool(num_ranks=2) as pool:  # its group is of no use afterwards
        mine, theirs = pool.run(words.absent, timeout_s=60)
    kind, missing, waited = mine
    assert (kind, missing) == ("PeerTimeoutError", (1,))
    assert waited < 20
    assert theirs == "away"
