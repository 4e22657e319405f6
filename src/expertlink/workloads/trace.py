"""Routing traces: recorded top-k choices, written by the demo and replayed by the benchmark.

A trace is a numpy archive (`.npz`) of four arrays, none of which needs pickle:

| name          | dtype, shape                            | content                              |
|---------------|-----------------------------------------|--------------------------------------|
| `version`     | int64 []                                | `TRACE_VERSION`                      |
| `num_experts` | int64 []                                | E                                    |
| `topk_ids`    | int32 [steps, layers, ranks, tokens, K] | expert of every choice, -1 for none  |
| `meta`        | uint8 [bytes]                           | a JSON object: where it was recorded |
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from expertlink.config import MAX_TOPK
from expertlink.errors import InputError

TRACE_VERSION = 1
MAX_IDS = 2**27
"""Most ids a trace may hold: 512 MiB of int32."""
MAX_EXPERTS = 2**20
MAX_META_BYTES = 2**16
_HEADER_BYTES = 4096
_PREFIX = "routing trace: "
# RuntimeError and its subclasses: encrypted, packed by an unknown method, JSON nested too deep.
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
_AXES = ("steps", "layers", "ranks", "tokens", "topk")


@dataclass(frozen=True)
class RoutingTrace:
    """Top-k choices of a model's MoE layers over some steps.

    Attributes:
        topk_ids: `[steps, layers, ranks, tokens, K]` int32: expert of every choice, from 0 to
            `num_experts` - 1 and distinct within a token, or -1 for no expert.
        num_experts: E of the recorded model.
        meta: where the trace comes from; plain JSON values.

    Raises:
        InputError: a field cannot be part of a trace; the message says which and why.
    """

    topk_ids: npt.NDArray[np.int32]
    num_experts: int
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = self.topk_ids
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            _refuse(f"num_experts={self.num_experts}, expected 1 to {MAX_EXPERTS}")
        if ids.dtype != np.int32 or ids.ndim != len(_AXES):
            _refuse(
                f"topk_ids is {ids.dtype} with {ids.ndim} dimensions, "
                f"expected int32 [{', '.join(_AXES)}]"
            )
        if 0 in ids.shape:
            _refuse(f"topk_ids has shape {list(ids.shape)}: nothing is recorded in it")
        if ids.size > MAX_IDS:
            _refuse(f"topk_ids holds {ids.size} ids, at most {MAX_IDS} are accepted")
        if self.topk > MAX_TOPK:
            _refuse(f"topk_ids has {self.topk} choices per token, at most {MAX_TOPK} are possible")
        if int(ids.min()) < -1 or int(ids.max()) >= self.num_experts:
            _refuse(
                f"topk_ids range from {int(ids.min())} to {int(ids.max())}, "
                f"expected -1 to {self.num_experts - 1}"
            )
        ordered = np.sort(ids, axis=-1)
        if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
            _refuse("topk_ids names an expert twice for one token")

    @property
    def num_steps(self) -> int:
        """Recorded steps."""
        return int(self.topk_ids.shape[0])

    @property
    def num_layers(self) -> int:
        """MoE layers of the recorded model."""
        return int(self.topk_ids.shape[1])

    @property
    def num_ranks(self) -> int:
        """Ranks of the recording."""
        return int(self.topk_ids.shape[2])

    @property
    def tokens_per_rank(self) -> int:
        """Tokens per rank and step."""
        return int(self.topk_ids.shape[3])

    @property
    def topk(self) -> int:
        """K, choices per token."""
        return int(self.topk_ids.shape[4])

    def for_ranks(self, num_ranks: int, tokens: int | None = None) -> RoutingTrace:
        """The same choices dealt to another number of ranks.

        Per layer, the recorded tokens form one stream in the order step, rank, token. The result
        cuts that stream into steps of `num_ranks * tokens`; a remainder that fills no step is
        left out, and a stream shorter than one step is repeated to fill it.

        Args:
            num_ranks: ranks of the replay.
            tokens: tokens per rank and step. None: the recorded tokens per step, shared out.

        Returns:
            A trace `[steps', layers, num_ranks, tokens, K]`.

        Raises:
            InputError: `num_ranks` or `tokens` is below 1, or the result would be too large.
        """
        if tokens is None:
            tokens = max(1, self.num_ranks * self.tokens_per_rank // max(1, num_ranks))
        if num_ranks < 1 or tokens < 1:
            _refuse(f"cannot be dealt to num_ranks={num_ranks} with tokens={tokens}; both from 1")
        if (num_ranks, tokens) == (self.num_ranks, self.tokens_per_rank):
            return self
        per_step = num_ranks * tokens
        if per_step * self.num_layers * self.topk > MAX_IDS:
            _refuse(f"would exceed {MAX_IDS} ids with num_ranks={num_ranks}, tokens={tokens}")
        streams_LNK = self.topk_ids.swapaxes(0, 1).reshape(self.num_layers, -1, self.topk)
        available = streams_LNK.shape[1]
        steps = max(1, available // per_step)
        taken = np.arange(steps * per_step) % available
        shape = (self.num_layers, steps, num_ranks, tokens, self.topk)
        ids = np.ascontiguousarray(streams_LNK[:, taken].reshape(shape).swapaxes(0, 1))
        return RoutingTrace(ids, self.num_experts, dict(self.meta))

    def save(self, path: str | Path) -> Path:
        """Writes the trace as a compressed numpy archive and returns its path.

        The file appears under its name only when it is complete.

        Raises:
            InputError: `meta` is no small JSON object.
            OSError: the file cannot be written.
        """
        path = Path(path)
        try:
            text = json.dumps(self.meta, allow_nan=False, sort_keys=True).encode()
        except (TypeError, ValueError) as error:
            _refuse(f"meta is not plain JSON: {error}")
        if len(text) > MAX_META_BYTES:
            _refuse(f"meta takes {len(text)} bytes as JSON, at most {MAX_META_BYTES} are accepted")
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez_compressed(
                file,
                version=np.int64(TRACE_VERSION),
                num_experts=np.int64(self.num_experts),
                topk_ids=self.topk_ids,
                meta=np.frombuffer(text, dtype=np.uint8),
            )
        return partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Reads and checks a trace. Nothing in the file is executed or trusted for its size.

        Raises:
            InputError: the file is missing or no valid trace; the message names it and says why.
        """
        path = Path(path)
        try:
            with zipfile.ZipFile(path) as archive:
                version = _scalar(archive, "version")
                if version != TRACE_VERSION:
                    _refuse(f"version is {version}, this library reads version {TRACE_VERSION}")
                num_experts = _scalar(archive, "num_experts")
                ids = _member(archive, "topk_ids", np.int32, len(_AXES), 4 * MAX_IDS)
                text = _member(archive, "meta", np.uint8, 1, MAX_META_BYTES)
            meta = json.loads(text.tobytes().decode())
            if not isinstance(meta, dict):
                _refuse("meta is no JSON object")
            return cls(ids, num_experts, meta)
        except FileNotFoundError:
            raise InputError(f"routing trace {path}: no such file") from None
        except InputError as error:
            raise InputError(f"routing trace {path}: {str(error).removeprefix(_PREFIX)}") from None
        except _UNREADABLE as error:
            raise InputError(f"routing trace {path}: cannot be read: {error}") from error


