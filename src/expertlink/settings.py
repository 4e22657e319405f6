"""Every environment variable that the library reads, in one table.

Most variables are the default of a configuration field; a field that is set wins. Variables are
read when a communicator is built, never at import.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from expertlink.errors import ConfigurationError

Value = TypeVar("Value")

LONGEST_S = 1e8
"""The longest wait, about three years, whatever is configured: engines count nanoseconds."""


@dataclass(frozen=True)
class Variable(Generic[Value]):
    """One environment variable: its name, its default, what it changes, and how it is read.

    Attributes:
        default: value where the variable is unset or empty.
        parse: text to value; raises a ValueError that says what is expected.
    """

    name: str
    default: Value
    meaning: str
    parse: Callable[[str], Value]

    def read(self) -> Value:
        """Value of the variable.

        Raises:
            ConfigurationError: the variable has a value that cannot be parsed.
        """
        text = os.environ.get(self.name)
        if text is None or text.strip() == "":
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ConfigurationError(f"{self.name}={text!r}: {error} is expected") from None


def positive_seconds(value: object) -> float:
    """`value` as a time-out.

    Raises:
        ValueError: it is not a finite number above 0; the message says what is expected.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            seconds = float(value)
        except OverflowError:
            seconds = math.inf
        if math.isfinite(seconds) and seconds > 0:
            return seconds
    raise ValueError("a finite, positive number of seconds")


def _seconds_in(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    return positive_seconds(value)


def _absolute_path(text: str) -> Path | None:
    # A relative path would be another directory in every working directory.
    path = Path(os.path.expanduser(text))
    if not path.is_absolute():
        raise ValueError("an absolute path")
    return path


def _switch(text: str) -> bool:
    if text.strip() not in ("0", "1"):
        raise ValueError("0 or 1")
    return text.strip() == "1"


def _thread_blocks(text: str) -> int | None:
    if not text.strip().isdecimal() or not 1 <= int(text) <= 64:
        raise ValueError("a whole number from 1 to 64")
    return int(text)


TIMEOUT = Variable(
    "EXPERTLINK_TIMEOUT",
    100.0,
    "seconds that a dispatch or combine waits for its peers (config field timeout_s)",
    _seconds_in,
)
STARTUP_TIMEOUT = Variable(
    "EXPERTLINK_STARTUP_TIMEOUT",
    300.0,
    "seconds that initialize() waits for its peers (config field startup_timeout_s)",
    _seconds_in,
)
CACHE_DIR: Variable[Path | None] = Variable(
    "EXPERTLINK_CACHE_DIR",
    None,
    "directory of compiled kernels, with mode 0700; unset: $XDG_CACHE_HOME/expertlink, "
    "else ~/.cache/expertlink",
    _absolute_path,
)
NVTX = Variable(
    "EXPERTLINK_NVTX",
    False,
    "1: NVTX ranges, and ranges of torch's profiler, around dispatch and combine, backward passes "
    "included; what makes their results readable, such as the receiving half of a call, has "
    "ranges of its own, which end in .finish",
    _switch,
)
DEEP_EP = Variable(
    "EXPERTLINK_DEEP_EP",
    False,
    "1: in every process of vLLM and SGLang, `import deep_ep` imports this library's drop-in",
    _switch,
)
RAIL_CTAS: Variable[int | None] = Variable(
    "EXPERTLINK_RAIL_CTAS",
    None,
    "most thread blocks, each on an SM, of NCCL's kernels between hosts, from 1 to 64, the same on "
    "all ranks; unset: NCCL decides",
    _thread_blocks,
)

VARIABLES: tuple[Variable[Any], ...] = (
    *(TIMEOUT, STARTUP_TIMEOUT, CACHE_DIR),
    *(NVTX, DEEP_EP, RAIL_CTAS),
)
