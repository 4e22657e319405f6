"""Steps of a rail that do not end: who is missing is named in time, and the process goes on."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from expertlink import AbortError, ClosedError, PeerTimeoutError
from expertlink.bench.rails import rail_environment
from expertlink.engines.hybrid import monitor as monitors
from expertlink.engines.hybrid.monitor import came, follow
from expertlink.engines.hybrid.rail import Marked, RailError
from expertlink.engines.hybrid.words import RANGE, DeviceWords
from expertlink.launch import RankError, RankPool
from support.depth import deep
from support.rails import Rank, Ranks, captured_steps_on_gpus, killed_in_an_exchange, ranks_on

TIMEOUT_S = 0.4
BOUND_S = TIMEOUT_S + 1.0
SHORT_S = 0.2
SLACK_S = 1.0  # for a machine with other things to do
TWO_BY_TWO = (0, 0, 1, 1)
THREE_HOSTS = (0, 1, 2)


@pytest.fixture(autouse=True)
def _threads_answer_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are threads of one process need no half second for a sign of life."""
    for name in ("_BEAT_S", "_FIRST_BEAT_S", "_EXPIRED_GRACE_S", "_LOST_GRACE_S", "_FOLLOW_S"):
        monkeypatch.setattr(monitors, name, getattr(monitors, name) / 3)


def errors_of(ranks: Ranks, *numbers: int) -> dict[int, tuple[BaseException, float]]:
    return {number: future.result(30) for number, future in ranks.start(*numbers).items()}


@pytest.mark.parametrize("kind", ["nccl", "copy"])
def test_a_rank_that_does_not_come_is_named(kind: str) -> None:
    """By all that wait; once, and then the communicator is closed. Others on the rail are not."""
    with ranks_on(THREE_HOSTS, timeout_s=TIMEOUT_S, kind=kind) as ranks:
        assert [error for error, _ in errors_of(ranks, 0, 1, 2).values()] == [None] * 3
        for number, (error, waited) in errors_of(ranks, 0, 2).items():
            assert isinstance(error, PeerTimeoutError)
            assert error.missing == (1,), error
            assert (error.rank, error.phase, error.call) == (number, "dispatch", 7)
            assert "host 1, rank 1 (a thread)" in str(error)
            assert waited < BOUND_S + SLACK_S
        for number in (0, 2):
            with pytest.raises(ClosedError, match="host 1, rank 1"):
                ranks.all[number].step()
            with pytest.raises(ClosedError):
                ranks.all[number].monitor.check()


def test_ranks_that_begin_apart_name_the_same_one() -> None:
    """One has just come when the other's time is over: it is not taken for missing."""
    with ranks_on(THREE_HOSTS, timeout_s=TIMEOUT_S) as ranks:
        first = ranks.start(0)[0]
        time.sleep(0.8 * TIMEOUT_S)
        second = ranks.start(1)[1]
        for future in (first, second):
            error, _ = future.result(30)
            assert isinstance(error, PeerTimeoutError)
            assert error.missing == (2,), error


def test_idle_ranks_are_not_named_beside_one_that_is_gone() -> None:
    """One has not begun the step, one is done with it: their signs of life say that they live."""
    with ranks_on((0, 1, 2, 3), timeout_s=SHORT_S) as ranks:
        waits, _, done, gone = ranks.all
        gone.monitor.stop()
        done.words.begin()
        done.words.end()
        waits.words.begin()
        await_failure(ranks, 0)
        with pytest.raises(PeerTimeoutError) as info:
            waits.monitor.check()
        assert info.value.missing == (3,), info.value


