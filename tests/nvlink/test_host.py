"""What the host of the nvlink engine does around its launches; needs no GPU."""

from __future__ import annotations

import gc
import time
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from expertlink import (
    ClosedError,
    EngineUnavailableError,
    HandleError,
    InputError,
    MoECommunicatorConfig,
    TooManyTokensError,
)
from expertlink.engines.nvlink import build, tuning, watchdog
from expertlink.engines.nvlink.ht.mode import HtMode
from expertlink.engines.nvlink.launch import KernelName
from expertlink.engines.nvlink.ll.arguments import Flag
from expertlink.engines.nvlink.shared import Phase
from expertlink.engines.nvlink.watchdog import Watchdog
from expertlink.engines.ranks.header import Operation, Status
from expertlink.routing import Placement, even_blocks
from support.fake_gpu import SMS, E, FakeGpu, inputs

LL: dict[str, Any] = {"mode": "ll", "output_layout": "expert_major"}
STATIC: dict[str, Any] = {"output_layout": "token_major", "static_shapes": True}
MODES = pytest.mark.parametrize("fields", [STATIC, LL], ids=["ht", "ll"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


@MODES
@torch.no_grad()
def test_kernels_get_addresses_of_tensors_that_collectives_return(
    gpu: FakeGpu, fields: dict[str, Any]
) -> None:
    """Results of functional collectives stand for other tensors, and have no memory themselves."""
    seen: list[list[int | None]] = []

    def note(name: KernelName, arguments: Any, words: Any) -> None:
        dispatched = name is KernelName.DISPATCH
        names = ("x", "ids", "weights") if dispatched else ("rows", "ids", "out")
        seen.append([getattr(arguments, each) for each in names])

    comm = gpu.communicator(**fields)
    gpu.kernel = note
    x, ids, weights = map(AsyncCollectiveTensor, inputs())
    out, handle = comm.dispatch(x, ids, weights)
    comm.combine(AsyncCollectiveTensor(out.tokens), handle)
    assert len(seen) == 2
    assert all(all(addresses) for addresses in seen)


@MODES
@torch.no_grad()
def test_every_call_names_the_dispatch_that_it_belongs_to(
    gpu: FakeGpu, fields: dict[str, Any]
) -> None:
    """By the address of the number that the dispatch's kernel leaves."""
    comm = gpu.communicator(**fields)
    x, ids, weights = inputs()
    out, first = comm.dispatch(x, ids, weights)
    again, second = comm.dispatch(x, ids, previous_handle=first)
    comm.combine(again.tokens, second)
    comm.combine(out.tokens, first)
    made, cached, of_second, of_first = gpu.launched
    assert made["subject"] is None
    assert cached["subject"] == made["origin"] == of_first["subject"]
    assert cached["origin"] == of_second["subject"] != made["origin"]
    operations = [launch["operation"] for launch in gpu.launched]
    assert operations == [
        Operation.DISPATCH,
        Operation.CACHED_DISPATCH,
        Operation.COMBINE,
        Operation.COMBINE,
    ]


@pytest.mark.parametrize(
    ("fields", "travel"),
    [
        ({"output_layout": "flat", "static_shapes": True}, True),
        (LL, False),
        ({**LL, "combine_precision": "exact"}, False),
    ],
    ids=["ht", "ll", "ll-exact"],
)
@torch.no_grad()
def test_a_dispatch_brings_weights_where_kernels_of_combines_cannot(
    gpu: FakeGpu, fields: dict[str, Any], travel: bool
) -> None:
    """Then the combine is of that dispatch."""
    comm = gpu.communicator(**fields)
    x, ids, weights = inputs()
    out, handle = comm.dispatch(x, ids)
    comm.combine(out.tokens, handle, topk_weights=weights)
    comm.combine(out.tokens, handle)
    made, *brought, given, plain = gpu.launched
    assert [launch["operation"] for launch in brought] == [Operation.CACHED_DISPATCH] * travel
    assert all(launch["subject"] == made["origin"] for launch in brought)
    assert given["subject"] == (brought[0]["origin"] if travel else made["origin"])
    assert plain["subject"] == made["origin"]
    if not travel:
        here = [bool(launch["flags"] & Flag.TOKEN_WEIGHTS) for launch in (given, plain)]
        assert here == [True, False]
        assert given["signature"] != plain["signature"]
        exact = "combine_precision" in fields
        kernel = KernelName.COMBINE if exact else KernelName.COMBINE_WEIGHTS
        assert [given["name"], plain["name"]] == [kernel, KernelName.COMBINE]


@torch.no_grad()
def test_a_cached_dispatch_into_the_same_buffers_has_a_number_of_its_own(gpu: FakeGpu) -> None:
    comm = gpu.communicator(**LL)
    buffers = comm.create_buffers()
    x, ids, weights = inputs()
    _, handle = comm.dispatch(x, ids, weights, output_buffer=buffers)
    comm.dispatch(x, ids, previous_handle=handle, output_buffer=buffers)
    comm.dispatch(x, ids, weights, output_buffer=buffers)
    first, cached, later = gpu.launched
    assert cached["subject"] == first["origin"] != cached["origin"]
    assert later["subject"] is None


@MODES
@torch.no_grad()
def test_a_capture_is_no_call(gpu: FakeGpu, fields: dict[str, Any]) -> None:
    comm = gpu.communicator(**{**fields, "check_inputs": False})
    engine: Any = comm._engine
    engine._check = True  # agreement of a single rank
    x, ids, weights = inputs()
    comm.dispatch(x, ids, weights)
    before = engine._wire.call
    gpu.capture = 3
    for _ in range(3):
        out, handle = comm.dispatch(x, ids, weights)
        comm.combine(out.tokens, handle)
    launched = len(gpu.launched)
    with pytest.raises(InputError, match="input has shape"):
        comm.dispatch(x[:, :3], ids, weights)
    assert len(gpu.launched) == launched, "nobody is told of a refusal in a capture"
    gpu.capture = 0
    assert engine._wire.call == before
    comm.dispatch(x, ids, weights)
    assert engine._wire.call == before + 1


@torch.no_grad()
def test_a_dispatch_that_waits_is_refused_in_a_capture(gpu: FakeGpu) -> None:
    comm = gpu.communicator(output_layout="token_major")
    x, ids, weights = inputs()
    out, handle = comm.dispatch(x, ids, weights)
    gpu.capture = 3
    launched = len(gpu.launched)
    with pytest.raises(InputError, match="static_shapes=True"):
        comm.dispatch(x, ids, weights)
    assert len(gpu.launched) == launched
    comm.dispatch(x, ids, previous_handle=handle)
    comm.combine(out.tokens, handle)
    comm.check_health()


@torch.no_grad()
def test_buffers_are_not_used_under_a_half_that_is_left(gpu: FakeGpu) -> None:
    comm = gpu.communicator(**LL)
    buffers = comm.create_buffers()
    x, ids, weights = inputs()
    out, handle = comm.dispatch(x, ids, weights, output_buffer=buffers)
    _, hook = comm.combine(out.tokens, handle, return_recv_hook=True)
    comm.dispatch(x, ids, weights, output_buffer=buffers, return_recv_hook=True)
    halves = [launch["flags"] & 3 for launch in gpu.launched]
    both, send, receive = (
        Flag.SEND | Flag.RECEIVE,
        Flag.SEND,
        Flag.RECEIVE,
    )
    assert halves == [both, send, receive, send], "the combine is received before the dispatch"
    hook()
    assert len(gpu.launched) == 4


@torch.no_grad()
def test_a_hook_of_a_closed_communicator_launches_nothing(gpu: FakeGpu) -> None:
    comm = gpu.communicator(**LL)
    _, _, hook = comm.dispatch(*inputs(), return_recv_hook=True)
    comm.close()
    launched = len(gpu.launched)
    with pytest.raises(ClosedError):
        hook()
    assert len(gpu.launched) == launched


@torch.no_grad()
def test_handles_from_before_clear_mask_are_refused(gpu: FakeGpu) -> None:
    comm = gpu.communicator(**LL)
    x, ids, weights = inputs()
    out, handle = comm.dispatch(x, ids, weights)
    comm.clear_mask()
    for call in (
        lambda: comm.combine(out.tokens, handle),
        lambda: comm.dispatch(x, ids, previous_handle=handle),
    ):
        with pytest.raises(HandleError, match="clear_mask"):
            call()
    comm.dispatch(x, ids, weights)


@torch.no_grad()
def test_a_refused_handle_is_one_call(gpu: FakeGpu) -> None:
    """Where hosts agree before calls they compare the numbers of these."""
    comm = gpu.communicator(**LL, check_inputs=True)
    x, ids, weights = inputs()
    out, handle = comm.dispatch(x, ids, weights)
    comm.clear_mask()
    with pytest.raises(HandleError, match="clear_mask"):
        comm.combine(out.tokens, handle)
    _, after = comm.dispatch(x, ids, weights)
    assert after.call == handle.call + 3


@torch.no_grad()
def test_launches_leave_sms_to_other_arenas(gpu: FakeGpu) -> None:
    """A launch lets the next one begin early only while its arena is alone on the GPU."""

    def is_alone(comm: Any) -> bool:
        comm.dispatch(*inputs())
        return not gpu.launched[-1]["flags"] & Flag.ALONE

    gc.collect()
    first = gpu.communicator(**LL)
    assert is_alone(first)
    second = gpu.communicator(**LL)
    assert not is_alone(first)
    assert not is_alone(second)
    second.close()
    assert is_alone(first)
    third = gpu.communicator(**LL)
    assert not is_alone(first)
    del third  # nobody closes it
    gc.collect()
    assert is_alone(first)


@pytest.mark.parametrize("fields", [{"output_layout": "token_major"}, LL], ids=["ht", "ll"])
@torch.no_grad()
def test_a_dropped_communicator_is_freed_without_a_collector(
    gpu: FakeGpu, fields: dict[str, Any]
) -> None:
    gc.collect()
    gc.disable()
    try:
        comm = gpu.communicator(**fields)
        out, handle = comm.dispatch(*inputs())
        comm.combine(out.tokens, handle)
        engine: Any = comm._engine
        seen = [weakref.ref(engine), weakref.ref(engine.arena), weakref.ref(engine.watchdog)]
        words = engine.watchdog.address
        del comm, engine, out, handle
        assert [ref() for ref in seen] == [None] * 3
    finally:
        gc.enable()
    kept = [memory.data_ptr() for memory in watchdog._abandoned]
    assert words in kept, "a kernel may still read the words of what nobody closed"


@torch.no_grad()
def test_an_interrupted_wait_aborts(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = gpu.communicator(output_layout="token_major")
    comm.dispatch(*inputs())
    gpu.mails = False

    class Clock:
        monotonic = time.monotonic

        @staticmethod
        def sleep(_: float) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(watchdog, "time", Clock)
    with pytest.raises(KeyboardInterrupt):
        comm.dispatch(*inputs())
    engine: Any = comm._engine
    assert engine.arena._abort_words[0].tolist() == [1], "its kernels, and those of peers, end"
    with pytest.raises(ClosedError, match="interrupted by KeyboardInterrupt"):
        comm.check_health()


HEAD = [int(Operation.COMBINE), 11, 5, 0, -1, 128, 0, 2, 11, 0, 0]


@pytest.mark.parametrize(
    ("changed", "kind", "text"),
    [
        ({7: 3}, "PeerError", "rank 0 is in combine #5 of dispatch #2; rank 1 is in combine #5 of"),
        ({0: 2}, "PeerError", "rank 1 is in cached dispatch #5 of dispatch #2"),
        ({1: 12, 8: 12}, "PeerError", "rank 1 is in combine #5 of dispatch #2 of another comm"),
        (
            {8: 12},
            "PeerError",
            "rank 1 is in combine #5 of dispatch #2 made by communicator 00",
        ),
        ({0: 77}, "PeerError", "rank 1 is in an unknown operation (77) #5"),
        ({3: 1}, "PeerError", "rank 1 refused combine #5 of dispatch #2"),
        ({5: 64}, "InputError", "bytes of a row: 128 on rank 0, 64 on rank 1"),
        ({9: 1}, "InputError", "some ranks pass weights, others do not"),
    ],
)
def test_heads_that_differ_are_one_text_on_all_ranks(
    gpu: FakeGpu, changed: dict[int, int], kind: str, text: str
) -> None:
    heads = [HEAD, [changed.get(i, word) for i, word in enumerate(HEAD)]]
    errors = [
        Watchdog(rank=rank, num_ranks=2, num_experts=8, timeout_s=1.0).disagreement(heads)
        for rank in range(2)
    ]
    assert {type(error).__name__ for error in errors} == {kind}
    assert len({str(error) for error in errors}) == 1
    assert text in str(errors[0])


@torch.no_grad()
def test_reports_of_the_device_become_errors_once(gpu: FakeGpu) -> None:
    comm = gpu.communicator(**LL)
    engine: Any = comm._engine
    words = engine.watchdog._words
    words.phase, words.expected, words.seen, words.operation = 7, 4, 3, int(Operation.DISPATCH)
    words.reported = 4
    with pytest.raises(InputError, match="between the halves of another one"):
        comm.dispatch(*inputs())
    with pytest.raises(ClosedError, match="between the halves"):
        comm.check_health()


def test_expired_waits_are_told_from_other_reports_without_asking_anyone(gpu: FakeGpu) -> None:
    """A monitor polls for them; why a peer aborted is read from the store, which takes time."""
    watchdog = Watchdog(rank=0, num_ranks=2, num_experts=8, timeout_s=1.0)
    asked: list[int] = []
    watchdog.attach(lambda reason: None, lambda rank: asked.append(rank) or "")
    words = watchdog._words
    words.peer, words.operation, words.reported = 1, int(Operation.DISPATCH), 4
    for phase in (Phase.ABORTED, Phase.HALVES, Phase.AGREEMENT):
        words.phase = int(phase)
        assert watchdog.expired_wait(4) is None
    assert not asked
    words.phase = int(Phase.ROW)
    error = watchdog.expired_wait(4)
    assert error is not None
    assert error.missing == (1,)


# -- one engine for both modes --------------------------------------------------------------------


@MODES
@torch.no_grad()
def test_every_call_is_checked_entered_agreed_on_and_ordered_alike(
    gpu: FakeGpu, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = gpu.communicator(**fields)
    engine: Any = comm._engine
    engine._check = True
    steps: list[str] = []

    def note(owner: Any, name: str) -> None:
        wanted = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            steps.append(name)
            return wanted(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    note(engine._mode, "check")
    note(engine._wire, "enter")
    note(engine.watchdog, "check")
    note(engine._mode, "find_fault")
    note(engine, "_agree")
    note(engine.arena, "follow")
    for name in ("dispatch", "combine"):
        note(engine._mode, name)
    x, ids, weights = inputs()
    out, handle = comm.dispatch(x, ids, weights)
    agrees = [] if engine._mode.agrees_on_device else ["_agree"]
    assert steps == ["check", "enter", "check", *agrees, "follow", "dispatch"]
    steps.clear()
    again, cached = comm.dispatch(x, ids, previous_handle=handle)
    before = ["enter", "check", "find_fault", "_agree", "follow"]
    assert steps == ["check", *before, "dispatch"]
    steps.clear()
    comm.combine(again.tokens, cached)
    assert steps == [*before, "combine"]
    assert out.tokens.shape == again.tokens.shape


@MODES
@pytest.mark.parametrize("check", [False, True])
@torch.no_grad()
def test_a_refused_call_is_counted_where_the_peers_learn_of_it(
    gpu: FakeGpu, fields: dict[str, Any], check: bool
) -> None:
    comm = gpu.communicator(**fields)
    engine: Any = comm._engine
    engine._check = check
    x, ids, weights = inputs()
    _, handle = comm.dispatch(x, ids, weights)
    number, launched = engine._wire.call, len(gpu.launched)
    with pytest.raises(InputError, match="input has shape"):
        comm.dispatch(x[:, :3], ids, weights)
    assert engine._wire.call == number + 1, "the peers make this call"
    told = [launch["operation"] for launch in gpu.launched[launched:]]
    by_kernel = engine._mode.agrees_on_device or not check
    assert bool(told) is by_kernel
    assert set(told) <= {Operation.DISPATCH}
    with pytest.raises(InputError):
        comm.dispatch(x[:, :3], ids, previous_handle=handle)
    assert engine._wire.call == number + 1 + check
    assert len(gpu.launched) == launched + len(told), "hosts agree on cached dispatches, if at all"


@torch.no_grad()
def test_a_rank_with_too_many_tokens_says_how_many(gpu: FakeGpu) -> None:
    comm = gpu.communicator(**STATIC)
    x, ids, weights = inputs()
    with pytest.raises(TooManyTokensError, match="rank 0: input has 20 tokens"):
        comm.dispatch(x.repeat(4, 1), ids.repeat(4, 1), weights.repeat(4, 1))
    with pytest.raises(InputError, match="input has shape"):
        comm.dispatch(x[:, :3], ids, weights)
    comm.dispatch(x, ids, weights)
    told = [(launch["status"], launch["capacity"]) for launch in gpu.launched if launch["origin"]]
    limit = comm.config.max_tokens_per_rank
    assert told[:1] == [(Status.TOO_MANY_TOKENS, 20)]
    assert (Status.REFUSED, -1) in told
    assert told[-1] == (Status.FINE, limit)


@pytest.mark.parametrize("sharer", [E, E // 2])
def test_mails_have_room_for_the_counts_of_all_who_share_the_memory(sharer: int) -> None:
    """Sharers have no more experts than the communicator that has made the memory."""
    plans = [
        HtMode.plan(
            MoECommunicatorConfig(
                num_experts=experts,
                hidden_size=64,
                topk=2,
                max_tokens_per_rank=16,
                device="cpu",
            ),
            2,
        )
        for experts in (E, sharer, E + 1)
    ]
    assert plans[0].holds(plans[1])
    assert not plans[0].holds(plans[2])


@MODES
@torch.no_grad()
def test_the_default_device_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    """Host memory that kernels write is on the host, whatever torch makes by default."""
    x, ids, weights = inputs()
    torch.set_default_device("meta")
    try:
        torch.zeros(1)  # torch notes its own functions at first use, so before some are replaced
        comm = FakeGpu(monkeypatch).communicator(**fields)
        out, handle = comm.dispatch(x, ids, weights)
        assert comm.combine(out.tokens, handle).device == x.device
    finally:
        torch.set_default_device("cpu")


# -- SMs that calls leave to other kernels ---------------------------------------------------------

RANK_MAJOR: dict[str, Any] = {"mode": "ll", "output_layout": "rank_major"}


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        (STATIC, (SMS - tuning.HT_MOST_SMS, SMS - tuning.HT_MOST_SMS)),
        (RANK_MAJOR, (SMS - tuning.LL_DISPATCH_SMS, SMS - tuning.LL_COMBINE_SMS)),
        (LL, (SMS - tuning.LL_DISPATCH_SMS_TWO_RANKS, SMS - tuning.LL_COMBINE_SMS_TWO_RANKS)),
        ({**STATIC, "num_sms_dispatch": 7, "num_sms_combine": 1}, (SMS - 7, SMS - 1)),
        ({**RANK_MAJOR, "num_sms_dispatch": 7, "num_sms_combine": 1}, (SMS - 7, SMS - 1)),
        ({**LL, "num_sms_dispatch": 200, "num_sms_combine": 131}, (0, 1)),
    ],
)
@pytest.mark.parametrize("given", [None, 1, 5, SMS, SMS + 1])
def test_launches_take_the_sms_that_they_do_not_leave(
    gpu: FakeGpu, fields: dict[str, Any], left: tuple[int, int], given: int | None
) -> None:
    comm = gpu.communicator(**fields)
    received, handle = comm.dispatch_async(
        *inputs(), overlap=comm.create_overlap_config("dispatch", num_sms=given)
    ).wait()
    overlap = comm.create_overlap_config("combine", num_sms=given)
    comm.combine_async(received.tokens, handle, overlap=overlap).wait()
    taken = [launch["grid"] for launch in gpu.launched]
    expected = left if given is None else (max(0, SMS - given),) * 2
    for op, grid, others in zip(("dispatch", "combine"), taken, expected, strict=True):
        assert comm.compute_sms(op, num_sms=given) == others
        assert grid + others == SMS


def test_halves_leave_as_many_sms_as_whole_calls(gpu: FakeGpu) -> None:
    comm = gpu.communicator(**LL, num_sms_dispatch=9)
    with torch.no_grad():
        *_, hook = comm.dispatch(*inputs(), return_recv_hook=True)
        hook()
    assert [SMS - launch["grid"] for launch in gpu.launched] == [comm.compute_sms("dispatch")] * 2


@pytest.mark.parametrize("text", ["no room for it", ""])
@pytest.mark.parametrize("part", ["DeviceRunner", "make_memory", "assemble"])
def test_an_engine_is_had_by_all_or_by_none(
    monkeypatch: pytest.MonkeyPatch, part: str, text: str
) -> None:
    """A rank without room for a part of it tells the others, which would wait for its calls."""
    left: list[int] = []
    said: list[str] = []

    def gather_text(text: str) -> list[str]:
        said.append(text)
        return ["", text]

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(text)

    detached: list[object] = []
    memory = types.SimpleNamespace(
        arena=types.SimpleNamespace(leave=left.append),
        watchdog=types.SimpleNamespace(detach=detached.append),
    )
    monkeypatch.setattr(build, "SymmetricBuffer", lambda *_: "buffer")
    monkeypatch.setattr(build, "DeviceRunner", lambda *_, **__: "run")
    monkeypatch.setattr(build, "WeightedBackward", lambda *_, **__: "backward")
    monkeypatch.setattr(build, "make_memory", lambda *_, **__: memory)
    monkeypatch.setattr(build, part, fail)
    config = MoECommunicatorConfig(num_experts=8, hidden_size=64, topk=2, max_tokens_per_rank=8)
    wire: Any = types.SimpleNamespace(
        gather_text=gather_text, peers=[], rank=1, number=7, group=None, timeout_s=5.0
    )
    wire.device = torch.device("cpu")
    wire.publish_abort = print
    placement = Placement.from_ranks(even_blocks(8, 2), num_ranks=2, device=wire.device)
    with pytest.raises(EngineUnavailableError, match=f"rank 1: .*{text}"):
        build.build(config, wire=wire, placement=placement, check_inputs=False)
    assert said[-1] == (text or "OutOfMemoryError('')")
    assert left == ([7] if part == "assemble" else [])
    assert detached == ([wire.publish_abort] if part == "assemble" else [])


def test_memory_forgets_communicators_that_do_not_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aborts are posted for, and interrupted waits end, those that do."""
    control = torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda *a, pin_memory=False, **kwargs: control(*a, **kwargs)
    )
    watchdog = Watchdog(rank=0, num_ranks=2, num_experts=8, timeout_s=1.0)
    said: list[str] = []

    def attach(name: str) -> Callable[[str], None]:
        def post(reason: str) -> None:
            said.append(f"{name}: {reason}")

        def interrupted(reason: str) -> None:
            said.append(f"{name} {reason}")

        watchdog.attach(post, lambda rank: name, lambda: interrupted)
        return post

    first, second = attach("first"), attach("second")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watchdog, "_await_mail", interrupt)
    for post in (second, first):
        watchdog.publish_abort("why")
        with pytest.raises(KeyboardInterrupt):
            watchdog.wait_for_mail(0, call=1, num_local=1)
        watchdog.detach(post)
    assert said == [
        "first: why",
        "second: why",
        "second interrupted by KeyboardInterrupt",
        "first: why",
        "first interrupted by KeyboardInterrupt",
    ]
    assert not watchdog.dead
    with pytest.raises(KeyboardInterrupt):
        watchdog.wait_for_mail(0, call=1, num_local=1)
    assert watchdog.dead
