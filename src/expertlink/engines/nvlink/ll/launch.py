"""Launches of low-latency kernels: whole calls, or one half now and the other one later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.launch import KernelName, Launch, Run, latency_warps
from expertlink.engines.nvlink.ll import plan as ll_plan
from expertlink.engines.nvlink.ll.arena import LlArena
from expertlink.engines.nvlink.ll.arguments import Flag
from expertlink.engines.nvlink.ll.halves import Half
from expertlink.jit.kernel import Arguments

# SMs that a call takes by default: docs/architecture.md, "How many SMs".
DISPATCH_SMS = 32
COMBINE_SMS = 64
# Warps of all blocks that begin with sending, where both halves are in one launch and a row goes to
# c peers: a / (b + c). So many fill the wire; more get into the way of those that wait for rows.
# Quantizing a row takes as long as b copies of it.
_SENDING_WARPS = {
    KernelName.DISPATCH: (260.0, 0.0),
    KernelName.DISPATCH_QUANTIZED: (950.0, 3.2),
}
_RETURNING_SHARE = {"sums": 0.84, "rows": 0.75}  # of the warps of combine's blocks, at most
# Copying rows takes few warps: so many in all blocks, and in each at least the latter.
_RETURNING_ROWS = (256, 4)
IN_FLIGHT = 2  # calls whose receiving half has not been launched
_SEND, _RECEIVE = int(Flag.SEND), int(Flag.RECEIVE)
_BOTH = _SEND | _RECEIVE


class LatencyLauncher:
    """Queues the launches of one rank's low-latency calls.

    Args:
        config: the communicator's.
        num_ranks: R.
        num_local: E_loc.
        arena: knows the calls of which half is under way.
        run: queues a kernel.
        num_sms: multiprocessors of the GPU.
        warps: most warps of a block.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        num_ranks: int,
        num_local: int,
        arena: LlArena,
        run: Run,
        num_sms: int,
        warps: int,
    ) -> None:
        self._config, self._arena, self._run = config, arena, run
        self._num_ranks, self._num_local = num_ranks, num_local
        self._num_sms, self._most_warps = num_sms, warps
        self._plans: dict[tuple[KernelName, int | None, str], tuple[Launch, int]] = {}

    def __call__(
        self,
        name: KernelName,
        a: Any,
        flags: int,
        num_sms: int | None,
        *,
        halves: bool,
        needs: tuple[object, ...] = (),
        after: Callable[[], object] | None = None,
        tables: object = None,
    ) -> Callable[[], None] | None:
        """Queues both halves, or the sending one; then returns what queues the other.

        `needs` owns the memory that the arguments name; it lives until the other is queued. `after`
        follows it. `tables` are those that both halves use.
        """
        arena = self._arena
        if not halves:
            if arena.halves.left:
                arena.halves.finish(arena.capture())
            launch, a.send_warps = self._plan(name, num_sms, "both")
            a.flags = flags | _BOTH
            self._run(name, a, launch)
            if after is not None:
                after()
            return None
        capture = arena.capture()
        arena.halves.finish(capture, IN_FLIGHT - 1)
        launch, a.send_warps = self._plan(name, num_sms, "send")
        a.flags = flags | _SEND
        self._run(name, a, launch)
        rest: Arguments = a.copy()  # the next call changes them
        rest.flags = flags | _RECEIVE
        rest_launch, _ = self._plan(name, num_sms, "receive")

        def launch_rest() -> None:
            self._run(name, rest, rest_launch)
            if after is not None:
                after()

        half = Half(
            arena.halves,
            capture=capture,
            tables=tables,
            launch=launch_rest,
            follow=arena.follow,
            capture_now=arena.capture,
            needs=needs,
        )
        arena.halves.add(half)
        return half

    def _plan(self, name: KernelName, num_sms: int | None, half: str) -> tuple[Launch, int]:
        """Grid and block of a launch, and how many warps of a block begin with sending."""
        key = (name, num_sms, half)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._new_plan(*key)
        return plan

    def _new_plan(self, name: KernelName, num_sms: int | None, half: str) -> tuple[Launch, int]:
        config, dispatches, both = self._config, name is not KernelName.COMBINE, half == "both"
        default = config.num_sms_dispatch if dispatches else config.num_sms_combine
        usual = DISPATCH_SMS if dispatches else COMBINE_SMS
        words = 0
        if dispatches:
            words = ll_plan.shared_words(
                config, num_ranks=self._num_ranks, num_local=self._num_local, half=half
            )
        blocks = min(self._num_sms, num_sms or default or usual)
        # One warp of a combine hears where the other ranks are, beside those that work.
        warps = max(1 if dispatches else 2, latency_warps(name, self._most_warps))
        launch = Launch(grid=blocks, block=32 * warps, shared_bytes=4 * words, follows=True)
        if dispatches:
            senders = warps - tuning.LL_PUBLISHING_WARPS
            if both:
                work, once = _SENDING_WARPS[name]
                wanted = work / (once + max(1.0, _copies_to_peers(config, self._num_ranks)))
                senders = min(senders, round(wanted / blocks))
        else:
            senders = warps
            if both and config.layout.expanded:
                senders = int(_RETURNING_SHARE["sums"] * warps)
            elif both:
                wanted, least = _RETURNING_ROWS
                senders = min(int(_RETURNING_SHARE["rows"] * warps), max(least, wanted // blocks))
        return launch, max(1, senders)


def _copies_to_peers(config: MoECommunicatorConfig, num_ranks: int) -> float:
    """Peers that a token goes to, on average, if its experts are drawn evenly from all ranks."""
    return (num_ranks - 1) * (1.0 - (1.0 - 1.0 / num_ranks) ** config.topk)
