"""The header that every rank sends to every rank before rows move.

int32 words: the fields below, then R counts (rows for each rank), then E counts (choices of each
expert). kernels/collective/send_order.cu writes the same words.
"""

from __future__ import annotations

import enum
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

UNBOUNDED = -1


class Operation(enum.IntEnum):
    """The calls that ranks agree on."""

    DISPATCH = 1
    CACHED_DISPATCH = 2
    COMBINE = 3
    WEIGHT_GRADS = 4
    REBALANCE = 5
    SUM_OF_COPIES = 6

    @property
    def title(self) -> str:
        """For messages."""
        return self.name.lower().replace("_", " ")


def title_of(operation: int) -> str:
    """The title of an operation in another rank's header, known or not."""
    try:
        return Operation(operation).title
    except ValueError:
        return f"an unknown operation ({operation})"


class Status(enum.IntEnum):
    """Whether a rank makes the call."""

    FINE = 0
    REFUSED = 1
    TOO_MANY_TOKENS = 2
    """Refused because it has more tokens than `max_tokens_per_rank`."""


@dataclass(frozen=True, kw_only=True)
class HeaderFields:
    """What a rank says of its call: the first words of a header, in this order.

    Attributes:
        operation: `Operation`.
        communicator: `Wire.number`.
        call: sequence number of the call.
        status: `Status`.
        capacity: rows that this rank has room for, or UNBOUNDED. TOO_MANY_TOKENS: its T.
        row_bytes: bytes of a row; all ranks must agree.
        metadata_bytes: bytes of metadata per row; all ranks must agree.
        subject: number of the dispatch whose routing the call uses: the call number of the
            dispatch, cached or not, that made the handle; 0 for a new routing.
        maker: `Wire.number` of the communicator that made that dispatch: each counts its calls by
            itself; 0 for a new routing.
    """

    operation: int
    communicator: int
    call: int
    status: int = 0
    capacity: int = UNBOUNDED
    row_bytes: int = 0
    metadata_bytes: int = 0
    subject: int = 0
    maker: int = 0


class HeaderWord(enum.IntEnum):
    """Positions of the fields."""

    OPERATION = 0
    COMMUNICATOR = 1
    CALL = 2
    STATUS = 3
    CAPACITY = 4
    ROW_BYTES = 5
    METADATA_BYTES = 6
    SUBJECT = 7
    MAKER = 8


NUM_FIELDS = len(HeaderWord)


def build_header(
    fields: HeaderFields,
    *,
    num_ranks: int,
    num_experts: int,
    device: torch.device,
    rows_per_rank: Tensor | None = None,
    choices: Tensor | None = None,
    suspect: Tensor | None = None,
) -> Tensor:
    """The header in plain torch.

    Args:
        fields: what the host knows.
        rows_per_rank: `[R]` counts on the device; None: zeros.
        choices: `[E]` counts on the device; None: zeros.
        suspect: bool scalar on the device; true raises the status.
    """
    header = torch.zeros(NUM_FIELDS + num_ranks + num_experts, dtype=torch.int32, device="cpu")
    header[:NUM_FIELDS] = torch.tensor(astuple(fields), dtype=torch.int32, device="cpu")
    header = header.to(device, non_blocking=True)
    if rows_per_rank is not None:
        header[NUM_FIELDS : NUM_FIELDS + num_ranks] = rows_per_rank
    if choices is not None:
        header[NUM_FIELDS + num_ranks :] = choices
    if suspect is not None:
        header[HeaderWord.STATUS] += suspect
    return header
