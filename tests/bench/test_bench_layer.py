"""`expertlink bench --layer`: whole MoE layers, checked, measured, recorded and drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from conftest import RankPools
from expertlink.bench.cases import Plan
from expertlink.bench.inputs import WrongResultError
from expertlink.bench.layer import LAYER_PHASES, LayerRecord, measure_layers
from expertlink.bench.layer_cases import LayerCase
from expertlink.bench.layer_model import (
    MODELS,
    LayerStack,
    LayerWeights,
    MoELayer,
    Recorder,
    dense_layer,
)
from expertlink.bench.layer_plots import draw_exposed, draw_timeline
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


def measure(context: RankContext, case: LayerCase) -> list[LayerRecord]:
    """Runs on a rank."""
    [records] = measure_layers(context, [case], Plan(iters=2), on_progress=lambda _: None)
    return records


def doubled_combine(comm: MoECommunicator, *args: Any, **kwargs: Any) -> Any:
    result = _COMBINE(comm, *args, **kwargs)
    return result * (2 if comm.rank == 0 else 1)


def doubled_weight_grads(engine: CollectiveEngine, *args: Any) -> Tensor:
    return 2 * _WEIGHT_GRADS(engine, *args)


_COMBINE, _WEIGHT_GRADS = MoECommunicator.combine, CollectiveEngine.weight_grads
WRONG: dict[str, tuple[type, str, Any]] = {
    "combine": (MoECommunicator, "combine", doubled_combine),
    "gradient": (CollectiveEngine, "weight_grads", doubled_weight_grads),
}


def measure_what_is_wrong(context: RankContext, wrong: str) -> str:
    """Runs on a rank."""
    with mock.patch.object(*WRONG[wrong]):
        try:
            measure(context, layer_case())
        except WrongResultError as error:
            return str(error)
    return ""


def test_wrong_layers_are_not_timed(rank_pools: RankPools) -> None:
    here, elsewhere = rank_pools(2).run(measure_what_is_wrong, "combine")
    assert here.startswith("layer 0: 4 of 4 checked tokens are wrong")
    assert "ranks [0]" in elsewhere
    for message in rank_pools(2).run(measure_what_is_wrong, "gradient"):
        assert message.startswith("the gradient of layer 0")


def rows_that_arrive(context: RankContext, case: LayerCase) -> list[int]:
    """Runs on a rank: rows of every layer, with room for no more than `most_rows` of them."""
    static = replace(case, variant="graph")
    room = static.config(CPU, timeout_s=30.0).max_recv_tokens_per_rank
    config = replace(case.config(context.device, timeout_s=30.0), max_recv_tokens_per_rank=room)
    rows: list[int] = []
    with MoECommunicator(config) as comm:
        for layer in range(case.layers):
            ids_TK = case.choices(layer)[comm.rank]
            received, _ = comm.dispatch(torch.zeros(len(ids_TK), case.hidden), ids_TK)
            rows.append(len(received.tokens))
    return rows


@pytest.mark.parametrize("routing", ["balanced", "zipf:1.5", "masked:0.7", "one_hot"])
def test_static_shapes_have_room_for_the_rows_that_arrive(
    routing: str, rank_pools: RankPools
) -> None:
    case = layer_case(routing=routing, layers=2, uneven=routing == "zipf:1.5")
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


@pytest.mark.gpu
def test_a_step_is_captured_on_one_gpu(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    options = ("--ranks", "1", "--device", "cuda", "--engine", "nvlink", "--variant", "eager,graph")
    result = CliRunner().invoke(app, [*QUICK, *options, "--uneven", "--out", str(path)])
    assert result.exit_code == 0, result.output
    records = read_records(path, LayerRecord)
    assert [(record.variant, record.phase) for record in records] == [
        (variant, phase) for variant in ("eager", "graph") for phase in LAYER_PHASES
    ]
    for record in records:
        assert record.floor_note == "one rank sends nothing to others"
        assert record.memory_peak_bytes


@pytest.mark.gpu(2)
def test_two_gpus_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for engine, variant in (("nvlink,collective", "eager"), ("nvlink", "graph")):
        options = ("--device", "cuda", "--engine", engine, "--variant", variant, "--layers", "2")
        result = CliRunner().invoke(app, [*QUICK, *options, "--out", str(path), "--append"])
        assert result.exit_code == 0, result.output
    records = read_records(path, LayerRecord)
    assert [(one.engine, one.variant, one.phase) for one in records] == [
        (engine, variant, phase)
        for engine, variant in (("nvlink", "eager"), ("collective", "eager"), ("nvlink", "graph"))
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
