"""Calls that only communicators of mode "ll" make: buffers, halves, micro-batches, masks."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from expertlink import DispatchHandle, DispatchOutput, MoECommunicator
from support.oracle import Case, without_rank
from support.soak.items import Item, Ledger
from support.soak.lines import Line


class LlLine(Line):
    """A communicator in mode "ll"."""

    def __init__(
        self,
        comm: MoECommunicator,
        cases: list[Case],
        stream: torch.cuda.Stream | None,
        ledger: Ledger,
    ) -> None:
        super().__init__(comm, cases, stream, ledger)
        self._buffers = [comm.create_buffers() for _ in range(2)]
        # Rails between hosts wait for all ranks, and CPUs have no masks.
        self.has_masks = comm.device.type == "cuda" and comm.config.domains is None
        # What the others receive where a rank is left out.
        self._without = [
            [self._item(number, without_rank(case, gone)) for gone in range(comm.num_ranks)]
            for number, case in enumerate(cases[:2] if self.has_masks else [])
        ]

    def forget(self) -> None:
        super().forget()
        for fewer in self._without:
            for item in fewer:
                item.forget()

    def buffered(self, item: Item, what: str, *, which: int) -> None:
        """A pair whose outputs are ours."""
        one = self._buffers[which]
        out, handle = self.comm.dispatch(item.x_TH, item.ids_TK, item.weights_TK, output_buffer=one)
        self.check_dispatch(item, out, what)
        self.combine(item, handle, what)

    def halves(self, item: Item, what: str, drawn: random.Random) -> None:
        """A pair in halves, of which some are left to later calls."""
        out, handle, hook = self._send(item, drawn)
        if drawn.random() < 0.5:
            hook()
        result, hook = self.comm.combine(
            item.rows(handle.rows_shape), handle, return_recv_hook=True
        )
        self.check_dispatch(item, out, what)
        if drawn.random() < 0.3:  # finished by the next call
            self.combine(item, self.dispatch(item, f"{what}, between"), f"{what}, between")
        hook()
        self.check_combine(item, result, what)

    def turns(self, first: Item, second: Item, what: str, drawn: random.Random) -> None:
        """Two micro-batches under way at once."""
        items = (first, second)
        sent = [self._send(item, drawn) for item in items]
        back = []
        for item, (out, handle, hook) in zip(items, sent, strict=True):
            hook()
            self.check_dispatch(item, out, what)
            rows = item.rows(handle.rows_shape)
            back.append(self.comm.combine(rows, handle, return_recv_hook=True))
        if drawn.random() < 0.5:
            back[1][1]()  # the first one's is launched before it
        for item, (result, hook) in zip(items, back, strict=True):
            hook()
            self.check_combine(item, result, what)

    def _send(
        self, item: Item, drawn: random.Random
    ) -> tuple[DispatchOutput, DispatchHandle, Callable[[], None]]:
        self.poison(item)
        return self.comm.dispatch(
            item.x_TH,
            item.ids_TK.to(torch.int32) if drawn.random() < 0.3 else item.ids_TK,
            item.weights_TK,
            return_recv_hook=True,
        )

    def without(self, item: Item, gone: int, what: str) -> None:
        """Some calls that leave a rank out, which goes on alone meanwhile; then all are back."""
        comm, rank = self.comm, self.comm.rank
        if comm.config.combine_precision == "exact" and not comm.config.mask_lost_peers:
            return  # cannot do without a rank
        for other in range(comm.num_ranks):
            if other != rank and gone in (rank, other):
                comm.mask_peer(other)
        fewer = self._without[item.number][gone]
        for call in range(2):
            out, handle = comm.dispatch(item.x_TH, item.ids_TK, item.weights_TK)
            result = comm.combine(fewer.rows(handle.rows_shape), handle)
            if rank != gone:
                self.check_dispatch(fewer, out, f"{what}, call {call} without rank {gone}")
                self.check_combine(fewer, result, f"{what}, call {call} without rank {gone}")
        comm.clear_mask()
