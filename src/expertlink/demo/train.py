"""Training on one rank: data parallel outside the experts, expert parallel inside.

Every rank reads its share of one global batch. The objective is a mean over all tokens of that
batch, so gradients add up over ranks: those of shared parameters in an all-reduce, those of experts
in backward, where combine and dispatch carry every rank's gradients to the experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from expertlink import MoECommunicator, MoECommunicatorConfig
from expertlink.demo.clock import PhaseClock
from expertlink.demo.model import LanguageModel, ModelConfig, Routing
from expertlink.demo.text import Batches, Corpus
from expertlink.launch import RankContext


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Its course does not depend on the number of ranks, up to rounding."""

    model: ModelConfig = field(default_factory=ModelConfig)
    steps: int = 150
    batch: int = 64
    """Samples of the global batch."""
    seed: int = 0
    """Chooses the samples; the model has its own seed."""
    learning_rate: float = 5e-3
    warmup: int = 20
    balance_weight: float = 0.1
    """Weight of the load-balancing loss."""
    max_gradient_norm: float = 1.0
    dtype: torch.dtype = torch.float32
    """Type of the rows that dispatch and combine move, and of the experts' arithmetic."""
    mode: str = "ht"
    layout: str | None = None
    """Receive layout; None for the mode's own."""
    validate_every: int = 20
    trace_every: int = 10
    """Every how many steps the routing is recorded."""

    @property
    def tokens(self) -> int:
        """Tokens of the global batch."""
        return self.batch * self.model.sequence

    def communicator_config(self, num_ranks: int, device: torch.device) -> MoECommunicatorConfig:
        """A communicator that fits the model and the batch, over the default process group."""
        flat = self.layout == "flat" or (self.layout is None and self.mode == "ht")
        return MoECommunicatorConfig(
            device=device,
            # Grouped products on GPUs take groups of 16 bytes.
            expert_alignment=8 if flat and device.type == "cuda" else 1,
            num_experts=self.model.num_experts,
            hidden_size=self.model.hidden_size,
            topk=self.model.topk,
            max_tokens_per_rank=-(-self.batch // num_ranks) * self.model.sequence,
            dtype=self.dtype,
            mode=cast(Any, self.mode),  # the communicator checks it
            output_layout=cast(Any, self.layout),
        )


@dataclass(frozen=True)
class StepRecord:
    """Figures of a step, the same on every rank except for `seconds`.

    Attributes:
        step: from 0.
        loss: cross entropy in nats per byte, mean over the global batch, before the update.
        load: `[L][E]` choices of each expert.
        seconds: wall time.
        validation_loss: on held-out text after the update, if it was evaluated.
    """

    step: int
    loss: float
    load: list[list[float]]
    seconds: float
    validation_loss: float | None = None


@dataclass(frozen=True)
class RankReport:
    """What a rank returns.

    Attributes:
        records: all steps.
        phases: seconds of the forward pass and its parts: forward, dispatch, experts, combine.
        trace: `[recorded steps, L, T, K]` int32 chosen experts.
        engine: name of the engine, and why it was chosen.
        layout: receive layout.
        local_experts: global ids of this rank's experts.
        num_parameters: parameters of the whole model.
    """

    records: list[StepRecord]
    phases: dict[str, float]
    trace: Tensor
    engine: tuple[str, str]
    layout: str
    local_experts: list[int]
    num_parameters: int


class Trainer:
    """The model, its optimizer and its batches on one rank."""

    def __init__(
        self, config: TrainConfig, corpus: Corpus, comm: MoECommunicator, device: torch.device
    ) -> None:
        self.config, self.comm, self.device = config, comm, device
        self.model = LanguageModel(config.model, comm).to(device)
        self.shared = self.model.shared_parameters()
        self.experts = self.model.expert_parameters()
        self.optimizer = torch.optim.AdamW(
            [*self.shared, *self.experts],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.01,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        draw = {"sequence": config.model.sequence, "batch": config.batch, "seed": config.seed}
        self.batches = Batches(corpus.train, **draw)
        self.held_out = Batches(corpus.held_out, **draw)
        self.clock = PhaseClock(device)

    def step(self, step: int) -> tuple[StepRecord, list[Routing]]:
        """One update. Collective."""
        started = time.perf_counter()
        config = self.config
        inputs_BS, targets_BS = self._draw(self.batches, step)
        with self.clock.phase("forward"):
            logits_BSV, routings = self.model(inputs_BS, self.clock)
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="sum")

        load_LE = torch.stack([routing.load for routing in routings])
        totals = self._sum_over_ranks(torch.cat([load_LE.flatten(), loss.detach()[None]]))
        load_LE, loss_of_all = totals[:-1].view_as(load_LE), totals[-1]
        # E * sum over e of (share of choices) * (mean probability), as in the Switch Transformer.
        # Choices are those of the whole batch, so it does not depend on the number of ranks.
        choice_LE = load_LE / (config.tokens * config.model.topk)
        probability_LE = torch.stack([routing.probability for routing in routings]) / config.tokens
        balance = (choice_LE * probability_LE).sum(dim=1).mean() * config.model.num_experts

        self.optimizer.zero_grad()
        (loss / config.tokens + config.balance_weight * balance).backward()
        self._finish_gradients()
        self.optimizer.step()
        self.schedule.step()
        record = StepRecord(
            step=step,
            loss=loss_of_all.item() / config.tokens,
            load=load_LE.tolist(),
            seconds=time.perf_counter() - started,
        )
        return record, routings

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Cross entropy in nats per byte on one fixed batch of held-out text. Collective."""
        inputs_BS, targets_BS = self._draw(self.held_out, 0)
        logits_BSV, _ = self.model(inputs_BS)
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="sum")
        return self._sum_over_ranks(loss[None]).item() / self.config.tokens

    def num_parameters(self) -> int:
        """Parameters of the whole model, all experts counted. Collective."""
        experts = torch.tensor([float(_count(self.experts))], device=self.device)
        return _count(self.shared) + int(self._sum_over_ranks(experts).item())

    def _draw(self, batches: Batches, step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = batches.draw(step, rank=self.comm.rank, num_ranks=self.comm.num_ranks)
        return inputs.to(self.device), targets.to(self.device)

    def _finish_gradients(self) -> None:
        """Adds shared gradients up over ranks and clips the norm of all gradients together."""
        square = sum((_gradient(p).square().sum() for p in self.experts), torch.zeros(()))
        parts = [_gradient(p).flatten() for p in self.shared]
        square = torch.as_tensor(square, device=self.device)
        flat = self._sum_over_ranks(torch.cat([*parts, square[None]]))
        square = flat[:-1].square().sum() + flat[-1]
        scale = (self.config.max_gradient_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
        sizes = [p.numel() for p in self.shared]
        for parameter, gradient in zip(self.shared, flat[:-1].split(sizes), strict=True):
            parameter.grad = (gradient * scale).view_as(parameter)
        for parameter in self.experts:
            parameter.grad = _gradient(parameter) * scale

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        x = x.clone()
        if self.comm.num_ranks > 1:
            dist.all_reduce(x)
        return x

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.config.warmup:
            return (step + 1) / self.config.warmup
        done = (step - self.config.warmup) / max(1, self.config.steps - self.config.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))


def train_rank(
    context: RankContext, config: TrainConfig, corpus: Corpus, *, stop_after: int | None = None
) -> RankReport:
    """Trains on this rank; rank 0 streams a `StepRecord` per step. Collective.

    Args:
        context: this rank. It uses the default process group; a single rank needs none.
        config: the run.
        corpus: the text, the same on all ranks.
        stop_after: ends the run after that many steps; None: runs all of them.
    """
    steps = config.steps if stop_after is None else min(stop_after, config.steps)
    records: list[StepRecord] = []
    trace: list[Tensor] = []
    settings = config.communicator_config(context.num_ranks, context.device)
    with MoECommunicator(settings) as comm:
        trainer = Trainer(config, corpus, comm, context.device)
        for step in range(steps):
            record, routings = trainer.step(step)
            if stop_after is None and _due(step, config.validate_every, steps):
                record = StepRecord(
                    **{**vars(record), "validation_loss": trainer.validation_loss()}
                )
            if step % config.trace_every == 0:
                trace.append(torch.stack([r.topk_ids for r in routings]).to("cpu", torch.int32))
            records.append(record)
            if context.rank == 0:
                context.send(record)
        return RankReport(
            records=records,
            phases=trainer.clock.read(),
            trace=torch.stack(trace),
            engine=(comm.engine_name, comm.engine_reason),
            layout=settings.layout.value,
            local_experts=list(comm.local_experts),
            num_parameters=trainer.num_parameters(),
        )


def _due(step: int, every: int, steps: int) -> bool:
    return step % every == every - 1 or step == steps - 1


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
