"""Trains a byte-level MoE language model on real text, in one readable loop.

python examples/train_language_model.py                        # one rank
torchrun --nproc-per-node 4 examples/train_language_model.py   # four ranks, on CPU or on GPUs

Every rank reads its share of one global batch. Attention, norms, router and head are replicated,
so their gradients are added up by an all-reduce. Experts live on one rank each; dispatch brings
them tokens of all ranks, and its backward brings gradients of all ranks, so theirs are complete.

The model is `expertlink.demo.model`, whose MLPs are those of `expertlink.nn`, as in
examples/moe_layer.py. `expertlink demo` wraps the same parts in progress bars, plots and checks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from expertlink import MoECommunicator, MoECommunicatorConfig
from expertlink.demo.model import LanguageModel, ModelConfig, Routing
from expertlink.demo.text import Batches, Corpus
from expertlink.launch import RankContext, torchrun_context

BALANCE_WEIGHT = 0.1


def main() -> None:
    arguments = parse_arguments()
    context = torchrun_context()  # joins torchrun's process group, if there is one
    train(arguments, context or RankContext(rank=0, num_ranks=1, device=torch.device("cpu")))
    if context:
        dist.destroy_process_group()


def train(arguments: argparse.Namespace, context: RankContext) -> None:
    """Runs the whole training on this rank."""
    rank, num_ranks, device = context.rank, context.num_ranks, context.device
    shape = ModelConfig(seed=arguments.seed)
    sample_bytes = shape.sequence + 1
    if arguments.text is None:
        corpus = Corpus.from_standard_library(sample_bytes=sample_bytes)
    else:
        corpus = Corpus.from_file(arguments.text, sample_bytes=sample_bytes)
    batches = Batches(
        corpus.train, sequence=shape.sequence, batch=arguments.batch, seed=arguments.seed
    )
    tokens_of_all = arguments.batch * shape.sequence

    config = MoECommunicatorConfig(
        device=device,
        num_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        topk=shape.topk,
        max_tokens_per_rank=-(-arguments.batch // num_ranks) * shape.sequence,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        output_layout=arguments.layout,
        # Grouped products on GPUs take groups of 16 bytes.
        expert_alignment=8 if arguments.layout in (None, "flat") else 1,
    )
    with MoECommunicator(config) as comm:  # one communicator serves all layers
        if rank == 0:
            print(f"{num_ranks} ranks, {comm.engine_name} engine: {comm.engine_reason}")
        model = LanguageModel(shape, comm).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
        started = time.perf_counter()
        for step in range(arguments.steps):
            inputs_BS, targets_BS = (
                part.to(device) for part in batches.draw(step, rank=rank, num_ranks=num_ranks)
            )
            logits_BSV, routings = model(inputs_BS)
            # A sum over this rank's tokens, divided by the tokens of all ranks: adding up over
            # ranks, as both kinds of gradients do, then gives the gradient of the global mean.
            loss = (
                F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="sum")
                / tokens_of_all
            )
            balance = balance_loss(routings, tokens_of_all)

            optimizer.zero_grad()
            (loss + BALANCE_WEIGHT * balance).backward()
            sum_gradients(model.shared_parameters())
            optimizer.step()

            if step % 10 == 9 or step == arguments.steps - 1:
                mean_loss = sum_over_ranks(loss.detach()).item()
                speed = (step + 1) * tokens_of_all / (time.perf_counter() - started)
                if rank == 0:
                    print(f"step {step + 1:4d}  loss {mean_loss:.4f}  {speed:,.0f} tokens/s")


def balance_loss(routings: list[Routing], tokens_of_all: int) -> Tensor:
    """This rank's part of the load-balancing loss of the Switch Transformer, 1 when balanced.

    E * sum over experts of (share of choices) * (mean probability), mean of the layers. The shares
    are those of the global batch.
    """
    load_LE = sum_over_ranks(torch.stack([routing.load for routing in routings]))
    share_LE = load_LE / load_LE.sum(dim=1, keepdim=True)
    probability_LE = torch.stack([routing.probability for routing in routings]) / tokens_of_all
    return (share_LE * probability_LE).sum(dim=1).mean() * share_LE.shape[1]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds the gradients of replicated parameters up over the ranks, in one all-reduce."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of all ranks' tensors."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a byte-level MoE language model.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64, help="samples per step, of all ranks")
    parser.add_argument("--layout", default=None, help="receive layout, default flat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, default=None, help="default: Python's own sources")
    return parser.parse_args()


if __name__ == "__main__":
    main()
