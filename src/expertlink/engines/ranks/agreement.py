"""The agreement before rows move: every rank makes the same call, or every rank raises.

In: this rank's header (header.py). Out: all ranks' headers, or an error.

Every rank sends its header to every rank. So all ranks see the same table and reach the same
verdict. No rank waits for one that refused its input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertlink.engines.ranks.header import (
    NUM_FIELDS,
    UNBOUNDED,
    HeaderFields,
    HeaderWord,
    Operation,
    Status,
    build_header,
    title_of,
)
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import InputError, PeerError, TooManyTokensError

_CHUNK = 1024  # words; headers on CPU are padded to a multiple
_LARGEST = 0x7FFFFFFF  # of a word; call numbers wrap around
_CALL_WORDS = (
    HeaderWord.OPERATION,
    HeaderWord.COMMUNICATOR,
    HeaderWord.CALL,
    HeaderWord.SUBJECT,
    HeaderWord.MAKER,
)
_SHOWN = 200  # letters of what ranks compare; a digest stands for the rest
_OWN_WORDS = 2  # the last of these: a rank that refuses a call may not know them


@dataclass(frozen=True)
class Table:
    """All ranks' headers.

    Attributes:
        rows: `[s][d]` rows that rank s sends to rank d.
        choices: `[R, E]` how often each source rank chose each global expert.
        capacity: rows that each rank has room for, or UNBOUNDED.
    """

    rows: list[list[int]]
    choices: Tensor
    capacity: list[int]


class Agreement:
    """A header exchange under way.

    Args:
        wire: the ranks' connection.
        operation: what this rank is about to do.
        header: this rank's, see header.py.
        max_tokens: T_max.
        refused: why this rank refuses the call, if it does.
    """

    def __init__(
        self,
        wire: Wire,
        operation: Operation,
        header: Tensor,
        *,
        max_tokens: int,
        refused: Exception | None = None,
    ) -> None:
        self._wire = wire
        self._operation = operation
        self._max_tokens = max_tokens
        self._refused = refused
        words = header.numel()
        if header.device.type == "cpu":
            header = _padded(header)
        received = header.new_empty((wire.num_ranks, header.numel()))
        self._received = received[:, :words]
        self._transfer = wire.gather(header, received)

    def conclude(self, explain: Callable[[], Exception] | None = None) -> Table:
        """Waits for all headers and raises the same verdict on every rank, or returns the table.

        Args:
            explain: makes this rank's error, if the device found its ids faulty.

        Raises:
            PeerError: the ranks are in different calls, or another rank refused.
            TooManyTokensError: a rank has more than `max_tokens_per_rank`.
            InputError: the ranks' rows differ in width.
        """
        table = self._wire.to_host(self._received, self._transfer)
        num_ranks = self._wire.num_ranks
        words_of_rank = table[:, : NUM_FIELDS + num_ranks].tolist()
        fields = [words[:NUM_FIELDS] for words in words_of_rank]
        judge(
            self._wire,
            self._operation,
            fields,
            max_tokens=self._max_tokens,
            refused=self._refused,
            explain=explain,
        )
        return Table(
            rows=[words[NUM_FIELDS:] for words in words_of_rank],
            choices=table[:, NUM_FIELDS + num_ranks :],
            capacity=[words[HeaderWord.CAPACITY] for words in fields],
        )


def _padded(header: Tensor) -> Tensor:
    """The header, padded, so that those of different communicators have the same size.

    gloo ends the process if a rank sends more than the other one expects.
    """
    return torch.nn.functional.pad(header, (0, -header.numel() % _CHUNK))


def header_fields(
    wire: Wire,
    operation: Operation,
    *,
    refused: Exception | None = None,
    capacity: int = UNBOUNDED,
    row_bytes: int = 0,
    metadata_bytes: int = 0,
    subject: int = 0,
    maker: int = 0,
) -> HeaderFields:
    """The fields of this rank's header in the call that the wire has entered."""
    status = Status.FINE
    if refused is not None:
        status, capacity = refusal(refused)
    return HeaderFields(
        operation=operation,
        communicator=wire.number,
        call=wire.call & _LARGEST,
        status=status,
        capacity=capacity,
        row_bytes=row_bytes,
        metadata_bytes=metadata_bytes,
        subject=subject & _LARGEST,
        maker=maker,
    )