def _refuse(message: str) -> NoReturn:
    raise InputError(_PREFIX + message)


def _scalar(archive: zipfile.ZipFile, name: str) -> int:
    return int(_member(archive, name, np.int64, 0, 8))


def _member(
    archive: zipfile.ZipFile, name: str, dtype: type[np.generic], ndim: int, most_bytes: int
) -> npt.NDArray[Any]:
    """Reads one array; its size is checked before anything is allocated for it."""
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError:
        _refuse(f"array {name!r} is missing")
    if info.file_size > most_bytes + _HEADER_BYTES:
        _refuse(f"array {name!r} takes {info.file_size} bytes, at most {most_bytes} are accepted")
    data = io.BytesIO(archive.read(info))
    if np.lib.format.read_magic(data) != (1, 0):
        _refuse(f"array {name!r} is not in the numpy format 1.0")
    shape, _, stored = np.lib.format.read_array_header_1_0(data)
    if stored != np.dtype(dtype) or len(shape) != ndim:
        _refuse(
            f"array {name!r} is {stored} with {len(shape)} dimensions, "
            f"expected {np.dtype(dtype)} with {ndim}"
        )
    size = math.prod(shape) * stored.itemsize
    if size != len(data.getbuffer()) - data.tell():
        _refuse(f"array {name!r} is cut off: shape {list(shape)} takes {size} bytes")
    data.seek(0)
    return np.lib.format.read_array(data, allow_pickle=False)
