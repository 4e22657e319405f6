"""Tiny MoE models of transformers with random weights, and jobs that spread their experts."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from expertlink import ClosedError, MoECommunicatorConfig
from expertlink.integrations import growing, versions
from expertlink.integrations import transformers as integration
from expertlink.integrations.growing import Communicators
from expertlink.integrations.versions import FrameworkVersionError
from expertlink.launch import RankContext

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe")
NUM_EXPERTS, VOCABULARY, LAYERS = 8, 48, 2
EXPERTS = ".experts."


def missing(since: str) -> str:
    """Why transformers cannot be used here; empty where it can."""
    if find_spec("transformers") is None:
        return "transformers is not installed"
    try:
        versions.require("transformers", since=since, before=integration.UNTESTED)
    except FrameworkVersionError as error:
        return str(error)
    return ""


needs_transformers = pytest.mark.skipif(
    bool(missing(integration.OLDEST)), reason=missing(integration.OLDEST) or "-"
)
needs_registry = pytest.mark.skipif(
    bool(missing(integration.REGISTRY)), reason=missing(integration.REGISTRY) or "-"
)
_MODULES = [f"transformers.models.{name}.modeling_{name}" for name in FAMILIES]
preloads = pytest.mark.preload("torch.distributed.tensor", "torch.distributed.fsdp", *_MODULES)


def build(family: str) -> Any:
    """A model in float32, the same on every rank; routings differ from token to token."""
    transformers: Any = importlib.import_module("transformers")

    torch.manual_seed(FAMILIES.index(family))
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    if family == "mixtral":
        config = transformers.MixtralConfig(
            **common, intermediate_size=16, num_local_experts=NUM_EXPERTS
        )
    elif family == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **common,
            head_dim=16,
            intermediate_size=16,
            moe_intermediate_size=16,
            num_experts=NUM_EXPERTS,
            norm_topk_prob=True,
        )
    elif family == "deepseek_v3":
        config = transformers.DeepseekV3Config(
            **common,
            intermediate_size=16,
            moe_intermediate_size=16,
            n_routed_experts=NUM_EXPERTS,
            n_group=2,
            topk_group=2,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
        )
    elif family == "gpt_oss":
        config = transformers.GptOssConfig(
            **common,
            head_dim=16,
            intermediate_size=16,
            num_local_experts=NUM_EXPERTS,
            sliding_window=4,
        )
    else:
        config = transformers.OlmoeConfig(**common, intermediate_size=16, num_experts=NUM_EXPERTS)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("_bias", ".bias", "sinks")):
            nn.init.normal_(parameter, std=0.2)
    return model.float()


def batch_of(rank: int) -> Tensor:
    """A rank's tokens; their number differs from rank to rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(VOCABULARY, (2, 3 + 2 * rank), generator=generator)


@dataclass
class Outcome:
    """How far a spread model is from the whole one.

    Attributes:
        logits: largest difference of this rank's logits.
        gradients: largest difference, by name of the parameter.
        largest: largest value among the gradients of experts, and among all others.
    """

    logits: float
    gradients: dict[str, float]
    largest: tuple[float, float]