def refusal(error: Exception) -> tuple[Status, int]:
    """The words `status` and `capacity` of a rank that refuses a call."""
    if isinstance(error, TooManyTokensError):
        return Status.TOO_MANY_TOKENS, error.num_tokens
    return Status.REFUSED, UNBOUNDED


def begin_agreement(
    wire: Wire,
    operation: Operation,
    *,
    num_experts: int,
    max_tokens: int,
    device: torch.device,
    refused: Exception | None = None,
    row_bytes: int = 0,
    metadata_bytes: int = 0,
    subject: int = 0,
    maker: int = 0,
) -> Agreement:
    """Starts the header exchange of a call that counts nothing.

    Args:
        wire: the ranks' connection, which has entered the call.
        operation: what this rank is about to do.
        num_experts: E; every header has room for E counts.
        max_tokens: T_max.
        device: where the headers are exchanged, alike on all ranks.
        refused: why this rank refuses the call, or None.
        row_bytes: bytes of a row.
        metadata_bytes: bytes of metadata per row.
        subject: number of the dispatch whose routing the call uses; ignored where this rank
            refuses the call.
        maker: number of the communicator that made that dispatch; likewise.
    """
    fields = header_fields(
        wire,
        operation,
        refused=refused,
        row_bytes=row_bytes,
        metadata_bytes=metadata_bytes,
        subject=subject,
        maker=maker,
    )
    header = build_header(fields, num_ranks=wire.num_ranks, num_experts=num_experts, device=device)
    return Agreement(wire, operation, header, max_tokens=max_tokens, refused=refused)


def agree(
    wire: Wire,
    operation: Operation,
    *,
    num_experts: int,
    max_tokens: int,
    device: torch.device,
    refused: Exception | None = None,
    row_bytes: int = 0,
    metadata_bytes: int = 0,
    subject: int = 0,
    maker: int = 0,
) -> None:
    """Exchanges headers and waits: returns where every rank makes this call, else raises.

    Arguments as in `begin_agreement`, errors as in `Agreement.conclude`. Where this rank refuses,
    `refused` is raised here and `PeerError` on the other ranks.
    """
    begin_agreement(
        wire,
        operation,
        num_experts=num_experts,
        max_tokens=max_tokens,
        device=device,
        refused=refused,
        row_bytes=row_bytes,
        metadata_bytes=metadata_bytes,
        subject=subject,
        maker=maker,
    ).conclude()


def judge(
    wire: Wire,
    operation: Operation,
    fields: list[list[int]],
    *,
    max_tokens: int,
    refused: Exception | None = None,
    explain: Callable[[], Exception] | None = None,
    resynchronise: bool = True,
) -> None:
    """Raises the verdict that every rank reaches on the same fields, or returns.

    Args:
        wire: the ranks' connection.
        operation: what this rank is about to do.
        fields: `[R][NUM_FIELDS]` the fields of every rank's header.
        max_tokens: T_max.
        refused: why this rank refuses the call, if its status says so.
        explain: makes that error, if the device found the fault.
        resynchronise: if the ranks are in different calls, they continue from one call number.

    Raises:
        PeerError: the ranks are in different calls, or another rank refused.
        TooManyTokensError: a rank has more than T_max, whatever the others refuse.
        InputError: the ranks' rows differ in width.
    """
    if not _in_one_call(fields):
        own = _call_of(fields[wire.rank])
        odd = [rank for rank, words in enumerate(fields) if _call_of(words) != own]
        if resynchronise:
            _resynchronise(wire, fields)
        text = difference(fields, communicator=wire.number)
        assert text is not None
        raise PeerError(text, ranks=odd) from refused
    _check_tokens(fields, max_tokens, refused)
    _check_status(wire, operation, [words[HeaderWord.STATUS] for words in fields], refused, explain)
    _check_widths(fields)


def difference(fields: Sequence[Sequence[int]], *, communicator: int) -> str | None:
    """Which call every rank is in, as a sentence; None if all make the same call.

    Local, and the same on every rank of a communicator.

    Args:
        fields: `[R][NUM_FIELDS]` fields of the headers; widths and capacity are not read.
        communicator: this rank's own, `Wire.number`.
    """
    refusing = [rank for rank, words in enumerate(fields) if words[HeaderWord.STATUS]]
    if not _in_one_call(fields):
        calls = "; ".join(
            f"rank {rank} is in {_name_of(words, communicator)}"
            + (", which it refused" if rank in refusing else "")
            for rank, words in enumerate(fields)
        )
        return (
            f"the ranks are not in the same call: {calls}. All ranks of a group make the same "
            "dispatch and combine calls in the same order"
        )
    if refusing:
        names = ", ".join(f"rank {rank}" for rank in refusing)
        best = max(fields, key=lambda words: words[HeaderWord.SUBJECT])
        return f"{names} refused {_name_of(best, communicator)}"
    return None


