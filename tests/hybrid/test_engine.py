"""What building the hybrid engine agrees on, without a GPU; groups of hosts over gloo."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.distributed as dist

from expertlink import (
    AbortError,
    ConfigurationError,
    EngineUnavailableError,
    MoECommunicatorConfig,
    PeerError,
    PeerTimeoutError,
)
from expertlink.domains import Domains
from expertlink.engines.hybrid import build
from expertlink.engines.hybrid.engine import HybridEngine
from expertlink.engines.nvlink.build import all_or_none
from expertlink.engines.nvlink.engine import NvlinkEngine
from expertlink.engines.ranks.wire import Wire
from expertlink.launch import RankContext
from expertlink.routing import Placement, even_blocks

CPU = torch.device("cpu")
HOST_OF = (0, 1, 0, 1)


def wire_of(texts: list[str]) -> Wire:
    """A wire over which the others say these texts."""
    wire = Wire(None, device=CPU, timeout_s=1.0)
    wire.gather_text = lambda text: [text, *texts]  # type: ignore[method-assign]
    return wire


def test_what_hinders_one_rank_hinders_all() -> None:
    all_or_none(wire_of(["", ""]), None)
    with pytest.raises(EngineUnavailableError, match="rank 2: no memory"):
        all_or_none(wire_of(["", "no memory"]), None)
    with pytest.raises(EngineUnavailableError, match="rank 0: mine"):
        all_or_none(wire_of(["", "no memory"]), "mine")


def test_ranks_agree_about_the_rails_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTLINK_RAIL_CTAS", "4")
    assert build._agreed_ctas(wire_of(["4"])) == 4
    with pytest.raises(ConfigurationError, match="rank 0: 4, rank 1: unset"):
        build._agreed_ctas(wire_of([""]))
    monkeypatch.setenv("EXPERTLINK_RAIL_CTAS", "65")
    with pytest.raises(ConfigurationError, match="from 1 to 64"):
        build._agreed_ctas(wire_of(["4"]))
    monkeypatch.delenv("EXPERTLINK_RAIL_CTAS")
    assert build._agreed_ctas(wire_of(["", ""])) is None
    with pytest.raises(ConfigurationError, match="rank 1: unreadable"):
        build._agreed_ctas(wire_of(["unreadable"]))


def test_what_no_mode_can_serve_is_refused() -> None:
    domains = Domains(HOST_OF)
    placement = Placement.from_ranks(even_blocks(8, 4), num_ranks=4, device=CPU)
    fields: dict[str, Any] = {"num_experts": 8, "hidden_size": 64, "topk": 2}
    config = MoECommunicatorConfig(
        **fields, max_tokens_per_rank=8, mode="ll", combine_precision="exact"
    )
    with pytest.raises(EngineUnavailableError, match="exact"):
        build.mode_of(config, placement, domains)


def host_groups(ctx: RankContext) -> tuple[list[int], int, int]:
    """Joins the group of the own host and leaves it; ranks have unequal numbers of other groups."""
    others = [dist.new_group([ctx.rank], use_local_synchronization=True) for _ in range(ctx.rank)]
    wire = Wire(dist.group.WORLD, device=CPU, timeout_s=30.0)
    wire.number = 12345
    before = len(dist.distributed_c10d._world.pg_names)
    with build._host_group(wire, Domains(HOST_OF)) as group:
        everyone = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        dist.all_gather(everyone, torch.tensor([ctx.rank]), group=group)
    after = len(dist.distributed_c10d._world.pg_names)
    for other in others:
        dist.destroy_process_group(other)  # type: ignore[arg-type]
    return [int(each) for each in everyone], before, after


def test_hosts_have_groups_of_their_own(rank_pools) -> None:
    for rank, (everyone, before, after) in enumerate(rank_pools(4).run(host_groups, timeout_s=60)):
        assert everyone == ([0, 2] if HOST_OF[rank] == 0 else [1, 3])
        assert before == after


# -- errors that a rail has caused ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["dispatch", "combine", "weight_grads", "check_health", "refuse"])
def test_every_call_raises_what_the_monitor_knows(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Kernels only see that a peer has ended their waits."""
    abort = AbortError("rank 1 called abort", rank=1, reason="")
    cause = PeerTimeoutError(
        "rank 3 is missing", rank=0, missing=[3], phase="dispatch", call=1, waited_s=1.0
    )

    def ended(*_: object) -> None:
        raise abort

    monkeypatch.setattr(NvlinkEngine, name, ended)
    engine: Any = HybridEngine.__new__(HybridEngine)
    engine._rail_mode = types.SimpleNamespace(dispatches_queued=0)
    engine._monitor = types.SimpleNamespace(
        failure=None, check=lambda: None, explain=lambda error: cause
    )
    failed: list[str] = []
    engine.watchdog = types.SimpleNamespace(fail=failed.append)
    both = (None, None)
    arguments = {"weight_grads": both, "refuse": both, "check_health": ()}.get(name, (None,))
    with pytest.raises(PeerTimeoutError) as info:
        getattr(engine, name)(*arguments)
    assert info.value is cause
    assert failed == [str(cause)]


