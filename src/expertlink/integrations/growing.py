"""Communicators that are made as calls need them: what layers of a framework's model share.

A framework's layer learns of H, K and the element type with its first call, and of the number of
tokens with every call. A communicator fixes all four. So there is one for every (H, K, dtype), and
a larger one takes its place where some rank has more tokens than it has room for. All ranks learn
of that together, from the same refused dispatch.
"""

from __future__ import annotations

import atexit
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expertlink.communicator import MoECommunicator
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.ranks.handshake import largest_of
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import ClosedError, TooManyTokensError
from expertlink.settings import STARTUP_TIMEOUT
from expertlink.types import DispatchHandle, DispatchOutput


class Communicators:
    """FLAT communicators of one group, whose experts are in blocks of equal size.

    Args:
        group: process group, device mesh of one dimension, or None for the default group.
        num_experts: E.
        max_tokens_per_rank: most tokens of any rank in any call; None: communicators grow.
        expert_alignment: as in `MoECommunicatorConfig`.
    """

    def __init__(
        self,
        group: Any,
        *,
        num_experts: int,
        max_tokens_per_rank: int | None = None,
        expert_alignment: int = 1,
    ) -> None:
        self.group = group_of(group)
        self.num_ranks: int = 1 if self.group is None else self.group.size()
        self.num_experts = num_experts
        self._max_tokens = max_tokens_per_rank
        self._alignment = expert_alignment
        self._members: dict[tuple[int, int, torch.dtype], MoECommunicator] = {}
        # Backward of their calls may be still to come. Each is at most half as large as the next.
        self._outgrown: list[MoECommunicator] = []
        self._closed = False
        _alive.add(self)

    def dispatch(
        self, x_TH: Tensor, topk_ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[DispatchOutput, DispatchHandle, MoECommunicator]:
        """A dispatch with a communicator that has room for it. Collective, differentiable.

        Returns:
            What `MoECommunicator.dispatch` returns, and the communicator to combine with.

        Raises:
            TooManyTokensError: more than `max_tokens_per_rank`, where that was given.
            ClosedError: `close()` was called.
            ExpertlinkError: as of `MoECommunicator.dispatch`.
        """
        key = (x_TH.shape[1], topk_ids_TK.shape[1], x_TH.dtype)
        comm = self._members.get(key)
        if comm is None:
            comm = self._make(key, x_TH.device, self._max_tokens or self._largest(x_TH))
        weights_TK = weights_TK.to(comm.config.weight_dtype)
        try:
            return (*comm.dispatch(x_TH, topk_ids_TK, weights_TK), comm)
        except TooManyTokensError as error:
            if self._max_tokens is not None:
                raise
            tokens = max(error.num_tokens, 2 * error.capacity)
        self._outgrown.append(comm)
        comm = self._make(key, x_TH.device, tokens)
        return (*comm.dispatch(x_TH, topk_ids_TK, weights_TK), comm)

    def close(self) -> None:
        """Closes all communicators. Local; safe to repeat."""
        for comm in (*self._members.values(), *self._outgrown):
            comm.close()
        self._members.clear()
        self._outgrown.clear()
        self.group, self._closed = None, True

    def __deepcopy__(self, memo: object) -> Communicators:
        """Copies of a model share them, as they share a communicator."""
        return self

    def _largest(self, x_TH: Tensor) -> int:
        """The largest T of all ranks, at least 1. Collective."""
        self._check_open()
        wire = Wire(self.group, device=x_TH.device, timeout_s=STARTUP_TIMEOUT.read())
        return largest_of(wire, max(x_TH.shape[0], 1))

    def _make(
        self, key: tuple[int, int, torch.dtype], device: torch.device, tokens: int
    ) -> MoECommunicator:
        self._check_open()
        hidden_size, topk, dtype = key
        comm = MoECommunicator(
            MoECommunicatorConfig(
                num_experts=self.num_experts,
                hidden_size=hidden_size,
                topk=topk,
                max_tokens_per_rank=tokens,
                group=self.group,
                device=device,
                dtype=dtype,
                expert_alignment=self._alignment,
            )
        )
        comm.initialize()
        self._members[key] = comm
        return comm

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("these communicators are closed")


def shared(mesh: Any, **fields: Any) -> Communicators:
    """The communicators that all layers with this mesh and these arguments have in common.

    The mesh holds them, and meshes that are equal have each their own. So whether there are some
    already depends on what the program did, which is the same on all ranks. It must not depend on
    when a rank's garbage is collected: a rank that finds none asks the others, who have to ask too.

    Args:
        mesh: device mesh of one dimension.
        fields: arguments of `Communicators`.
    """
    held: dict[Any, Communicators] = vars(mesh).setdefault("_expertlink_communicators", {})
    key = tuple(sorted(fields.items()))
    if key not in held:
        held[key] = Communicators(mesh, **fields)
    return held[key]


def group_of(group: Any) -> Any:
    """A process group for all ways to name one; None where there is a single rank without any."""
    if hasattr(group, "get_group"):
        return group.get_group()
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return group


_alive: weakref.WeakSet[Communicators] = weakref.WeakSet()


@atexit.register
def _let_go() -> None:
    """A process group that outlives `destroy_process_group()` can abort the process at its end."""
    for communicators in list(_alive):
        try:
            communicators.close()
        except RuntimeError:  # the device may be gone
            continue
