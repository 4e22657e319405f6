"""What stands for communicators and handles in a graph, which holds tensors, numbers and strings.

A communicator is a string. It is found again as long as somebody else keeps it.

A handle is a list of tensors that the dispatch returns, in one of two forms:

- **A token**, where the host knows counts: one int64 on the CPU, the number of the handle. The
  memory of that tensor keeps the handle, and nothing else does. So a routing lives exactly as long
  as a graph, autograd, a checkpoint or a caller holds the token, or a view of it.
- **The tables**, where the host knows nothing (`static_shapes`, mode "ll", of the nvlink engine):
  tensors on the device. They take part in CUDA graphs: memory is the graph's, and a replay, in
  which no Python runs, finds what it wrote. All that is not in them depends on the number of tokens
  and on which weights there are, and is kept by communicator.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.nvlink.tables import Route
from expertlink.errors import ClosedError, HandleError
from expertlink.types import DispatchHandle, RoutingScope

if TYPE_CHECKING:
    from expertlink.connection import Connection
    from expertlink.engines.base import Engine

_communicators: weakref.WeakValueDictionary[str, Connection] = weakref.WeakValueDictionary()
_handles: weakref.WeakValueDictionary[int, _Memory] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


@dataclass(frozen=True)
class GraphForm:
    """What a graph knows of a communicator.

    Attributes:
        name: of the communicator.
        static: handles are tables, and calls take part in CUDA graphs.
        fixed_rows: the shape of `tokens` depends on nothing but the configuration.
        expanded: a row per (token, local expert): combine applies the weights.
        num_local: E_loc.
        hidden: H.
        in_blocks: the library quantizes rows.
        own_tables: cached dispatches have tables of their own.
        leaf: `[0]` float32 that requires grad: combines of a dispatch that autograd does not track
            hang on to it, so that they are tracked on ranks without rows too.
        identity: marks its handles.
        scope: which communicators can use them.
    """

    name: str
    static: bool
    fixed_rows: bool
    expanded: bool
    num_local: int
    hidden: int
    in_blocks: bool
    own_tables: bool
    leaf: Tensor
    identity: int
    scope: RoutingScope


def register(
    comm: Connection, *, engine: Engine, num_local: int, identity: int, scope: RoutingScope
) -> GraphForm | None:
    """Makes a communicator known to graphs; None: its rows are not its own (`zero_copy`).

    The name says what shapes depend on, so that compiled code that torch keeps on disk is never
    taken for a communicator of other shapes.

    Args:
        comm: the communicator.
        engine: its engine.
        num_local: E_loc.
        identity: marks its handles.
        scope: which communicators can use them.
    """
    config = comm.config
    if config.zero_copy:
        return None
    facts = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(MoECommunicatorConfig)
        if field.name not in ("group", "timeout_s", "startup_timeout_s")
    ]
    # The kernels of mode "ll". Routes of mode "ht" across hosts also hold lengths of messages.
    never_waits = engine.numbers_by_max_tokens and config.mode == "ll"
    static = engine.name == "nvlink" and (config.static_shapes or never_waits)
    facts += [engine.routing_form, str(num_local), str(comm.num_ranks), str(comm.device)]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    form = GraphForm(
        name=f"{identity}-{digest}",
        static=static,
        fixed_rows=static or config.layout.padded,
        expanded=config.layout.expanded,
        num_local=num_local,
        hidden=config.hidden_size,
        in_blocks=config.block_format is not None,
        own_tables=never_waits,
        leaf=torch.empty(0, device=comm.device, requires_grad=True),
        identity=identity,
        scope=scope,
    )
    _communicators[form.name] = comm
    return form


def communicator(name: str) -> Connection:
    """The communicator of a name.

    Raises:
        ClosedError: it does not exist any more, or is one of another process.
    """
    comm = _communicators.get(name)
    if comm is None:
        raise ClosedError(
            f"no communicator {name!r} lives in this process: a compiled or exported graph works "
            "with the communicators that it was made with, while they exist"
        )
    return comm


# -- tokens ---------------------------------------------------------------------------------------


class _Memory(bytearray):
    """The memory of a token. torch keeps it as long as a tensor lies in it."""

    handle: DispatchHandle


def token_of(handle: DispatchHandle) -> Tensor:
    """A token that keeps a handle."""
    memory = _Memory(8)
    memory.handle = handle
    number = next(_numbers)
    _handles[number] = memory
    return torch.frombuffer(memory, dtype=torch.int64).fill_(number)


def _handle_of(token: Tensor) -> DispatchHandle:
    memory = _handles.get(int(token))
    if memory is None:
        raise HandleError(
            "the routing of this dispatch is gone: something copied the handle's tensors and let "
            "go of them"
        )
    return memory.handle


# -- tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Template:
    """A handle without its tensors.

    Attributes:
        handle: all but the ids and `state`.
        state: all but the tensors.
        origin: bytes from the start of `keeps`, or of `block`, to the number of the transfer.
    """

    handle: DispatchHandle
    state: Route
    origin: int


_Key = tuple[int, bool, int, int]
_templates: weakref.WeakKeyDictionary[Connection, dict[_Key, _Template]] = (
    weakref.WeakKeyDictionary()
)


def apart(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: an operator's results must not share theirs."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def tables_of(comm: Connection, handle: DispatchHandle) -> list[Tensor]:
    """The tensors of a handle: tables with the ids, then counts and weights of a cached dispatch.

    The rest of the handle is kept for others that are like it.
    """
    route = handle.state
    assert isinstance(route, Route)
    # Without what else lies behind them: shapes are those that graphs were told.
    tables = [route.block[: route.layout.ids_end(route.num_tokens, wide=route.wide_ids)]]
    keeps = None if route.keeps is None else route.keeps[: sum(route.layout.public) + 1]
    tables += [table for table in (keeps, route.weights_block) if table is not None]
    base = route.block if route.keeps is None else route.keeps
    absent: Any = None
    without = {"block": absent, "ids_TK": absent, "keeps": absent, "weights_block": absent}
    template = _Template(
        handle=dataclasses.replace(handle, _topk_ids=absent, state=None),
        state=dataclasses.replace(route, **without, other_slots={}),
        origin=route.origin - base.data_ptr(),
    )
    key = _key_of(tables, route.num_tokens, route.weighted)
    _templates.setdefault(comm, {})[key] = template
    return tables


def _key_of(tables: Sequence[Tensor], num_tokens: int, weighted: bool) -> _Key:
    """What handles are alike in; the number of words says whether ids are int64."""
    return num_tokens, weighted, len(tables), tables[0].numel()


def _handle_with(
    comm: Connection, tables: Sequence[Tensor], num_tokens: int, weighted: bool
) -> DispatchHandle:
    template = _templates.get(comm, {}).get(_key_of(tables, num_tokens, weighted))
    if template is None:
        raise HandleError("no such dispatch has been made in this process")
    block, layout = tables[0], template.state.layout
    keeps = tables[1] if len(tables) > 1 else None
    route = dataclasses.replace(
        template.state,
        block=block,
        ids_address=block.data_ptr() + layout.ids_at(num_tokens),
        keeps=keeps,
        weights_block=tables[2] if len(tables) > 2 else None,
        origin=template.origin + (block if keeps is None else keeps).data_ptr(),
        other_slots={},
    )
    return dataclasses.replace(template.handle, _topk_ids=route.ids, state=route)


def handle_of(
    maker: str, tensors: Sequence[Tensor], num_tokens: int, weighted: bool
) -> DispatchHandle:
    """The handle that a dispatch returned as tensors.

    Args:
        maker: name of the communicator that dispatched.
        tensors: a token, or tables.
        num_tokens: T of the dispatch.
        weighted: it has weights.
    """
    if tensors[0].dtype is torch.int64:  # tables are int32
        return _handle_of(tensors[0])
    return _handle_with(communicator(maker), tensors, num_tokens, weighted)
