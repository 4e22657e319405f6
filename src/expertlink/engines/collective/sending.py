"""The sending half of a dispatch: counting and ordering the rows that leave.

In: a dispatch. Out: its header, the order of its rows, their metadata, and where their returns go.

Two implementations give the same bits: `TorchSending` with the functions of routing.py, and kernels
on GPUs (send_order.py), where launching two dozen small operations takes longer than moving rows.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from expertlink import routing
from expertlink.engines.base import DispatchCall
from expertlink.engines.ranks import metadata
from expertlink.engines.ranks.header import HeaderFields, build_header
from expertlink.routing import Placement, ReturnPaths


class Sending(Protocol):
    """One dispatch on its source rank. Call the methods in the order of their definition."""

    header: Tensor
    """The call's header, with this rank's counts."""

    @property
    def rows_per_rank(self) -> Tensor:
        """`[R]` rows for each rank, on the device."""
        ...

    def order(self) -> None:
        """Queues the ordering of the rows; needs no host wait."""
        ...

    def token_of_row(self, count: int) -> Tensor:
        """`[count]` int64: the source token of every row."""
        ...

    def metadata(self, count: int) -> Tensor | None:
        """`[count, bytes]` uint8: the metadata of every row."""
        ...

    def paths(self) -> ReturnPaths:
        """Where tokens find the rows that come back."""
        ...


class Sender(Protocol):
    """Starts the sending half of dispatches."""

    def __call__(self, call: DispatchCall, fields: HeaderFields, check: bool) -> Sending:
        """Queues the counting; with `check`, faulty ids raise the header's status."""
        ...


class TorchSender:
    """`Sender` in plain torch."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def __call__(self, call: DispatchCall, fields: HeaderFields, check: bool) -> TorchSending:
        return TorchSending(call, fields, check, self._placement)


class TorchSending:
    """`Sending` in plain torch."""

    def __init__(
        self, call: DispatchCall, fields: HeaderFields, check: bool, placement: Placement
    ) -> None:
        assert call.topk_ids_TK is not None
        self._call = call
        self._placement = placement
        ids_TK, num_experts = call.topk_ids_TK, placement.num_experts
        suspect = None
        if check:
            faulty = routing.out_of_range(ids_TK, num_experts) | routing.has_duplicates(ids_TK)
            suspect = faulty.any()
        self._members = routing.find_members(ids_TK, placement)
        self.header = build_header(
            fields,
            num_ranks=placement.num_ranks,
            num_experts=num_experts,
            device=ids_TK.device,
            rows_per_rank=self._members.rows_per_rank,
            choices=routing.count_choices(self._members.expert_TK, num_experts),
            suspect=suspect,
        )

    @property
    def rows_per_rank(self) -> Tensor:
        return self._members.rows_per_rank

    def order(self) -> None:
        self._order = routing.order_rows(self._members)

    def token_of_row(self, count: int) -> Tensor:
        self._token_of_row = self._order.token_of_row[:count].clone()
        return self._token_of_row

    def metadata(self, count: int) -> Tensor | None:
        local_ids_nK = routing.local_ids_of_rows(self._members, self._order, count, self._placement)
        return metadata.pack(self._call, self._token_of_row, local_ids_nK)

    def paths(self) -> ReturnPaths:
        return routing.return_paths(self._members, self._order)
