"""`expertlink bench --layer`: whole MoE layers, checked, measured, recorded and drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from conftest import RankPools
from expertlink.bench import layer as bench_layer
from expertlink.bench.carve_out import product_sms, products_on
from expertlink.bench.cases import Plan
from expertlink.bench.inputs import WrongResultError
from expertlink.bench.layer import measure_layers
from expertlink.bench.layer_cases import LayerCase
from expertlink.bench.layer_model import (
    MODELS,
    LayerStack,
    LayerWeights,
    MoELayer,
    Recorder,
    dense_layer,
    in_one_piece,
    in_turn,
)
from expertlink.bench.layer_plots import draw_exposed, draw_timeline
from expertlink.bench.layer_record import LAYER_PHASES, LayerRecord
from expertlink.bench.layer_turns import calls_alone
from expertlink.bench.records import RecordError, latest, read_records, write_records
from expertlink.cli import app
from expertlink.communicator import MoECommunicator
from expertlink.engines.collective.engine import CollectiveEngine
from expertlink.grouped_product import find_grouped_product
from expertlink.launch import RankContext
from support.bench_records import make_layer_record, make_record

TINY = MODELS["tiny"]
CPU = torch.device("cpu")
QUICK = ("bench", "--layer", "--ranks", "2", "--tokens", "16", "--iters", "3", "--warmup", "1")
FORWARD_PHASES = ["gate", "dispatch", "products", "shared", "combine", "rest"]
BACKWARD_PHASES = [
    f"{name}_backward" for name in ("combine", "shared", "products", "dispatch", "gate")
]


def layer_case(**changes: Any) -> LayerCase:
    values: dict[str, Any] = {"model": "tiny", "variant": "eager", "dtype": "float32"}
    values |= {"ranks": 2, "tokens": 16, "hidden": 64, "topk": 2, "experts": 8}
    return LayerCase(**{**values, **changes})


def test_two_ranks_end_to_end(tmp_path: Path) -> None:
    path = write_records(tmp_path / "r.jsonl", [make_record()])
    options = ("--device", "cpu", "--layers", "2", "--profile", str(tmp_path / "traces"))
    result = CliRunner().invoke(app, [*QUICK, *options, "--out", str(path), "--append"])
    assert result.exit_code == 0, result.output
    for word in ("tiny", "2 layers", "compute", "exposed", "forward", "step", "2 records"):
        assert word in result.output
    forward, step = read_records(path, LayerRecord)
    assert read_records(path) == [make_record()]
    assert (forward.phase, step.phase) == LAYER_PHASES
    for record in (forward, step):
        assert (record.engine, record.model, record.layers) == ("collective", "tiny", 2)
        assert record.iterations == 3
        difference = record.time_us.median - record.compute_us.median
        assert record.exposed_us == pytest.approx(difference, abs=0.01)
        assert record.floor_us is record.exposed_ratio is record.memory_peak_bytes is None
        assert record.floor_note is not None
    # A token goes to the other rank and back, at most, with 64 elements of 2 bytes, in 2 layers.
    assert 0 < forward.wire_bytes <= 2 * 2 * 16 * 64 * 2
    assert step.wire_bytes == 2 * forward.wire_bytes
    assert list(forward.phases_us) == FORWARD_PHASES
    assert list(step.phases_us) == [*FORWARD_PHASES, *BACKWARD_PHASES]
    traces = sorted((tmp_path / "traces").iterdir())
    assert len(traces) == 2 * 2  # phases and ranks
    assert json.loads(traces[0].read_text())["traceEvents"]


def test_uneven_tokens_of_a_skewed_routing(rank_pools: RankPools) -> None:
    case = layer_case(uneven=True, routing="masked:0.5", dtype="bfloat16")
    records, nothing = rank_pools(2).run(measure, case)
    assert [record.phase for record in records] == list(LAYER_PHASES)
    assert nothing == []


def test_two_micro_batches_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    options = ("--device", "cpu", "--layers", "2", "--variant", "eager,micro_batches")
    result = CliRunner().invoke(app, [*QUICK, *options, "--out", str(path)])
    assert result.exit_code == 0, result.output
    assert "x longer: layer over the longer of compute and calls" in " ".join(result.output.split())
    eager, both = (read_records(path, LayerRecord)[first : first + 2] for first in (0, 2))
    for whole, halves in zip(eager, both, strict=True):
        assert (whole.variant, halves.variant) == ("eager", "micro_batches")
        assert whole.phase == halves.phase
        assert whole.communication_us is whole.overlap_ratio is whole.compute_sms is None
        assert halves.wire_bytes == whole.wire_bytes
        assert halves.communication_us is not None
        longer = max(halves.compute_us.median, halves.communication_us.median)
        assert halves.overlap_ratio == pytest.approx(halves.time_us.median / longer, abs=1e-3)
        assert halves.exposed_us == pytest.approx(
            halves.time_us.median - halves.compute_us.median, abs=0.01
        )
        assert halves.compute_sms is None  # CPUs have none
        assert list(halves.phases_us) == list(whole.phases_us)


def started_calls(context: RankContext, case: LayerCase) -> tuple[list[str], list[bool]]:
    """Runs on a rank: the calls of two micro-batches in turn, and which of their tensors have the
    bits of one after the other."""
    made: list[str] = []

    class Noted(MoECommunicator):
        def dispatch_async(self, *args: Any, **kwargs: Any) -> Any:
            made.append(f"dispatch {len(args[0])}")
            return super().dispatch_async(*args, **kwargs)

        def combine_async(self, *args: Any, **kwargs: Any) -> Any:
            made.append("combine")
            return super().combine_async(*args, **kwargs)

    with Noted(case.config(context.device, timeout_s=30.0)) as comm:
        drawn = [
            LayerWeights(shape=TINY, layer=layer, seed=3, dtype=torch.float32, device=CPU)
            for layer in range(case.layers)
        ]
        layers = [MoELayer(weights, comm.local_experts) for weights in drawn]
        ids_LTK = [case.choices(layer)[comm.rank] for layer in range(case.layers)]
        torch.manual_seed(comm.rank)
        x_TH = torch.randn(len(ids_LTK[0]), TINY.hidden)
        calls = [comm] * case.layers
        results: list[list[Tensor]] = []
        for turns in (True, False):
            inputs, several = [], []
            for part in case.micro_batches(len(x_TH)):
                inputs.append(x_TH[part].clone().requires_grad_())
                stack = LayerStack(layers, [ids_TK[part] for ids_TK in ids_LTK])
                several.append(stack.parts(inputs[-1], calls))
            out = in_turn(several) if turns else [in_one_piece(parts) for parts in several]
            wanted = [*inputs, *(weight for one in layers for weight in one.parameters())]
            ones = [torch.ones_like(one) for one in out]
            results.append([*out, *torch.autograd.grad(out, wanted, ones)])
        same = [torch.equal(*pair) for pair in zip(*results, strict=True)]
    return made, same


def test_micro_batches_take_turns_and_keep_their_bits(rank_pools: RankPools) -> None:
    case = layer_case(variant="micro_batches", tokens=7, layers=2, routing="masked:0.5")
    for made, same in rank_pools(2).run(started_calls, case):
        assert made == ["dispatch 4", "dispatch 3", "combine", "combine"] * 2
        assert len(same) == 2 + 2 + 2 * 5  # results, their tokens, weights of two layers
        assert all(same)


def test_a_rank_without_tokens_takes_its_turns(rank_pools: RankPools) -> None:
    case = layer_case(variant="micro_batches", uneven=True, routing="masked:0.5", dtype="bfloat16")
    assert 0 in case.token_counts()
    records, nothing = rank_pools(2).run(measure, case)
    assert [record.phase for record in records] == list(LAYER_PHASES)
    assert nothing == []


def measure(context: RankContext, case: LayerCase) -> list[LayerRecord]:
    """Runs on a rank."""
    [records] = measure_layers(context, [case], Plan(iters=2), on_progress=lambda _: None)
    return records


def doubled_combine(comm: MoECommunicator, *args: Any, **kwargs: Any) -> Any:
    result = _COMBINE(comm, *args, **kwargs)
    return result * (2 if comm.rank == 0 else 1)


def shifted_combine_async(comm: MoECommunicator, *args: Any, **kwargs: Any) -> Any:
    request = _COMBINE_ASYNC(comm, *args, **kwargs)
    wait = request.wait
    request.wait = lambda: wait() * (1 + 2**-20)  # well within tolerances, but not the same bits
    return request


def doubled_weight_grads(engine: CollectiveEngine, *args: Any) -> Tensor:
    return 2 * _WEIGHT_GRADS(engine, *args)


_COMBINE, _WEIGHT_GRADS = MoECommunicator.combine, CollectiveEngine.weight_grads
_COMBINE_ASYNC = MoECommunicator.combine_async
WRONG: dict[str, tuple[type, str, Any]] = {
    "combine": (MoECommunicator, "combine", doubled_combine),
    "gradient": (CollectiveEngine, "weight_grads", doubled_weight_grads),
    "turns": (MoECommunicator, "combine_async", shifted_combine_async),
}


def measure_what_is_wrong(context: RankContext, wrong: str) -> str:
    """Runs on a rank."""
    with mock.patch.object(*WRONG[wrong]):
        try:
            measure(context, layer_case(variant="micro_batches" if wrong == "turns" else "eager"))
        except WrongResultError as error:
            return str(error)
    return ""


def test_wrong_layers_are_not_timed(rank_pools: RankPools) -> None:
    here, elsewhere = rank_pools(2).run(measure_what_is_wrong, "combine")
    assert here.startswith("layer 0: 4 of 4 checked tokens are wrong")
    assert "ranks [0]" in elsewhere
    for message in rank_pools(2).run(measure_what_is_wrong, "gradient"):
        assert message.startswith("the gradient of layer 0")
    for message in rank_pools(2).run(measure_what_is_wrong, "turns"):
        assert message.startswith("layer_forward: 2 of 2 tensors have other bits")


def rows_that_arrive(context: RankContext, case: LayerCase) -> list[int]:
    """Runs on a rank: rows of every dispatch, with room for no more than `most_rows` of them."""
    config = case.config(context.device, timeout_s=30.0)
    config = replace(config, max_recv_tokens_per_rank=case.most_rows(), static_shapes=False)
    rows: list[int] = []
    with MoECommunicator(config) as comm:
        for layer in range(case.layers):
            ids_TK = case.choices(layer)[comm.rank]
            for part in case.micro_batches(len(ids_TK)):
                x_TH = torch.zeros(len(ids_TK[part]), case.hidden)
                received, _ = comm.dispatch(x_TH, ids_TK[part])
                rows.append(len(received.tokens))
    return rows


@pytest.mark.parametrize("variant", ["graph", "micro_batches"])
@pytest.mark.parametrize("routing", ["balanced", "zipf:1.5", "masked:0.7", "one_hot"])
def test_static_shapes_have_room_for_the_rows_that_arrive(
    routing: str, variant: str, rank_pools: RankPools
) -> None:
    uneven = routing == "zipf:1.5"
    case = layer_case(routing=routing, layers=2, uneven=uneven, variant=variant, tokens=15)
    rows = rank_pools(2).run(rows_that_arrive, case)
    assert max(map(max, rows)) == case.most_rows()


@pytest.fixture
def comm() -> Any:
    with MoECommunicator(layer_case(ranks=1).config(CPU, timeout_s=30.0)) as only:
        yield only


def weights_of(layer: int = 0) -> LayerWeights:
    return LayerWeights(shape=TINY, layer=layer, seed=3, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("grouped", [True, False])
def test_the_layer_is_the_dense_layer(comm: MoECommunicator, grouped: bool) -> None:
    torch.manual_seed(0)
    layer = MoELayer(weights_of(), comm.local_experts)
    if not grouped:
        layer.experts._products["cpu", torch.float32] = None
    ids_TK = torch.rand(16, TINY.experts).topk(TINY.topk).indices
    ids_TK[3, 1] = -1
    x_TH = torch.randn(16, TINY.hidden, requires_grad=True)
    grad_TH = torch.randn(16, TINY.hidden)
    results = [
        (y_TH, *torch.autograd.grad(y_TH, x_TH, grad_TH))
        for y_TH in (layer(x_TH, ids_TK, comm), dense_layer(weights_of(), x_TH, ids_TK))
    ]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_compute_alone_makes_the_same_products_and_no_calls(comm: MoECommunicator) -> None:
    torch.manual_seed(0)
    product = find_grouped_product(CPU, torch.float32)
    layers = [MoELayer(weights_of(layer), comm.local_experts) for layer in range(2)]
    ids_LTK = [torch.rand(16, TINY.experts).topk(TINY.topk).indices for _ in layers]
    stack, x_TH = LayerStack(layers, ids_LTK), torch.randn(16, TINY.hidden, requires_grad=True)
    kept = Recorder(comm)
    with torch.no_grad():
        y_TH = stack(x_TH, [kept, kept])
    wanted = (x_TH, *stack.parameters())
    shapes: list[list[tuple[int, ...]]] = []
    for calls in ([comm, comm], kept.stand_ins()):
        rows: list[tuple[int, ...]] = []

        def counted(*args: Any, rows: list[tuple[int, ...]] = rows, **kwargs: Any) -> Tensor:
            rows.append(tuple(args[0].shape))
            assert product is not None
            return product(*args, **kwargs)

        with mock.patch.dict(layers[0].experts._products, {("cpu", torch.float32): counted}):
            result_TH = stack(x_TH, calls)
        assert torch.equal(result_TH, y_TH)
        grads = torch.autograd.grad(result_TH, wanted, torch.ones_like(y_TH))
        assert [grad.shape for grad in grads] == [tensor.shape for tensor in wanted]
        assert all(bool(grad.any()) for grad in grads)
        shapes.append(rows)
        comm.close()  # the stand-ins need no communicator
    assert len(shapes[0]) == 2
    assert shapes[0] == shapes[1]


def test_micro_batches_do_not_wait_for_counts_where_the_engine_can() -> None:
    for engine, where, static in (
        ("nvlink", "cuda", True),
        ("auto", "cuda", True),
        ("collective", "cuda", False),
        ("auto", "cpu", False),
    ):
        case = layer_case(variant="micro_batches", engine=engine, tokens=63)
        config = case.config(torch.device(where), timeout_s=30.0)
        room = case.most_rows() if static else None
        assert (config.static_shapes, config.max_recv_tokens_per_rank) == (static, room)
        assert config.max_tokens_per_rank == 32
        assert room is None or 0 < room < replace(case, variant="eager").most_rows()


def test_calls_alone_move_rows_there_and_back(comm: MoECommunicator) -> None:
    ids_LTK = [torch.rand(16, TINY.experts).topk(TINY.topk).indices for _ in range(2)]
    weights_TK = torch.full((16, TINY.topk), 1 / TINY.topk)
    x_TH = torch.randn(16, TINY.hidden)
    y_TH = in_one_piece(calls_alone(comm, x_TH, ids_LTK, [weights_TK] * 2))
    torch.testing.assert_close(y_TH, x_TH)


def carve_out() -> int | None:
    return torch._C._get_sm_carveout_experimental()  # pyright: ignore[reportAttributeAccessIssue]


def test_products_are_limited_for_as_long_as_they_are_measured(comm: MoECommunicator) -> None:
    assert product_sms(comm) is None  # CPUs have no SMs
    with products_on(None, comm.device):
        assert carve_out() is None
    gpu = torch.device("cuda")
    on_gpu = mock.Mock(device=gpu)
    properties = mock.Mock(multi_processor_count=132)
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=properties):
        for left, limit, free in (((108, 100), 100, 32), ((132, 132), None, None)):
            on_gpu.compute_sms = dict(zip(("dispatch", "combine"), left, strict=True)).get
            assert product_sms(on_gpu) == limit
            with pytest.raises(KeyboardInterrupt), products_on(limit, gpu):  # noqa: PT012
                assert carve_out() == free
                with products_on(None, gpu):
                    assert carve_out() is None
                assert carve_out() == free
                raise KeyboardInterrupt
            assert carve_out() is None
        on_gpu.compute_sms = {"dispatch": 108, "combine": 100}.get
        assert product_sms(on_gpu, ["dispatch"]) == 108


def limited_on_cpus(context: RankContext, case: LayerCase) -> tuple[list[LayerRecord], set[str]]:
    """Runs on a rank: records, and the limits under which layers ran, with CPUs said to have
    SMs."""
    limits: set[str] = set()
    now: list[int | None] = [None]

    @contextmanager
    def products(num_sms: int | None, device: torch.device) -> Iterator[None]:
        before, now[0] = now[0], num_sms
        limits.add(f"{before} to {num_sms}")
        yield
        now[0] = before

    with (
        mock.patch.object(bench_layer, "product_sms", return_value=108),
        mock.patch.object(bench_layer, "products_on", products),
    ):
        return measure(context, case), limits


def test_micro_batches_are_measured_without_the_limit_too(rank_pools: RankPools) -> None:
    case = layer_case(variant="micro_batches")
    (records, limits), _ = rank_pools(2).run(limited_on_cpus, case)
    assert limits == {"None to 108", "108 to None"}
    for record in records:
        assert record.compute_sms == 108
        assert record.unlimited_us is not None


@pytest.mark.gpu
def test_a_step_is_captured_on_one_gpu(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    variants = ("eager", "graph", "micro_batches")
    options = ("--ranks", "1", "--device", "cuda", "--engine", "nvlink")
    options += ("--variant", ",".join(variants))
    result = CliRunner().invoke(app, [*QUICK, *options, "--uneven", "--out", str(path)])
    assert result.exit_code == 0, result.output
    records = read_records(path, LayerRecord)
    assert [(record.variant, record.phase) for record in records] == [
        (variant, phase) for variant in variants for phase in LAYER_PHASES
    ]
    total = torch.cuda.get_device_properties(0).multi_processor_count
    assert [record.compute_sms for record in records[:4]] == [None] * 4
    assert all(0 < (record.compute_sms or 0) < total for record in records[4:])
    assert [record.unlimited_us is None for record in records] == [True] * 4 + [False] * 2
    for record in records:
        assert (record.overlap_ratio is None) == (record.variant != "micro_batches")
        assert record.floor_note == "one rank sends nothing to others"
        assert record.memory_peak_bytes


@pytest.mark.gpu(2)
def test_two_gpus_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for engine, variant in (
        ("nvlink,collective", "eager"),
        ("nvlink", "graph"),
        ("nvlink,collective", "micro_batches"),
    ):
        options = ("--device", "cuda", "--engine", engine, "--variant", variant, "--layers", "2")
        result = CliRunner().invoke(app, [*QUICK, *options, "--out", str(path), "--append"])
        assert result.exit_code == 0, result.output
    records = read_records(path, LayerRecord)
    assert [(one.engine, one.variant, one.phase) for one in records] == [
        (engine, variant, phase)
        for engine, variant in (
            ("nvlink", "eager"),
            ("collective", "eager"),
            ("nvlink", "graph"),
            ("nvlink", "micro_batches"),
            ("collective", "micro_batches"),
        )
        for phase in LAYER_PHASES
    ]
    for record in records:
        assert record.aligned == "device"
        assert record.products == "grouped"
        assert record.floor_us is not None
        assert record.exposed_ratio == pytest.approx(record.exposed_us / record.floor_us, abs=1e-3)
        assert record.memory_peak_bytes
        phases = [name for name in FORWARD_PHASES if name != "shared"]  # this model has none
        both = phases + (BACKWARD_PHASES if record.phase == "layer_step" else [])
        assert list(record.phases_us) == both
    forward, step = records[:2]
    assert forward.floor_us is not None
    assert step.floor_us == pytest.approx(2 * forward.floor_us, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "gpt-9"), "model='gpt-9' cannot be measured; accepted: qwen3-30b-a3b"),
        (("--layers", "0"), "layers=0"),
        (("--hidden", "64"), "hidden='64' cannot be measured with --layer"),
        (("--layout", "rank_major"), "layout='rank_major'"),
        (("--mode", "ll"), "mode='ll' cannot be measured with --layer"),
        (("--overlap",), "either --layer or --overlap"),
        (("--variant", "cached"), "variant='cached' cannot be measured; accepted: one of eager"),
        (("--variant", "graph"), "variant='graph' cannot be measured on CPU ranks"),
        (("--variant", "micro_batches", "--tokens", "1"), "tokens=1 cannot be measured with"),
        (("--variant", "micro_batches,graph"), "variant='graph' cannot be measured on CPU ranks"),
        (("--variant", "micro_batches", "--mode", "ll"), "mode='ll' cannot be measured with"),
        (("--variant", "graph", "--engine", "collective"), "engine='collective'"),
        (("--routing", "trace"), "--trace"),
        (("--tokens", "0"), "max_tokens_per_rank=0"),
        (("--profile", "/proc/x"), "--profile /proc/x: cannot be written to"),
    ],
)
def test_bad_arguments_end_in_a_sentence(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "--layer", "--device", "cpu", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("arguments", [("--model", "tiny"), ("--layers", "2"), ("--profile", "x")])
def test_options_of_layers_need_layers(arguments: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", *arguments])
    assert result.exit_code == 2
    assert "needs --layer" in result.output


class TestRecords:
    def test_records_survive_a_file_of_several_kinds(self, tmp_path: Path) -> None:
        records = [
            make_layer_record(exposed_us=-3.0, exposed_ratio=-0.5, floor_us=6.0),
            make_layer_record(phase="layer_step", model="kimi-k2", engine="collective"),
        ]
        path = write_records(tmp_path / "r.jsonl", [records[0], make_record(), records[1]])
        assert read_records(path, LayerRecord) == records
        assert read_records(path) == [make_record()]

    @pytest.mark.parametrize(
        "change",
        [
            {"phase": "dispatch"},
            {"variant": "cached"},
            {"phases_us": {"gate": -1.0}},
            {"phases_us": {"gate": "soon"}},
            {"kind": "other"},
            {"tokens": None},
            {"communication_us": -1.0},
            {"overlap_ratio": -0.5},
            {"compute_sms": 1.5},
        ],
    )
    def test_wrong_records_are_refused(self, change: dict[str, Any], tmp_path: Path) -> None:
        values = {**json.loads(make_layer_record().to_json()), **change}
        path = tmp_path / "r.jsonl"
        path.write_text(json.dumps(values) + "\n")
        with pytest.raises(RecordError, match="r.jsonl:1"):
            read_records(path, LayerRecord)

    def test_later_records_replace_earlier_ones(self) -> None:
        old, new = make_layer_record(), make_layer_record(50.0, date="2031-01-01T00:00:00")
        other = make_layer_record(variant="graph")
        assert latest([old, other, new]) == [new, other]


def test_bars_are_compute_and_what_is_exposed(tmp_path: Path) -> None:
    records = [
        make_layer_record(100.0, engine=engine, phase=phase, floor_us=20.0)
        for engine in ("nvlink", "collective")
        for phase in LAYER_PHASES
    ]
    for panel in draw_exposed(records).axes:
        widths = [bar.get_width() for bar in panel.patches]  # pyright: ignore[reportAttributeAccessIssue]
        assert widths == [60.0, 40.0, 60.0, 40.0]
        assert len(panel.get_yticks()) == 2
    for panel in draw_timeline(records).axes:
        widths = [bar.get_width() for bar in panel.patches]  # pyright: ignore[reportAttributeAccessIssue]
        assert widths == [5.0, 20.0, 15.0] * 2
    path = write_records(tmp_path / "r.jsonl", records)
    result = CliRunner().invoke(app, ["plot", str(path), "--out", str(tmp_path / "plots")])
    assert result.exit_code == 0, result.output
    assert {one.name for one in (tmp_path / "plots").iterdir()} == {"layers.png", "timeline.png"}


def test_columns_of_micro_batches_stand_where_there_are_some(tmp_path: Path) -> None:
    summary = make_layer_record(50.0).time_us
    changes = {"communication_us": summary, "overlap_ratio": 1.25, "compute_sms": 108}
    turns = make_layer_record(variant="micro_batches", **changes)
    for name, records in (("a", [make_layer_record()]), ("b", [make_layer_record(), turns])):
        (tmp_path / name).mkdir()
        write_records(tmp_path / name / "layer-here.jsonl", records)
        done = CliRunner().invoke(app, ["report", str(tmp_path / name), "--out", str(tmp_path)])
        assert done.exit_code == 0, done.output
        text = (tmp_path / "layer.md").read_text()
        assert ("x longer" in text) == ("calls: dispatch" in text) == (name == "b")
    assert "| nvlink | forward | 100 | 60 | 40 | 50 | 1.25 | 108 |" in text


def test_layers_have_a_page(tmp_path: Path) -> None:
    results, out = tmp_path / "records", tmp_path / "pages"
    results.mkdir()
    records = [
        make_layer_record(phase=phase, floor_us=20.0, exposed_ratio=2.0) for phase in LAYER_PHASES
    ]
    write_records(results / "layer-here.jsonl", records)
    done = CliRunner().invoke(app, ["report", str(results), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert [path.name for path in out.iterdir()] == ["layer.md"]
    text = (out / "layer.md").read_text()
    assert "| nvlink | step | 100 | 60 | 40 | 20 | 2.00 |" in text
    assert "](../records/layer-here/timeline.png)" in text
    assert (results / "layer-here" / "layers.png").is_file()
