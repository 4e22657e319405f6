"""Launches of the kernels of mode `ll`: whole calls, or one half now and the other one later."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.launch import KernelName, Launch, Launches, Run
from expertlink.engines.nvlink.ll.arena import LlArena
from expertlink.engines.nvlink.ll.arguments import Flag
from expertlink.engines.nvlink.ll.halves import Half
from expertlink.jit.kernel import Arguments

_SEND, _RECEIVE = int(Flag.SEND), int(Flag.RECEIVE)
_BOTH = _SEND | _RECEIVE


class LlLaunch(NamedTuple):
    """A launch, and how many warps of a block begin with sending."""

    launch: Launch
    send_warps: int


class HalvesLauncher:
    """Queues launches of one operation: both halves at once, or one now and the other later.

    Args:
        arena: knows the calls of which half is under way.
        run: queues a kernel.
        plan: the launch of a kernel for a number of SMs, and whether it sends and receives.
    """

    def __init__(
        self,
        *,
        arena: LlArena,
        run: Run,
        plan: Callable[[KernelName, int | None, bool, bool], LlLaunch],
    ) -> None:
        self._arena, self._run = arena, run
        self._launches = Launches(plan)

    def __call__(
        self,
        name: KernelName,
        arguments: Arguments,
        flags: int,
        num_sms: int | None,
        *,
        halves: bool,
        needs: tuple[object, ...] = (),
        after: Callable[[], object] | None = None,
        tables: object = None,
    ) -> Half | None:
        """Queues both halves, or the sending one; then returns what queues the other.

        `needs` owns the memory that the arguments name; it lives until the other is queued. `after`
        follows it. `tables` are those that both halves use.
        """
        arena = self._arena
        if not halves:
            if arena.halves.left:
                arena.halves.finish(arena.capture())
            self.launch_whole(name, arguments, flags, num_sms)
            if after is not None:
                after()
            return None
        capture = arena.capture()
        arena.halves.finish(capture, tuning.LL_CALLS_IN_FLIGHT - 1)
        launch, arguments.send_warps = self._launches[name, num_sms, True, False]
        arguments.flags = flags | _SEND
        self._run(name, arguments, launch)
        run, rest = self._run, arguments.copy()  # the next call changes the arguments
        rest.flags = flags | _RECEIVE
        rest_launch, _ = self._launches[name, num_sms, False, True]

        def launch_rest() -> None:
            run(name, rest, rest_launch)
            if after is not None:
                after()

        return add_half(arena, capture, launch_rest, tables=tables, needs=needs)

    def launch_whole(
        self,
        name: KernelName,
        arguments: Arguments,
        flags: int,
        num_sms: int | None,
        *,
        after_all: bool = False,
    ) -> None:
        """Queues both halves in one launch, whatever halves are left.

        `after_all`: it starts when all before it is over.
        """
        launch, arguments.send_warps = self._launches[name, num_sms, True, True]
        arguments.flags = flags | _BOTH
        self._run(name, arguments, launch.after_all if after_all else launch)


@functools.cache
def local_launch(grid: int, block: int) -> Launch:
    """A launch that waits for no other rank. One object each: runners keep what they prepare."""
    return Launch(grid, block, shared_bytes=0, follows=True, local=True)


def add_half(
    arena: LlArena,
    capture: int,
    launch: Callable[[], None],
    *,
    tables: object,
    needs: tuple[object, ...],
) -> Half:
    """A half of a call that is left; see `Half` for the arguments."""
    half = Half(
        arena.halves,
        capture=capture,
        tables=tables,
        launch=launch,
        follow=arena.follow,
        capture_now=arena.capture,
        needs=needs,
    )
    arena.halves.add(half)
    return half