def test_idle_ranks_seldom_ask_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in a while as long as nobody asks them; not at all when it does not answer."""
    monkeypatch.setattr(monitors, "_LOOKS_PER_TIMEOUT", 2)
    with ranks_on((0, 1), timeout_s=SHORT_S) as ranks:
        rank, reads = ranks.all[0], []
        rank.monitor.stop()

        def read(name: str) -> None:
            reads.append(name)
            if len(reads) > 1:
                raise RuntimeError("the store is gone")

        monkeypatch.setattr(rank.status, "read", read)
        rank.monitor._next_look = 0.0
        for _ in range(3):
            rank.monitor.poll()
        assert len(reads) == 1
        rank.monitor._next_look = 0.0
        for _ in range(3):
            rank.monitor.poll()
        assert len(reads) == 2
        time.sleep(SHORT_S / 2)
        rank.monitor.poll()
        assert len(reads) == 2


def test_a_late_rank_learns_that_it_was_given_up() -> None:
    with ranks_on((0, 1), timeout_s=TIMEOUT_S) as ranks:
        error, _ = errors_of(ranks, 0)[0]
        assert isinstance(error, PeerTimeoutError)
        late, waited = errors_of(ranks, 1)[1]
        assert isinstance(late, PeerTimeoutError)
        assert late.missing == ()
        assert "rank 0 has given up this rank as late" in str(late)
        assert waited < BOUND_S + SLACK_S


def test_a_slow_rank_is_waited_for() -> None:
    with ranks_on((0, 1), timeout_s=5.0) as ranks:
        first = ranks.start(0)[0]
        time.sleep(0.6)
        second = ranks.start(1)[1]
        assert first.result(30)[0] is second.result(30)[0] is None


def test_steps_may_go_on_for_longer_than_the_time_out() -> None:
    """Each has its own time."""
    with ranks_on((0, 1), timeout_s=0.4) as ranks:

        def steps(number: int) -> None:
            for _ in range(6):
                time.sleep(0.1 * number)
                assert ranks.all[number].step() == [1 - number]

        for future in [ranks.threads.submit(steps, number) for number in range(2)]:
            future.result(30)


def wait_inside(rank: int, missing: int) -> PeerTimeoutError:
    """The error of a wait inside a host that has expired."""
    text = f"rank {rank} waited for rank {missing}"
    return PeerTimeoutError(
        text, rank=rank, missing=[missing], phase="dispatch", call=7, waited_s=1.0
    )


def await_failure(ranks: Ranks, number: int) -> None:
    """Waits until a monitor has found out why no step is possible."""
    deadline = time.monotonic() + 5
    while ranks.all[number].monitor.failure is None and time.monotonic() < deadline:
        time.sleep(0.01)


def test_the_cause_is_looked_for_inside_the_host() -> None:
    """Rank 2 waits for rank 3 of its own host, and so does not come to its rail."""
    with ranks_on(TWO_BY_TWO, timeout_s=TIMEOUT_S) as ranks:
        waiting = ranks.start(0)
        time.sleep(TIMEOUT_S / 2)
        ranks.faults[2] = wait_inside(2, 3)
        error, waited = waiting[0].result(30)
        assert isinstance(error, PeerTimeoutError)
        assert error.missing == (3,)
        assert waited < BOUND_S + SLACK_S
        await_failure(ranks, 2)
        with pytest.raises(PeerTimeoutError, match="waited for rank 3"):
            ranks.all[2].monitor.check()


def test_waits_inside_the_host_are_not_the_rails() -> None:
    """The kernel that says that a step is done waits for rank 1 before. Nothing is wrong with the
    rail: rank 2 is done. The wait has begun after the step, so it expires after the step's time."""
    with ranks_on(TWO_BY_TWO, timeout_s=SHORT_S) as ranks:
        waits, done = ranks.all[0], ranks.all[2]
        waits.monitor.done_inside = True
        for words in (waits.words, done.words):
            words.begin()
        done.words.end()
        time.sleep(1.8 * SHORT_S)
        assert waits.monitor.failure is None
        ranks.faults[0] = wait_inside(0, 1)
        await_failure(ranks, 0)
        with pytest.raises(PeerTimeoutError, match="rank 0 waited for rank 1") as info:
            waits.monitor.check()
        assert info.value.missing == (1,)


