"""`expertlink.nn`: the layer equals a dense one in every layout; checkpoints; what it refuses."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from expertlink import (
    ConfigurationError,
    DispatchLayout,
    DispatchOutput,
    InputError,
    MoECommunicator,
)
from expertlink.nn import GroupedExperts, MoELayer, SwiGLU, merge_state_dicts
from expertlink.placement import ExpertPlacement
from support import moe_layers
from support.compiled import compiled, counting
from support.moe_layers import EXPERTS, HIDDEN, TOPK, WIDTH, LayerCase, received_of
from support.small_calls import make

LAYOUTS = [layout.value for layout in DispatchLayout]
COPIES = ExpertPlacement(EXPERTS, ((0, 1, 2, 4), (1, 3, 4), (0, 2)))
BARE = ExpertPlacement(EXPERTS, ((0, 1, 2), (3, 4), ()))


# -- results and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients_equal_a_dense_layer(rank_pools, layout: str) -> None:
    """Ranks without tokens or experts, an expert without rows, copies of experts, no tokens."""
    fields: dict[str, Any] = {"output_layout": layout}
    cases = [LayerCase((5, 0, 7), placement, fields=fields) for placement in (None, COPIES, BARE)]
    cases += [LayerCase((0, 0, 0), fields=fields)]
    cases += [LayerCase((5, 0, 7), dtype=torch.float32, fields=fields)]
    if layout == "flat":
        cases += [LayerCase((5, 0, 7), fields={**fields, "expert_alignment": 8})]
    cases += [LayerCase((5, 0, 7), COPIES, fields={**fields, "mode": "ll"})]
    for worst in rank_pools(3).run(moe_layers.gradients, cases, timeout_s=60):
        for case, gap in zip(cases, worst, strict=True):
            assert gap < (1e-12 if case.dtype is torch.float64 else 1e-5), case


@pytest.mark.gpu(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients_equal_a_dense_layer_on_gpus(rank_pools, layout: str) -> None:
    cases = [
        LayerCase((33, 0), placement, torch.bfloat16, {"output_layout": layout, **more})
        for placement in (None, ExpertPlacement(EXPERTS, ((0, 1, 2), (0, 2, 3, 4))))
        for more in ({}, {"mode": "ll"}, {"engine": "collective"})
    ]
    if layout == "flat":
        fields: dict[str, Any] = {"output_layout": layout, "expert_alignment": 8}
        cases += [LayerCase((33, 0), None, torch.bfloat16, fields)]
    for worst in rank_pools(2, "cuda").run(moe_layers.gradients, cases, timeout_s=200):
        for case, gap in zip(cases, worst, strict=True):
            assert gap < 0.06, case


def test_gradcheck(rank_pools) -> None:
    layouts = ["flat", "rank_major"]  # the others take the same products of other slots
    assert all(rank_pools(2).run(moe_layers.gradcheck, layouts, timeout_s=60))


def test_a_router_of_the_caller(tmp_path: Any) -> None:
    case = LayerCase((12,), dtype=torch.float32)
    with MoECommunicator(case.config(torch.device("cpu"))) as comm:
        router = Router()
        layer = MoELayer(comm, intermediate_size=WIDTH, router=router)
        assert "router.gate.weight" in layer.state_dict()
        x = torch.randn(3, 4, HIDDEN, dtype=torch.float64)  # cast on the way, and back
        ids_TK, weights_TK = router(x.view(12, HIDDEN).float())
        plain = MoELayer(comm, intermediate_size=WIDTH, router=lambda x: router(x.float()))
        plain.experts.load_state_dict(layer.experts.state_dict())
        y = plain(x)
        assert y.dtype is torch.float64
        assert y.shape == x.shape
        assert torch.equal(y, layer(x, ids_TK, weights_TK))
        y.sum().backward()
        assert router.gate.weight.grad is not None


# -- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [0, 9])
def test_counts_of_the_host_change_nothing(layout: str, tokens: int) -> None:
    """Grouped product or loop, with counts on the host or on the device alone: the same rows."""
    received, experts = received_of(layout, tokens, torch.float32)
    assert received.num_tokens_per_expert_list is not None
    experts_alone = [experts, _looping(experts)]
    found = []
    for module in experts_alone:
        for counts in (received.num_tokens_per_expert_list, None):
            tokens_in = received.tokens.detach().clone().requires_grad_()
            given = dataclasses.replace(
                received, tokens=tokens_in, num_tokens_per_expert_list=counts
            )
            rows = module(given)
            assert rows.shape == received.tokens.shape
            rows = _filled(rows, received)
            grads = torch.autograd.grad(rows.square().sum(), (tokens_in, *module.parameters()))
            found.append((rows, *grads))
    assert found[0][0].isfinite().all()
    for other in found[1:]:
        for value, first in zip(other, found[0], strict=True):
            torch.testing.assert_close(value, first)


def _looping(experts: GroupedExperts) -> GroupedExperts:
    """The same experts without a grouped product."""
    other = copy.deepcopy(experts)
    [key] = other._products
    assert other._products[key] is not None, "nothing is compared"
    other._products[key] = None
    return other


def _filled(rows: Tensor, received: DispatchOutput) -> Tensor:
    """Rows that combine reads."""
    if received.layout is not DispatchLayout.EXPERT_MAJOR:
        return rows
    slots = torch.arange(rows.shape[1], device=rows.device)
    return torch.where((slots < received.num_tokens_per_expert[:, None])[..., None], rows, 0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("layout", "alignment"), [*((layout, 1) for layout in LAYOUTS), ("flat", 8)]
)
@pytest.mark.parametrize("tokens", [0, 9])
def test_grouped_products_on_a_gpu(layout: str, tokens: int, alignment: int) -> None:
    """What the loop gives, with gradients and without, for groups of any size."""
    received, experts = received_of(layout, tokens, torch.bfloat16, alignment, "cuda")
    loop = _looping(experts)
    for counts in (received.num_tokens_per_expert_list, None):
        tokens_in = received.tokens.detach().clone().requires_grad_()
        given = dataclasses.replace(received, tokens=tokens_in, num_tokens_per_expert_list=counts)
        found = []
        for module in (experts, loop):
            rows = _filled(module(given), received)
            grads = torch.autograd.grad(rows.square().sum(), (tokens_in, *module.parameters()))
            with torch.no_grad():
                found.append((rows, _filled(module(given), received), *grads))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_captured(layout: str) -> None:
    """Where counts stay on the device the host waits for nothing."""
    received, experts = received_of(layout, 9, torch.bfloat16, 1, "cuda")
    given = dataclasses.replace(received, num_tokens_per_expert_list=None)
    with torch.no_grad():
        expected = _filled(experts(given), received)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rows = experts(given)
        rows.fill_(float("nan"))
        graph.replay()
    assert torch.equal(_filled(rows, received), expected)


def test_garbage_behind_the_rows_reaches_nobody() -> None:
    """Padding of RANK_MAJOR without gradients holds anything."""
    received, experts = received_of("rank_major", 9, torch.float32)
    assert received.topk_ids is not None
    unfilled = (received.topk_ids < 0).all(dim=-1)
    dirty = dataclasses.replace(
        received, tokens=received.tokens.masked_fill(unfilled[..., None], float("nan"))
    )
    for counts in (received.num_tokens_per_expert_list, None):
        given = dataclasses.replace(dirty, num_tokens_per_expert_list=counts)
        with torch.no_grad():
            assert torch.equal(experts(given), experts(received))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_compile_into_one_graph(layout: str) -> None:
    """As the products of a compiled layer: counts stay on the device, and T may change."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    _, experts = received_of(layout, 9, torch.float32)

    def run(tokens: Tensor, offsets: Any, ids: Any, weights: Any, counts: Tensor) -> Tensor:
        return experts(
            DispatchOutput(
                tokens,
                counts,
                DispatchLayout(layout),
                expert_offsets=offsets,
                topk_ids=ids,
                topk_weights=weights,
            )
        )

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
    for tokens in (9, 5, 12):
        received, _ = received_of(layout, tokens, torch.float32)
        given = (received.tokens, received.expert_offsets, received.topk_ids)
        given += (received.topk_weights, received.num_tokens_per_expert)
        torch.testing.assert_close(compiled(*given), run(*given), rtol=0, atol=0)
    assert len(graphs) == 1


