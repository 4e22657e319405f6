"""Several hosts: messages on rails, and the transfers inside hosts that they feed, as a machine.

What docs/protocol/hybrid_ht.md and hybrid_ll.md say beyond one host. Inside a host a transfer is
credit, one row for each source, and a flag; the rest of it is ht.py's and ll.py's. Every rank has

    stream     packs messages, moves rows inside the host, reads what the rail has brought
    rail       mode "ht": exchanges, beside the stream; in mode "ll" they are steps of the stream

A message and a row carry the call and the chunk, and whose tokens they are. An exchange is done for
a rank when it has everybody's message, and everybody has its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from expertlink.engines.hybrid.ht.order import Step as Part
from expertlink.engines.hybrid.ht.order import combine_steps, dispatch_steps

from .ends import let_stop, waiting
from .explorer import END, End, Flaw, Machine, Memory, Process, Step

Order = tuple[str, int, int]  # what, call, chunk
Program = Sequence[Order]


@dataclass(frozen=True)
class Protocol:
    """The rules; each of them can be broken.

    Attributes:
        ring: messages in memory, in each direction.
        waits_for_credit: rows are written when the reader is done with the last transfer.
        one_writer: a slot belongs to a source; else to a writer, whatever host the row is of.
        exchange_waits: the rail goes on behind the kernel that packs.
        reader_waits: what reads messages goes on behind the exchange.
        compares_heads: a message of another call is reported.
        begun_before: the monitor's word says that a step has begun before it can wait.
        done_behind: the other word says that it is done when it is, not when it was queued.
    """

    ring: int = 3
    waits_for_credit: bool = True
    one_writer: bool = True
    exchange_waits: bool = True
    reader_waits: bool = True
    compares_heads: bool = True
    begun_before: bool = True
    done_behind: bool = True


AS_IT_IS = Protocol()


class Message(NamedTuple):
    """What a message or a row is of."""

    call: int
    chunk: int
    source: int


def ht_program(*calls: str, chunks: int) -> Program:
    """Calls, "dispatch" or "combine", of so many chunks, in the order of the engine's steps."""
    program: list[Order] = []
    for number, call in enumerate(calls):
        parts = (dispatch_steps if call == "dispatch" else combine_steps)(chunks)
        names = {
            Part.FILL: "pack" if call == "dispatch" else "return",
            Part.OWN: "own" if call == "dispatch" else "own sum",
            Part.DRAIN: "relay" if call == "dispatch" else "sum",
        }
        program += [(names[part], number, chunk) for part, chunk in parts]
    return program


def ll_program(*orders: str) -> Program:
    """Halves of calls: "d0" and "D0" are those of dispatch 0, "c1" and "C1" of combine 1."""
    names = {"d": "pack", "D": "relay", "c": "return", "C": "sum"}
    return [(names[order[0]], int(order[1:]), 0) for order in orders]


def build(
    programs: Sequence[Program],
    host_of: Sequence[int],
    protocol: Protocol = AS_IT_IS,
    *,
    beside: bool = True,
    stops: int | None = None,
) -> Machine:
    """The machine of ranks on hosts of one size, that run their programs.

    Args:
        programs: of every rank.
        host_of: of every rank.
        protocol: what they do.
        beside: the rail works beside the stream (mode "ht").
        stops: a rank that may stop at any moment.
    """
    return _Builder(programs, host_of, protocol, beside, stops).machine


