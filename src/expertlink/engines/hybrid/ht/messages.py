"""Messages of one rank: what the rail sends from and receives into, and the rail's stream."""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink.engines.hybrid.ht.plan import RING, HybridPlan, Message
from expertlink.engines.hybrid.rail import Rail


class Messages:
    """A ring of messages of the latest chunks, and the order between their writers and the rail.

    The rail works on a stream of its own, beside the kernels of the call.

    Args:
        plan: sizes.
        rail: carries the messages.
        device: this rank's GPU.

    Attributes:
        plan: as given.
        send: `[RING, bytes]` to other hosts.
        receive: `[RING, bytes]` from them.
        addresses: of the messages of a chunk, to send and received.
        own_sums: sums of this host for the tokens of a chunk.
    """

    def __init__(self, plan: HybridPlan, *, rail: Rail, device: torch.device) -> None:
        self.plan, self._rail, self._device = plan, rail, device
        memory = torch.empty((2 * RING, plan.messages), dtype=torch.uint8, device=device)
        self.send, self.receive = memory[:RING], memory[RING:]
        self.addresses = [
            (sent.data_ptr(), received.data_ptr())
            for sent, received in zip(self.send, self.receive, strict=True)
        ]
        self.own_sums = torch.empty(plan.own_sums, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)
        self._filled = [torch.cuda.Event() for _ in range(RING)]
        self._brought = [torch.cuda.Event() for _ in range(RING)]

    def exchange(self, chunk: int, rows: Message, stride: int) -> None:
        """The rail moves the messages of a chunk, once the current stream has come this far."""
        slot = chunk % RING
        send = _rows(self.send[slot], sum(rows.send), stride)
        receive = _rows(self.receive[slot], sum(rows.receive), stride)
        self._fork(slot)
        self._rail.exchange(send, receive, rows.send, rows.receive, self._stream)
        self._brought[slot].record(self._stream)

    def gather(self, row: Tensor, rows: Tensor) -> None:
        """The rail gathers a row of every rank; `wait` for chunk 0 then waits for these."""
        self._fork(0)
        self._rail.gather(row, rows, self._stream)
        self._brought[0].record(self._stream)

    def wait(self, chunk: int) -> None:
        """The current stream goes on when the messages of a chunk are here."""
        torch.cuda.current_stream(self._device).wait_event(self._brought[chunk % RING])

    def _fork(self, slot: int) -> None:
        """The rail goes on when the current stream has come this far."""
        self._filled[slot].record(torch.cuda.current_stream(self._device))
        self._stream.wait_event(self._filled[slot])


def _rows(memory: Tensor, rows: int, stride: int) -> Tensor:
    return memory[: rows * stride].view(rows, stride)
