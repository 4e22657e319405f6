"""Low latency: sets, tagged words, rows that carry their own flag, and halves, as a machine.

Every rank has one process for each role that its launches have, and one for its stream. They are what
docs/architecture.md, "Low latency", says:

    tell d     waits for room; then what this rank has received before, and the head of its call
    send       waits for room; rows into the set of the transfer
    check      heads of all ranks: a dispatch learns its rows from them, a combine compares beside
    receive    waits until a row is there, reads it, puts "nothing" back
    stream     ends the launch

Transfers are numbered by the launches that sent and received before; a transfer uses the set t mod 3.
`clear_mask()` makes all memory new while nobody is in a call, which is modelled by new words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .calls import Call, Fate, Identity, Kind, Program, Routing, Row
from .ends import Blame, let_stop, waiting
from .explorer import END, End, Flaw, Machine, Memory, Process, Step

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
        tells_though_failed: a block that starts late tells its peers all the same.
    """

    sets: int = SETS
    sends_wait_for_credit: bool = True
    credit_follows_put_back: bool = True
    combines_compare_heads: bool = True
    heads_name_dispatch: bool = True
    whole_calls_check: bool = True
    handles_have_epochs: bool = True
    tells_though_failed: bool = True


class Head(NamedTuple):
    """A pair of tagged words: number of the transfer, and what is said of the call."""

    author: int
    transfer: int
    says: Identity


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
class _Host:
    """Queues the launches of one rank, as latency_launch.py does."""

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
    streams = [_Host(program, protocol).run() for program in programs]
    torn = any(isinstance(item, Launch) and item.torn for items in streams for item in items)
    if torn:
        return Foreseen([until_torn(items, protocol) for items in streams], Fate.KILLED, 0, True)
    calls = [
        {(item.transfer.epoch, item.sends): item.transfer.identity for item in items if sends(item)}
        for items in streams
    ]
    for key in sorted(set().union(*calls)):
        identities = [made.get(key) for made in calls]
        if len(set(identities)) > 1:
            fate = Fate.MISSED if None in identities else Fate.KILLED
            return Foreseen([until(items, key) for items in streams], fate, key[1], False)
    return Foreseen(streams, Fate.AGREED, 0, False)


def sends(item: Item) -> bool:
    """Whether it is a launch that sends."""
    return isinstance(item, Launch) and item.sends > 0


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


def build(
    programs: Sequence[Program],
    routings: Sequence[Routing],
    protocol: Protocol = Protocol(),  # noqa: B008  (frozen)
    *,
    stops: int | None = None,
) -> Machine:
    """The machine of ranks that run their programs on one arena each.

    Args:
        programs: of every rank.
        routings: of the dispatches of communicators X and Y, which share the arena.
        protocol: what kernels and hosts do.
        stops: a rank that may stop at any moment.
    """
    return _Builder(programs, routings, protocol, stops).machine


@dataclass
class _Epoch:
    """Memory that peers write, from one `clear_mask()` to the next: [d][s] is what s tells d.

    Attributes:
        head: tagged, in every set.
        row: in every set; None: nothing.
        credit, ready: counters.
    """

    head: list[list[list[int]]]
    row: list[list[list[int]]]
    credit: list[list[int]]
    ready: list[list[int]]


