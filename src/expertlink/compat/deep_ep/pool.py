"""The communicators of one buffer: made when first needed, replaced by larger ones.

`deep_ep` learns of H, E and K with every call, and of T without any announced bound. A communicator
fixes all four. So a buffer keeps one for every (routing form, H), and the one of a dispatch grows
where some rank has more tokens than it has room for. All ranks learn of that together, so all of
them grow in the same call. Handles outlive the communicator that made them. Those of the engine
`hybrid` are good for equal room only, so there the smaller communicators stay open.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import torch

from expertlink.communicator import MoECommunicator
from expertlink.compat.deep_ep.errors import CallError
from expertlink.config import MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.hybrid.discovery import domain_label
from expertlink.engines.ranks import handshake
from expertlink.engines.ranks.agreement import shortened
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import ExpertlinkError, TooManyTokensError
from expertlink.settings import STARTUP_TIMEOUT

Result = TypeVar("Result")

_FEWEST_TOKENS = 64
_pretended: ContextVar[str | None] = ContextVar("pretended host", default=None)


class Ranks(Protocol):
    """What a pool asks of the other ranks. All calls are collective."""

    def hosts(self, device: torch.device, common: Mapping[str, object]) -> Domains:
        """Which ranks share a host; their tensors live on such devices.

        ConfigurationError on all of them where they do not have the same in common.
        """
        ...

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of all ranks' numbers."""
        ...

    def communicator(
        self, fields: dict[str, Any], share_with: MoECommunicator | None
    ) -> MoECommunicator:
        """A communicator with these fields of its configuration, initialized."""
        ...

    def refuse(self, error: Exception, device: torch.device) -> NoReturn:
        """Raises `error`; ranks in one of the calls above raise PeerError."""
        ...


class GroupRanks:
    """The ranks of a process group.

    Args:
        group: the process group.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    def hosts(self, device: torch.device, common: Mapping[str, object]) -> Domains:
        """Which ranks share a host, as the engines find it. Collective, unless R = 1."""
        if self._group.size() == 1:
            return Domains.one(1)
        own = {"host": shortened(_pretended.get() or domain_label(device))}
        common = {**common, "device type": device.type}
        answers = handshake.agree_on(self._wire(device), common, own, what="buffer")
        return Domains.of([answer["host"] for answer in answers])

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of all ranks' numbers. Collective; bounded by EXPERTLINK_STARTUP_TIMEOUT."""
        return handshake.largest_of(self._wire(device), number)

    def communicator(
        self, fields: dict[str, Any], share_with: MoECommunicator | None
    ) -> MoECommunicator:
        """A communicator of the group."""
        config = MoECommunicatorConfig(**fields, group=self._group)
        made = MoECommunicator(config, share_with=share_with)
        made.initialize()
        return made

    def refuse(self, error: Exception, device: torch.device) -> NoReturn:
        """Raises `error`, after telling the ranks that are in one of the calls above."""
        handshake.refuse(self._wire(device), error)

    def _wire(self, device: torch.device) -> Wire:
        return Wire(self._group, device=device, timeout_s=STARTUP_TIMEOUT.read())


class _Nobody:
    """The ranks of a pool that is closed, which must not hold on to their group."""

    def hosts(self, device: torch.device, common: Mapping[str, object]) -> Domains:
        raise CallError("this buffer has been destroyed")

    def largest(self, number: int, device: torch.device) -> int:
        raise CallError("this buffer has been destroyed")

    def communicator(
        self, fields: dict[str, Any], share_with: MoECommunicator | None
    ) -> MoECommunicator:
        raise CallError("this buffer has been destroyed")

    def refuse(self, error: Exception, device: torch.device) -> NoReturn:
        raise error


class Routing(NamedTuple):
    """What a routing depends on, beside the ranks: handles are good for communicators alike in it.

    Attributes:
        num_experts: E.
        topk: K.
        output_layout: "token_major" or "flat".
        expert_alignment: of FLAT.
        static_tokens: largest T of any rank where shapes are static; 0: shapes follow the routing.
        max_rows: rows of static shapes, where they are fewer than can arrive.
        exact: sums are rounded once ("exact"), not once per rank ("wire").
    """

    num_experts: int
    topk: int
    output_layout: str = "token_major"
    expert_alignment: int = 1
    static_tokens: int = 0
    max_rows: int | None = None
    exact: bool = False


