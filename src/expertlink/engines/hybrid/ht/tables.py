"""What a dispatch across hosts leaves for combine, backward and cached dispatches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.hybrid.ht.plan import HybridPlan
from expertlink.engines.nvlink.tables import Route, TableLayout


class HybridTables(TableLayout):
    """The tables of a routing; those of `TableLayout`, and which rows each chunk has.

    rows_before `[R, C + 1]`, relayed_before `[N, C + 1, G]`, relayed `[N, C + 1]`, sent
    `[C + 1, N]`, relay_codes `[N, T_max, min(G, K)]` and host_slots `[T, min(N, K)]` are what
    arguments.py says.
    """

    def __init__(self, config: MoECommunicatorConfig, plan: HybridPlan, *, num_local: int) -> None:
        self._plan = plan
        self.host_copies = min(plan.num_hosts, config.topk)
        super().__init__(config, num_ranks=plan.num_ranks, num_local=num_local)

    def _table_shapes(self, config: MoECommunicatorConfig) -> dict[str, tuple[int, ...]]:
        plan = self._plan
        bounds = plan.num_chunks + 1
        return {
            **super()._table_shapes(config),
            "rows_before": (plan.num_ranks, bounds),
            "relayed_before": (plan.num_hosts, bounds, plan.num_peers),
            "relayed": (plan.num_hosts, bounds),
            "sent": (bounds, plan.num_hosts),
            "relay_codes": (plan.num_hosts, self.max_tokens, min(plan.num_peers, config.topk)),
        }

    def words(self, num_tokens: int) -> int:
        """Words of a block."""
        return super().words(num_tokens) + num_tokens * self.host_copies

    def host_slots(self, block: int, num_tokens: int) -> int:
        """Address of the hosts of this rank's tokens."""
        return block + 4 * super().words(num_tokens)

    def host_slots_in(self, block: Tensor, num_tokens: int) -> Tensor:
        """`[T, min(N, K)]` host * T_max + index there."""
        start = super().words(num_tokens)
        shape = (num_tokens, self.host_copies)
        return block[start : start + math.prod(shape)].view(shape)


@dataclass(eq=False)
class HybridRoute(Route):
    """`Route` across hosts.

    Attributes:
        rows: per chunk, tokens for and from every host, where the host knows them: then there are
            only as many chunks as hold a token. None: with static shapes, all chunks are full.
    """

    rows: Sequence[tuple[Sequence[int], Sequence[int]]] | None = None


def as_hybrid_route(state: object) -> HybridRoute:
    """The state of a dispatch of this engine."""
    assert isinstance(state, HybridRoute)
    return state
