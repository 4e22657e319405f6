"""A communicator from constructor to close: groups, copies, time-outs, aborts, what outlives it."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch

from expertlink import (
    AbortError,
    ClosedError,
    ConfigurationError,
    DispatchLayout,
    InputError,
    MoECommunicatorConfig,
)
from expertlink.launch import RankPool
from support import life
from support.oracle import Case
from support.small_calls import E, H, good, make, works

LAYOUTS = pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)


def test_groups(rank_pools) -> None:
    for two_d, text, foreign, other in rank_pools(2).run(life.groups, timeout_s=60):
        assert 'a mesh of one dimension, such as mesh["ep"]' in two_d
        assert "ConfigurationError: group='ep'" in text
        assert "a torch.distributed.ProcessGroup, a 1-D DeviceMesh, or None" in text
        assert "ConfigurationError: " in foreign
        assert "a group that this rank is in" in foreign
        assert "a torch.distributed.ProcessGroup" in other


def test_copies_and_pickles(rank_pools) -> None:
    for module, saved, config in rank_pools(2).run(life.copies, timeout_s=60):
        assert module == saved
        assert "a MoECommunicator cannot be pickled" in module
        assert "state_dict()" in module
        assert "dataclasses.replace(config, group=None)" in config


@LAYOUTS
def test_inference_mode(rank_pools, layout: DispatchLayout) -> None:
    case = Case((4, 3), 8, experts=4, topk=2, layout=layout, dtype=torch.float32)
    assert all(rank_pools(2).run(life.inference, case, timeout_s=60))
    assert all(rank_pools(2).run(life.inference_then_training, case, timeout_s=60))


# -- time-outs ------------------------------------------------------------------------------------

NO_TIMEOUTS = ["3", True, math.inf, -math.inf, math.nan, 0, -1.5, [1], 1j]


@pytest.mark.parametrize("value", NO_TIMEOUTS, ids=repr)
def test_no_timeouts(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "a finite, positive number of seconds"
    with make() as comm:
        for name in ("timeout_s", "startup_timeout_s"):
            with pytest.raises(ConfigurationError, match=f"{name}=.*{said}") as caught:
                make(**{name: value})
            assert repr(value) in str(caught.value)
            with pytest.raises(InputError, match=f"{name}=.*{said}") as refused:
                comm.set_timeouts(**{name: value})
            assert repr(value) in str(refused.value)
        works(comm)
    if isinstance(value, float):
        monkeypatch.setenv("EXPERTLINK_TIMEOUT", str(value))
        with pytest.raises(ConfigurationError, match=f"EXPERTLINK_TIMEOUT='{value}': {said}"):
            make()


@pytest.mark.parametrize("seconds", [1e9, 1e12, 1e300, 10**40])
def test_long_timeouts(rank_pools, seconds: float) -> None:
    case = life.CASE
    job = life.with_timeout
    assert all(rank_pools(2).run(job, case, seconds, timeout_s=60))


# -- the end --------------------------------------------------------------------------------------


def test_abort_before_the_handshake() -> None:
    comm = make()
    comm.abort("no weights")
    comm.abort("again")
    for call in (comm.initialize, comm.check_health, lambda: comm.dispatch(**good())):
        with pytest.raises(ClosedError, match="aborted on this rank: no weights"):
            call()
    comm.close()
    comm.abort("too late")
    with pytest.raises(ClosedError, match="no weights"):
        comm.initialize()


def test_abort_closes_calls() -> None:
    with make() as comm:
        fields = good()
        out, handle = comm.dispatch(**fields)
        request = comm.dispatch_async(**fields)
        comm.abort("boom")
        for call in (
            lambda: comm.dispatch(**fields),
            lambda: comm.combine(out.tokens, handle),
            comm.check_health,
            request.wait,
        ):
            with pytest.raises(ClosedError, match="boom"):
                call()


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_that_leaves_the_block_aborts(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = []
    comm = make()
    with contextlib.suppress(type(error)), comm:
        engine = comm._ready()
        monkeypatch.setattr(engine, "abort", reasons.append)
        raise error
    assert reasons == [f"{type(error).__name__}: {error}"]


def test_a_block_that_ends_without_an_error_aborts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str] = []

    def steps() -> Any:
        with make() as comm:
            monkeypatch.setattr(comm._ready(), "abort", reasons.append)
            yield

    generator = steps()
    next(generator)
    generator.close()
    list(steps())
    assert reasons == []


def test_other_ranks_learn_of_an_abort() -> None:
    with RankPool(num_ranks=2) as pool:  # its process group is of no use afterwards
        mine, theirs = pool.run(life.experts_raise, life.CASE, timeout_s=60)
    assert mine == "ValueError"
    assert isinstance(theirs, AbortError)
    assert (theirs.rank, theirs.reason) == (0, "ValueError: no such expert")


def test_health_without_a_handshake() -> None:
    comm = make()
    comm.check_health()
    assert comm._engine is None, "check_health() must not wait for other ranks"
    comm.close()
    with pytest.raises(ClosedError, match="closed"):
        comm.check_health()


def test_waiting_after_the_end() -> None:
    comm = make()
    fields = good()
    waits = []
    with torch.no_grad():
        waits.append(comm.dispatch_async(**fields).wait)
        _, handle = comm.dispatch(**fields, async_finish=True)
        waits.append(handle.wait)
        *_, hook = comm.dispatch(**fields, return_recv_hook=True)
        waits.append(hook)
        out, handle = comm.dispatch(**fields)
        waits.append(comm.combine_async(out.tokens, handle).wait)
    done = comm.dispatch_async(**fields)
    received = done.wait()
    comm.close()
    for wait in waits:
        with pytest.raises(ClosedError, match="closed"):
            wait()
    assert done.wait() is received


# -- what is said ---------------------------------------------------------------------------------


def test_a_handle_in_one_line() -> None:
    with make() as comm:
        _, handle = comm.dispatch(**good())
        assert repr(handle) == f"DispatchHandle(dispatch #1, 4 tokens, flat rows [7, {H}])"


def test_a_wrong_keyword_names_the_class() -> None:
    from expertlink import MoECommunicator

    config = MoECommunicatorConfig(
        num_experts=E, hidden_size=H, topk=1, max_tokens_per_rank=1, device="cpu"
    )
    with pytest.raises(TypeError, match=r"MoECommunicator\.__init__"):
        MoECommunicator(config, engine="nvlink")  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["input", "weights"])
def test_dtypes_under_autocast(name: str) -> None:
    fields = good()
    fields[name] = fields[name].bfloat16()
    with make() as comm:
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError) as caught:
            comm.dispatch(**fields)
        assert "torch.autocast" in str(caught.value)
        assert f"pass {name}.to(torch.float32)" in str(caught.value)
        with pytest.raises(InputError) as caught:
            comm.dispatch(**fields)
        assert "autocast" not in str(caught.value)


def test_autocast_and_casts() -> None:
    with make() as comm, torch.autocast("cpu", torch.bfloat16):
        works(comm)
