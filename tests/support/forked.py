"""Rank processes on CPUs that start at once: forked from a server that has imported torch.

A rank that is started as users start it imports torch first, two seconds of a core, and the tests
start dozens. Everything else is as in such a rank: arguments are pickled, nothing of the parent's
state is inherited but its environment and import path.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

_MODULES = ["torch", "torch.distributed", "torch._dynamo"]  # the last as optimizers import it


class ForkedRanks:
    """What `expertlink.launch` takes for the module `multiprocessing`.

    Args:
        modules: what the server imports beside torch.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._spawn = multiprocessing.get_context("spawn")
        self._fork = multiprocessing.get_context("forkserver")
        self._fork.set_forkserver_preload([*_MODULES, *modules])
        self.Pipe = self._spawn.Pipe

    def get_context(self, method: str) -> ForkedRanks:
        assert method == "spawn"
        return self

    def Process(
        self, *, target: Callable[..., None], args: tuple[Any, ...], **options: Any
    ) -> BaseProcess:
        if args[0].device != "cpu":
            return self._spawn.Process(target=target, args=args, **options)
        work = (dict(os.environ), target, args)
        return self._fork.Process(target=_in_environment, args=work, **options)


def _in_environment(
    environment: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """The server's environment is that of its own start."""
    os.environ.clear()
    os.environ.update(environment)
    target(*args)
