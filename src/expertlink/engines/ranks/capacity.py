"""Room for rows: what a rank announces, and whether a call fits.

In: the configuration, and the table of all headers. Out: nothing, or the same error on every rank.
"""

from __future__ import annotations

from torch import Tensor

from expertlink import layouts
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.ranks.agreement import Table
from expertlink.engines.ranks.header import UNBOUNDED
from expertlink.errors import CapacityError, InputError
from expertlink.routing import Placement
from expertlink.types import DispatchLayout


def announced(config: MoECommunicatorConfig, output_buffer: Tensor | None) -> int:
    """Rows that this rank has room for, or UNBOUNDED."""
    limits = []
    if config.max_recv_tokens_per_rank is not None:
        limits.append(config.max_recv_tokens_per_rank)
    if output_buffer is not None and not config.layout.padded:
        limits.append(output_buffer.shape[0])
    return min(limits, default=UNBOUNDED)


def largest_shape(
    config: MoECommunicatorConfig, *, num_ranks: int, num_local: int
) -> tuple[int, ...]:
    """Leading shape of `tokens` with room for all that a dispatch can bring."""
    arrivals = num_ranks * config.max_tokens_per_rank
    if config.layout is DispatchLayout.RANK_MAJOR:
        return (num_ranks, config.max_tokens_per_rank)
    if config.layout is DispatchLayout.EXPERT_MAJOR:
        return (num_local, arrivals)
    most = arrivals
    if config.layout is DispatchLayout.FLAT:
        gaps = num_local * (config.expert_alignment - 1)
        most = arrivals * min(config.topk, num_local) + gaps
    limit = config.max_recv_tokens_per_rank
    return (most if limit is None else min(most, limit),)


def check(config: MoECommunicatorConfig, placement: Placement, table: Table, *, call: int) -> None:
    """Refuses a call that would overflow a rank, before any row is sent.

    Raises:
        CapacityError: a rank would receive more rows than it announced room for.
        InputError: an expert was chosen more often than EXPERT_MAJOR has room for. That takes
            tokens that choose an expert twice.
    """
    if config.layout is DispatchLayout.EXPERT_MAJOR:
        room = placement.num_ranks * config.max_tokens_per_rank
        most, expert = table.choices.sum(dim=0).max(dim=0)
        if most > room:
            raise InputError(
                f"expert {int(expert)} was chosen {int(most)} times by at most {room} tokens: some "
                "tokens choose it twice; check_inputs=True names them"
            )
    if all(room == UNBOUNDED for room in table.capacity):
        return
    per_expert = table.choices.sum(dim=0)
    for rank, (experts, room) in enumerate(
        zip(placement.experts_of_rank, table.capacity, strict=True)
    ):
        needed, *_ = layouts.leading_shape(
            config.layout,
            tokens_per_expert=per_expert[list(experts)].tolist() if experts else [],
            rows_per_source=[rows[rank] for rows in table.rows],
            max_tokens_per_rank=config.max_tokens_per_rank,
            alignment=config.expert_alignment,
        )
        if room != UNBOUNDED and needed > room:
            raise CapacityError(
                f"rank {rank} would receive {needed} rows in dispatch #{call} but has room for "
                f"{room}; nothing was sent. Raise max_recv_tokens_per_rank, or pass a larger "
                "output_buffer",
                rank=rank,
                rows=needed,
                capacity=room,
            )
