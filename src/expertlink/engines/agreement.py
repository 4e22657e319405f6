"""What the ranks tell each other before rows move: a header per call, the configuration at start.

Every rank sends its header to every rank. So all of them see the same table and come to the same
verdict: go on, or all raise. Nobody waits for a rank that refused its input.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.engines.wire import Wire
from expertlink.errors import CapacityError, InputError, PeerError

UNBOUNDED = -1


class Operation(enum.IntEnum):
    """What a rank is in the middle of."""

    DISPATCH = 1
    CACHED_DISPATCH = 2
    COMBINE = 3
    WEIGHT_GRADS = 4

    @property
    def title(self) -> str:
        """For messages."""
        return self.name.lower().replace("_", " ")


class _Field(enum.IntEnum):
    OPERATION = 0
    CALL = 1
    STATUS = 2
    CAPACITY = 3
    ROW_BYTES = 4
    EXTRA_BYTES = 5


@dataclass(frozen=True)
class Table:
    """All ranks' headers.

    Attributes:
        rows: `[R, R]` rows that rank s sends to rank d.
        choices: `[R, E]` choices of each global expert by each source rank.
        rows_device: as `rows`, where the tensors live.
        choices_device: as `choices`, where the tensors live.
    """

    rows: Tensor
    choices: Tensor
    rows_device: Tensor
    choices_device: Tensor


class Agreement:
    """A header exchange under way.

    Args:
        wire: the ranks' connection.
        operation: what this rank is about to do.
        rows_per_rank: `[R]` rows for each rank, on the device; None: none counted.
        choices: `[E]` choices of each expert, on the device; None: none counted.
        refused: this rank takes no part in the call, or `suspect` says so.
        suspect: bool scalar on the device: this rank's ids are faulty.
        capacity: rows this rank has room for.
        row_bytes: bytes of a row; all ranks must agree.
        extra_bytes: bytes that travel beside a row; all ranks must agree.
    """

    def __init__(
        self,
        wire: Wire,
        operation: Operation,
        *,
        num_experts: int,
        rows_per_rank: Tensor | None = None,
        choices: Tensor | None = None,
        refused: Exception | None = None,
        suspect: Tensor | None = None,
        capacity: int = UNBOUNDED,
        row_bytes: int = 0,
        extra_bytes: int = 0,
    ) -> None:
        self._wire = wire
        self._operation = operation
        self._refused = refused
        device, num_ranks = wire.device, wire.num_ranks
        header = torch.zeros(len(_Field) + num_ranks + num_experts, dtype=torch.int32)
        fields = [operation, wire.call & 0x7FFFFFFF, refused is not None, capacity]
        header[: len(_Field)] = torch.tensor([*map(int, fields), row_bytes, extra_bytes])
        header = header.to(device, non_blocking=True)
        if rows_per_rank is not None and choices is not None:
            header[len(_Field) : len(_Field) + num_ranks] = rows_per_rank
            header[len(_Field) + num_ranks :] = choices
        if suspect is not None:
            header[_Field.STATUS] += suspect
        self._received = torch.empty((num_ranks, header.numel()), dtype=torch.int32, device=device)
        self._transfer = wire.exchange(header.repeat(num_ranks, 1), self._received)

    def conclude(self, explain: Callable[[], Exception] | None = None) -> Table:
        """Waits for all headers and raises the same verdict on every rank, or returns the table.

        Args:
            explain: makes this rank's error where `suspect` was set.

        Raises:
            PeerError: the ranks are in different calls, or another rank refused.
            InputError: the ranks' rows differ in width.
            CapacityError: a rank would receive more rows than it has room for.
        """
        table = self._wire.to_host(self._received, self._transfer)
        fields, num_ranks = len(_Field), self._wire.num_ranks
        self._check_same_call(table)
        self._check_status(table[:, _Field.STATUS].tolist(), explain)
        _check_widths(table[:, [_Field.ROW_BYTES, _Field.EXTRA_BYTES]].tolist())
        self._capacity = table[:, _Field.CAPACITY].tolist()
        return Table(
            rows=table[:, fields : fields + num_ranks],
            choices=table[:, fields + num_ranks :],
            rows_device=self._received[:, fields : fields + num_ranks],
            choices_device=self._received[:, fields + num_ranks :],
        )

    def check_capacity(self, rows_needed: Sequence[int]) -> None:
        """Compares what each rank would receive with the room it announced."""
        for rank, (needed, room) in enumerate(zip(rows_needed, self._capacity, strict=True)):
            if room != UNBOUNDED and needed > room:
                raise CapacityError(
                    f"rank {rank} would receive {needed} rows in dispatch #{self._wire.call} but "
                    f"has room for {room} (max_recv_tokens_per_rank or its output_buffer); "
                    "nothing was sent",
                    rank=rank,
                    rows=needed,
                    capacity=room,
                )

    def _check_same_call(self, table: Tensor) -> None:
        calls = table[:, [_Field.OPERATION, _Field.CALL]].tolist()
        if all(call == calls[0] for call in calls):
            return
        seen = "; ".join(
            f"rank {rank} is in {Operation(operation).title} #{call}"
            for rank, (operation, call) in enumerate(calls)
        )
        odd = [rank for rank, call in enumerate(calls) if call != calls[self._wire.rank]]
        raise PeerError(
            f"the ranks are not in the same call: {seen}. All ranks of a group make the same "
            "dispatch and combine calls in the same order",
            ranks=odd,
        )

    def _check_status(self, status: list[int], explain: Callable[[], Exception] | None) -> None:
        if not any(status):
            return
        own = self._refused
        if own is None and status[self._wire.rank] and explain is not None:
            own = explain()
        text = "" if own is None else f"{type(own).__name__}: {own}"
        texts = self._wire.gather_text(text)
        if own is not None:
            raise own
        ranks = [rank for rank, code in enumerate(status) if code]
        reasons = "; ".join(f"rank {rank} refused it: {texts[rank]}" for rank in ranks)
        raise PeerError(
            f"{self._operation.title} #{self._wire.call} did not happen: {reasons}", ranks=ranks
        )


def _check_widths(widths: list[list[int]]) -> None:
    for index, what in ((0, "row"), (1, "scales and weights beside a row")):
        values = [width[index] for width in widths]
        if len(set(values)) > 1:
            raise InputError(
                f"ranks disagree about the bytes of {what}: {_by_value(values)}; every rank of a "
                "group must pass the same dtype, width, scales and either weights or none"
            )


def _by_value(values: Sequence[object]) -> str:
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(str(value), []).append(rank)
    return ", ".join(
        f"{value} on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        for value, ranks in groups.items()
    )


def compare(values: dict[str, Sequence[object]]) -> list[str]:
    """One sentence part for every name whose values differ between ranks."""
    return [
        f"{name}: {_by_value(per_rank)}"
        for name, per_rank in values.items()
        if len(set(map(str, per_rank))) > 1
    ]
