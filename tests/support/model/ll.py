"""Low latency: sets, tagged words, rows that carry their own flag, and halves, as a machine.

Every rank has one process for each role that its launches have, and one for its stream. They are
what docs/protocol/ll.md says:

    tell       waits for room; says what this rank has received before, and the head of its call
    send       waits for room; rows into the set of the transfer
    check      heads of all ranks: a dispatch learns its rows from them, a combine compares beside
    receive    waits until a row is there, reads it, puts "nothing" back
    stream     ends the launch

Transfers are numbered by the launches that sent and received before; a transfer uses the set
t mod 3. Combines may bring weights: `tell` publishes them, and `send` waits for those of a row's
tokens. `clear_mask()` makes all memory new while nobody is in a call: from then on the processes
use new words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .calls import Fate, Identity, Kind, Program, Routing, Row
from .ends import Blame, let_stop, waiting
from .explorer import END, End, Flaw, Machine, Memory, Step
from .ll_host import (
    AS_IT_IS,
    SETS,
    Clear,
    Launch,
    Protocol,
    Transfer,
    foresee,
)


class Head(NamedTuple):
    """A pair of tagged words: number of the transfer, and what is said of the call."""

    author: int
    transfer: int
    says: Identity

    def __str__(self) -> str:
        return f"rank {self.author} is in transfer {self.transfer}, {self.says}"


def build(
    programs: Sequence[Program],
    routings: Sequence[Routing],
    protocol: Protocol = AS_IT_IS,
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
        weights: tagged, in every set.
        credit, ready: counters.
    """

    head: list[list[list[int]]]
    row: list[list[list[int]]]
    weights: list[list[list[int]]]
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
        self.told, self.sent, self.checked, self.received, self.ended = (
            [word(f"{name} {r}") for r in self.ranks]
            for name in ("told", "sent", "checked", "received", "ended")
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

        return _Epoch(sets("head"), sets("row"), sets("weights"), table("credit"), table("ready"))

    # -- one rank ---------------------------------------------------------------------------------

    def rank(self, rank: int) -> None:
        """All processes of a rank."""
        process = self.machine.process
        tell, send, check = process("tell", rank), process("send", rank), process("check", rank)
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
            tell.steps += self.tell(rank, item, number, begins)
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
        self, rank: int, launch: Launch, number: int, begins: tuple[tuple[int, int], ...]
    ) -> Iterator[Step]:
        """Credit for what has been received; with what is sent, its head, a lane for each peer."""
        transfer, t = launch.transfer, launch.sends or launch.receives
        epoch, peers, failed = self.epochs[transfer.epoch], self.peers(rank, transfer), self.failed
        if self.foreseen.fate is Fate.KILLED:
            yield Step(
                "starts late, and looks whether the call has failed",
                waits=begins,
                reads=(failed[rank],),
                act=lambda memory: END if memory[failed[rank]] is not None else 1,
                transfer=t,
            )
        raises = tuple((epoch.credit[peer][rank], launch.received) for peer in peers)
        done = ((self.told[rank], number),)
        label = f"grants credit {launch.received}"
        if not launch.sends:
            yield Step(label, waits=begins, raises=(*raises, *done), transfer=t)
            return
        raises += tuple((epoch.ready[peer][rank], t) for peer in peers)
        yield Step(label, waits=begins, raises=raises, peer=rank, transfer=t)
        head = Head(rank, t, self.says(transfer))
        words = [epoch.head[peer][rank][t % self.protocol.sets] for peer in peers]

        def write(memory: Memory) -> None:
            for word in words:
                memory[word] = head

        yield Step(
            f"writes the head of transfer {t} ({transfer.call}) to all",
            writes=tuple(words),
            act=write,
            transfer=t,
        )
        if self.brings(transfer) and self.protocol.weights_come_first:
            yield self.publish_weights(rank, transfer, t)
        yield Step("has told", raises=done, quiet=True)

    def brings(self, transfer: Transfer) -> bool:
        """Whether a call brings weights to the ranks that send rows back."""
        return self.protocol.brings_weights and transfer.call.kind is Kind.COMBINE

    def publish_weights(self, rank: int, transfer: Transfer, t: int) -> Step:
        """Weights of a rank's tokens, to the ranks that these chose."""
        row, routing = Row(rank, t, transfer.identity), self.routings[transfer.call.comm]
        chosen = [peer for peer in self.peers(rank, transfer) if routing[rank][peer]]
        weights = self.epochs[transfer.epoch].weights
        words = [weights[peer][rank][t % self.protocol.sets] for peer in chosen]

        def write(memory: Memory) -> None:
            for word in words:
                memory[word] = row

        return Step(
            f"publishes weights of transfer {t}", writes=tuple(words), act=write, transfer=t
        )

    def await_weights(
        self, rank: int, d: int, transfer: Transfer, t: int, begins: tuple[tuple[int, int], ...]
    ) -> Step:
        """Waits for the weights of a row that goes back to rank d."""
        spoiled = self.spoiled[rank]
        word = self.epochs[transfer.epoch].weights[rank][d][t % self.protocol.sets]
        expected = Row(d, t, transfer.identity)

        def read(memory: Memory) -> None:
            if memory[word] != expected:
                memory[spoiled] = f"weights of rank {d} are those of {memory[word]}"

        return Step(
            f"reads the weights of rank {d} in transfer {t}",
            waits=begins,
            when=lambda memory: memory[word] is not None and memory[word].transfer == t,
            reads=(word,),
            writes=(spoiled,),
            act=read,
            peer=d,
            transfer=t,
        )

    def says(self, transfer: Transfer) -> Identity:
        """What a head says of a call."""
        if self.protocol.heads_name_dispatch:
            return transfer.identity
        return transfer.identity._replace(subject=0)

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

            if self.brings(transfer):
                yield self.await_weights(rank, d, transfer, t, begins)
            yield Step(
                f"writes the row of transfer {t} to rank {d}",
                waits=begins,
                reads=(word,),
                writes=(word,),
                act=write,
                transfer=t,
            )
        if t and self.brings(transfer) and not self.protocol.weights_come_first:
            yield self.publish_weights(rank, transfer, t)
        yield Step("has sent", waits=begins, raises=((self.sent[rank], number),), quiet=True)

    def check(
        self, rank: int, launch: Launch, number: int, begins: tuple[tuple[int, int], ...]
    ) -> Iterator[Step]:
        """The heads of all ranks."""
        t, transfer = launch.receives, launch.transfer
        done = ((self.checked[rank], number),)
        combines = transfer.call.kind is Kind.COMBINE
        if self.brings(transfer) and self.protocol.senders_compare_heads:
            t = launch.sends or launch.receives
        if not t or (combines and not self.protocol.combines_compare_heads):
            yield Step("checks nothing", waits=begins, raises=done, quiet=True)
            return
        peers, seen, failed = self.peers(rank, transfer), self.heads[rank], self.failed[rank]
        if not self.protocol.hears_own_head:
            peers = [peer for peer in peers if peer != rank]
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
        says = self.says(transfer)

        def compare(memory: Memory) -> int | None:
            heads = tuple(memory[seen[s]] for s in peers)
            if all(head.says == says for head in heads):
                return None
            memory[failed] = (t, "; ".join(map(str, heads)))
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
        done = (self.told[rank], self.sent[rank], self.checked[rank], self.received[rank])
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
        roles = (self.told[rank], self.sent[rank], self.checked[rank], self.received[rank])
        raises = tuple((word, number) for word in (*roles, self.ended[rank]))
        yield Step("begins anew", waits=before, raises=raises)

    # -- how it has to end ------------------------------------------------------------------------

    def judge_end(self, end: End) -> None:
        """Nobody can go on: is everybody where they have to be?"""
        foreseen = self.foreseen
        reports = [end.memory[word] for word in self.failed]
        stuck = {process.rank for process, _ in end.left() if process.name == "stream"}
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

    def makes(self, rank: int, number: int) -> bool:
        """Whether a rank makes a transfer at all."""
        items = self.foreseen.items[rank]
        return any(isinstance(item, Launch) and item.sends == number for item in items)