class Pool:
    """See the module's docstring.

    Args:
        ranks: the other ranks.
        device: where tensors live.
        domains: hosts of the ranks.
    """

    def __init__(self, ranks: Ranks, device: torch.device, domains: Domains) -> None:
        self._ranks: Ranks = ranks
        self.device, self.domains = device, domains
        self._members: dict[tuple[Routing, int], MoECommunicator] = {}
        self._recent: tuple[Routing, int] | None = None  # of the last call
        self._fixed: dict[object, MoECommunicator] = {}
        # Smaller ones than the members, whose handles a larger one cannot take.
        self._kept: dict[tuple[Routing, int, int], MoECommunicator] = {}

    def dispatch(
        self,
        routing: Routing,
        hidden: int,
        num_tokens: int,
        call: Callable[[MoECommunicator], Result],
    ) -> tuple[Result, int]:
        """Makes an uncached dispatch with a communicator that has room for it.

        Args:
            routing: of the dispatch.
            hidden: H, in elements of bfloat16 or of quantized rows.
            num_tokens: T.
            call: the dispatch; called again where the communicator had to grow.

        Returns:
            The call's result, and the communicator's `max_tokens_per_rank`.
        """
        self._recent = (routing, hidden)
        comm = self._members.get(self._recent)
        if comm is None:
            tokens = routing.static_tokens
            if not tokens:
                tokens = self._ranks.largest(num_tokens, self.device)
            comm = self._make(routing, hidden, tokens)
        while True:
            try:
                return call(comm), comm.config.max_tokens_per_rank
            except TooManyTokensError as error:
                if routing.static_tokens:
                    raise
                needed = error.num_tokens
            comm = self._make(routing, hidden, needed)

    def member(self, routing: Routing, hidden: int, capacity: int) -> MoECommunicator:
        """The communicator for calls with a handle.

        Args:
            routing: of the handle.
            hidden: H of the call.
            capacity: `max_tokens_per_rank` of the communicator that made the handle.
        """
        self._recent = (routing, hidden)
        comm = self._found(routing, hidden, capacity)
        return self._make(routing, hidden, capacity) if comm is None else comm

    def fixed(
        self, key: object, fields: dict[str, Any], share_with: MoECommunicator | None = None
    ) -> MoECommunicator:
        """The communicator of a key that says all of its fields. It never grows."""
        comm = self._fixed.get(key)
        if comm is None:
            comm = self._fixed[key] = self._communicator(fields, share_with)
        return comm

    def refuse(
        self,
        op: str,
        error: ExpertlinkError,
        *,
        routing: Mapping[str, object],
        hidden: int | None,
        capacity: int = 0,
        cached: bool = False,
    ) -> NoReturn:
        """Raises `error` in place of a call that the other ranks make: they raise PeerError.

        They are told through the communicator that the call uses, as far as its arguments tell,
        or in the handshake if there is none. Where the wrong one is told all ranks wait until
        their time-out.

        Args:
            op: the call, "dispatch" or "combine".
            error: what to raise.
            routing: fields of the call's routing; those that are not known are left out.
            hidden: H, None if it is not known.
            capacity: as of `member`; 0 for a dispatch of `dispatch`.
            cached: the dispatch has a handle.
        """
        self._tell_nobody_of_captures(error)
        fitting = [
            key
            for key in self._members
            if hidden in (None, key[1])
            and all(getattr(key[0], name) == value for name, value in routing.items())
        ]
        if fitting:
            recent = self._recent
            key = recent if recent in fitting else fitting[-1]
            comm = self._found(*key, capacity) if capacity else self._members[key]
            if comm is not None:
                try:
                    refuse_through(comm, op, error, cached=cached)
                except TooManyTokensError as larger:
                    if comm.config.static_shapes:
                        raise larger from error  # on all ranks; elsewhere they make a larger one
        self._ranks.refuse(error, self.device)

    def refuse_new(self, error: ExpertlinkError) -> NoReturn:
        """Raises `error`; the ranks that make a communicator for a call raise PeerError."""
        self._tell_nobody_of_captures(error)
        self._ranks.refuse(error, self.device)

    def _tell_nobody_of_captures(self, error: ExpertlinkError) -> None:
        if _is_capturing(self.device):
            raise error

    def has(self, routing: Routing, hidden: int, capacity: int) -> bool:
        """Whether `member` would find that communicator, and make none."""
        return self._found(routing, hidden, capacity) is not None

    def close(self) -> None:
        """Closes all communicators. Local; safe to repeat."""
        self._ranks = _Nobody()
        owned = (self._members, self._fixed, self._kept)
        for comm in itertools.chain.from_iterable(each.values() for each in owned):
            comm.close()
        for each in owned:
            each.clear()

    def _found(self, routing: Routing, hidden: int, capacity: int) -> MoECommunicator | None:
        """What `member` would find."""
        comm = self._members.get((routing, hidden))
        if comm is None or not _bound_to_room(comm):
            fits = comm is not None and comm.config.max_tokens_per_rank >= capacity
            return comm if fits else None
        room = _room(routing, capacity)
        if comm.config.max_tokens_per_rank == room:
            return comm
        return self._kept.get((routing, hidden, room))

    def _make(self, routing: Routing, hidden: int, tokens: int) -> MoECommunicator:
        """A communicator for that many tokens, in place of a smaller one."""
        key = (routing, hidden)
        other = self._members.get(key)
        tokens = _room(routing, tokens)
        if other is not None and not _bound_to_room(other) and self.device.type == "cuda":
            # Every rank does this before it comes to the handshake below. So nobody uses the
            # smaller one's memory any more once that has ended.
            torch.cuda.synchronize(self.device)
        fields: dict[str, Any] = {
            "num_experts": routing.num_experts,
            "hidden_size": hidden,
            "topk": routing.topk,
            "max_tokens_per_rank": tokens,
            "mode": "ht",
            "output_layout": routing.output_layout,
            "expert_alignment": routing.expert_alignment,
            "static_shapes": routing.static_tokens > 0,
            "max_recv_tokens_per_rank": routing.max_rows,
            "combine_precision": "exact" if routing.exact else "wire",
            "source_tokens": True,
        }
        comm = self._communicator(fields, None)
        if other is None:
            self._members[key] = comm
        elif not _bound_to_room(other):
            self._members[key] = comm
            other.close()
        else:
            small, large = sorted((other, comm), key=lambda one: one.config.max_tokens_per_rank)
            self._members[key] = large
            self._kept[routing, hidden, small.config.max_tokens_per_rank] = small
        return comm

    def _communicator(
        self, fields: dict[str, Any], share_with: MoECommunicator | None
    ) -> MoECommunicator:
        usual: dict[str, Any] = {
            "dtype": torch.bfloat16,
            "device": self.device,
            "check_inputs": False,
            "domains": self.domains.host_of if self.domains.num_hosts > 1 else None,
        }
        return self._ranks.communicator({**usual, **fields}, share_with)


