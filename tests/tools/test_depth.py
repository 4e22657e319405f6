"""The one setting for how many cases the tests draw."""

from __future__ import annotations

import pytest
from hypothesis import settings

from support.depth import VARIABLE, deep


@pytest.mark.parametrize(("text", "factor"), [("", 1), ("1", 1), ("10", 10)])
def test_the_depth_multiplies_cases(
    text: str, factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, text)
    assert deep(8) == 8 * factor


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "deep"])
def test_depths_that_mean_nothing_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match=f"{VARIABLE}={text}: an integer from 1"):
        deep(1)


def test_tests_that_name_no_number_draw_by_the_depth_as_well() -> None:
    assert settings().max_examples == deep(100)
