"""How many cases are drawn: `make test DEPTH=10`, or EXPERTLINK_TEST_DEPTH=10, draws ten times as
many. Rank processes inherit the variable."""

from __future__ import annotations

import os

VARIABLE = "EXPERTLINK_TEST_DEPTH"


def depth() -> int:
    """The setting; 1 where it is not set.

    Raises:
        ValueError: it is no positive integer.
    """
    text = os.environ.get(VARIABLE, "").strip() or "1"
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{VARIABLE}={text}: an integer from 1 is needed")
    return int(text)


def deep(cases: int) -> int:
    """This many cases, at the depth that is set."""
    return cases * depth()
