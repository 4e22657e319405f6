"""A communicator of a soak on its stream, and the calls that it makes outside of training."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from expertlink import DispatchHandle, DispatchOutput, MoECommunicator
from support.oracle import Case
from support.soak.items import Item, Ledger


class Line:
    """One communicator on its stream, and its calls with their checks."""

    def __init__(
        self,
        comm: MoECommunicator,
        cases: list[Case],
        stream: torch.cuda.Stream | None,
        ledger: Ledger,
    ) -> None:
        self.comm, self.stream, self.ledger = comm, stream, ledger
        self.items = [self._item(number, case) for number, case in enumerate(cases)]
        self._view: tuple[Item, DispatchOutput] | None = None

    def forget(self) -> None:
        """Lets go of what is made again when it is needed."""
        self._view = None
        for item in self.items:
            item.forget()

    def _item(self, number: int, case: Case) -> Item:
        comm = self.comm
        return Item.of(number, case, comm.rank, comm.device, comm.config.block_format)

    def check_dispatch(
        self, item: Item, out: DispatchOutput, what: str, *, other: bool = False
    ) -> None:
        """`other`: the call had the item's other weights."""
        # A view is as it was after the dispatch that follows it.
        if self._view is not None:
            self._check_tokens(*self._view, f"{what}: view of the dispatch before")
        self._check_tokens(item, out, what)
        self._view = (item, out) if self.comm.config.zero_copy else None
        if item.choices is None:
            return
        ids, weights, other_weights = item.choices
        assert out.topk_ids is not None
        assert out.topk_weights is not None
        self.ledger.compare(out.topk_ids.flatten(0, -2)[item.slots], ids, f"{what}: ids")
        self.ledger.compare(
            out.topk_weights.flatten(0, -2)[item.slots],
            other_weights if other else weights,
            f"{what}: weights",
        )

    def _check_tokens(self, item: Item, out: DispatchOutput, what: str) -> None:
        tokens = out.tokens
        if item.scales is not None:
            assert out.scales is not None
            tokens = tokens.view(torch.uint8)
            scales = out.scales.tensor.flatten(0, -2)[item.slots]
            self.ledger.compare(scales, item.scales, f"{what}: scales")
        self.ledger.compare(tokens.flatten(0, -2)[item.slots], item.tokens, f"{what}: tokens")

    def poison(self, item: Item) -> None:
        """Leaves NaN in the memory that the next outputs are likely to be given."""
        elements = (len(item.slots) + 1) * item.case.hidden
        held = [
            torch.full((elements,), float("nan"), dtype=item.case.dtype, device=self.comm.device),
            torch.full_like(item.x_TH, float("nan")),
        ]
        del held

    def dispatch(self, item: Item, what: str) -> DispatchHandle:
        """An uncached dispatch."""
        self.poison(item)
        out, handle = self.comm.dispatch(item.x_TH, item.ids_TK, item.weights_TK)
        self.check_dispatch(item, out, what)
        return handle

    def cached(
        self, item: Item, handle: DispatchHandle, what: str, *, other: bool
    ) -> DispatchHandle:
        """A cached dispatch, with other weights or those of the handle."""
        self.poison(item)
        weights_TK = item.other_weights_TK if other else None
        out, again = self.comm.dispatch(item.x_TH, None, weights_TK, previous_handle=handle)
        self.check_dispatch(item, out, what, other=other)
        return again

    def combine(
        self,
        item: Item,
        handle: DispatchHandle,
        what: str,
        *,
        other: bool = False,
        late: bool = False,
    ) -> None:
        """A combine, half of the time into a tensor of ours; `late`: it is given other weights."""
        out = torch.full_like(item.x_TH, float("nan")) if item.number % 2 else None
        self.poison(item)
        weights_TK = item.other_weights_TK if late else None
        rows = item.rows(handle.rows_shape)
        result = self.comm.combine(rows, handle, out=out, topk_weights=weights_TK)
        self.check_combine(item, result, what, other=other or late)

    def several(self, items: list[Item], what: str, drawn: random.Random) -> None:
        """Dispatches, then their combines in another order, the same on all ranks."""
        handles = [self.dispatch(item, f"{what}, {i}") for i, item in enumerate(items)]
        for i in drawn.sample(range(len(items)), len(items)):
            self.combine(items[i], handles[i], f"{what}, {i} of {len(items)}")

    def check_combine(self, item: Item, result: Tensor, what: str, *, other: bool = False) -> None:
        expected = item.combined
        if other and item.case.layout.expanded:
            expected = item.other_combined
        self.ledger.compare(result, expected, f"{what}: combine")