def _room(routing: Routing, tokens: int) -> int:
    """`max_tokens_per_rank` of a communicator for that many tokens."""
    if routing.static_tokens:
        return tokens
    return max(_FEWEST_TOKENS, 1 << max(tokens - 1, 0).bit_length())


def _bound_to_room(comm: MoECommunicator) -> bool:
    """Whether its handles are good only for communicators with room for as many tokens."""
    return comm.engine_name == "hybrid"


def refuse_through(
    comm: MoECommunicator, op: str, error: ExpertlinkError, *, cached: bool = False
) -> NoReturn:
    """Raises `error` in place of a communicator's call, and tells the other ranks if that is safe.

    It is not where hosts do not wait for each other: a refusal makes such a communicator unusable,
    even if all ranks refuse.
    """
    config = comm.config
    if comm.engine_name != "collective" and (config.mode == "ll" or config.static_shapes):
        raise error
    comm.refuse(op, error, cached=cached)


def connect(group: Any, made_by: str, **common: object) -> Pool:
    """The pool of a new buffer: on CUDA's current device, or on the CPU where there is no GPU.

    Collective: the ranks tell each other which hosts they are on.

    Args:
        group: the process group.
        made_by: constructor or function; the same on all ranks.
        common: arguments that have to be the same on all ranks.

    Raises:
        CallError: the group cannot move rows between GPUs of several hosts, on every rank; or a
            CUDA graph is captured.
        ConfigurationError: ranks differ, on every rank.
        PeerError: another rank has called `refuse_buffer`.
    """
    device, ranks = current_device(), GroupRanks(group)
    if _is_capturing(device):
        raise CallError("a buffer cannot be made while a CUDA graph is captured")
    domains = ranks.hosts(device, {"made by": made_by, **common})
    if domains.num_hosts > 1:
        reason = handshake.cannot_move(group, device)
        if reason is not None:
            raise CallError(
                f"group: its ranks are on {domains.num_hosts} hosts, and {reason}; pass one that "
                "has NCCL"
            )
    return Pool(ranks, device, domains)


@contextlib.contextmanager
def on_host(name: str) -> Iterator[None]:
    """Takes this rank for one of the host of that name where `connect` is called meanwhile.

    For measuring: NCCL, which heeds NCCL_HOSTID, sees the machine as it is.
    """
    token = _pretended.set(name)
    try:
        yield
    finally:
        _pretended.reset(token)


def refuse_buffer(group: Any, error: Exception) -> NoReturn:
    """Raises `error` in place of `connect`: the ranks that are there raise PeerError. Collective.

    Raises:
        PeerTimeoutError: a rank did not come.
    """
    device = current_device()
    if _is_capturing(device):
        raise error  # nobody can be told
    GroupRanks(group).refuse(error, device)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_device() -> torch.device:
    """CUDA's current device, or the CPU where there is no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