# -- in torch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_around_a_layer_with_checkpoints(rank_pools, wrapper: str) -> None:
    """What is recomputed is sent again, but for what a policy saves."""
    for sent in rank_pools(2).run(moe_layers.wrapped, wrapper, timeout_s=60):
        rows = sent["plain"] // 4  # of a dispatch, or of a combine, and both again in backward
        assert rows > 0
        assert sent["selective"] == sent["plain"] == 4 * rows
        assert sent["reentrant"] == 6 * rows
        assert sent["not reentrant"] in (5 * rows, 6 * rows)  # torch may stop before the combine


def test_a_layer_is_exported_and_not_mapped() -> None:
    case = LayerCase((6,), dtype=torch.float32)
    with MoECommunicator(case.config(torch.device("cpu"))) as comm, torch.no_grad():
        comm.initialize()
        layer = moe_layers.layer_of(comm, case)
        given = moe_layers.inputs_of(case, 0)
        expected = layer(*given)
        state: dict[str, Tensor] = dict(layer.named_parameters())
        found = torch.func.functional_call(layer, state, given)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        batch = given[0].expand(2, -1, -1)
        with pytest.raises(InputError, match="torch.vmap or torch.func"):
            torch.vmap(lambda x_TH: layer(x_TH, *given[1:]))(batch)
        program = torch.export.export(layer, given)
        torch.testing.assert_close(program.module()(*given), expected)


