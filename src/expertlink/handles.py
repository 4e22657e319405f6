"""Checks of a handle: whom it suits, whether its buffers still hold its dispatch, its routing.

They raise `HandleError` and `RoutingChangedError`, which name the caller's arguments.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import Tables
from expertlink.errors import HandleError, RoutingChangedError
from expertlink.types import DispatchHandle, RoutingScope


def scope_of(
    config: MoECommunicatorConfig,
    *,
    ranks: tuple[object, ...],
    engine: str,
    numbers_by_max_tokens: bool,
    experts_of_rank: tuple[tuple[int, ...], ...],
    identity: int,
) -> RoutingScope:
    """The scope of a communicator's handles.

    Args:
        config: the communicator's.
        ranks: the processes of all ranks.
        engine: `Engine.routing_form`.
        numbers_by_max_tokens: rows are numbered by T_max in every layout.
        experts_of_rank: global ids of every rank's experts.
        identity: the communicator's own.
    """
    layout = config.layout
    by_max_tokens = layout.padded or numbers_by_max_tokens
    bound = config.zero_copy or config.mask_lost_peers
    return RoutingScope(
        ranks=ranks,
        engine=engine,
        mode=config.mode,
        output_layout=layout.value,
        num_experts=config.num_experts,
        topk=config.topk,
        expert_alignment=config.expert_alignment,
        experts_of_rank=experts_of_rank,
        static_shapes=config.static_shapes,
        max_recv_tokens_per_rank=config.max_recv_tokens_per_rank,
        max_tokens_per_rank=config.max_tokens_per_rank if by_max_tokens else None,
        owner=identity if bound else None,
    )


def check_handle(
    handle: object, *, identity: int, scope: RoutingScope, max_tokens: int
) -> DispatchHandle:
    """The handle, if a communicator can use it and it is not stale.

    Args:
        handle: what the caller passed.
        identity: the communicator's own.
        scope: its scope.
        max_tokens: its T_max.
    """
    if not isinstance(handle, DispatchHandle):
        raise HandleError(f"a DispatchHandle is expected, not {type(handle).__name__}")
    handle = handle.plain()
    if handle.owner != identity:
        _check_fit(handle, scope, max_tokens)
    check_current(handle)
    return handle


def _check_fit(handle: DispatchHandle, scope: RoutingScope, max_tokens: int) -> None:
    """Refuses a handle of another communicator that does not suit this one."""
    if handle.leases:
        raise HandleError(
            "the handle of a dispatch into DispatchBuffers belongs to another communicator"
        )
    if handle.scope != scope:
        raise HandleError(
            f"the handle belongs to another communicator, whose {_difference(handle.scope, scope)}"
        )
    if handle.num_tokens > max_tokens:
        raise HandleError(
            f"the handle is of a dispatch of {handle.num_tokens} tokens in another communicator; "
            f"max_tokens_per_rank={max_tokens} here"
        )


def _difference(theirs: RoutingScope, own: RoutingScope) -> str:
    """The first property in which two scopes differ, and how."""
    name = next(
        field.name
        for field in dataclasses.fields(own)
        if getattr(theirs, field.name) != getattr(own, field.name)
    )
    if name == "owner":
        return "handles are of use to itself alone (zero_copy or mask_lost_peers)"
    if name == "ranks":
        return "ranks are not those of this one"
    if name == "experts_of_rank":
        return "experts are placed in another way"
    return f"{name} is {getattr(theirs, name)!r}, not {getattr(own, name)!r}"


def check_current(handle: DispatchHandle) -> None:
    """Refuses a stale handle: a later dispatch has used its buffers."""
    for buffers, generation in handle.leases:
        if buffers.generation != generation:
            raise HandleError(
                f"the handle of dispatch #{handle.call} is stale: a later dispatch used its "
                "DispatchBuffers; alternate between two of them to keep two dispatches"
            )


def tables_of(handle: DispatchHandle) -> Tables:
    """What the routing of a finished dispatch says of its rows, for as long as the handle lives.

    Also once every communicator that it suits is closed.
    """
    handle.wait()
    return cast(Tables, handle.state)


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
