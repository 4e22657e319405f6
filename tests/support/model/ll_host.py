"""Low latency, hosts: from the programs of all ranks to their launches, and how those must end.

Nothing here depends on time: what hosts do is in the order of their programs, and transfers of all
ranks meet by their numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .calls import Call, Fate, Identity, Kind, Program

SETS = 3
IN_FLIGHT = 2  # calls whose receiving half has not been queued


@dataclass(frozen=True)
class Protocol:
    """What the kernels and the host do. The defaults are the protocol; each field can be broken.

    Attributes:
        sets: staging sets that transfers take in turn.
        sends_wait_for_credit: nothing is sent in t before all peers have received t - 3.
        credit_follows_put_back: a launch tells what the launches before it have received.
        combines_compare_heads: combines look for the heads of all ranks, and compare them.
        heads_name_dispatch: heads say which dispatch a call refers to.
        whole_calls_check: a whole call refuses to run while a half of another is under way.
        handles_have_epochs: the host refuses handles from before `clear_mask()`.
        hears_own_head: a rank waits for its own head too, hence until its peers have theirs.
        weights_come_first: weights are published before anything waits for those of peers.
        senders_compare_heads: a sending half that waits for weights compares the heads beside.
        brings_weights: combines bring weights to the ranks that send rows back. Both is right.
    """

    sets: int = SETS
    sends_wait_for_credit: bool = True
    credit_follows_put_back: bool = True
    combines_compare_heads: bool = True
    heads_name_dispatch: bool = True
    whole_calls_check: bool = True
    handles_have_epochs: bool = True
    hears_own_head: bool = True
    weights_come_first: bool = True
    senders_compare_heads: bool = True
    brings_weights: bool = False


AS_IT_IS = Protocol()
WITH_WEIGHTS = Protocol(brings_weights=True)


@dataclass(frozen=True)
class Transfer:
    """One call of one rank that transfers anything.

    Attributes:
        call: what the program says.
        identity: which call it really is.
        epoch: between which two `clear_mask()` it is made.
        masked: whether this rank leaves out the others.
        had_rows: whether it had them in the dispatch whose handle a combine takes.
    """

    call: Call
    identity: Identity
    epoch: int
    masked: bool
    had_rows: bool


@dataclass(frozen=True)
class Launch:
    """A kernel of one rank.

    Attributes:
        transfer: what it is about.
        sends: number of the transfer that it sends, or 0.
        receives: number of the transfer that it receives, or 0.
        received: transfers that the launches before it have received.
        torn: it is a whole call, and a half of another one is under way.
    """

    transfer: Transfer
    sends: int
    receives: int
    received: int
    torn: bool = False


@dataclass(frozen=True)
class Clear:
    """A `clear_mask()` in the stream of one rank."""

    epoch: int  # that it ends


Item = Launch | Clear


@dataclass
class Host:
    """Queues the launches of one rank, as latency_launch.py does.

    Attributes:
        program: what it runs.
        protocol: what it refuses.
        items: the stream.
        pending: calls whose receiving half is left, oldest first.
        made: calls, by place in the program; `numbers`: of their transfers.
        epoch: how often the masks were cleared.
        masked: whether this rank leaves out the others.
        sent, received: transfers that the launches so far have sent and received.
    """

    program: Program
    protocol: Protocol
    items: list[Item] = field(default_factory=list)
    pending: list[Transfer] = field(default_factory=list)
    made: dict[int, Transfer] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    epoch: int = 0
    masked: bool = False
    sent: int = 0
    received: int = 0

    def run(self) -> list[Item]:
        """The whole stream."""
        for at, call in enumerate(self.program):
            if call is not None:
                self.queue(at, call)
        self.finish(0)
        return self.items

    def queue(self, at: int, call: Call) -> None:
        """What one line of the program makes of the stream."""
        if call.kind is Kind.HOOK:
            self.finish(max(0, len(self.pending) - 1))
        elif call.kind is Kind.MASK:
            self.masked = True
        elif call.kind is Kind.CLEAR:
            self.finish(0)
            self.items.append(Clear(self.epoch))
            self.epoch += 1
            self.masked = False
            self.sent = self.received = 0
        elif self.has_handle(call):
            self.start(at, call)

    def has_handle(self, call: Call) -> bool:
        """Whether the host accepts the handle that a call takes."""
        if call.of is None:
            return True
        made = self.made.get(call.of)
        if made is None:
            return False
        return made.epoch == self.epoch or not self.protocol.handles_have_epochs

    def start(self, at: int, call: Call) -> None:
        """Queues a call, or its sending half, and before it the halves that have to be first."""
        subject, had_rows = 0, True
        if call.of is not None:
            subject, had_rows = self.numbers[call.of], not self.made[call.of].masked
            while self.made[call.of] in self.pending:  # a handle is good once its rows are here
                self.finish(len(self.pending) - 1)
        if not call.captured:  # the host of a replay knows nothing of halves
            self.finish(IN_FLIGHT - 1 if call.halves else 0)
        identity = Identity(call.kind, call.comm, subject)
        transfer = Transfer(call, identity, self.epoch, self.masked, had_rows)
        self.made[at] = transfer
        self.sent += 1
        self.numbers[at] = self.sent
        if call.halves:
            self.items.append(Launch(transfer, self.sent, 0, self.received))
            self.pending.append(transfer)
            return
        torn = self.sent != self.received + 1
        self.items.append(Launch(transfer, self.sent, self.sent, self.received, torn))
        self.received += 1

    def finish(self, most: int) -> None:
        """Queues receiving halves until so many are left."""
        while len(self.pending) > most:
            transfer = self.pending.pop(0)
            self.items.append(Launch(transfer, 0, self.received + 1, self.received))
            self.received += 1


@dataclass(frozen=True)
class Foreseen:
    """What has to happen.

    Attributes:
        items: of the stream of every rank, up to where it has to end.
        fate: of the last transfer.
        last: its number.
        torn: ranks have to find that a half of another call is under way.
    """

    items: list[list[Item]]
    fate: Fate
    last: int
    torn: bool


def foresee(programs: Sequence[Program], protocol: Protocol) -> Foreseen:
    """Streams of all ranks, and how they have to end: from the programs alone."""
    streams = [Host(program, protocol).run() for program in programs]
    torn = any(isinstance(item, Launch) and item.torn for items in streams for item in items)
    if torn:
        return Foreseen([until_torn(items, protocol) for items in streams], Fate.KILLED, 0, True)
    calls = [
        {
            (item.transfer.epoch, item.sends): item.transfer.identity
            for item in items
            if isinstance(item, Launch) and item.sends
        }
        for items in streams
    ]
    for key in sorted(set().union(*calls)):
        identities = [made.get(key) for made in calls]
        if len(set(identities)) > 1:
            fate = Fate.MISSED if None in identities else Fate.KILLED
            return Foreseen([until(items, key) for items in streams], fate, key[1], False)
    return Foreseen(streams, Fate.AGREED, 0, False)


def until(items: list[Item], key: tuple[int, int]) -> list[Item]:
    """Items up to the launch that receives a transfer."""
    for at, item in enumerate(items):
        if isinstance(item, Launch) and (item.transfer.epoch, item.receives) == key:
            return items[: at + 1]
    return items


def until_torn(items: list[Item], protocol: Protocol) -> list[Item]:
    """Items up to the launch that finds a half under way; all, if it does not look."""
    for at, item in enumerate(items):
        if isinstance(item, Launch) and item.torn and protocol.whole_calls_check:
            return items[: at + 1]
    return items