def reference(model: Any, ranks: list[int]) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """Logits by rank, and gradients of the sum of all ranks' losses, of the unmodified model."""
    logits = {}
    for rank in ranks:
        logits[rank] = model(batch_of(rank).to(model.device)).logits
        loss_of(logits[rank]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {rank: values.detach() for rank, values in logits.items()}, gradients


def loss_of(logits: Tensor) -> Tensor:
    """Something that reaches every parameter, with gradients that are not small."""
    return (logits.square().mean() + logits[..., 0].sum()) * 0.5


def compare(
    logits: Tensor, found: dict[str, Tensor], expected: tuple[Tensor, dict[str, Tensor]]
) -> Outcome:
    """The differences of one rank, whose gradients were gathered."""
    expected_logits, gradients = expected
    assert set(found) == set(gradients)
    differences = {n: (found[n] - gradients[n]).abs().max().item() for n in gradients}
    routed = [g.abs().max().item() for n, g in gradients.items() if EXPERTS in n]
    others = [g.abs().max().item() for n, g in gradients.items() if EXPERTS not in n]
    difference = (logits - expected_logits).abs().max().item()
    return Outcome(difference, differences, (max(routed), max(others)))


@contextlib.contextmanager
def counted_dispatches() -> Iterator[list[torch.Size]]:
    """The shapes of what is dispatched inside."""
    shapes: list[torch.Size] = []
    original = Communicators.dispatch

    def dispatch(self: Communicators, x_TH: Tensor, *rest: Tensor) -> Any:
        shapes.append(x_TH.shape)
        return original(self, x_TH, *rest)

    with mock.patch.object(Communicators, "dispatch", dispatch):
        yield shapes


# -- jobs ------------------------------------------------------------------------------------------


def cut_by_hand(ctx: RankContext, family: str, size: int) -> Outcome:
    """`parallelize` over groups of `size` ranks; backward of every rank's own tokens."""
    device = ctx.device
    shape = (ctx.num_ranks // size, size)
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("dp", "ep"))
    group = mesh.get_group("ep")
    ranks = dist.get_process_group_ranks(group)
    expected_logits, gradients = reference(build(family).to(device), ranks)
    model = integration.parallelize(build(family).to(device), mesh["ep"])
    logits = model(batch_of(ctx.rank).to(device)).logits
    loss_of(logits).backward()
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is None:
            continue
        if EXPERTS in name:
            parts = [torch.empty_like(grad) for _ in ranks]
            dist.all_gather(parts, grad, group=group)
            found[name] = torch.cat(parts)
        else:
            dist.all_reduce(grad, group=group)
            found[name] = grad
    return compare(logits.detach(), found, (expected_logits[ctx.rank], gradients))


def engines_alike(ctx: RankContext, family: str) -> list[str]:
    """A model in bfloat16 gives the same bits with the engine chosen for it as with `collective`.

    Returns:
        The chosen engine's name.
    """
    results, names = [], []
    for engine in ("collective", "auto"):

        def configuration(engine: str = engine, **fields: Any) -> MoECommunicatorConfig:
            return MoECommunicatorConfig(engine=engine, **fields)  # pyright: ignore[reportArgumentType]

        with mock.patch.object(growing, "MoECommunicatorConfig", configuration):
            model = integration.parallelize(build(family).bfloat16().to(ctx.device))
            logits = model(batch_of(ctx.rank).to(ctx.device)).logits
        loss_of(logits.float()).backward()
        experts = model.model.layers[-1].mlp.experts
        results.append((logits, *(p.grad for p in experts.parameters())))
        communicators = experts.forward._communicators
        names = [comm.engine_name for comm in communicators._members.values()]
        communicators.close()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return names


def written(ctx: RankContext, family: str, path: Path) -> None:
    """A checkpoint for `loaded`."""
    if ctx.rank == 0:
        build(family).save_pretrained(path)
    dist.barrier()


def loaded(ctx: RankContext, family: str, path: Path, sizes: dict[str, int]) -> Outcome:
    """`from_pretrained` with a configuration that names the registered implementation."""
    from torch.distributed.tensor import DTensor

    transformers: Any = importlib.import_module("transformers")

    integration.register()
    config = transformers.distributed.DistributedConfig(**sizes, ep_implementation="expertlink")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, distributed_config=config, dtype=torch.float32
    )
    batch = ctx.rank // config.tp_size  # ranks of a tensor-parallel group have the same tokens
    batches = list(range(ctx.num_ranks // config.tp_size))
    expected_logits, gradients = reference(build(family), batches)
    with counted_dispatches() as calls:
        logits = model(batch_of(batch)).logits
    assert len(calls) == LAYERS - (family == "deepseek_v3")  # whose first layer is dense
    loss_of(logits).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            full = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[name] = full * len(batches)  # FSDP takes the mean
    return compare(logits.detach(), found, (expected_logits[batch], gradients))


def longer_and_longer(ctx: RankContext) -> list[int]:
    """Forwards of more tokens than before, and backward of the first one after all of them."""
    torch.manual_seed(0)
    whole, model = build("mixtral"), integration.parallelize(build("mixtral"))
    tokens, outputs = torch.empty(0), []
    for length in (2, 5, 40, 3):
        tokens = torch.full((2, length), ctx.rank) + torch.arange(length)
        outputs.append(model(tokens).logits)
        torch.testing.assert_close(outputs[-1], whole(tokens).logits, rtol=0, atol=1e-5)
    copy_of_model = copy.deepcopy(model)
    torch.testing.assert_close(copy_of_model(tokens).logits, outputs[-1], rtol=0, atol=0)
    for output in outputs:
        loss_of(output).backward()
    experts = model.model.layers[0].mlp.experts
    communicators = experts.forward._communicators
    assert communicators is model.model.layers[1].mlp.experts.forward._communicators
    sizes = [comm.config.max_tokens_per_rank for comm in communicators._outgrown]
    assert torch.isfinite(experts.down_proj.grad).all()
    communicators.close()
    try:
        model(tokens)
    except ClosedError:
        return sizes
    raise AssertionError("a forward after close()")


def steps_of_the_example(ctx: RankContext, folder: Path) -> tuple[list[list[float]], int, str]:
    """Losses of both implementations, calls of ours, and what is printed."""
    path = Path(__file__).parents[2] / "examples" / "transformers_step.py"
    spec = spec_from_file_location("transformers_step", path)
    assert spec is not None
    assert spec.loader is not None
    example: Any = module_from_spec(spec)
    sys.modules[spec.name] = example  # dataclasses look there
    spec.loader.exec_module(example)
    work = example.Workload(
        example.TINY, length=16, batch=1, steps=2, warmup=1, dtype=torch.float32
    )
    with counted_dispatches() as calls:
        found = example.measure(work, ctx.device, folder)
    assert [one.implementation for one in found] == [example.THEIRS, example.OURS]
    assert all(one.tokens_per_s * one.step_ms > 0 for one in found)
    return [one.losses for one in found], len(calls), example.report(found)


def one_after_the_other(ctx: RankContext) -> bool:
    """Models over one group, where rank 0 keeps the first and the others have forgotten it."""
    tokens, kept = torch.full((2, 3), ctx.rank), []
    for family in ("mixtral", "mixtral"):
        model = integration.parallelize(build(family))
        kept.append((model(tokens).logits, model if ctx.rank == 0 else None))
        del model
        gc.collect()
    return torch.equal(kept[0][0], kept[1][0])


def refusals(ctx: RankContext, path: Path) -> dict[str, str]:
    """What wrong sizes, plans and names say."""
    transformers: Any = importlib.import_module("transformers")
    integration.register()
    said = {}
    cases: dict[str, dict[str, Any]] = {
        "size": {"fsdp_size": 4, "ep_size": 3},
        "name": {"fsdp_size": 4, "ep_size": 4, "ep_implementation": "expertlynk"},
        "plan": {
            "fsdp_size": 4,
            "ep_size": 4,
            "ep_plan": {
                "model.layers.*.mlp.experts.gate_up_proj": "replicate",
                "model.layers.*.mlp.experts.down_proj": "replicate",
            },
        },
    }
    for case, fields in cases.items():
        try:
            config = transformers.distributed.DistributedConfig(
                **{"ep_implementation": "expertlink", **fields}
            )
            transformers.AutoModelForCausalLM.from_pretrained(path, distributed_config=config)
        except ValueError as error:
            said[case] = f"{type(error).__name__}: {error}"
    return said
