"""High throughput, hosts: from the programs of all ranks to their transfers, and how they must end.

Nothing here depends on time: what hosts do is in the order of their programs, and transfers of all
ranks meet by their numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .calls import Call, Fate, Identity, Kind, Program, Routing


@dataclass(frozen=True)
class Protocol:
    """What the kernels and the host do. The defaults are the protocol; each field can be broken.

    Attributes:
        all_compare_heads: calls that count nothing compare the heads of all ranks before they end.
        one_stride: count rows have the stride of the arena, not that of the communicator.
        receiver_names_pool: senders write to the pool that the receiver's head names.
        captures_move_pool: a capture moves the turn of the pools of eager dispatches.
        places_disagreed: rows are placed although the counts do not belong together.
        sends_disagreed: zero-copy rows are sent although some rank's head tells of another call.
        origin_is_shared: a cached dispatch renames the dispatch in tables that it shares.
        looks_once_more: a wait that gives up looks at its word once more.
        form_decides: whether a disagreement is survived follows from the heads of all ranks.
        rows_wait_for_credit: senders wait until all peers have consumed the transfer before.
        heads_wait_for_credit: heads and counts wait for that of their receiver.
    """

    all_compare_heads: bool = True
    one_stride: bool = True
    receiver_names_pool: bool = True
    captures_move_pool: bool = False
    places_disagreed: bool = False
    sends_disagreed: bool = False
    origin_is_shared: bool = False
    looks_once_more: bool = True
    form_decides: bool = True
    rows_wait_for_credit: bool = True
    heads_wait_for_credit: bool = True


AS_IT_IS = Protocol()


@dataclass(frozen=True)
class Comm:
    """A communicator.

    Attributes:
        experts: E; its count rows have 1 + R + E words.
        routing: of all its dispatches.
        zero_copy: rows go to pools, of which the caller has views.
        mails: the host learns the counts; else shapes are static and a disagreement is fatal.
    """

    experts: int
    routing: Routing
    zero_copy: bool = False
    mails: bool = True


@dataclass(frozen=True)
class Transfer:
    """One transfer of one rank.

    Attributes:
        number: t.
        call: what the program says.
        identity: which call it really is.
        says: what its head says of that.
        pool: zero copy: where this rank's view is.
        fate: what has to become of it.
    """

    number: int
    call: Call
    identity: Identity
    says: Identity
    pool: int
    fate: Fate


@dataclass
class Host:
    """What the host of a rank knows while it goes through its program.

    Attributes:
        program: what it runs.
        at: what it runs next.
        pool: that eager dispatches used last.
        captured_pool: that captured ones named last.
        baked: the pool of the graph that was captured last.
        numbers: of the dispatches that left a handle: their transfers, by place in the program.
        origins: of the tables: the transfer that they say they are of.
    """

    program: Program
    at: int = 0
    pool: int = 0
    captured_pool: int = 0
    baked: int = 0
    numbers: dict[int, int] = field(default_factory=dict)
    origins: dict[int, int] = field(default_factory=dict)

    def root(self, at: int) -> int:
        """The dispatch that made the tables of a handle."""
        call = self.program[at]
        assert call is not None
        return at if call.of is None else self.root(call.of)

    def next_call(self, protocol: Protocol) -> Call | None:
        """The next call that transfers anything and whose handle exists."""
        while self.at < len(self.program):
            call = self.program[self.at]
            self.at += 1
            if call is None:
                continue
            if call.kind is Kind.CAPTURE:
                if protocol.captures_move_pool:
                    self.pool ^= 1
                    self.baked = self.pool
                else:
                    self.captured_pool ^= 1
                    self.baked = self.captured_pool
            elif call.of is None or call.of in self.numbers:
                return call
        return None

    def identity(self, call: Call) -> Identity:
        """Which call it really is."""
        subject = 0 if call.of is None else self.numbers[call.of]
        return Identity(call.kind, call.comm, subject)

    def says(self, call: Call, protocol: Protocol) -> Identity:
        """What its head says of that."""
        subject = 0
        if call.of is not None:
            shared = protocol.origin_is_shared
            subject = self.origins[self.root(call.of)] if shared else self.numbers[call.of]
        return Identity(call.kind, call.comm, subject)

    def next_pool(self, call: Call, comm: Comm) -> int:
        """Where the view of a call is; 0 where it has none."""
        if not comm.zero_copy or not call.kind.dispatches:
            return 0
        if call.captured:
            return self.baked
        self.pool ^= 1
        return self.pool

    def keep(self, call: Call, number: int) -> None:
        """The call has left a handle."""
        if call.kind.dispatches:
            self.numbers[self.at - 1] = number
            self.origins[self.root(self.at - 1)] = number


def foresee(
    programs: Sequence[Program], comms: Sequence[Comm], protocol: Protocol
) -> list[list[Transfer]]:
    """The transfers of every rank, and what has to become of them: from the programs alone."""
    hosts = [Host(program) for program in programs]
    transfers: list[list[Transfer]] = [[] for _ in programs]
    for number in range(1, 1 + max(len(program) for program in programs)):
        calls = [host.next_call(protocol) for host in hosts]
        made = [(host, call) for host, call in zip(hosts, calls, strict=True) if call is not None]
        if not made:
            break
        identities = {host.identity(call) for host, call in made}
        if len(made) < len(calls):
            fate = Fate.MISSED
        elif len(identities) == 1:
            fate = Fate.AGREED
        elif all(call.kind is Kind.DISPATCH and comms[call.comm].mails for _, call in made):
            fate = Fate.SURVIVED
        else:
            fate = Fate.KILLED
        for rank, (host, call) in enumerate(zip(hosts, calls, strict=True)):
            if call is None:
                continue
            transfers[rank].append(
                Transfer(
                    number,
                    call,
                    host.identity(call),
                    host.says(call, protocol),
                    host.next_pool(call, comms[call.comm]),
                    fate,
                )
            )
            if fate is Fate.AGREED:
                host.keep(call, number)
        if fate in (Fate.KILLED, Fate.MISSED):
            break
    return transfers
