"""Memory of the messages of low-latency calls, and their way over the rail."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.hybrid.ll.messages import most_bytes
from expertlink.engines.hybrid.rail import Marked, Rail
from expertlink.engines.nvlink import tuning

SETS = tuning.LL_CALLS_IN_FLIGHT
"""Calls whose messages may be in memory at once: calls take the sets in turn."""


def message_regions(config: MoECommunicatorConfig, num_hosts: int) -> dict[str, int]:
    """Bytes of this memory by region."""
    each = SETS * num_hosts * most_bytes(config)
    return {"messages to hosts": each, "messages of hosts": each}


@dataclass(frozen=True)
class MessageSet:
    """Memory of one call's messages, N of each kind. The own host's is the last one.

    Attributes:
        send: `[N * most_bytes]` uint8.
        receive: likewise.
        under_way: `[1]` int32: calls whose messages are here. A kernel adds one when it writes
            them, and one takes it away when it reads them.
        views: of what the rail moves, by the bytes of a message.
    """

    send: Tensor
    receive: Tensor
    under_way: Tensor
    views: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Messages:
    """The messages of a rank's calls, and the rail that moves them.

    Args:
        config: the communicator's.
        domains: hosts of the ranks.
        rank: this one.
        rail: its rail.
        device: its GPU.

    Attributes:
        host, local: this rank's host, and its index there.
        num_hosts: N.
        marks: as `Rail.marks`.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        domains: Domains,
        rank: int,
        rail: Rail,
        device: torch.device,
    ) -> None:
        self.host, self.local = domains.host_of[rank], domains.local_of(rank)
        self.num_hosts = domains.num_hosts
        assert (rail.index, rail.size) == (self.host, self.num_hosts)
        self._rail, self._next, self.marks = rail, 0, rail.marks
        self._rows = [int(host != self.host) for host in range(self.num_hosts)]
        size = self.num_hosts * most_bytes(config)
        memory = torch.zeros((SETS, 2, size), dtype=torch.uint8, device=device)
        counts = torch.zeros((SETS, 1), dtype=torch.int32, device=device)
        self._sets = [
            MessageSet(send, receive, count)
            for (send, receive), count in zip(memory, counts, strict=True)
        ]

    def next_set(self) -> MessageSet:
        """Where the next call's messages go: the last but one call is done with it."""
        self._next = (self._next + 1) % SETS
        return self._sets[self._next]

    def exchange(self, at: MessageSet, nbytes: int, marked: Marked) -> None:
        """Queues the exchange of messages of so many bytes on the current stream.

        `marked`: as `Rail.exchange`.
        """
        views = at.views.get(nbytes)
        if views is None:
            shape = self.num_hosts - 1, nbytes
            send, receive = (
                memory[: shape[0] * nbytes].view(shape) for memory in (at.send, at.receive)
            )
            views = at.views[nbytes] = send, receive
        self._rail.exchange(*views, self._rows, self._rows, marked=marked)
