"""Records: one JSON object per line, one line per measured phase, checked when written and read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

from expertlink.bench.cases import RAILS, VARIANTS, recorded_as
from expertlink.config import MODES
from expertlink.errors import InputError

PHASES = ("dispatch", "combine", "pair")
_PREPARED = tuple(
    name for key, calls in VARIANTS["ll"].items() if calls.prepared for name in recorded_as(key)
)
_ACCEPTED = {
    "phase": PHASES,
    "variant": (*VARIANTS["ht"], *_PREPARED),
    "mode": MODES,
    "ceiling": (None, "put", "get", "put+put", "put+get"),
    "rail": (None, *RAILS),
}
_COUNTS = ("ranks", "tokens", "hidden", "topk", "experts", "iterations", "inputs", "hosts")
_KEY = (
    *("engine", "mode", "phase", "variant", "layout", "dtype", "quantization", "routing"),
    *("uneven", "ranks", "tokens", "hidden", "topk", "experts", "num_sms"),
    *("num_sms_dispatch", "num_sms_combine", "max_tokens_per_rank", "hosts", "rail", "rail_ctas"),
)
_MAX_LINE_BYTES = 1 << 20
RECORD_KIND = "call"
KINDS = (RECORD_KIND, "overlap", "layer", "host_time", "drop_in", "backward")
"""Of the lines of a file; a `Record` does not name its own."""
Loaded = TypeVar("Loaded", bound="Checked")
OneKeyed = TypeVar("OneKeyed", bound="Keyed")


class RecordError(InputError):
    """A line of a file is no valid record; the message names file, line and field."""


class Checked:
    """Base of dataclasses whose fields are what their annotations say, also when read from JSON.

    Numbers are finite, and not negative unless `signed` names their field.
    """

    signed: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, (kind, optional) in _kinds(type(self)).items():
            value = getattr(self, name)
            fits = type(value) is kind or (kind is float and type(value) is int)
            if fits and isinstance(value, (int, float)):
                fits = value >= 0 or name in self.signed
                fits &= not isinstance(value, float) or math.isfinite(value)
            if not fits and not (optional and value is None):
                expected = kind.__name__ + (" or None" if optional else "")
                _refuse(name, f"is {repr(value)[:60]}, expected {expected}")

    def to_json(self) -> str:
        """All fields in one line."""
        return json.dumps(asdict(self), allow_nan=False)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_json(cls: type[Loaded], line: str) -> Loaded:
        """Reads what `to_json` wrote.

        Raises:
            RecordError: the line is something else; the message names the field.
        """
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"no JSON: {error}") from None
        return _load(cls, values, "record")


@dataclass(frozen=True)
class Summary(Checked):
    """Distribution over iterations, in microseconds. p99 is an observed value (nearest rank)."""

    min: float
    median: float
    p99: float
    mean: float


def summarize(values: Sequence[float]) -> Summary:
    """Of at least one value; rounded to hundredths of a microsecond."""
    ordered = sorted(values)
    count = len(ordered)
    median = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    p99 = ordered[math.ceil(0.99 * count) - 1]
    numbers = (ordered[0], median, p99, sum(ordered) / count)
    return Summary(*(round(number, 2) for number in numbers))


def slowest_rank(times_RI: Tensor) -> list[float]:
    """Time of the slowest rank of each iteration: a collective step is over when all are."""
    return times_RI.amax(dim=0).tolist()


@dataclass(frozen=True, kw_only=True)
class Environment(Checked):
    """Where and when a record was made. None: does not apply, or could not be found out."""

    gpu: str | None
    driver: str | None
    torch: str
    cuda: str | None
    commit: str | None  # of the library's checkout, with "-dirty" where it had changes
    date: str  # UTC, ISO 8601
    cpu: str
    cores: int
    backend: str  # of torch.distributed, which moved the rows of the raw baseline

    @property
    def hardware(self) -> str:
        """GPU, or CPU with its core count, that the record was made on."""
        return self.gpu or f"{self.cpu}, {self.cores} cores"


@dataclass(frozen=True, kw_only=True)
class Record(Checked):
    """One phase of one case. Times in microseconds, bandwidths in GB/s (10**9 bytes) over medians.

    Times run from "inputs ready" to "outputs usable". `wire_bytes` counts the rows that leave a
    rank (its own share is not counted), payload and scales. A ratio is that of two medians.
    """

    engine: str
    mode: str
    phase: str  # "dispatch", "combine", or "pair": both in one go
    variant: str
    layout: str
    dtype: str
    quantization: str | None
    routing: str
    ranks: int
    tokens: int  # of the rank that has most
    hidden: int
    topk: int
    experts: int
    num_sms: int | None  # allowed to the phase, the larger budget of a pair; None: the engine's
    time_us: Summary  # of the slowest rank of each iteration
    time_us_mean_rank: Summary
    # Until the call returned to its caller, slowest rank; where there is an `idle_us`, of those
    # calls, from an idle device and with other work of the host in between. `calls_per_graph`: a
    # replay's time divided by it.
    host_us: Summary
    wire_bytes: int  # average rank; of the two halves of a call, those of the sending one
    wire_gbps: float
    ceiling_gbps: float | None = None  # `wire_bytes` over `ceiling_us`
    ceiling_ratio: float | None = None  # `ceiling_us` over `time_us`: 1.0 is as fast as the wire
    environment: Environment
    uneven: bool = False  # ranks had different numbers of tokens, one of them none
    wire_bytes_max: int  # most that left one rank
    wire_bytes_received_max: int  # most that arrived at one rank
    wire_gbps_max: float  # `wire_bytes_max` over `time_us`
    aggregate_gbps: float  # all ranks together
    metadata_bytes: int | None = None  # ids and weights beside the rows, not part of `wire_bytes`
    # `all_to_all_single` of the same bytes to the same ranks (own share included), alternating
    # with the measured calls; for a pair the sum of both directions.
    raw_us: Summary
    raw_gbps: float
    raw_ratio: float  # `time_us` over `raw_us`
    # Which ceiling: "put" for dispatch, the faster of "put" and "get" for combine, both with a "+"
    # between for a pair. None: nothing was measured, see `ceiling_note`.
    ceiling: str | None = None
    ceiling_us: Summary | None = None  # alternating with the calls; for a pair the sum of both
    ceiling_num_sms: int | None = None  # SMs that its copies occupied
    ceiling_note: str | None = None  # why there is no ceiling
    # Plain bulk copies of the rows that the phase puts on the wire (own share excluded), slowest
    # rank. Put: from local memory into that of the peers; get: from theirs into shared memory.
    put_us: Summary | None = None
    put_ratio: float | None = None  # `put_us` over `time_us`
    get_us: Summary | None = None
    get_ratio: float | None = None
    # Mode "ll": bytes of the rank that sends or receives most over `floor_gbps`, and two flags;
    # for a pair the sum of both calls. No call can take less.
    floor_us: float | None = None
    floor_ratio: float | None = None  # `floor_us` over `time_us`
    floor_gbps: float | None = None  # what leaves a rank while all put 160 MiB to each other
    flag_us: float | None = None  # a flag from one GPU to another, measured in the same run
    hosts: int = 1  # N, of equally many ranks
    rail: str | None = None  # what joins them, see `cases.RAILS`; None: one host
    rail_ctas: int | None = None  # most thread blocks of NCCL's kernels on a rail; None: its choice
    # The rails alone: one row per (token, other host), in the chunks of the hybrid engine,
    # alternating with the calls; for a pair the sum of both directions.
    rail_us: Summary | None = None
    rail_ratio: float | None = None  # `rail_us` over `time_us`
    rail_bytes: int | None = None  # that a rank sends to other hosts then, mean over ranks
    max_tokens_per_rank: int | None = None  # T_max of the communicator; None: `tokens`
    calls_per_graph: int | None = None  # in the replayed graph; None: no graph, or one call ("ht")
    num_sms_dispatch: int | None = None  # pair only
    num_sms_combine: int | None = None
    idle_us: Summary | None = None  # CUDA: from an idle device, launch time of all ranks included
    # Pair: from an idle device until the host sees it idle again, one after the other with nothing
    # in between: the host's code and data are warm. The pair before aligns the ranks.
    idle_loop_us: Summary | None = None
    host_hot_us: Summary | None = None  # until the call returned, one call right after the other
    # The library that is fastest in the same case on the same machine, and its median. The
    # benchmark runs no peers: whoever measured them fills in both fields.
    peer: str | None = None
    peer_us: float | None = None
    aligned: str  # ranks, before a call: on the "device" (in stream order) or "host" (barrier)
    iterations: int
    inputs: int  # different ones that the iterations took turns with
    threads: int  # CPU threads of each rank
    memory_peak_bytes: int | None = None  # CUDA: most that the timed calls added
    seed: int
    command: str  # that made the record

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, accepted in _ACCEPTED.items():
            if getattr(self, name) not in accepted:
                _refuse(name, f"is {getattr(self, name)!r}, not one of {accepted}")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                _refuse(name, f"is {getattr(self, name)}, expected at least 1")

    def key(self) -> tuple[object, ...]:
        """What was measured, without when and how fast: a later record with the same key replaces
        an earlier one in a picture."""
        return (*(getattr(self, name) for name in _KEY), self.hardware)

    @property
    def prepared(self) -> bool:
        """Whether calls into outputs that were made once were timed (mode "ll")."""
        return self.mode == "ll" and self.variant in _PREPARED

    @property
    def hardware(self) -> str:
        """GPU, or CPU with its core count, that the record was made on."""
        return self.environment.hardware

    @property
    def sms_label(self) -> str:
        """SMs of the phase; for a pair with two different budgets both of them."""
        budgets = [self.num_sms_dispatch, self.num_sms_combine]
        if budgets[0] == budgets[1]:  # not a pair, a pair of equals, or an old record
            budgets = [self.num_sms]
        return "+".join("auto" if budget is None else str(budget) for budget in budgets)

    @property
    def wire_ratio(self) -> float | None:
        """What the wire allows over the time: the floor for prepared calls, else the ceiling."""
        return self.floor_ratio if self.prepared else self.ceiling_ratio


def write_records(path: str | Path, records: Iterable[Checked], *, append: bool = False) -> Path:
    """Writes records as JSON lines, replacing the file or adding to it.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    text = "".join(record.to_json() + "\n" for record in records)
    if append:
        with path.open("a+b") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                text = "\n" + text  # the last writer was cut off: keep its line apart
            file.write(text.encode())
        return path
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        return partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_records(path: str | Path, kind: type[Loaded] = Record) -> list[Loaded]:
    """The records of one kind of a file in their order; empty lines do not count.

    A file may have several kinds: lines name theirs in the field `kind`, but for a `Record`.

    Raises:
        RecordError: a line is no valid record, or the file cannot be read.
    """
    records: list[Loaded] = []
    wanted = getattr(kind, "kind", RECORD_KIND)
    number = 0
    try:
        with Path(path).open("rb") as file:
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > _MAX_LINE_BYTES:
                    raise RecordError(f"longer than {_MAX_LINE_BYTES} bytes")
                if line.strip() and _kind_in(text := line.decode()) in (None, wanted):
                    records.append(kind.from_json(text))
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (RecordError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}:{number}: {error}") from None
    return records


