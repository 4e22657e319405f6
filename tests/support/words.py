"""What ranks say of a communicator whose tensors their group cannot move. Needs no such tensors."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from expertlink import ExpertlinkError, MoECommunicatorConfig
from expertlink.engines.ranks.agreement import agree
from expertlink.engines.ranks.handshake import handshake
from expertlink.engines.ranks.header import Operation
from expertlink.engines.ranks.wire import Wire
from expertlink.launch import RankContext

ELSEWHERE = torch.device("meta")  # stands for GPUs: its tensors have no values that could travel


def over_gloo(ctx: RankContext) -> Any:
    """A handshake, texts, an agreement, and one that a rank refuses."""
    wire = Wire(dist.group.WORLD, device=ELSEWHERE, timeout_s=20.0)
    config = MoECommunicatorConfig(
        num_experts=4, hidden_size=8, topk=2, max_tokens_per_rank=4, device="cpu"
    )
    placement = handshake(wire, config, engine="a test", check_inputs=True)
    owners = tuple(rank for rank, own in enumerate(placement.experts_of_rank) for _ in own)
    placed = placement.rank_of_E.device.type, (*owners, placement.num_ranks)
    wire.enter("combine", 1)
    texts = wire.gather_text(f"rank {ctx.rank}")
    common: dict[str, Any] = {"num_experts": 4, "max_tokens": 4, "device": wire.words_device}
    agree(wire, Operation.COMBINE, subject=1, maker=5, **common)
    wire.enter("combine", 2)
    error = ValueError("no") if ctx.rank == 1 else None
    refused = None
    try:
        agree(wire, Operation.COMBINE, refused=error, **common)
    except (ExpertlinkError, ValueError) as seen:
        refused = type(seen).__name__, str(seen)
    wire.close()
    return texts, placed, refused


def absent(ctx: RankContext) -> Any:
    """A text that one rank does not send."""
    wire = Wire(dist.group.WORLD, device=ELSEWHERE, timeout_s=2.0)
    if ctx.rank == 1:
        time.sleep(6.0)
        return "away"
    wire.enter("combine", 1)
    started = time.monotonic()
    try:
        wire.gather_text("here")
    except ExpertlinkError as error:
        return type(error).__name__, getattr(error, "missing", ()), time.monotonic() - started
    return "", (), 0.0