def test_kernels_that_say_that_steps_are_done_are_noticed() -> None:
    with ranks_on((0, 1), timeout_s=SHORT_S) as ranks:
        empty = torch.zeros((0, 8), dtype=torch.uint8, device="cpu")

        def step(rank: Rank, marked: Marked) -> None:
            rank.rail.exchange(empty, empty, [0, 0], [0, 0], marked=marked)

        for marked in (Marked.NOT, Marked.BEGUN | Marked.DONE):
            list(ranks.threads.map(step, ranks.all, [marked] * 2))
            assert ranks.all[0].monitor.done_inside == bool(marked & Marked.DONE)


def test_a_step_that_ends_while_the_others_are_looked_for_has_not_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last rank came when the time was just over: nobody is missing, and rows moved."""
    with ranks_on((0, 1), timeout_s=SHORT_S) as ranks:
        rank = ranks.all[0]
        looked: list[bool] = []

        def all_came(*_: object) -> list[int]:
            looked.append(True)
            rank.words.end()
            return []

        monkeypatch.setattr(rank.monitor, "_without_sign", all_came)
        rank.words.begin()
        time.sleep(1.5 * SHORT_S)
        assert looked == [True]
        rank.monitor.check()


def test_a_monitor_that_fails_bounds_steps_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ValueError("no such phase")

    with ranks_on((0, 1), timeout_s=60.0) as ranks:
        waiting = ranks.start(0)[0]
        monkeypatch.setattr(ranks.all[0].monitor, "_fault", broken)
        error, _ = waiting.result(10)
        assert isinstance(error, PeerTimeoutError)
        assert "no such phase" in str(error)


@pytest.mark.parametrize("by_host", [False, True], ids=["monitor", "host"])
def test_the_cause_is_looked_for_on_the_rails_of_peers(by_host: bool) -> None:
    """Rank 0 waits for rank 1 of its host, which waits for rank 3 on its rail."""
    with ranks_on(TWO_BY_TWO, timeout_s=TIMEOUT_S) as ranks:
        waiting = ranks.start(1)
        time.sleep(TIMEOUT_S)
        monitor = ranks.all[0].monitor
        if by_host:
            found = monitor.explain(wait_inside(0, 1))
        else:
            ranks.faults[0] = wait_inside(0, 1)
            await_failure(ranks, 0)
            found = monitor.failure
        assert isinstance(found, PeerTimeoutError)
        assert found.missing == (3,), found
        error, _ = waiting[1].result(30)
        assert isinstance(error, PeerTimeoutError)
        assert error.missing == (3,), error


def test_all_name_the_failure_that_was_first() -> None:
    """Also a rank that has looked for it just before another one posts it."""
    with ranks_on(THREE_HOSTS, timeout_s=TIMEOUT_S) as ranks:
        publish_first = ranks.all[0].status.publish_first

        def late(name: str, text: str) -> str:
            ranks.all[2].status.publish(name, "2:1:rank 1 is missing")
            return publish_first(name, text)

        ranks.all[0].status.publish_first = late  # type: ignore[method-assign]
        error, _ = errors_of(ranks, 0)[0]
        assert isinstance(error, PeerTimeoutError)
        assert error.missing == (1,), error  # itself it misses 2 as well
        with pytest.raises(ClosedError, match="rank 2 reports: rank 1 is missing"):
            ranks.all[0].monitor.check()


def test_a_peer_whose_rail_failed_has_not_aborted() -> None:
    """It ends the waits of its host with the sign of an abort."""
    with ranks_on(TWO_BY_TWO, timeout_s=TIMEOUT_S) as ranks:
        errors_of(ranks, 1)
        found = ranks.all[0].monitor.explain(AbortError("rank 1 called abort", rank=1, reason=""))
        assert isinstance(found, PeerTimeoutError)
        assert found.missing == (3,), found
        with pytest.raises(ClosedError):
            ranks.all[0].monitor.check()


def test_an_abort_inside_a_host_stays_one() -> None:
    with ranks_on(TWO_BY_TWO, timeout_s=TIMEOUT_S) as ranks:
        ranks.all[1].status.publish("abort", "1:number:no room")
        abort = AbortError("rank 1 called abort: no room", rank=1, reason="no room")
        assert ranks.all[0].monitor.explain(abort) is abort


def test_waits_end_when_a_rank_aborts() -> None:
    with ranks_on((0, 1), timeout_s=60.0) as ranks:
        waiting = ranks.start(0)
        ranks.all[1].status.publish("abort", "1:number:no room: at all")
        error, waited = waiting[0].result(30)
        assert isinstance(error, AbortError)
        assert (error.rank, error.reason) == (1, "no room: at all")
        assert waited < 5


@pytest.mark.parametrize("done_inside", [False, True])
def test_nobody_is_named_where_all_came(done_inside: bool) -> None:
    """A cut network: all wait in the same step. Waits inside hosts have had their time too."""
    with ranks_on((0, 1), timeout_s=SHORT_S) as ranks:
        began = time.monotonic()
        for rank in ranks.all:
            rank.monitor.done_inside = done_inside
            rank.words.begin()
        for rank in ranks.all:
            await_failure(ranks, rank.number)
            assert time.monotonic() - began < BOUND_S + done_inside * SHORT_S + SLACK_S
            with pytest.raises(PeerTimeoutError, match="network between the hosts") as info:
                rank.monitor.check()
            assert info.value.missing == ()


def test_the_network_is_not_blamed_by_who_knows_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: str) -> str | None:
        raise RuntimeError("connection reset")

    with ranks_on((0, 1), timeout_s=60.0) as ranks:
        rank = ranks.all[0]
        monkeypatch.setattr(rank.status, "read", gone)
        text = str(rank.monitor.lost(RailError("a connection broke")))
        assert "store does not answer" in text
        assert "moves nothing" not in text


def test_two_communicators_fail_apart() -> None:
    with (
        ranks_on((0, 1), timeout_s=TIMEOUT_S) as ranks,
        ranks_on((0, 1), timeout_s=TIMEOUT_S) as others,
    ):
        error, _ = errors_of(ranks, 0)[0]
        assert isinstance(error, PeerTimeoutError)
        assert [error for error, _ in errors_of(others, 0, 1).values()] == [None] * 2


def test_close_during_a_hang_ends_it() -> None:
    with ranks_on((0, 1), timeout_s=60.0) as ranks:
        waiting = ranks.start(0)[0]
        time.sleep(0.1)
        ranks.all[0].rail.abort()
        ranks.all[0].rail.close()
        assert waiting.result(10)[0] is not None


def test_a_stopped_process_gets_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps, the words do not move: the wait has not lasted as long as the clock says."""
    with ranks_on((0, 1), timeout_s=30.0) as ranks:
        rank = ranks.all[0]
        rank.monitor.stop()
        rank.words.begin()
        rank.monitor.poll()
        later = time.monotonic() + 1e4
        monkeypatch.setattr(monitors.time, "monotonic", lambda: later)
        rank.monitor.poll()
        assert rank.monitor.failure is None


