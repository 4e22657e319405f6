"""Tokens per second of a training step of Qwen3-MoE, by transformers' expert parallelism and ours.

Both are the same model of transformers, with random weights, in one run: steps of one and of the
other take turns, on the same tokens. Experts are spread over all ranks, everything else is sharded
by FSDP2, and every rank has a batch of its own. The sizes are those of Qwen3-30B-A3B, with two
layers.

    torchrun --nproc-per-node 4 examples/transformers_step.py
    torchrun --nproc-per-node 2 examples/transformers_step.py --tiny  # on CPUs

Needs transformers 5.23.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from expertlink.integrations.transformers import register

THEIRS, OURS = "all_to_all", "expertlink"
REAL: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
TINY: dict[str, Any] = {
    **REAL,
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Workload:
    """What is trained, and how long.

    Attributes:
        sizes: of the model's configuration.
        layers: decoder layers, all with experts.
        batch: sequences of a rank.
        length: tokens of a sequence.
        steps: measured ones of each implementation.
        warmup: steps before.
        dtype: of weights and states.
    """

    sizes: dict[str, Any]
    layers: int = 2
    batch: int = 2
    length: int = 2048
    steps: int = 20
    warmup: int = 5
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Measured:
    """Steps of one implementation.

    Attributes:
        implementation: name in transformers' registry.
        tokens_per_s: of all ranks, from the median step; the slowest rank counts in each.
        step_ms: that step.
        losses: mean over the ranks, one for each step, those of the warm-up included.
    """

    implementation: str
    tokens_per_s: float
    step_ms: float
    losses: list[float]


class Training:
    """A model with the experts of one implementation, and its optimizer.

    Args:
        path: the checkpoint.
        implementation: name in transformers' registry.
        work: the workload.
    """

    def __init__(self, path: Path, implementation: str, work: Workload) -> None:
        transformers: Any = importlib.import_module("transformers")
        distributed: Any = importlib.import_module("transformers.distributed")
        ranks = dist.get_world_size()
        config = distributed.DistributedConfig(
            fsdp_size=ranks, ep_size=ranks, ep_implementation=implementation
        )
        self.implementation = implementation
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path, distributed_config=config, dtype=work.dtype
        )
        self.model.train()
        # Parameters lie on several meshes, which one operation for all of them does not accept.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=False)
        self.times_s: list[float] = []
        self.losses: list[float] = []

    def step(self, tokens_BS: torch.Tensor) -> None:
        """One step, from inputs that all ranks have to parameters that all ranks have changed."""
        device = tokens_BS.device
        dist.barrier()
        _wait_for(device)
        started = time.perf_counter()
        loss = self.model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        _wait_for(device)
        took = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=device)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        mean = loss.detach().double() / dist.get_world_size()
        dist.all_reduce(mean)
        self.times_s.append(took.item())
        self.losses.append(mean.item())

    def measured(self, work: Workload) -> Measured:
        """What the steps after the warm-up took."""
        median = statistics.median(self.times_s[work.warmup :])
        tokens = work.batch * work.length * dist.get_world_size()
        return Measured(self.implementation, tokens / median, 1000 * median, self.losses)


def measure(work: Workload, device: torch.device, folder: Path) -> list[Measured]:
    """Steps of both implementations in turn. Collective; all ranks reach the same folder."""
    _write_checkpoint(work, folder)
    register(max_tokens_per_rank=work.batch * work.length)
    both = [Training(folder, name, work) for name in (THEIRS, OURS)]
    generator = torch.Generator().manual_seed(dist.get_rank())
    vocabulary = work.sizes["vocab_size"]
    for _ in range(work.warmup + work.steps):
        tokens_BS = torch.randint(vocabulary, (work.batch, work.length), generator=generator)
        for training in both:
            training.step(tokens_BS.to(device))
    return [training.measured(work) for training in both]


def _write_checkpoint(work: Workload, folder: Path) -> None:
    """Random weights, written by rank 0."""
    if dist.get_rank() == 0:
        transformers: Any = importlib.import_module("transformers")
        config = transformers.Qwen3MoeConfig(
            num_hidden_layers=work.layers, max_position_embeddings=work.length, **work.sizes
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=work.dtype)
        model.save_pretrained(folder)
    dist.barrier()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(found: list[Measured]) -> str:
    """A table."""
    lines = [f"{'experts by':<12} {'tokens/s':>12} {'ms':>9} {'first loss':>11} {'last loss':>10}"]
    for one in found:
        first, last = one.losses[0], one.losses[-1]
        lines.append(
            f"{one.implementation:<12} {one.tokens_per_s:>12,.0f} {one.step_ms:>9.2f} "
            f"{first:>11.4f} {last:>10.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_KeepLines)
    parser.add_argument("--tiny", action="store_true", help="a tiny model in float32, on CPUs")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2, help="sequences of a rank")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON of all figures, written by rank 0")
    arguments = parser.parse_args()
    work = Workload(
        TINY if arguments.tiny else REAL,
        layers=arguments.layers,
        batch=arguments.batch,
        length=min(arguments.length, 64) if arguments.tiny else arguments.length,
        steps=arguments.steps,
        warmup=arguments.warmup,
        dtype=torch.float32 if arguments.tiny else torch.bfloat16,
    )
    device = torch.device("cpu")
    if torch.cuda.is_available() and not arguments.tiny:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    names: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    try:
        found = measure(work, device, Path(names[0]))
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(names[0], ignore_errors=True)
    if dist.get_rank() == 0:
        print(report(found))
        if arguments.output:
            arguments.output.write_text(_record(work, found, device))
    dist.destroy_process_group()


class _KeepLines(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def _record(work: Workload, found: list[Measured], device: torch.device) -> str:
    transformers: Any = importlib.import_module("transformers")
    on_gpu = device.type == "cuda"
    environment = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "ranks": dist.get_world_size(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    workload = {**asdict(work), "dtype": str(work.dtype)}
    parts = {"environment": environment, "workload": workload}
    return json.dumps({**parts, "measured": [asdict(one) for one in found]}, indent=2) + "\n"


if __name__ == "__main__":
    main()