def _kind_in(line: str) -> str | None:
    """The kind of a line; None where it is no JSON object: reading it says what is wrong."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    name = values.get("kind", RECORD_KIND)
    if name not in KINDS:
        _refuse("kind", f"is {name!r}, not one of {KINDS}")
    return name


class Keyed(Protocol):
    """A record of which later ones of the same case replace earlier ones."""

    @property
    def environment(self) -> Environment:
        """Where and when it was made."""
        ...

    def key(self) -> tuple[object, ...]:
        """What was measured."""
        ...


def latest(records: Iterable[OneKeyed]) -> list[OneKeyed]:
    """The last made record of every key, in the order in which keys first appear."""
    newest: dict[tuple[object, ...], OneKeyed] = {}
    for record in records:
        kept = newest.get(record.key())
        if kept is None or record.environment.date >= kept.environment.date:
            newest[record.key()] = record
    return list(newest.values())


WORDS: dict[str, Callable[[Record], object]] = {
    "on": lambda record: record.hardware,
    "mode": lambda record: record.mode,
    "R": lambda record: _ranks_of(record),
    "H": lambda record: record.hidden,
    "K": lambda record: record.topk,
    "E": lambda record: record.experts,
    "SMs": lambda record: record.sms_label,
    "layout": lambda record: record.layout,
    "routing": lambda record: f"{record.routing} uneven" if record.uneven else record.routing,
    "format": lambda record: record.quantization or record.dtype,
    "engine": lambda record: record.engine,
    "variant": lambda record: record.variant,
    "T": lambda record: record.tokens,
}
"""What tells cases apart in tables and pictures, in the order in which they are told apart."""


def _ranks_of(record: Record) -> str:
    """Their number, or of several hosts "2x8 sockets", with their rails."""
    if record.hosts == 1:
        return str(record.ranks)
    ctas = "" if record.rail_ctas is None else f" {record.rail_ctas} CTAs"
    return f"{record.hosts}x{record.ranks // record.hosts} {record.rail}{ctas}"


_BARE = ("mode", "layout", "routing", "format", "engine", "variant")  # values that name themselves


def names_of(records: Sequence[Record], *, without: Sequence[str] = ()) -> tuple[str, list[str]]:
    """What all records share, and for each record a name made of what they do not share.

    `without` has words that something else says already, such as an axis.
    """
    marks = {**{word: f"{word}=" for word in WORDS}, **dict.fromkeys(_BARE, ""), "on": "on "}
    values = [
        [f"{marks[word]}{read(record)}" for record in records]
        for word, read in WORDS.items()
        if word not in without
    ]
    shared = [texts[0] for texts in values if len(set(texts)) == 1]
    varying = [texts for texts in values if len(set(texts)) > 1]
    names = [" ".join(texts[index] for texts in varying) for index in range(len(records))]
    return ", ".join(shared), [name or "measured" for name in names]


# -- the checks -----------------------------------------------------------------------------------


@cache
def _kinds(cls: type[Any]) -> dict[str, tuple[type[Any], bool]]:
    """Type of every field, and whether it may be None."""
    kinds: dict[str, tuple[type[Any], bool]] = {}
    for name, hint in get_type_hints(cls).items():
        if name != "signed":
            optional = NoneType in get_args(hint)
            kinds[name] = (get_args(hint)[0] if optional else get_origin(hint) or hint, optional)
    return kinds


def _load(cls: type[Loaded], values: Any, name: str) -> Loaded:
    """What was read from JSON as a dataclass, with exactly its fields, optional ones aside."""
    if not isinstance(values, dict):
        _refuse(name, "is no JSON object")
    known = fields(cls)  # pyright: ignore[reportArgumentType]
    for unknown in values.keys() - {field.name for field in known}:
        _refuse(name, f"has an unknown field {unknown!r}")
    for field in known:
        if field.default is MISSING and field.name not in values:
            _refuse(name, f"lacks the field {field.name!r}")
    nested = {
        key: _load(kind, values[key], key)
        for key, (kind, _) in _kinds(cls).items()
        if is_dataclass(kind) and values.get(key) is not None
    }
    try:
        return cls(**{**values, **nested})
    except RecordError as error:
        raise RecordError(f"{name}: {error}") from None


def _refuse(name: str, problem: str) -> NoReturn:
    raise RecordError(f"{name} {problem}")