def _call_of(words: Sequence[int]) -> tuple[int, ...]:
    return tuple(words[i] for i in _CALL_WORDS)


def _in_one_call(fields: Sequence[Sequence[int]]) -> bool:
    """A rank that refuses its call may not know which dispatch the call belongs to."""
    calls = {_call_of(words)[:-_OWN_WORDS] for words in fields}
    subjects = {_call_of(words)[-_OWN_WORDS:] for words in fields if not words[HeaderWord.STATUS]}
    return len(calls) == 1 and len(subjects) <= 1


def _name_of(words: Sequence[int], communicator: int) -> str:
    subject, maker = words[HeaderWord.SUBJECT], words[HeaderWord.MAKER]
    foreign = maker not in (0, words[HeaderWord.COMMUNICATOR])
    return (
        f"{title_of(words[HeaderWord.OPERATION])} #{words[HeaderWord.CALL]}"
        + (f" of dispatch #{subject}" if subject else "")
        + (f" made by communicator {maker:07x}" if subject and foreign else "")
        + ("" if words[HeaderWord.COMMUNICATOR] == communicator else " of another communicator")
    )


def _resynchronise(wire: Wire, fields: Sequence[Sequence[int]]) -> None:
    """Brings all ranks back in step: no rank has made the call that they disagree about."""
    if all(words[HeaderWord.COMMUNICATOR] == wire.number for words in fields):
        # A rank that missed a call is back in step with the next one.
        wire.call = max(words[HeaderWord.CALL] for words in fields)
    else:
        wire.call -= 1  # ranks in another communicator have not counted it


def _check_tokens(
    fields: Sequence[Sequence[int]], max_tokens: int, refused: Exception | None
) -> None:
    """Ranks that would make a larger communicator all have to: so this comes before refusals."""
    counts = [
        words[HeaderWord.CAPACITY] if words[HeaderWord.STATUS] == Status.TOO_MANY_TOKENS else 0
        for words in fields
    ]
    most = max(counts)
    if most:
        error = TooManyTokensError.of(rank=counts.index(most), num_tokens=most, capacity=max_tokens)
        raise error from refused


def _check_status(
    wire: Wire,
    operation: Operation,
    status: list[int],
    refused: Exception | None,
    explain: Callable[[], Exception] | None,
) -> None:
    if not any(status):
        return
    own = refused
    if own is None and status[wire.rank] and explain is not None:
        own = explain()
    text = "" if own is None else f"{type(own).__name__}: {own}"
    texts = wire.gather_text(text)
    if own is not None:
        raise own
    ranks = [rank for rank, code in enumerate(status) if code]
    reasons = "; ".join(f"rank {rank} refused it: {texts[rank]}" for rank in ranks)
    raise PeerError(f"{operation.title} #{wire.call} did not happen: {reasons}", ranks=ranks)


def _check_widths(fields: Sequence[Sequence[int]]) -> None:
    text = width_difference(fields)
    if text is not None:
        raise InputError(text)


def width_difference(fields: Sequence[Sequence[int]]) -> str | None:
    """How the ranks' rows differ, as a sentence; None if they do not. The same on every rank."""
    for word, what in (
        (HeaderWord.ROW_BYTES, "a row"),
        (HeaderWord.METADATA_BYTES, "a row's scales and weights"),
    ):
        values = [words[word] for words in fields]
        if len(set(values)) > 1:
            return (
                f"ranks disagree about the bytes of {what}: {_by_value(values)}; every rank of a "
                "group must pass the same dtype, width, scales and either weights or none"
            )
    return None


def _by_value(values: Sequence[object]) -> str:
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(str(value), []).append(rank)
    return ", ".join(
        f"{value} on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        for value, ranks in groups.items()
    )


def compare(values: dict[str, Sequence[object]]) -> list[str]:
    """For every name whose values differ between ranks: the name and which rank has which value."""
    return [
        f"{name}: {_by_value(per_rank)}"
        for name, per_rank in values.items()
        if len(set(map(str, per_rank))) > 1
    ]


def shortened(text: str) -> str:
    """A text that ranks compare, short enough to travel with others; equal where the text is."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({digest})"