@pytest.mark.parametrize("has_failed", [True, False])
@pytest.mark.parametrize("name", ["dispatch", "combine", "weight_grads", "check_health"])
def test_verdicts_about_what_a_failed_rail_has_brought_are_none(
    monkeypatch: pytest.MonkeyPatch, name: str, has_failed: bool
) -> None:
    """The kernels behind a step that was aborted compare what an earlier call has left there."""
    verdict = PeerError("the ranks are not in the same call", ranks=[1])
    cause = PeerTimeoutError(
        "rank 3 is missing", rank=0, missing=[3], phase="dispatch", call=1, waited_s=1.0
    )

    def decided(*_: object) -> None:
        raise verdict

    monkeypatch.setattr(NvlinkEngine, name, decided)
    engine: Any = HybridEngine.__new__(HybridEngine)
    failure = cause if has_failed else None
    engine._rail_mode = types.SimpleNamespace(dispatches_queued=0)
    engine._monitor = types.SimpleNamespace(
        failure=failure, check=lambda: None, explain=lambda _: failure
    )
    failed: list[str] = []
    engine.watchdog = types.SimpleNamespace(fail=failed.append)
    arguments = {"weight_grads": (None, None), "check_health": ()}.get(name, (None,))
    with pytest.raises((PeerError, PeerTimeoutError)) as info:
        getattr(engine, name)(*arguments)
    assert info.value is (failure or verdict)
    assert failed == ([str(cause)] if has_failed else [])


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("name", ["dispatch", "combine", "weight_grads"])
def test_a_rank_without_memory_ends_the_call_of_all(
    monkeypatch: pytest.MonkeyPatch, name: str, capturing: bool
) -> None:
    """Its peers would wait for it; a capture is no call."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room for it")

    monkeypatch.setattr(NvlinkEngine, name, fail)
    monkeypatch.setattr("expertlink.engines.hybrid.engine.is_capturing", lambda: capturing)
    engine: Any = HybridEngine.__new__(HybridEngine)
    engine._rail_mode = types.SimpleNamespace(dispatches_queued=3)
    aborted: list[str] = []
    engine.abort = aborted.append
    with pytest.raises(torch.OutOfMemoryError):
        getattr(engine, name)(*((None, None) if name == "weight_grads" else (None,)))
    assert aborted == ([] if capturing else ["OutOfMemoryError: no room for it"])


def test_a_rank_that_took_part_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its dispatch is queued, only its output is missing: the others wait for nothing."""
    engine: Any = HybridEngine.__new__(HybridEngine)
    mode = engine._rail_mode = types.SimpleNamespace(dispatches_queued=3)

    def queue_and_fail(*_: object) -> None:
        mode.dispatches_queued += 1
        raise torch.OutOfMemoryError("no room for it")

    monkeypatch.setattr(NvlinkEngine, "dispatch", queue_and_fail)
    aborted: list[str] = []
    engine.abort = aborted.append
    with pytest.raises(torch.OutOfMemoryError):
        engine.dispatch(None)
    assert not aborted


@pytest.mark.parametrize("shared", [False, True])
def test_memory_of_messages_is_had_by_all_or_by_none(
    monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """A rank without room for them tells the others, and a rail that is new is closed."""
    closed: list[bool] = []
    rail = types.SimpleNamespace(close=lambda: closed.append(True))
    left: list[object] = []
    memory = types.SimpleNamespace(
        arena=types.SimpleNamespace(plan=None, leave=left.append),
        watchdog=types.SimpleNamespace(detach=left.append),
    )
    parts = memory, types.SimpleNamespace(rail=rail, leave=left.append)

    class Mode:
        plan_of = program_of = staticmethod(lambda *_: None)

        def __init__(self, *_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("no room for messages")

    monkeypatch.setattr(build, "mode_of", lambda *_: Mode)
    monkeypatch.setattr(build, "DeviceRunner", lambda *_, **__: "run")
    monkeypatch.setattr(build, "_shared", lambda *_: parts)
    monkeypatch.setattr(build, "new_memory", lambda *_, **__: parts[0])
    monkeypatch.setattr(build, "_connect", lambda *_, **__: parts[1])
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    config = MoECommunicatorConfig(
        num_experts=8, hidden_size=64, topk=2, max_tokens_per_rank=8, output_layout="rank_major"
    )
    wire = wire_of([""])
    monkeypatch.setattr(build, "_agreed_ctas", lambda _: None)
    with pytest.raises(EngineUnavailableError, match="rank 0: no room for messages"):
        build.build(
            config,
            wire=wire,
            placement=Placement.from_ranks(even_blocks(8, 4), num_ranks=4, device=CPU),
            domains=Domains(HOST_OF),
            check_inputs=False,
            share_with=object() if shared else None,
        )
    assert closed == ([] if shared else [True])
    assert left == [wire.number, wire.number, wire.publish_abort]
