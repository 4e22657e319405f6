"""Ranges around dispatch and combine, for profilers (EXPERTLINK_NVTX)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.profiler import record_function

from expertlink.engines.base import Engine


def add_ranges(engine: Engine) -> None:
    """Puts ranges around the calls of an engine, those of backward passes included.

    A call, or its sending half, is `expertlink.dispatch` or `expertlink.combine`. What makes its
    results readable, the receiving half for one, is the same with `.finish`. An engine that is
    not given to this has no part of it in its calls.
    """
    for name in ("dispatch", "combine"):
        setattr(engine, name, _in_ranges(f"expertlink.{name}", getattr(engine, name)))


def _in_ranges(name: str, start: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def start_in_range(call: Any) -> Any:
        with _range(name):
            started = start(call)
        finish = started.finish

        def finish_in_range() -> None:
            with _range(f"{name}.finish"):
                finish()

        return dataclasses.replace(started, finish=finish_in_range)

    return start_in_range


@contextmanager
def _range(name: str) -> Iterator[None]:
    """A range of torch's profiler and, where there are GPUs, of NVTX."""
    if not torch.cuda.is_available():  # builds of torch for CPUs have no NVTX
        with record_function(name):
            yield
        return
    with record_function(name), torch.cuda.nvtx.range(name):
        yield