class _Builder:
    def __init__(
        self,
        programs: Sequence[Program],
        host_of: Sequence[int],
        protocol: Protocol,
        beside: bool,
        stops: int | None,
    ) -> None:
        self.host_of, self.protocol, self.beside, self.stops = host_of, protocol, beside, stops
        self.ranks = range(len(host_of))
        self.same = all(program == programs[0] for program in programs)
        machine = self.machine = Machine()
        word = machine.word

        def words(name: str, value: object = 0) -> list[int]:
            return [word(f"{name} {rank}", value) for rank in self.ranks]

        def pairs(name: str, value: object = 0) -> list[list[int]]:
            return [[word(f"{name} {s} at {d}", value) for s in self.ranks] for d in self.ranks]

        # Inside a host: [d][s], of s at d.
        self.credit, self.flag, self.staged = pairs("credit"), pairs("flag"), pairs("row", None)
        # On the rail.
        self.offered, self.took, self.begun, self.done = map(
            words, ("offered", "took", "begun", "done")
        )
        self.filled, self.ready = words("filled"), words("brought")
        self.own_sum, self.reported = words("own sum", None), words("reported", None)
        ring = range(protocol.ring)
        self.send = [[word(f"sent {slot} of {r}", None) for slot in ring] for r in self.ranks]
        self.receive = [
            [[word(f"message {slot} of {s} at {r}", None) for s in self.ranks] for slot in ring]
            for r in self.ranks
        ]
        self.transfers = [itertools.count(1) for _ in self.ranks]
        for rank in self.ranks:
            stream = machine.process("stream", rank)
            rail = machine.process("rail", rank) if beside else stream
            self.run(rank, programs[rank], stream, rail)
        if stops is not None:
            let_stop(machine, stops)
        machine.judge = self.judge

    def peers(self, rank: int) -> list[int]:
        """Ranks of its host."""
        return [other for other in self.ranks if self.host_of[other] == self.host_of[rank]]

    def rail(self, rank: int) -> list[int]:
        """The others of its rail."""
        index = self.peers(rank).index(rank)
        return [
            other
            for other in self.ranks
            if other != rank and self.peers(other).index(other) == index
        ]

    def run(self, rank: int, program: Program, stream: Process, rail: Process) -> None:
        exchanges = 0
        numbers: dict[tuple[int, int], int] = {}
        for what, call, chunk in program:
            message = Message(call, chunk, rank)
            if what in ("pack", "return"):
                exchanges += 1
                numbers[call, chunk] = exchanges
                if what == "return":
                    stream.steps += self.transfer(rank, call, chunk, others=True)
                stream.steps.append(self.pack(rank, exchanges, message))
                rail.steps += self.exchange(rank, exchanges, message)
            elif what in ("own", "own sum"):
                stream.steps += self.transfer(rank, call, chunk, others=False)
                if what == "own sum":
                    stream.steps.append(self.keep(rank, message))
            elif what == "relay":
                stream.steps.append(self.read(rank, numbers[call, chunk], message))
                stream.steps += self.transfer(rank, call, chunk, others=True)
                if not self.beside:  # mode "ll" moves own tokens with those of the rail
                    stream.steps += self.transfer(rank, call, chunk, others=False)
            else:
                stream.steps.append(self.read(rank, numbers[call, chunk], message))
                if self.beside:
                    stream.steps.append(self.add_own(rank, message))

    # -- messages ---------------------------------------------------------------------------------

    def pack(self, rank: int, number: int, message: Message) -> Step:
        at = self.send[rank][number % self.protocol.ring]

        def write(memory: Memory) -> None:
            memory[at] = message

        raises = [(self.filled[rank], number)]
        return Step(f"packs {number}", writes=(at,), raises=tuple(raises), act=write)

    def exchange(self, rank: int, number: int, message: Message) -> Iterator[Step]:
        slot, others, rules = number % self.protocol.ring, self.rail(rank), self.protocol
        raises = [(self.offered[rank], number)]
        late = []
        (raises if rules.begun_before else late).append((self.begun[rank], number))
        if not rules.done_behind:
            raises.append((self.done[rank], number))
        waits = ((self.filled[rank], number),) if rules.exchange_waits else ()
        yield Step(f"begins exchange {number}", waits=waits, raises=tuple(raises))
        for other in others:
            source, target = self.send[other][slot], self.receive[rank][slot][other]

            def move(memory: Memory, source: int = source, target: int = target) -> None:
                memory[target] = memory[source]

            yield Step(
                f"receives message {number} of rank {other}",
                waits=((self.offered[other], number),),
                reads=(source,),
                writes=(target,),
                act=move,
                peer=other,
                transfer=number,
            )
        yield Step(f"has messages {number}", raises=((self.took[rank], number),))
        for other in others:
            yield Step(
                f"sends message {number} to rank {other}",
                waits=((self.took[other], number),),
                peer=other,
                transfer=number,
            )
        yield Step(
            f"ends exchange {number}",
            raises=(*late, (self.done[rank], number), (self.ready[rank], number)),
        )

    def read(self, rank: int, number: int, message: Message) -> Step:
        """Reads what the rail has brought: of the same call and chunk, from everybody."""
        slot, others = number % self.protocol.ring, self.rail(rank)
        at = tuple(self.receive[rank][slot][other] for other in others)
        reported, rules = self.reported[rank], self.protocol

        def check(memory: Memory) -> int | None:
            for other, word in zip(others, at, strict=True):
                found = memory[word]
                if found == message._replace(source=other):
                    continue
                if rules.compares_heads and found is not None and found.call != message.call:
                    if self.same:
                        raise Flaw("false alarm", f"rank {rank} reads {found} in {message}")
                    memory[reported] = other
                    return END
                raise Flaw("wrong message", f"rank {rank} reads {found} in {message}")
            return None

        waits = ((self.ready[rank], number),) if rules.reader_waits else ()
        return Step(
            f"reads messages {number}", waits=waits, reads=at, writes=(reported,), act=check
        )

    def keep(self, rank: int, message: Message) -> Step:
        def write(memory: Memory) -> None:
            memory[self.own_sum[rank]] = message

        return Step("keeps sums of its host", writes=(self.own_sum[rank],), act=write)

    def add_own(self, rank: int, message: Message) -> Step:
        at = self.own_sum[rank]

        def check(memory: Memory) -> None:
            if memory[at] != message:
                raise Flaw("wrong sum", f"rank {rank} adds {memory[at]} to {message}")

        return Step("adds the sums of its host", reads=(at,), act=check)

    # -- inside a host ----------------------------------------------------------------------------

    def transfer(self, rank: int, call: int, chunk: int, *, others: bool) -> Iterator[Step]:
        """Rows of the own tokens, or of those of the rail, to all peers; theirs are read."""
        t, peers = next(self.transfers[rank]), self.peers(rank)
        for peer in peers:
            sources = self.rail(rank) if others else [rank]
            slots = [self.staged[peer][s if self.protocol.one_writer else rank] for s in sources]
            rows = [Message(call, chunk, source) for source in sources]

            def write(memory: Memory, slots: list[int] = slots, rows: list[Message] = rows) -> None:
                for slot, row in zip(slots, rows, strict=True):
                    memory[slot] = row

            waits = ((self.credit[rank][peer], t - 1),) if self.protocol.waits_for_credit else ()
            yield Step(
                f"writes rows of transfer {t} to rank {peer}",
                waits=waits,
                writes=tuple(slots),
                act=write,
                peer=peer,
            )
            yield Step(f"raises flag {t} at rank {peer}", raises=((self.flag[peer][rank], t),))
        for peer in peers:
            sources = self.rail(peer) if others else [peer]
            slots = [self.staged[rank][s if self.protocol.one_writer else peer] for s in sources]
            expected = [Message(call, chunk, source) for source in sources]
            yield Step(
                f"reads rows of transfer {t} from rank {peer}",
                waits=((self.flag[rank][peer], t),),
                reads=tuple(slots),
                act=self.reader(rank, t, slots, expected),
                peer=peer,
            )
            yield Step(f"gives rank {peer} credit {t}", raises=((self.credit[peer][rank], t),))

    def reader(
        self, rank: int, t: int, slots: Sequence[int], expected: Sequence[Message]
    ) -> Callable[[Memory], None]:
        def check(memory: Memory) -> None:
            for slot, row in zip(slots, expected, strict=True):
                found = memory[slot]
                if found == row:
                    continue
                # Heads of a host are compared before its rows: ht.py and ll.py model that.
                if self.same or found is None or found.call == row.call:
                    raise Flaw("wrong row", f"rank {rank} reads {found} in {t}, expects {row}")

        return check

    # -- the end ----------------------------------------------------------------------------------

    def judge(self, end: End) -> None:
        left = end.left()
        for rank in self.ranks:
            steps = [step for process, step in left if process.rank == rank]
            if end.memory[self.begun[rank]] < end.memory[self.done[rank]]:
                raise Flaw("wrong mark", f"rank {rank} has done steps that it has not begun")
            inside = [step for step in steps if step.transfer]
            if inside and rank != self.stops:
                # The monitor acts on what the words say, and on nothing else.
                if end.memory[self.begun[rank]] == end.memory[self.done[rank]]:
                    raise Flaw("unnoticed", f"rank {rank} {inside[0].label}")
                self.follow(end, rank)
        if left and self.same and self.stops is None:
            raise Flaw("deadlock", waiting(end))

    def follow(self, end: End, rank: int) -> None:
        """Whom a rank misses leads to the one that stopped, perhaps over others that wait."""
        if self.stops is None:
            return
        todo, reached = [rank], {rank}
        while todo:
            for other in self.missed_by(end, todo.pop()) - reached:
                if other == self.stops:
                    return
                reached.add(other)
                todo.append(other)
        raise Flaw("no name", f"rank {rank} waits, and nobody leads to rank {self.stops}")

    def missed_by(self, end: End, rank: int) -> set[int]:
        """By signs: ranks of the rail that have not begun the step; inside the host, the peer."""
        missed: set[int] = set()
        for process, step in end.left():
            if process.rank != rank or step.peer is None:
                continue
            if not step.transfer:
                missed.add(step.peer)
                continue
            late = {r for r in self.rail(rank) if end.memory[self.begun[r]] < step.transfer}
            missed |= late or {r for r in self.rail(rank) if r == self.stops}
        return missed