def test_dropped_ranks_leave_no_thread() -> None:
    ranks = Ranks((0, 1), timeout_s=1.0, kind="copy")
    gone = [weakref.ref(rank.monitor) for rank in ranks.all]
    ranks.threads.shutdown()
    del ranks
    deadline = time.monotonic() + 5
    gc.collect()
    while any(monitor() is not None for monitor in gone):  # the thread may have been in a poll
        assert time.monotonic() < deadline
        time.sleep(0.01)
        gc.collect()
    while any(thread.name == "expertlink-monitor" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


_EXIT = """
import os, sys, time
from support.rails import Ranks
ranks = Ranks((0, 1), timeout_s=60.0)
ranks.start(0)
time.sleep(0.3)
pid = os.fork()
if pid == 0:
    for rank in ranks.all:
        rank.rail.close()  # of the parent: nothing happens
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
ranks.start(1)[1].result(20)
print("worked", flush=True)
ranks.start(0)
time.sleep(0.3)
ranks.all[0].rail.abort()  # the pool waits for its threads
"""


def test_exit_with_open_rails_and_forks() -> None:
    """Nobody closes: the interpreter ends cleanly. A fork neither waits nor closes connections."""
    done = subprocess.run(
        [sys.executable, "-c", _EXIT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "worked\n"


def test_a_killed_rank_is_named_and_the_others_go_on() -> None:
    """Processes: the others name it, live, and make new rails."""
    host_of, culprit = (0, 1, 2), 1
    with RankPool(num_ranks=len(host_of)) as pool:
        job = pool.run(
            killed_in_an_exchange,
            host_of,
            culprit,
            TIMEOUT_S,
            timeout_s=60,
            return_exceptions=True,
        )
    died = job.pop(culprit)
    assert isinstance(died, RankError)
    assert died.failures[culprit].kind == "died"
    for result, other in zip(job, (2, 0), strict=True):
        assert isinstance(result, tuple), result
        kind, message, missing, waited, again, found = result
        assert kind == "PeerTimeoutError", message
        assert missing == (culprit,), message
        assert "host 1, rank 1 (process" in message
        assert "has exited" in message
        assert waited < BOUND_S + SLACK_S
        assert again == "ClosedError"
        assert found == [other]


@pytest.mark.gpu
def test_replays_are_counted() -> None:
    """Steps of a graph are counted by its replays, in the order of their stream."""
    device = torch.device("cuda", 0)
    words = DeviceWords(device)
    side = torch.cuda.Stream()
    words.begin()
    torch.cuda.synchronize()
    assert words.read() == (1, 0)
    words.end(side)
    torch.cuda.synchronize()
    assert words.read() == (1, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            words.begin()
            words.end()
        words.begin()
    assert words.read() == (1, 1)
    for replays in range(1, 4):
        graph.replay()
        torch.cuda.synchronize()
        assert words.read() == (1 + 4 * replays, 1 + 3 * replays)
    words.release()


@pytest.mark.gpu(2)
@pytest.mark.parametrize("rail", ["sockets", "nvlink"])
def test_a_replay_that_one_rank_makes_alone_ends_in_time(rail: str) -> None:
    """Over NCCL: the missing rank is named, the context lives, a new rail works."""
    timeout_s = 3.0
    environments = [
        rail_environment(rank, ranks=2, hosts=2, rail=rail, ctas=None) for rank in range(2)
    ]
    with RankPool(num_ranks=2, device="cuda", environments=environments) as pool:
        first, late = pool.run(captured_steps_on_gpus, timeout_s, timeout_s=120)
    message, missing, waited = first
    assert missing == (1,), message
    assert "host 1, rank 1 (process" in message
    assert waited < timeout_s + 1 + SLACK_S
    assert late[1] == (), late[0]


@pytest.mark.parametrize(
    ("verdicts", "ends"),
    [
        ({0: [1]}, [1]),
        ({0: [1], 1: [2]}, [2]),
        ({0: [1, 3], 1: [2]}, [2, 3]),
        ({0: [1], 1: []}, [1]),
        ({0: [1], 1: [0]}, [1]),
        ({0: [1], 1: [2], 2: [1]}, [1]),
        ({0: [1], 1: [0, 2]}, [2]),
    ],
)
def test_who_is_missed_in_the_end(verdicts: dict[int, list[int]], ends: list[int]) -> None:
    assert follow(0, verdicts) == ends


def test_verdicts_end_outside_of_themselves() -> None:
    """All that reach the same ranks name the same ones, and nobody who has said whom he misses."""
    for seed in range(deep(200)):
        draw = random.Random(seed)
        ranks = range(draw.randint(2, 7))
        verdicts = {
            rank: draw.sample(ranks, draw.randint(1, len(ranks)))
            for rank in draw.sample(ranks, draw.randint(1, len(ranks)))
        }
        for rank in verdicts:
            found = follow(rank, verdicts)
            if any(other not in verdicts for other in found):
                assert not set(found) & set(verdicts)


def test_steps_are_compared_across_the_wrap() -> None:
    assert came("5 1", 5)
    assert came("6 9", 5)
    assert not came("4 3", 5)
    assert came("1 1", RANGE - 1)
    assert not came(f"{RANGE - 1} 1", 1)