class Router(torch.nn.Module):
    """A linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(HIDDEN, EXPERTS)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        weights_TK, ids_TK = self.gate(x_TH).softmax(dim=-1).topk(TOPK)
        return ids_TK, weights_TK


def test_a_layer_is_one_graph() -> None:
    """With router, physical ids, shared expert, and backward; for any number of tokens."""
    everything = ExpertPlacement(EXPERTS, (tuple(range(EXPERTS)),))
    case = LayerCase((12,), everything, dtype=torch.float32)
    with MoECommunicator(case.config(torch.device("cpu"))) as comm, counting() as counted:
        comm.initialize()
        layer = moe_layers.layer_of(comm, case)
        layer.router = Router()
        fast = compiled(layer, dynamic=True)
        for tokens in (9, 12, 3, 7):
            x_TH = torch.randn(tokens, HIDDEN)
            found = []
            for model in (layer, fast):
                y_TH = model(x_TH)
                grads = torch.autograd.grad(y_TH.square().sum(), tuple(layer.parameters()))
                found.append((y_TH, *grads))
            for one, other in zip(*found, strict=True):
                assert torch.equal(one, other)
    assert (counted.graphs, counted.breaks) == (1, 0)


# -- moves and checkpoints ------------------------------------------------------------------------


def test_moved_experts_give_the_same(rank_pools) -> None:
    for layout in LAYOUTS:
        rank_pools(2).run(moe_layers.moves, layout, timeout_s=60)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("mode", ["ht", "ll"])
def test_moved_experts_give_the_same_on_gpus(rank_pools, mode: str) -> None:
    for layout in LAYOUTS:
        rank_pools(2, "cuda").run(moe_layers.moves, layout, mode, timeout_s=120)


def test_training_with_copies_equals_a_dense_model(rank_pools) -> None:
    rank_pools(3).run(moe_layers.trains_with_copies, timeout_s=60)


def test_steps_with_gradients_of_single_copies_are_refused(rank_pools) -> None:
    for said in rank_pools(2).run(moe_layers.steps_without_sums, timeout_s=60):
        nothing, alone, summed, own, again = said
        assert nothing == summed == own == ""
        for text in (alone, again):
            assert text.startswith("SGD.step: gradients of gate_up are those of single copies")


def test_sums_hold_for_one_step_whether_it_comes_or_not(rank_pools) -> None:
    for said in rank_pools(2).run(moe_layers.steps_that_are_left_out, timeout_s=60):
        skipped, more, first_closure, second_closure, closure_alone, moved, frozen = said
        assert first_closure == second_closure == frozen == ""
        for text in (skipped, more, closure_alone, moved):
            assert "are those of single copies" in text


def test_what_ranks_save_makes_one_checkpoint(rank_pools) -> None:
    rank_pools(2).run(moe_layers.checkpoints, timeout_s=60)


def experts_of(*ids: int) -> GroupedExperts:
    return GroupedExperts(HIDDEN, WIDTH, expert_ids=ids, num_experts=EXPERTS)


def dense_checkpoint() -> tuple[Tensor, Tensor]:
    return torch.randn(EXPERTS, HIDDEN, 2 * WIDTH), torch.randn(EXPERTS, WIDTH, HIDDEN)


def linear_names(
    gate_up: Tensor, down: Tensor, names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, Tensor]:
    """The names of most checkpoints: linear layers, transposed."""
    found: dict[str, Tensor] = {}
    for expert in range(len(down)):
        gate, up = gate_up[expert].chunk(2, dim=1)
        for name, weight in zip(names, (gate, up, down[expert]), strict=True):
            found[f"{expert}.{name}.weight"] = weight.t().contiguous()
    return found


def test_every_kind_of_checkpoint_loads_the_local_experts() -> None:
    gate_up, down = dense_checkpoint()
    order = torch.tensor([4, 1, 3])
    checkpoints = [
        {"gate_up": gate_up, "down": down},
        {"gate_up": gate_up[order], "down": down[order], "expert_ids": order},
        linear_names(gate_up, down),
        linear_names(gate_up, down, ("w1", "w3", "w2")),
        {"gate_up_proj": gate_up.transpose(1, 2), "down_proj": down.transpose(1, 2)},
    ]
    for checkpoint in checkpoints:
        for assign in (False, True):
            experts = experts_of(1, 4)
            experts.load_state_dict(checkpoint, assign=assign)
            assert torch.equal(experts.gate_up, gate_up[[1, 4]])
            assert torch.equal(experts.down, down[[1, 4]])
            assert experts.expert_ids == (1, 4)
    nobody = experts_of()
    nobody.load_state_dict(linear_names(gate_up, down))
    assert nobody.down.shape == (0, WIDTH, HIDDEN)


def test_the_shared_expert_loads_linear_names() -> None:
    shared, other = SwiGLU(HIDDEN, WIDTH), SwiGLU(HIDDEN, WIDTH)
    gate_up, down = (weight.detach()[None] for weight in (shared.gate_up, shared.down))
    named = {name.removeprefix("0."): w for name, w in linear_names(gate_up, down).items()}
    other.load_state_dict(named)
    x = torch.randn(3, HIDDEN)
    assert torch.equal(shared(x), other(x))
    del named["up_proj.weight"]
    with pytest.raises(RuntimeError, match="expected one of up_proj.weight and w3.weight, found 0"):
        other.load_state_dict(named)


GATE_UP, DOWN = dense_checkpoint()
LINEAR = linear_names(GATE_UP, DOWN)


@pytest.mark.parametrize(
    ("checkpoint", "says"),
    [
        ({}, 'Missing key(s) in state_dict: "gate_up", "down"'),
        ({"gate_up": GATE_UP}, 'Missing key(s) in state_dict: "down"'),
        ({"gate_up": GATE_UP[:3], "down": DOWN[:3]}, "gate_up has shape [3, 8, 32], expected [5,"),
        (
            {"gate_up": GATE_UP[:2], "down": DOWN[:2], "expert_ids": torch.tensor([1, 2])},
            "gate_up has no expert 4 (1 of the 2 experts of this rank are missing); it has 2 "
            "experts, 1 to 2",
        ),
        (
            {"gate_up": GATE_UP, "down": DOWN, "expert_ids": torch.tensor([1, 4])},
            "gate_up has shape [5, 8, 32], expected [2, ...]",
        ),
        ({"gate_up": GATE_UP, "down": DOWN[..., :4]}, "size mismatch for down"),
        ({k: v for k, v in LINEAR.items() if k[0] != "4"}, "has no expert 4"),
        ({k: v for k, v in LINEAR.items() if k != "4.up_proj.weight"}, "4.up_proj.weight"),
        ({**LINEAR, "1.w3.weight": DOWN[0]}, "found 2"),
        ({**LINEAR, "1.up_proj.weight": DOWN[0]}, "1. has projections of shapes [16, 8], [16, 8]"),
        ({**LINEAR, "1.up_proj.bias": DOWN[0, 0]}, 'Unexpected key(s) in state_dict: "1.up_proj.'),
    ],
)
def test_bad_checkpoints_are_refused(checkpoint: dict[str, Tensor], says: str) -> None:
    if "1. has projections" in says:
        checkpoint["1.up_proj.weight"] = torch.ones(3, 8)
        says = "1. has projections of shapes [16, 8], [3, 8], [8, 16]"
    with pytest.raises(RuntimeError) as refused:
        experts_of(1, 4).load_state_dict(checkpoint)
    assert says in str(refused.value)


def test_parts_that_make_no_checkpoint_are_refused() -> None:
    one, two = (
        {"e." + k: v for k, v in experts_of(*ids).state_dict().items()} for ids in ((0, 1), (1, 3))
    )
    with pytest.raises(InputError, match="copies of expert 1 differ"):
        merge_state_dicts([one, two])
    for name in ("e.gate_up", "e.down"):
        two[name][0] = one[name][1]
    with pytest.raises(InputError, match="e.gate_up: no part has expert 2"):
        merge_state_dicts([one, two])
    with pytest.raises(InputError, match="no state dicts"):
        merge_state_dicts([])


def test_experts_are_drawn_by_their_ids() -> None:
    """So ranks with one seed make one model, wherever the experts live."""
    torch.manual_seed(3)
    all_of_them = experts_of(*range(EXPERTS))
    torch.manual_seed(3)
    some = experts_of(1, 4)
    assert torch.equal(some.gate_up, all_of_them.gate_up[[1, 4]])
    assert torch.equal(some.down, all_of_them.down[[1, 4]])
    assert not torch.equal(some.down[0], some.down[1])


# -- refusals -------------------------------------------------------------------------------------


def test_refusals_reach_all_ranks(rank_pools) -> None:
    here, elsewhere = rank_pools(2).run(moe_layers.refusals, timeout_s=60)
    assert here["weights"].startswith("InputError: topk_ids and topk_weights are both needed")
    assert elsewhere["weights"].startswith("PeerError: ")
    for said in (here, elsewhere):
        for name in ("slots", "made"):
            assert said[name].startswith(
                "ConfigurationError: the communicator has 5 experts, [3, 2] per rank, the "
                "placement has 6 slots, [3, 3] per rank"
            )


def test_quantized_rows_are_refused() -> None:
    with (
        make(quantization="e4m3_float32", dtype=torch.bfloat16) as comm,
        pytest.raises(ConfigurationError, match="quantization='e4m3_float32' is not possible"),
    ):
        MoELayer(comm, intermediate_size=8)
