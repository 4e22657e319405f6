"""Every environment variable the library reads, in one table.

A variable gives the default of a configuration field; a field that is set wins. Variables are read
when a communicator is built, never at import.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from expertlink.errors import ConfigurationError


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, its default and what it changes."""

    name: str
    default: float
    meaning: str

    def read(self) -> float:
        """Value of the variable, a positive number.

        Raises:
            ConfigurationError: the variable is set to something else.
        """
        text = os.environ.get(self.name)
        if text is None or text.strip() == "":
            return self.default
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not value > 0:
            raise ConfigurationError(f"{self.name}={text!r}: a positive number is expected")
        return value


TIMEOUT = Variable(
    "EXPERTLINK_TIMEOUT",
    100.0,
    "seconds a dispatch or combine waits for its peers (config field timeout_s)",
)
STARTUP_TIMEOUT = Variable(
    "EXPERTLINK_STARTUP_TIMEOUT",
    300.0,
    "seconds initialize() waits for its peers (config field startup_timeout_s)",
)

VARIABLES = (TIMEOUT, STARTUP_TIMEOUT)
