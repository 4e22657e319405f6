"""Checks of a handle: whose it is, whether its buffers still hold its dispatch, its routing.

They raise `HandleError` and `RoutingChangedError`, which name the caller's arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink.errors import HandleError, RoutingChangedError
from expertlink.types import DispatchHandle


def check_handle(handle: object, identity: int) -> DispatchHandle:
    """The handle, if it is of the communicator with that identity, and not stale."""
    if not isinstance(handle, DispatchHandle):
        raise HandleError(f"a DispatchHandle is expected, not {type(handle).__name__}")
    if handle.owner != identity:
        raise HandleError("the handle belongs to another communicator")
    check_current(handle)
    return handle


def check_current(handle: DispatchHandle) -> None:
    """Refuses a stale handle: a later dispatch has used its buffers."""
    for buffers, generation in handle.leases:
        if buffers.generation != generation:
            raise HandleError(
                f"the handle of dispatch #{handle.call} is stale: a later dispatch used its "
                "DispatchBuffers; alternate between two of them to keep two dispatches"
            )


def check_same_routing(
    handle: DispatchHandle, topk_ids: Tensor | None, ids_TK: Tensor | None, num_tokens: int
) -> None:
    """Refuses a cached dispatch whose routing is not the handle's.

    Args:
        handle: of the earlier dispatch.
        topk_ids: the caller's ids, or None: the handle's.
        ids_TK: the same, checked.
        num_tokens: T of the new dispatch.
    """
    if num_tokens != handle.num_tokens:
        raise RoutingChangedError(
            f"input has {num_tokens} tokens, previous_handle's dispatch had "
            f"{handle.num_tokens}: dispatch without previous_handle when the routing changes"
        )
    if topk_ids is None or ids_TK is None:
        return
    if handle.ids_seen is not None:
        seen, version = handle.ids_seen
        if seen is topk_ids and version == topk_ids._version:
            return
    same = ids_TK.to(torch.int64) == handle.topk_ids.to(torch.int64)
    if not bool(same.all()):
        token = int((~same).any(dim=1).nonzero()[0])
        raise RoutingChangedError(
            f"topk_ids[{token}]={ids_TK[token].tolist()} differs from the routing of "
            f"previous_handle, {handle.topk_ids[token].tolist()}: dispatch without "
            "previous_handle when the routing changes"
        )
