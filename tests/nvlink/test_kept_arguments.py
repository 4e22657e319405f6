"""What mode "ht" keeps between calls is never out of date: kernels are told the same without it."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from expertlink import CapacityError, InputError, MoECommunicator
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.ht.arguments import DISPATCH, Flag
from expertlink.engines.nvlink.ht.outputs import OutputMaker
from expertlink.engines.nvlink.launch import KernelName
from expertlink.engines.nvlink.shared import Verdict
from expertlink.engines.ranks.header import Status
from expertlink.jit.kernel import Arguments
from support.depth import deep
from support.fake_gpu import T_MAX, E, FakeGpu, H, K, inputs

NUMBERS = [field.name for field in DISPATCH.fields if not field.ctype.endswith("*")]
NUMBERS.remove("communicator")
TABLES = (
    *("own_tokens", "rows_from", "rows_to", "choices_of_row", "first_sent", "first_slot"),
    *("tokens_per_expert", "expert_offsets"),
)
LAYOUTS = pytest.mark.parametrize("layout", ["token_major", "flat", "expert_major"])
SHAPES = pytest.mark.parametrize("static", [False, True], ids=["", "static"])
REFUSED = "refused"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


@dataclasses.dataclass(frozen=True)
class Step:
    """A call, and what becomes of it.

    Attributes:
        kind: "new", "cached" or `REFUSED`.
        x, ids, weights, scales: what is passed.
        num_sms: of the call.
        handle: which of the handles so far a cached dispatch is of.
        arrivals: rows that the host learns of.
        verdict: of the ranks.
        fails: allocation of the output that finds no memory, 0 for none.
    """

    kind: str
    x: Tensor
    ids: Tensor
    weights: Tensor | None
    scales: Tensor | None
    num_sms: int | None
    handle: int
    arrivals: int
    verdict: Verdict
    fails: int


def drawn_steps(draw: random.Random, count: int, *, static: bool) -> list[Step]:
    """Rows are often like those of the call before."""
    steps = [drawn_step(draw, static=static)]
    while len(steps) < count:
        step = drawn_step(draw, static=static)
        if draw.random() < 0.6:
            fate = {name: getattr(step, name) for name in ("arrivals", "verdict", "fails")}
            step = dataclasses.replace(steps[-1], **fate)
        steps.append(step)
    return steps


def drawn_step(draw: random.Random, *, static: bool) -> Step:
    tokens = draw.choice([0, 1, 5, T_MAX])
    ids = torch.rand(tokens, E).topk(K).indices.to(draw.choice([torch.int32, torch.int64]))
    x, scales = torch.randn(tokens, H).to(torch.bfloat16), None
    if draw.random() < 0.4:
        x = torch.zeros((tokens, draw.choice([32, 64])), dtype=torch.uint8)
        scales = torch.ones(tokens, draw.choice([1, 2]))
    overflows = not static and draw.random() < 0.2
    return Step(
        kind=draw.choice(["new", "new", "cached", "cached", *([REFUSED] if static else [])]),
        x=x,
        ids=ids,
        weights=draw.choice([None, torch.rand(tokens, K)]),
        scales=scales,
        num_sms=draw.choice([None, 3, 20]),
        handle=draw.randrange(1000),
        arrivals=draw.randrange(1, T_MAX + 1),
        verdict=Verdict.OVERFLOW if overflows else Verdict.FINE,
        fails=draw.choice([0, 0, 0, 0, 0, 0, 1, 2]),
    )


def take(comm: MoECommunicator, step: Step, handles: list[Any]) -> None:
    if step.kind == REFUSED:
        with pytest.raises(InputError):
            comm.dispatch(step.x[:, :3], step.ids, step.weights, step.scales)
        return
    ids, weights, scales, old, x = step.ids, step.weights, step.scales, None, step.x
    if step.kind == "cached":
        old = handles[step.handle % len(handles)]
        x, scales = torch.zeros((old.num_tokens, H), dtype=torch.bfloat16), None
        weights = None if weights is None else torch.ones(old.num_tokens, K)
    handle = comm.dispatch_in_line(
        x, ids if old is None else None, weights, scales, old, step.num_sms
    )[1]
    handles.append(handle)


def told(name: KernelName, a: Arguments, foreign: int) -> tuple[object, ...]:
    """What a launch of dispatch says; of addresses, how they lie to each other.

    `foreign`: address of the slots of a routing that another communicator has made.
    """
    said: list[object] = [name, *(getattr(a, field) for field in NUMBERS)]
    said += [getattr(a, table) - a.first_row for table in TABLES]
    said.append("foreign" if a.slots_of_token == foreign else a.slots_of_token - a.first_row)
    said += [a.offsets_out - a.counts_out, a.rows_from_out - a.counts_out]
    if a.flags & Flag.COUNT and a.status == Status.FINE:
        own = (a.ids_copy or 0, a.origin, a.counts_out)
        said += [address - a.first_row for address in own]
        said.append(a.weights_of_row and a.weights_of_row - a.first_row)
    return tuple(said)


def launches(
    gpu: FakeGpu, comm: MoECommunicator, steps: list[Step], *, forgets: bool
) -> list[tuple[object, ...]]:
    """What kernels are told; `forgets`: nothing is kept from one call to the next."""
    found: list[tuple[object, ...]] = []
    engine: Any = comm._engine
    dispatcher, make = engine._mode._dispatcher, OutputMaker.make
    gpu.kernel = lambda *_: None
    # In padded layouts routings depend on T_max.
    room = T_MAX if comm.config.layout.padded else 8
    other = gpu.communicator(
        output_layout=comm.config.layout.value,
        static_shapes=comm.config.static_shapes,
        max_tokens_per_rank=room,
    )
    handles: list[Any] = [other.dispatch(*inputs())[1]]
    slots = handles[0].state.slots_for(T_MAX)
    foreign = 0 if slots is None else slots.data_ptr()
    for step in steps:

        def kernel(name: KernelName, a: Arguments, words: Any, step: Step = step) -> None:
            found.append(told(name, a, foreign))
            words.mail_arrivals = words.mail_slots = step.arrivals
            words.mail_verdict = int(step.verdict)

        made = 0

        def fails(self: OutputMaker, *args: Any, step: Step = step) -> Any:
            nonlocal made
            made += 1
            if made == step.fails:
                raise torch.OutOfMemoryError("none left")
            return make(self, *args)

        gpu.kernel = kernel
        if forgets:
            dispatcher._forms.clear()
            dispatcher._places.clear()
            dispatcher._named = dispatcher._said = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OutputMaker, "make", fails)
            with contextlib.suppress(CapacityError, torch.OutOfMemoryError):
                take(comm, step, handles)
    return found


@LAYOUTS
@SHAPES
@pytest.mark.parametrize("number", range(deep(1)))
@torch.no_grad()
def test_kernels_are_told_the_same_as_if_nothing_were_kept(
    gpu: FakeGpu, layout: str, static: bool, number: int
) -> None:
    """After calls of other rows, with other routings, and after such as fail at some point."""
    torch.manual_seed(number)
    draw = random.Random(number)
    steps = drawn_steps(draw, 60, static=static)
    fields: dict[str, Any] = {"output_layout": layout, "static_shapes": static}
    kept, forgotten = (
        launches(gpu, gpu.communicator(**fields), steps, forgets=forgets)
        for forgets in (False, True)
    )
    assert len(kept) > 30
    assert kept == forgotten


@torch.no_grad()
def test_kept_forms_and_places_are_bounded(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertlink.engines.nvlink.ht.dispatch._MOST_FORMS", 3)
    comm = gpu.communicator(output_layout="flat", static_shapes=True)
    dispatcher: Any = comm._engine._mode._dispatcher  # type: ignore[union-attr]
    x, ids, weights = inputs()
    for tokens in range(1, 5):
        for num_sms in range(1, 5):
            comm.dispatch_in_line(x[:tokens], ids[:tokens], weights[:tokens], None, None, num_sms)
            assert len(dispatcher._forms) <= 3
            assert len(dispatcher._places) <= 3


@torch.no_grad()
def test_a_refusal_without_memory_is_not_said_by_later_calls(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = gpu.communicator(output_layout="flat", static_shapes=True)
    x, ids, weights = inputs()

    def none_left(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(OutputMaker, "new_words", none_left)
        with pytest.raises(torch.OutOfMemoryError):
            comm.dispatch(x[:, :3], ids, weights)
    comm.dispatch(x, ids, weights)
    assert [launch["status"] for launch in gpu.launched] == [Status.FINE]


@pytest.mark.parametrize("number", range(deep(3)))
@torch.no_grad()
def test_outputs_are_as_large_as_recent_calls_suggest(gpu: FakeGpu, number: int) -> None:
    comm = gpu.communicator(output_layout="token_major")
    maker: OutputMaker = comm._engine._mode._dispatcher._outputs  # type: ignore[union-attr]
    draw, needed = random.Random(number), []
    for _ in range(60):
        needed.append(draw.choice([0, 3, 3, 3, 7, draw.randrange(T_MAX)]))
        maker.remember(needed[-1])
        most = max(needed[-tuning.HT_CALLS_REMEMBERED :])
        most = min(most + most // tuning.HT_OUTPUT_SLACK, maker.limit)
        assert maker.expected == ((most,) if most else None)
