"""The launcher of local ranks: results come back, failures are told, nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conftest import RankPools, interruptible
from expertlink.errors import ExpertlinkError
from expertlink.launch import (
    LaunchError,
    RankContext,
    RankError,
    RankPool,
    RanksHungError,
    torchrun_context,
)
from expertlink.launch_folder import RankFolder

pytestmark = pytest.mark.usefixtures("spawned_ranks")

NUM_RANKS = 3
FOREVER_S = 3600.0


@pytest.fixture
def pool(rank_pools: RankPools) -> RankPool:
    return rank_pools(NUM_RANKS)


def sum_over_ranks(context: RankContext, scale: float, *, offset: float = 0.0) -> torch.Tensor:
    value = torch.tensor([scale * context.rank + offset])
    dist.all_reduce(value)
    return value


def describe(context: RankContext) -> tuple[RankContext, int, int, int]:
    return context, dist.get_rank(), dist.get_world_size(), torch.get_num_threads()


def fail_on(context: RankContext, ranks: tuple[int, ...]) -> int:
    if context.rank in ranks:
        raise KeyError(f"rank {context.rank} refuses")
    return context.rank


def raise_local_class(context: RankContext) -> None:
    class LocalError(Exception):
        """Cannot be pickled: no module knows it."""

    raise LocalError(f"of rank {context.rank}")


def sum_on_device(context: RankContext) -> tuple[int, float, float]:
    on_gpu = torch.tensor([context.rank + 1.0], device=context.device)
    on_cpu = on_gpu.cpu()
    dist.all_reduce(on_gpu)
    dist.all_reduce(on_cpu)
    return torch.cuda.current_device(), on_gpu.item(), on_cpu.item()


def die_or_return(context: RankContext) -> str:
    if context.rank == 1:
        os._exit(7)
    if context.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def talk_forever(context: RankContext) -> None:
    while True:
        context.send("still here")


def return_or_hang(context: RankContext) -> None:
    if context.rank == 1:
        wait_in_python()
    if context.rank == 2:
        wait_outside_of_python()


def wait_in_python() -> None:
    threading.Event().wait()


def wait_outside_of_python() -> None:
    dist.barrier()  # rank 0 never comes


def count_to(context: RankContext, limit: int) -> None:
    for number in range(limit):
        context.send((context.rank, number))


def hold_ranks() -> None:
    """Run in a process of its own: two ranks that never return."""

    def announce(rank: int, message: object) -> None:
        sys.stdout.write("." if rank == 0 else "")
        sys.stdout.flush()

    with RankPool(num_ranks=2) as held:
        held.run(announce_and_hang, on_message=announce, timeout_s=FOREVER_S)


def call_ranks_twice() -> None:
    """Run in a process of its own: a second call when a line has come in."""
    with RankPool(num_ranks=2) as held:
        held.run(fail_on, ())
        sys.stdout.write(".")
        sys.stdout.flush()
        sys.stdin.readline()
        held.run(fail_on, ())


def announce_and_hang(context: RankContext) -> None:
    context.send("running")
    wait_in_python()


def children() -> set[int | None]:
    return {child.pid for child in multiprocessing.active_children()}


def test_results_come_in_rank_order(pool: RankPool) -> None:
    assert pool.run(fail_on, ()) == list(range(NUM_RANKS))


def test_ranks_communicate_and_take_arguments(pool: RankPool) -> None:
    results = pool.run(sum_over_ranks, 2.0, offset=1.0)
    assert [result.item() for result in results] == [2.0 * (0 + 1 + 2) + NUM_RANKS] * NUM_RANKS


def test_context_agrees_with_the_process_group(pool: RankPool) -> None:
    cpu = torch.device("cpu")
    for rank, described in enumerate(pool.run(describe)):
        context = RankContext(rank=rank, num_ranks=NUM_RANKS, device=cpu)
        assert described == (context, rank, NUM_RANKS, 1)


def test_an_exception_is_raised_with_rank_and_traceback(pool: RankPool) -> None:
    with pytest.raises(RankError, match="rank 1 raised: KeyError: 'rank 1 refuses'") as caught:
        pool.run(fail_on, (1,))
    assert isinstance(caught.value, ExpertlinkError)
    assert list(caught.value.failures) == [1]
    failure = caught.value.failures[1]
    assert (failure.kind, failure.exception_type) == ("raised", "KeyError")
    assert isinstance(failure.exception, KeyError)
    assert "in fail_on" in failure.traceback
    assert failure.traceback in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).failures.keys() == {1}


def test_a_pool_stays_usable_after_exceptions(pool: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(fail_on, (0, 2))
    assert list(caught.value.failures) == [0, 2]
    assert pool.alive
    assert pool.run(fail_on, ()) == list(range(NUM_RANKS))


def test_exceptions_can_be_returned(pool: RankPool) -> None:
    results = pool.run(fail_on, (1,), return_exceptions=True)
    assert (results[0], results[2]) == (0, 2)
    assert isinstance(results[1], KeyError)


def test_exceptions_that_cannot_be_pickled_are_described(pool: RankPool) -> None:
    results = pool.run(raise_local_class, return_exceptions=True)
    for rank, result in enumerate(results):
        assert isinstance(result, RankError)
        failure = result.failures[rank]
        assert (failure.exception_type, failure.message) == ("LocalError", f"of rank {rank}")
        assert failure.exception is None


def test_a_call_that_cannot_be_pickled_leaves_the_pool_usable(pool: RankPool) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pool.run(lambda context: context.rank)
    assert pool.run(fail_on, ()) == list(range(NUM_RANKS))


def test_messages_arrive_by_rank_and_in_order(pool: RankPool) -> None:
    received: dict[int, list[object]] = {rank: [] for rank in range(NUM_RANKS)}
    pool.run(count_to, 5, on_message=lambda rank, message: received[rank].append(message))
    assert received == {rank: [(rank, n) for n in range(5)] for rank in range(NUM_RANKS)}


def test_messages_without_listener_are_dropped(pool: RankPool) -> None:
    assert pool.run(count_to, 5) == [None] * NUM_RANKS
    assert pool.run(fail_on, ()) == list(range(NUM_RANKS))


def test_an_error_in_the_listener_ends_the_ranks() -> None:
    def refuse(rank: int, message: object) -> None:
        raise ZeroDivisionError

    with RankPool(num_ranks=1) as own:
        with pytest.raises(ZeroDivisionError):
            own.run(announce_and_hang, on_message=refuse, timeout_s=FOREVER_S)
        assert not own.alive
        assert not children() & set(own.pids)


def test_dead_ranks_are_reported_with_the_results_of_the_survivors() -> None:
    with RankPool(num_ranks=NUM_RANKS) as own:
        results = own.run(die_or_return, return_exceptions=True)
        assert results[0] == "survived"
        for rank, message in ((1, "exit code 7"), (2, "killed by SIGKILL")):
            error = results[rank]
            assert isinstance(error, RankError)
            assert (error.failures[rank].kind, error.failures[rank].message) == ("died", message)
        assert not own.alive
        with pytest.raises(LaunchError, match="closed"):
            own.run(fail_on, ())


def test_a_rank_that_died_between_calls_is_reported() -> None:
    with RankPool(num_ranks=2) as own:
        os.kill(own.pids[1], signal.SIGKILL)
        with pytest.raises(RankError, match="rank 1 died: killed by SIGKILL"):
            own.run(sum_over_ranks, 1.0, timeout_s=FOREVER_S)


def test_hung_ranks_are_killed_and_every_stack_is_shown() -> None:
    with RankPool(num_ranks=NUM_RANKS) as own:
        own.run(fail_on, ())  # this module is imported
        with pytest.raises(RanksHungError) as caught:
            own.run(return_or_hang, timeout_s=1.0, return_exceptions=True)
        assert not own.alive
        assert not children() & set(own.pids)
    assert isinstance(caught.value, TimeoutError)
    assert {rank: f.kind for rank, f in caught.value.failures.items()} == {1: "hung", 2: "hung"}
    assert "in wait_in_python" in caught.value.failures[1].traceback
    assert "in wait_outside_of_python" in caught.value.failures[2].traceback
    for stack in ("in wait_in_python", "in wait_outside_of_python", "rank 0 had finished"):
        assert stack in str(caught.value)


def test_messages_do_not_extend_the_time_out() -> None:
    with RankPool(num_ranks=1) as own, pytest.raises(RanksHungError, match="in talk_forever"):
        own.run(talk_forever, timeout_s=0.5)


def test_a_closed_pool_leaves_no_process() -> None:
    own = RankPool(num_ranks=1)
    assert set(own.pids) <= children()
    own.close()
    own.close()
    assert not children() & set(own.pids)
    with pytest.raises(LaunchError, match="closed"):
        own.run(fail_on, ())


def start_holder(
    folder: Path, *, job: str = "hold_ranks", heed: bool = True
) -> subprocess.Popen[bytes]:
    """A process that runs a function of this module, with its own place for temporary files."""
    command = [sys.executable, "-c", f"import test_launch; test_launch.{job}()"]
    return subprocess.Popen(
        interruptible(command) if heed else command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.parametrize("how", ["ctrl-c", "SIGTERM", "SIGKILL"])
def test_ranks_and_their_folder_end_with_their_parent(how: str, tmp_path: Path) -> None:
    parent = start_holder(tmp_path)
    try:
        assert parent.stdout is not None
        assert parent.stdout.read(1) == b"."
        assert len(list(tmp_path.glob("expertlink-ranks-*"))) == 1
        if how == "ctrl-c":
            os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to the whole group
        else:
            parent.send_signal(signal.Signals[how])
        # The ranks hold the other ends of the pipes: this returns once the last one is gone.
        _, errors = parent.communicate(timeout=60)
    except BaseException:
        os.killpg(parent.pid, signal.SIGKILL)
        raise
    assert list(tmp_path.glob("*expertlink-*")) == []
    if how == "ctrl-c":
        assert errors.count(b"Traceback") == 1  # of the parent, none of the ranks
        assert b"KeyboardInterrupt" in errors
    else:
        assert errors == b""


def test_a_caller_that_ignores_ctrl_c_keeps_all_ranks(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job of a script
    try:
        parent = start_holder(tmp_path, job="call_ranks_twice", heed=False)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        assert parent.stdout is not None
        assert parent.stdout.read(1) == b"."
        os.killpg(parent.pid, signal.SIGINT)
        output, errors = parent.communicate(b"go on\n", timeout=60)
    except BaseException:
        os.killpg(parent.pid, signal.SIGKILL)
        raise
    assert (parent.returncode, output) == (0, b""), errors


def test_children_of_the_tests_react_to_ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
        done = subprocess.run(
            interruptible([sys.executable, "-c", code]), capture_output=True, timeout=60
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert b"KeyboardInterrupt" in done.stderr


def test_a_launch_removes_the_folder_of_a_launcher_killed_with_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parent = start_holder(tmp_path)
    try:
        assert parent.stdout is not None
        assert parent.stdout.read(1) == b"."
        [left] = tmp_path.glob("expertlink-ranks-*")
        RankFolder().remove()
        assert left.exists()  # its launcher lives
    finally:
        os.killpg(parent.pid, signal.SIGKILL)  # the ranks as well: nobody can tidy up
    parent.communicate(timeout=60)
    assert left.exists()
    with RankPool(num_ranks=1):
        assert not left.exists()
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_cannot_start_are_refused() -> None:
    with pytest.raises(LaunchError, match="num_ranks=0"):
        RankPool(num_ranks=0)
    with pytest.raises(LaunchError, match="every rank needs a GPU"):
        RankPool(num_ranks=torch.cuda.device_count() + 1, device="cuda")
    with pytest.raises(RankError, match="raised"):
        RankPool(num_ranks=1, backend="no-such-backend")


def test_torchrun_context_needs_the_environment_of_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun_context() is None
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        context = torchrun_context(backend="gloo")
        assert context is not None
        assert (context.rank, context.num_ranks) == (0, 1)
        assert dist.is_initialized()
        context.send("nobody listens")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "num_ranks", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (1, 2, 4)]
)
def test_ranks_on_gpus_communicate(rank_pools: RankPools, num_ranks: int) -> None:
    results = rank_pools(num_ranks, "cuda").run(sum_on_device)
    total = sum(range(1, num_ranks + 1))
    assert results == [(rank, total, total) for rank in range(num_ranks)]