class _Builder:
    """Makes the processes, rank by rank, from their streams."""

    def __init__(
        self,
        programs: Sequence[Program],
        routings: Sequence[Routing],
        protocol: Protocol,
        stops: int | None,
    ) -> None:
        self.routings, self.protocol, self.stops = routings, protocol, stops
        self.ranks = range(len(programs))
        self.foreseen = foresee(programs, protocol)
        machine = self.machine = Machine()
        clears = max(
            sum(isinstance(item, Clear) for item in items) for items in self.foreseen.items
        )
        self.epochs = [self.epoch(number) for number in range(clears + 1)]
        word = machine.word
        self.told = [[word(f"told {s} at {d}") for s in self.ranks] for d in self.ranks]
        self.sent, self.checked, self.received, self.ended = (
            [word(f"{name} {r}") for r in self.ranks]
            for name in ("sent", "checked", "received", "ended")
        )
        self.failed = [word(f"failed {r}", None) for r in self.ranks]
        self.spoiled = [word(f"spoiled {r}", "") for r in self.ranks]
        self.heads = [
            [word(f"head of {s} seen by {d}", None) for s in self.ranks] for d in self.ranks
        ]
        self.here = [[word(f"clears {r} {i}") for r in self.ranks] for i in range(2)]
        for rank in self.ranks:
            self.rank(rank)
        if stops is not None:
            let_stop(machine, stops)
        machine.judge = self.judge_end

    def epoch(self, number: int) -> _Epoch:
        """Memory as it is before the first call."""
        word, ranks = self.machine.word, self.ranks

        def table(name: str, value: Any = 0) -> list[list[int]]:
            return [[word(f"{name} {s} at {d} ({number})", value) for s in ranks] for d in ranks]

        def sets(name: str) -> list[list[list[int]]]:
            return [
                [
                    [word(f"{name} {s} in set {i} at {d} ({number})", None) for i in range(SETS)]
                    for s in ranks
                ]
                for d in ranks
            ]

        return _Epoch(sets("head"), sets("row"), table("credit"), table("ready"))

    # -- one rank ---------------------------------------------------------------------------------

    def rank(self, rank: int) -> None:
        """All processes of a rank."""
        process = self.machine.process
        tellers = [process(f"tell {peer}", rank) for peer in self.ranks]
        send, check = process("send", rank), process("check", rank)
        receive, stream = process("receive", rank), process("stream", rank)
        for number, item in enumerate(self.foreseen.items[rank], 1):
            if isinstance(item, Clear):
                stream.steps += self.clear(rank, item, number)
                continue
            if item.torn and self.protocol.whole_calls_check:
                check.steps.append(self.find_torn(rank, item, number))
                stream.steps += self.end(rank, item, number)
                continue
            begins = self.begins(rank, item, number)
            for peer, teller in zip(self.ranks, tellers, strict=True):
                teller.steps += self.tell(rank, peer, item, number, begins)
            send.steps += self.send(rank, item, number, begins)
            check.steps += self.check(rank, item, number, begins)
            receive.steps += self.receive(rank, item, number, begins)
            stream.steps += self.end(rank, item, number)

    def peers(self, rank: int, transfer: Transfer) -> list[int]:
        """Ranks that are not left out."""
        return [peer for peer in self.ranks if peer == rank or not transfer.masked]

    def begins(self, rank: int, launch: Launch, number: int) -> tuple[tuple[int, int], ...]:
        """What a block waits for before it does anything: the launch before, and room."""
        waits = ((self.ended[rank], number - 1),)
        if launch.sends and self.protocol.sends_wait_for_credit:
            credit = self.epochs[launch.transfer.epoch].credit[rank]
            peers = self.peers(rank, launch.transfer)
            waits += tuple((credit[peer], launch.sends - SETS) for peer in peers)
        return waits

    def tell(
        self,
        rank: int,
        peer: int,
        launch: Launch,
        number: int,
        begins: tuple[tuple[int, int], ...],
    ) -> Iterator[Step]:
        """Credit for what has been received; with what is sent, its head."""
        told = ((self.told[rank][peer], number),)
        transfer, t = launch.transfer, launch.sends or launch.receives
        if peer not in self.peers(rank, transfer):
            yield Step(f"leaves out rank {peer}", waits=begins, raises=told, quiet=True)
            return
        epoch = self.epochs[transfer.epoch]
        failed = self.failed[rank]
        if not self.protocol.tells_though_failed and self.foreseen.fate is Fate.KILLED:
            yield Step(
                "starts late, and looks whether the call has failed",
                waits=begins,
                reads=(failed,),
                act=lambda memory: END if memory[failed] is not None else 1,
                transfer=t,
            )
        raises = ((epoch.credit[peer][rank], launch.received),)
        label = f"grants credit {launch.received} to rank {peer}"
        if not launch.sends:
            yield Step(label, waits=begins, raises=(*raises, *told), transfer=t)
            return
        yield Step(
            label,
            waits=begins,
            raises=(*raises, (epoch.ready[peer][rank], t)),
            peer=peer,
            transfer=t,
        )
        says = transfer.identity
        if not self.protocol.heads_name_dispatch:
            says = says._replace(subject=0)
        head, word = Head(rank, t, says), epoch.head[peer][rank][t % self.protocol.sets]

        def write(memory: Memory) -> None:
            memory[word] = head

        yield Step(
            f"writes the head of transfer {t} ({transfer.call}) to rank {peer}",
            writes=(word,),
            raises=told,
            act=write,
            transfer=t,
        )

    def sent_to(self, rank: int, transfer: Transfer) -> list[int]:
        """Ranks to which a rank sends a row."""
        routing, combines = self.routings[transfer.call.comm], transfer.call.kind is Kind.COMBINE
        return [
            peer
            for peer in self.travels(rank, transfer)
            if (routing[peer][rank] and transfer.had_rows if combines else routing[rank][peer])
        ]

    def awaited_from(self, rank: int, transfer: Transfer) -> list[int]:
        """Ranks from which a rank waits for a row.

        Tables of a dispatch name all ranks that its tokens choose, also those that were left out.
        """
        routing, combines = self.routings[transfer.call.comm], transfer.call.kind is Kind.COMBINE
        return [
            peer
            for peer in self.travels(rank, transfer)
            if (routing[rank][peer] if combines else routing[peer][rank])
        ]

    def travels(self, rank: int, transfer: Transfer) -> list[int]:
        """Ranks whose rows take the way over staging memory. Whole calls have their own at hand."""
        halves = transfer.call.halves
        return [peer for peer in self.peers(rank, transfer) if peer != rank or halves]

    def send(
        self, rank: int, launch: Launch, number: int, begins: tuple[tuple[int, int], ...]
    ) -> Iterator[Step]:
        """Rows, into the set of the transfer."""
        t, transfer = launch.sends, launch.transfer
        rows = self.epochs[transfer.epoch].row
        for d in self.sent_to(rank, transfer) if t else ():
            row, word = Row(rank, t, transfer.identity), rows[d][rank][t % self.protocol.sets]

            def write(memory: Memory, d: int = d, word: int = word, row: Row = row) -> None:
                if memory[word] is not None:
                    raise Flaw("overwritten", f"rank {d} has not put back {memory[word]}")
                memory[word] = row

            yield Step(
                f"writes the row of transfer {t} to rank {d}",
                waits=begins,
                reads=(word,),
                writes=(word,),
                act=write,
                transfer=t,
            )
        yield Step("has sent", waits=begins, raises=((self.sent[rank], number),), quiet=True)

    def check(
        self, rank: int, launch: Launch, number: int, begins: tuple[tuple[int, int], ...]
    ) -> Iterator[Step]:
        """The heads of all ranks."""
        t, transfer = launch.receives, launch.transfer
        done = ((self.checked[rank], number),)
        combines = transfer.call.kind is Kind.COMBINE
        if not t or (combines and not self.protocol.combines_compare_heads):
            yield Step("checks nothing", waits=begins, raises=done, quiet=True)
            return
        peers, seen, failed = self.peers(rank, transfer), self.heads[rank], self.failed[rank]
        for s in peers:
            word = self.epochs[transfer.epoch].head[rank][s][t % self.protocol.sets]

            def is_here(memory: Sequence[Any], word: int = word) -> bool:
                return memory[word] is not None and memory[word].transfer == t

            def keep(memory: Memory, word: int = word, s: int = s) -> None:
                memory[seen[s]] = memory[word]

            yield Step(
                f"reads the head of rank {s} in transfer {t}",
                waits=begins,
                when=is_here,
                reads=(word,),
                writes=(seen[s],),
                act=keep,
                peer=s,
                transfer=t,
            )
        says = transfer.identity
        if not self.protocol.heads_name_dispatch:
            says = says._replace(subject=0)

        def compare(memory: Memory) -> int | None:
            heads = tuple(memory[seen[s]] for s in peers)
            if all(head.says == says for head in heads):
                return None
            memory[failed] = (t, heads)
            return END

        yield Step(
            f"compares the heads of transfer {t} ({transfer.call})",
            reads=tuple(seen),
            writes=(failed,),
            act=compare,
            transfer=t,
        )
        yield Step("lets the launch end", raises=done, quiet=True)

    def receive(
        self, rank: int, launch: Launch, number: int, begins: tuple[tuple[int, int], ...]
    ) -> Iterator[Step]:
        """Reads rows, and puts "nothing" back."""
        t, transfer = launch.receives, launch.transfer
        done = ((self.received[rank], number),)
        if not t:
            yield Step("receives nothing", waits=begins, raises=done, quiet=True)
            return
        if transfer.call.kind is not Kind.COMBINE:  # how many come, the heads say
            begins = (*begins, (self.checked[rank], number))
        epoch = self.epochs[transfer.epoch]
        sources = self.awaited_from(rank, transfer)
        words = {s: epoch.row[rank][s][t % self.protocol.sets] for s in sources}
        reads = [self.read(rank, s, launch, words[s], begins) for s in sources]
        puts = [self.put_back(s, t, words[s]) for s in sources]
        if self.protocol.credit_follows_put_back:
            yield from (step for pair in zip(reads, puts, strict=True) for step in pair)
        else:
            credits = tuple((epoch.credit[d][rank], t) for d in self.peers(rank, transfer))
            yield from reads
            yield Step(f"grants credit {t}", waits=begins, raises=credits, transfer=t)
            yield from puts
        yield Step("has all rows", waits=begins, raises=done, quiet=True)

    def read(
        self,
        rank: int,
        s: int,
        launch: Launch,
        word: int,
        begins: tuple[tuple[int, int], ...],
    ) -> Step:
        """Waits until a row is there and reads it."""
        t, spoiled = launch.receives, self.spoiled[rank]
        expected = Row(s, t, launch.transfer.identity)

        def read(memory: Memory) -> None:
            if memory[word] != expected:
                memory[spoiled] = f"what came from rank {s} is {memory[word]}"

        return Step(
            f"reads the row of rank {s} in transfer {t}",
            waits=begins,
            when=lambda memory: memory[word] is not None,
            reads=(word,),
            writes=(spoiled,),
            act=read,
            peer=s,
            transfer=t,
        )

    def put_back(self, s: int, t: int, word: int) -> Step:
        """The row's memory, as if nobody had written it."""

        def clear(memory: Memory) -> None:
            memory[word] = None

        return Step(
            f"puts back the row of rank {s} in transfer {t}",
            writes=(word,),
            act=clear,
            transfer=t,
        )

    def find_torn(self, rank: int, launch: Launch, number: int) -> Step:
        """A whole call while a half is under way."""
        failed = self.failed[rank]

        def find(memory: Memory) -> int:
            memory[failed] = (0, "a half of another call is under way")
            return END

        return Step(
            f"finds that a half is under way in {launch.transfer.call}",
            waits=((self.ended[rank], number - 1),),
            writes=(failed,),
            act=find,
        )

    def end(self, rank: int, launch: Launch, number: int) -> Iterator[Step]:
        """The launch is over when all its roles are."""
        done = (*self.told[rank], self.sent[rank], self.checked[rank], self.received[rank])
        spoiled = self.spoiled[rank]

        def leave(memory: Memory) -> None:
            if memory[spoiled]:
                text = f"{launch.transfer.call} ends well on rank {rank}, where {memory[spoiled]}"
                raise Flaw("wrong row", text)

        halves = "" if launch.sends == launch.receives else " (a half)"
        yield Step(
            f"ends {launch.transfer.call}{halves}",
            waits=tuple((word, number) for word in done),
            reads=(spoiled,),
            raises=((self.ended[rank], number),),
            act=leave,
            transfer=launch.receives or launch.sends,
        )

    def clear(self, rank: int, item: Clear, number: int) -> Iterator[Step]:
        """All ranks meet, make their memory new, and meet again."""
        before = ((self.ended[rank], number - 1),)
        for words, what in zip(self.here, ("is in no call", "has new memory"), strict=True):
            yield Step(what, waits=before, raises=((words[rank], item.epoch + 1),))
            before = tuple((word, item.epoch + 1) for word in words)
        # So are the words in which the roles of later launches say that they are done.
        roles = (*self.told[rank], self.sent[rank], self.checked[rank], self.received[rank])
        raises = tuple((word, number) for word in (*roles, self.ended[rank]))
        yield Step("begins anew", waits=before, raises=raises)

    # -- how it has to end ------------------------------------------------------------------------

    def judge_end(self, end: End) -> None:
        """Nobody can go on: is everybody where they have to be?"""
        foreseen = self.foreseen
        reports = [end.memory[word] for word in self.failed]
        stuck = {process.rank for process, _ in self.streams(end)}
        if foreseen.torn and stuck and not any(reports):
            raise Flaw("deadlock", f"a half is under way, and these wait: {waiting(end)}")
        if foreseen.fate is Fate.KILLED:
            if any(report is None or report[0] != foreseen.last for report in reports):
                what = "a half is under way" if foreseen.torn else "ranks are in different calls"
                raise Flaw("unequal verdicts", f"{what}, and ranks report {reports}")
            return
        if any(reports):
            raise Flaw("false alarm", f"nothing is wrong, and ranks report {reports}")
        culprits = set()
        if self.stops is not None:
            culprits.add(self.stops)
        if foreseen.fate is Fate.MISSED:
            culprits = {rank for rank in self.ranks if not self.makes(rank, foreseen.last)}
        stuck -= culprits
        if stuck and not culprits:
            raise Flaw("deadlock", f"nobody is missing, and these wait: {waiting(end)}")
        blame = Blame(end, self.epochs[0].ready, culprits, stuck)
        for rank in stuck if len(self.epochs) == 1 else ():
            blame.check(rank)

    def streams(self, end: End) -> list[tuple[Process, Step]]:
        """Streams that have not come to their end."""
        return [(process, step) for process, step in end.left() if process.name == "stream"]

    def makes(self, rank: int, number: int) -> bool:
        """Whether a rank makes a transfer at all."""
        items = self.foreseen.items[rank]
        return any(isinstance(item, Launch) and item.sends == number for item in items)
