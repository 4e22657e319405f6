"""Whole MoE layers: what a model's layer takes, what its products take, and what is left of the
communication (`expertlink bench --layer`).

The layer and its stand-in without communication (`layer_model.StandIn`) take turns. Exposed is
the difference of their medians. Where two halves of the tokens overlap (`micro_batches`), the calls
alone take part as well.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from expertlink.bench.carve_out import product_sms, products_on
from expertlink.bench.cases import Case, Plan
from expertlink.bench.ceilings import Ceilings, Floor
from expertlink.bench.clock import Clock, capture
from expertlink.bench.environment import describe_environment
from expertlink.bench.inputs import WireRows, agree_on_results
from expertlink.bench.layer_cases import LayerCase
from expertlink.bench.layer_model import (
    MODELS,
    LayerStack,
    LayerWeights,
    Mark,
    MoELayer,
    Recorder,
    Timeline,
    dense_layer,
    in_one_piece,
    in_turn,
)
from expertlink.bench.layer_record import (
    FORWARD,
    LAYER_PHASES,
    STEP,
    LayerRecord,
    floor_fields,
    overlap_fields,
)
from expertlink.bench.layer_turns import calls_alone
from expertlink.bench.measure import no_garbage_collection, open_communicator, time_steps
from expertlink.bench.records import Summary, slowest_rank, summarize
from expertlink.bench.steps import Step
from expertlink.communicator import MoECommunicator
from expertlink.errors import ConfigurationError
from expertlink.grouped_product import find_grouped_product
from expertlink.launch import RankContext
from expertlink.nn import Calls

_SAME = ("variant", "model", "layers", "dtype", "uneven", "ranks", "tokens", "hidden", "topk")
_SAME += ("experts", "num_sms_dispatch", "num_sms_combine", "seed")
_CHECKED_TOKENS = 4
_TIMELINES = 10
_END = ""
_TOLERANCE = {torch.float32: 1e-3}
_HALF_TOLERANCE = 0.03  # of a token's norm; a row that is lost or wrong changes it by a tenth

Run = Callable[[], tuple[Tensor, ...]]
"""Results of the micro-batches, or the gradients of their tokens and of all weights."""
Forward = Callable[[Sequence[Tensor]], list[Tensor]]
"""From the tokens of each micro-batch, `[T, H]`, to results of the same shapes."""


def measure_layers(
    context: RankContext,
    cases: Sequence[Case],
    plan: Plan,
    *,
    on_progress: Callable[[int], None],
    control: dist.ProcessGroup | None = None,
) -> Iterator[list[LayerRecord]]:
    """Checks, then times layers. See `measure.measure_batch`."""
    clock = Clock(context.device, control)
    for case in cases:
        assert isinstance(case, LayerCase)
        gc.collect()
        if clock.on_gpu:
            torch.cuda.empty_cache()  # communicators have memory that torch does not manage
        records = _measure(context, case, plan, clock, on_progress)
        yield records if context.rank == 0 else []


def _measure(
    context: RankContext,
    case: LayerCase,
    plan: Plan,
    clock: Clock,
    on_progress: Callable[[int], None],
) -> list[LayerRecord]:
    # Before there are weights, and gone before them: large puts need memory of their own.
    with Ceilings(case, plan, clock) as ceilings:
        floor, note = ceilings.floor, ceilings.note
    with open_communicator(context, case, plan) as comm:
        bench = _LayerBench(case, plan, clock, comm)
        if not case.calls.turns:
            return bench.records(floor, note, on_progress)
        compute_sms = product_sms(comm)
        with products_on(compute_sms, context.device):
            return bench.records(floor, note, on_progress, compute_sms)


@dataclass(frozen=True)
class _MicroBatch:
    """Tokens of this rank that go through the layers together."""

    stack: LayerStack
    x_TH: Tensor
    grad_TH: Tensor


class _LayerBench:
    """The layers of a case on this rank, with all that is timed. Every method is collective."""

    def __init__(self, case: LayerCase, plan: Plan, clock: Clock, comm: MoECommunicator) -> None:
        self._case, self._plan, self._clock, self._comm = case, plan, clock, comm
        device, dtype = clock.device, case.torch_dtype
        grouped = find_grouped_product(device, dtype)
        if grouped is None and case.calls.graph:
            raise ConfigurationError(
                f"variant={case.variant!r} cannot be measured: this torch has no grouped product "
                f"for {case.dtype} on {device.type}, and a loop over experts waits for the host; "
                "accepted: eager"
            )
        self._products = "loop" if grouped is None else "grouped"
        shape = MODELS[case.model]
        self._weights = [
            LayerWeights(shape=shape, layer=layer, seed=case.seed, dtype=dtype, device=device)
            for layer in range(case.layers)
        ]
        layers = [MoELayer(weights, comm.local_experts) for weights in self._weights]
        ids_LTK = [case.choices(layer)[comm.rank].to(device) for layer in range(case.layers)]
        generator = torch.Generator().manual_seed(case.seed * 1_000_003 + comm.rank)
        tokens = case.token_counts()[comm.rank]
        size = (2, tokens, case.hidden)
        drawn = torch.randn(size, generator=generator, dtype=torch.float32)
        x_TH, grad_TH = drawn.to(dtype).to(device)
        self._batches = [
            _MicroBatch(
                LayerStack(layers, [ids_TK[part] for ids_TK in ids_LTK]), x_TH[part], grad_TH[part]
            )
            for part in case.micro_batches(tokens)
        ]
        self._parameters = self._batches[0].stack.parameters()

    def records(
        self,
        floor: Floor | None,
        note: str | None,
        on_progress: Callable[[int], None],
        compute_sms: int | None = None,
    ) -> list[LayerRecord]:
        """Checks, times and describes the layers. `compute_sms`: what products are limited to."""
        case, plan, clock = self._case, self._plan, self._clock
        kept = [self._check(batch) for batch in self._batches]
        traffic = self._traffic(kept)
        real: list[Sequence[Calls]] = [[self._comm] * case.layers for _ in self._batches]
        alone = [one.stand_ins() for one in kept]
        layers = self._forward(real, turns=case.calls.turns)
        runs = {phase: self._run(phase, layers) for phase in LAYER_PHASES}
        if case.calls.turns:
            self._check_turns(runs, self._forward(real))
        expected = {phase: run()[0].clone() for phase, run in runs.items()}
        computes = {phase: self._run(phase, self._forward(alone)) for phase in LAYER_PHASES}
        kept_bytes: dict[str, int] = dict.fromkeys(LAYER_PHASES, 0)
        if case.calls.graph:
            for phase in LAYER_PHASES:
                computes[phase]()
                computes[phase], _ = self._captured(computes[phase])
                runs[phase], kept_bytes[phase] = self._captured(runs[phase])
            self._check_runs(runs, expected)
        steps: list[list[Step]] = []
        for phase in LAYER_PHASES:
            layer = Step(variant=case.variant, phase=phase, run=runs[phase])
            compute = Step(variant="", phase=phase, kind="compute", run=computes[phase])
            steps.append([layer, compute])
            if case.calls.turns:
                run = self._communication(phase)
                steps[-1].append(Step(variant="", phase=phase, kind="communication", run=run))
            if compute_sms is not None:
                run = self._unlimited(runs[phase])
                steps[-1].append(Step(variant="", phase=phase, kind="unlimited", run=run))
        with no_garbage_collection():
            times = time_steps([steps], plan, clock, on_progress).gather(clock)
        self._comm.check_health()
        memory = clock.gather(torch.tensor(list(kept_bytes.values()))).amax(dim=0).tolist()
        memory = dict(zip(LAYER_PHASES, memory, strict=True))
        phases_us = {phase: self._timeline(phase, real) for phase in LAYER_PHASES}
        if plan.profile is not None:
            for phase in LAYER_PHASES:
                self._profile(plan.profile, phase, runs[phase])

        def optional(phase: str, kind: str) -> Summary | None:
            found = times.get(("", phase, kind))
            return None if found is None else summarize(slowest_rank(found))

        def record(phase: str) -> LayerRecord:
            time_us, host_us = (
                summarize(slowest_rank(times[case.variant, phase, kind]))
                for kind in ("time", "host")
            )
            compute_us = summarize(slowest_rank(times["", phase, "compute"]))
            exposed_us = round(time_us.median - compute_us.median, 2)
            added = int(times[case.variant, phase, "memory"].max())
            rounds = 2 if phase == STEP else 1  # backward moves the same rows once more
            return LayerRecord(
                engine=self._comm.engine_name,
                phase=phase,
                routing=case.routing_label,
                **{field: getattr(case, field) for field in _SAME},
                intermediate=MODELS[case.model].intermediate,
                shared=MODELS[case.model].shared,
                products=self._products,
                time_us=time_us,
                host_us=host_us,
                compute_us=compute_us,
                exposed_us=exposed_us,
                **overlap_fields(optional(phase, "communication"), time_us, compute_us),
                compute_sms=compute_sms,
                unlimited_us=optional(phase, "unlimited"),
                **floor_fields(floor, note, rounds, traffic, exposed_us),
                wire_bytes=round(float(traffic[:, :, :, 0].sum(dim=(1, 2)).mean()) * rounds),
                phases_us=phases_us[phase],
                memory_peak_bytes=max(added, memory[phase]) if clock.on_gpu else None,
                environment=describe_environment(clock.device),
                aligned="device" if clock.on_gpu else "host",
                iterations=plan.iters,
                threads=torch.get_num_threads(),
                command=plan.command,
            )

        return [record(phase) for phase in LAYER_PHASES]

    # -- what is run ------------------------------------------------------------------------------

    def _forward(
        self,
        calls: Sequence[Sequence[Calls]],
        mark: Mark | None = None,
        *,
        turns: bool = False,
    ) -> Forward:
        """All layers, with the calls of every micro-batch and layer; the micro-batches one after
        the other or in turn."""

        def forward(inputs: Sequence[Tensor]) -> list[Tensor]:
            given = zip(self._batches, inputs, calls, strict=True)
            several = [batch.stack.parts(x_TH, own, mark) for batch, x_TH, own in given]
            return in_turn(several, mark) if turns else [in_one_piece(parts) for parts in several]

        return forward

    def _run(
        self,
        phase: str,
        forward: Forward,
        mark: Mark | None = None,
        *,
        parameters: Sequence[Tensor] | None = None,
    ) -> Run:
        """A run of a phase; `parameters` that have gradients are those of the layers."""
        wanted = self._parameters if parameters is None else parameters

        def inference() -> tuple[Tensor, ...]:
            with torch.no_grad():
                results = forward([batch.x_TH for batch in self._batches])
            if mark is not None:
                mark(_END)
            return tuple(results)

        def step() -> tuple[Tensor, ...]:
            inputs = [batch.x_TH.detach().requires_grad_() for batch in self._batches]
            with torch.enable_grad():
                results = forward(inputs)
            # Not backward(), whose accumulation would tie a captured run to earlier ones.
            gradients = torch.autograd.grad(
                results, (*inputs, *wanted), [batch.grad_TH for batch in self._batches]
            )
            if mark is not None:
                mark(_END)
            return gradients

        return inference if phase == FORWARD else step

    def _communication(self, phase: str) -> Run:
        """The calls of all layers without anything in between."""
        tracked, topk = phase == STEP, self._case.topk
        weights = [
            [
                torch.full(ids_TK.shape, 1 / topk, device=ids_TK.device, requires_grad=tracked)
                for ids_TK in batch.stack.ids_LTK
            ]
            for batch in self._batches
        ]

        def forward(inputs: Sequence[Tensor]) -> list[Tensor]:
            given = zip(self._batches, inputs, weights, strict=True)
            return in_turn(
                [
                    calls_alone(self._comm, x_TH, batch.stack.ids_LTK, own)
                    for batch, x_TH, own in given
                ]
            )

        every = [weights_TK for own in weights for weights_TK in own]
        return self._run(phase, forward, parameters=every)

    def _unlimited(self, run: Run) -> Run:
        """A run whose products may use all SMs."""

        def unlimited() -> tuple[Tensor, ...]:
            with products_on(None, self._clock.device):
                return run()

        return unlimited

    def _captured(self, run: Run) -> tuple[Run, int]:
        """A replay of a run, and the device memory that its graph keeps."""
        results: list[tuple[Tensor, ...]] = []
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        graph = capture(lambda: results.append(run()))
        memory = torch.cuda.max_memory_allocated() - before

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return results[0]

        return replay, memory

    def _timeline(self, phase: str, calls: Sequence[Sequence[Calls]]) -> dict[str, float]:
        """Microseconds by phase: mean over ranks, median over runs."""
        found: list[dict[str, float]] = []
        with no_garbage_collection():
            for _ in range(min(_TIMELINES, self._plan.iters)):
                timeline = Timeline(self._clock.on_gpu)
                forward = self._forward(calls, timeline.mark, turns=self._case.calls.turns)
                self._clock.sample(self._run(phase, forward, timeline.mark))
                found.append(timeline.phases_us())
        names = list(found[0])
        mine = torch.tensor([[one[name] for name in names] for one in found], dtype=torch.float64)
        medians = self._clock.gather(mine).mean(dim=0).median(dim=0).values.tolist()
        return {name: round(value, 2) for name, value in zip(names, medians, strict=True)}

    def _profile(self, folder: Path, phase: str, run: Callable[[], object]) -> None:
        """A Chrome trace of one run, written by every rank."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if self._clock.on_gpu else []
        case, comm = self._case, self._comm
        words = [case.model, comm.engine_name, case.variant, case.dtype, f"T{case.tokens}"]
        words += [case.routing_label.replace(":", "-"), phase, f"rank{comm.rank}"]
        folder.mkdir(parents=True, exist_ok=True)  # ranks may be on several hosts
        with profile(activities=activities) as profiled:
            self._clock.sample(run)
        profiled.export_chrome_trace(str(folder / f"{'-'.join(words)}.json"))

    # -- what is checked --------------------------------------------------------------------------

    def _check(self, batch: _MicroBatch) -> Recorder:
        """Runs every layer once and compares some tokens with a dense layer; and the gradient of
        the first layer's tokens. Returns what dispatch and combine returned."""
        kept = Recorder(self._comm)
        problem: str | None = None
        x_TH, some = batch.x_TH, slice(_CHECKED_TOKENS)
        for weights, layer, ids_TK in zip(
            self._weights, batch.stack.layers, batch.stack.ids_LTK, strict=True
        ):
            with torch.no_grad():
                y_TH = layer(x_TH, ids_TK, kept)
                expected = dense_layer(weights, x_TH[some], ids_TK[some])
                problem = problem or self._problem(y_TH[some], expected, f"layer {weights.layer}")
                x_TH = x_TH + y_TH
        leaf_TH, ids_TK = batch.x_TH.detach().requires_grad_(), batch.stack.ids_LTK[0]
        with torch.enable_grad():
            y_TH = batch.stack.layers[0](leaf_TH, ids_TK, self._comm)
            [grad_TH] = torch.autograd.grad(y_TH, leaf_TH, batch.grad_TH)
            few_TH = batch.x_TH[some].detach().requires_grad_()
            expected = dense_layer(self._weights[0], few_TH, ids_TK[some])
            [expected] = torch.autograd.grad(expected, few_TH, batch.grad_TH[some].float())
        problem = problem or self._problem(grad_TH[some], expected, "the gradient of layer 0")
        agree_on_results(problem, self._clock)
        return kept

    def _check_turns(self, runs: dict[str, Run], one_by_one: Forward) -> None:
        """Compares all results and gradients with those of one micro-batch after the other."""
        problem: str | None = None
        for phase, run in runs.items():
            pairs = [*zip(run(), self._run(phase, one_by_one)(), strict=True)]
            wrong = [not torch.equal(found, expected) for found, expected in pairs]
            if any(wrong):
                problem = problem or (
                    f"{phase}: {sum(wrong)} of {len(wrong)} tensors have other bits with two "
                    "micro-batches in turn than with one after the other"
                )
        agree_on_results(problem, self._clock)

    def _check_runs(self, runs: dict[str, Run], expected: dict[str, Tensor]) -> None:
        """Compares the results of replays with those of the same calls launched one by one."""
        problem: str | None = None
        for phase, run in runs.items():
            run()[0].fill_(float("nan"))  # so that a result of before is noticed
            problem = problem or self._problem(run()[0], expected[phase], f"a replayed {phase}")
        agree_on_results(problem, self._clock)

    def _problem(self, found_TH: Tensor, expected_TH: Tensor, what: str) -> str | None:
        tolerance = _TOLERANCE.get(self._case.torch_dtype, _HALF_TOLERANCE)
        error_T = (found_TH.float() - expected_TH.float()).norm(dim=1)
        wrong_T = ~(error_T <= tolerance * expected_TH.float().norm(dim=1) + 1e-6)
        if not bool(wrong_T.any()):
            return None
        token = int(wrong_T.nonzero()[0])
        return (
            f"{what}: {int(wrong_T.sum())} of {len(wrong_T)} checked tokens are wrong; token "
            f"{token} is off by {float(error_T[token]):.3g}, its norm is "
            f"{float(expected_TH[token].float().norm()):.3g}"
        )

    def _traffic(self, kept: Sequence[Recorder]) -> Tensor:
        """`[R, calls, 2, 2]` float64 bytes of rows that a rank sends and receives, in the dispatch
        and in the combine of each layer and micro-batch."""
        mine = []
        for handle in (handle for one in kept for handle in one.handles):
            rows_to, rows_from = self._comm.wire_rows(handle)
            wire = WireRows(self._comm.rank, list(rows_to), list(rows_from))
            mine.append([part[:2] for part in wire.traffic(self._case)[:2]])
        return self._clock.gather(torch.tensor(mine, dtype=torch.float64))
