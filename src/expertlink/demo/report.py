"""The demo's results: a table, two plots, a summary and the routing trace."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from expertlink.demo.plots import plot_expert_load, plot_loss
from expertlink.demo.train import RankReport, StepRecord, TrainConfig
from expertlink.workloads.trace import RoutingTrace

SUMMARY, LOSS, EXPERT_LOAD = "summary.json", "loss.png", "expert_load.png"
TRACE = "routing_trace.npz"
PHASES = ("dispatch", "experts", "combine")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
_LAST = 10  # steps over which final figures are averaged


@dataclass(frozen=True)
class Check:
    """Losses of the first steps on many ranks and on one.

    They differ by rounding only. Ranks add the same terms in another order, which changes the
    seventh digit in float32. If a token's last chosen expert is almost tied with the next one, that
    can swap them, which changes the loss by about 1e-5. bfloat16 rows are rounded once per rank
    that holds some of a token's experts, which changes it by about 1e-4. Rows that are lost,
    doubled or sent to the wrong expert change it far more.

    Attributes:
        losses: of the ranks, nats per byte.
        reference: of one rank.
        dtype: of the rows.
    """

    losses: list[float]
    reference: list[float]
    dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        """Largest relative difference that rounding can cause."""
        return TOLERANCE[self.dtype]

    @property
    def difference(self) -> float:
        """Largest relative difference of a step's losses; infinite if one is not a number."""
        pairs = zip(self.losses, self.reference, strict=True)
        differences = [abs(loss - reference) / reference for loss, reference in pairs]
        return math.inf if any(map(math.isnan, differences)) else max(differences)

    @property
    def passed(self) -> bool:
        """True if all losses agree."""
        return self.difference <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Report:
    """A finished run."""

    config: TrainConfig
    corpus: str
    device: str
    ranks: list[RankReport]
    check: Check

    @property
    def records(self) -> list[StepRecord]:
        """The steps, from rank 0."""
        return self.ranks[0].records

    def tokens_per_second(self) -> float:
        """Tokens of a global batch over the median time of a step, validation not counted."""
        return self.config.tokens / median(record.seconds for record in self.records)

    def forward_shares(self) -> dict[str, float]:
        """Share of the forward pass spent in each phase, over all steps, mean of the ranks."""
        shares = {
            phase: mean(rank.phases[phase] / rank.phases["forward"] for rank in self.ranks)
            for phase in PHASES
        }
        return {**shares, "attention and rest": 1 - sum(shares.values())}

    def imbalance(self, records: list[StepRecord]) -> float:
        """Load of the busiest expert over the mean load, mean of layers and steps; best is 1."""
        return mean(max(load) / mean(load) for record in records for load in record.load)

    def trace(self) -> RoutingTrace:
        """Recorded choices; ranks with fewer tokens than others are padded with -1."""
        most = max(rank.trace.shape[2] for rank in self.ranks)
        padded = [
            torch.nn.functional.pad(t, (0, 0, 0, most - t.shape[2]), value=-1)
            for t in (rank.trace for rank in self.ranks)
        ]
        meta = {
            "source": "expertlink demo",
            "text": self.corpus,
            "seed": self.config.seed,
            "every_steps": self.config.trace_every,
            "balance_weight": self.config.balance_weight,
        }
        ids = np.ascontiguousarray(torch.stack(padded, dim=2).numpy())
        return RoutingTrace(ids, self.config.model.num_experts, meta)

    def summary(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        records, first = self.records, self.ranks[0]
        losses = [record.loss for record in records]
        return {
            "text": self.corpus,
            "ranks": len(self.ranks),
            "device": self.device,
            "engine": {"name": first.engine[0], "reason": first.engine[1]},
            "mode": self.config.mode,
            "layout": first.layout,
            "dtype": str(self.config.dtype).removeprefix("torch."),
            "seed": self.config.seed,
            "model": {**vars(self.config.model), "parameters": first.num_parameters},
            "steps": len(records),
            "tokens_per_step": self.config.tokens,
            "loss": {
                "unit": "nats per byte",
                "first": losses[0],
                "last": mean(losses[-_LAST:]),
                "validation": records[-1].validation_loss,
                "steps": losses,
            },
            "tokens_per_second": self.tokens_per_second(),
            "forward_shares": self.forward_shares(),
            "busiest_expert_over_mean": {
                "first": self.imbalance(records[:1]),
                "last": self.imbalance(records[-_LAST:]),
            },
            "one_rank_check": {
                "passed": self.check.passed,
                "largest_relative_difference": self.check.difference,
                "tolerance": self.check.tolerance,
                "losses": self.check.losses,
                "one_rank_losses": self.check.reference,
            },
            "environment": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "cpu_cores": os.cpu_count(),
                "gpu": torch.cuda.get_device_name() if self.device == "cuda" else None,
            },
        }


def write_report(report: Report, out: Path, console: Console) -> None:
    """Writes all files to `out` and shows the table.

    Raises:
        OSError: a file cannot be written.
    """
    records = report.records
    summary = report.summary()
    text = json.dumps(summary, indent=2, allow_nan=True)
    (out / SUMMARY).write_text(text + "\n", encoding="utf-8")
    plot_loss(records, out / LOSS, title=f"Predicting the next byte of: {report.corpus}")
    plot_expert_load(records, [rank.local_experts for rank in report.ranks], out / EXPERT_LOAD)
    report.trace().save(out / TRACE)
    console.print(_table(report, summary))
    console.print(f"Written to [bold]{out}[/]: {', '.join((SUMMARY, LOSS, EXPERT_LOAD, TRACE))}")


def _table(report: Report, summary: dict[str, Any]) -> Table:
    check, loss, load = report.check, summary["loss"], summary["busiest_expert_over_mean"]
    table = Table(
        title=f"{len(report.ranks)} ranks on {report.device}, engine {summary['engine']['name']}, "
        f"mode {summary['mode']}, layout {summary['layout']}, {summary['dtype']}",
        caption="Shares are means of the ranks; dispatch and combine include waiting for others.",
        show_header=False,
    )
    table.add_row("loss, nats per byte", f"{loss['first']:.3f} → {loss['last']:.3f}")
    held_out = loss["validation"]
    table.add_row("loss on held-out text", f"{held_out:.3f} ({held_out / math.log(2):.2f} bits)")
    table.add_row("throughput", f"{report.tokens_per_second():,.0f} tokens/s")
    table.add_section()
    for phase, part in summary["forward_shares"].items():
        table.add_row(f"forward pass: {phase}", f"{part:.0%}")
    table.add_section()
    table.add_row("busiest expert / mean", f"{load['first']:.2f} → {load['last']:.2f}")
    table.add_section()
    verdict = "[green]agrees[/]" if check.passed else "[red]DIFFERS[/]"
    table.add_row(
        f"first {len(check.losses)} losses on one rank",
        f"{verdict}: {check.difference:.1e} relative, tolerance {check.tolerance:.0e}",
    )
    return table
