"""What a low-latency dispatch across hosts leaves, beyond the tables of one host."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink.ll.tables import LlRoute, LlTableLayout


class RailTableLayout(LlTableLayout):
    """Tables of a routing whose tokens a rank forwards for its whole rail.

    Beside those of `LlTableLayout`: `rail_ids` `[N * T_max, K]`, ids of the tokens of the rail. In
    `slots` `[N * B, D]` are the tokens of the rail too, the own host's last; D = min(G, K).
    """

    def __init__(
        self, config: MoECommunicatorConfig, *, num_ranks: int, num_local: int, num_hosts: int
    ) -> None:
        self.num_hosts = num_hosts
        super().__init__(config, num_ranks=num_ranks, num_local=num_local)
        self.copies = min(num_ranks // num_hosts, config.topk)

    def _table_shapes(self, config: MoECommunicatorConfig) -> dict[str, tuple[int, ...]]:
        return {
            **super()._table_shapes(config),
            "rail_ids": (self.num_hosts * self.max_tokens, config.topk),
        }


@dataclass(eq=False)
class RailRoute(LlRoute):
    """Tables of one routing across hosts.

    Attributes:
        bound: B, tokens that every rank of the rail sent.
    """

    bound: int = 0

    @property
    def rail_tokens(self) -> int:
        """N * B: tokens that this rank forwards."""
        layout = self.layout
        assert isinstance(layout, RailTableLayout)
        return layout.num_hosts * self.bound

    def table(self, name: str) -> Tensor:
        """A table as a tensor."""
        if name == "slots":
            return self.layout.view(self.block, name, self.rail_tokens)
        return super().table(name)

    def wire_rows(self) -> tuple[list[int], list[int]]:
        """Rows sent to and received from each rank, own rank included. Waits for the device."""
        return self.table("rows_to").tolist(), self.table("rows_from").tolist()
