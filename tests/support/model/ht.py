"""High throughput: the words, credits and pools of one arena per rank, as a machine.

Every rank has one process for each role that its kernels have, and one for its stream. They are
what docs/protocol/ht.md says:

    tell d     head (uncached dispatch: and counts) to rank d, then ready word
    judge      heads of all ranks: uncached dispatches before anything is placed, others beside it
    send       waits for room, then writes rows and raises arrival flags
    receive    waits for flags and reads rows
    stream     ends the kernel: credits to all; then whatever the caller does with views of pools

A row, a head and a count carry who wrote them, in which transfer and in which call. A reader that
finds anything else than its own call spoils its transfer; a spoiled transfer must not end well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .calls import Call, Fate, Identity, Kind, Program, Row
from .ends import Blame, let_stop, waiting
from .explorer import END, End, Flaw, Machine, Memory, Step
from .ht_host import AS_IT_IS, Comm, Protocol, Transfer, foresee

# What is wrong where a judge, a sender or a receiver has read something else than its own call.
SPOILS = ("wrong counts", "wrong pool", "wrong row")


class Head(NamedTuple):
    """First word of a count row."""

    author: int
    transfer: int
    says: Identity
    pool: int
    mails: bool

    def __str__(self) -> str:
        return f"rank {self.author} is in transfer {self.transfer}, {self.says}"


class Count(NamedTuple):
    """One of the other words: how many rows, or choices of an expert."""

    author: int
    transfer: int
    comm: int
    column: int
    rows: int

    def __str__(self) -> str:
        return f"count {self.column} of rank {self.author} in transfer {self.transfer}"


class Plan(NamedTuple):
    """What the planning block found: whether all agree, and rows from each rank."""

    agreed: bool
    rows: tuple[int, ...]


def build(
    programs: Sequence[Program],
    comms: Sequence[Comm],
    protocol: Protocol = AS_IT_IS,
    *,
    stops: int | None = None,
) -> Machine:
    """The machine of ranks that run their programs on one arena each.

    Args:
        programs: of every rank.
        comms: X and Y, which share the arena.
        protocol: what kernels and hosts do.
        stops: a rank that may stop at any moment.
    """
    return _Builder(programs, comms, protocol, stops).machine


class _Builder:
    """Makes the processes, rank by rank, from their transfers."""

    def __init__(
        self,
        programs: Sequence[Program],
        comms: Sequence[Comm],
        protocol: Protocol,
        stops: int | None,
    ) -> None:
        self.comms, self.protocol, self.stops = comms, protocol, stops
        self.ranks = range(len(programs))
        self.transfers = foresee(programs, comms, protocol)
        self.astray = any(
            transfer.fate is not Fate.AGREED for rank in self.transfers for transfer in rank
        )
        self.words_of_row = 1 + len(programs) + max(comm.experts for comm in comms)
        machine = self.machine = Machine()
        word = machine.word

        def table(name: str, value: Any = 0) -> list[list[int]]:
            return [[word(f"{name} {s} at {d}", value) for s in self.ranks] for d in self.ranks]

        # Memory that peers write: [d][s] is what s writes into the arena of d.
        self.ready, self.credit = table("ready"), table("credit")
        self.flag, self.staged = table("flag"), table("row", None)
        self.pools = [table("row in pool 0", None), table("row in pool 1", None)]
        self.counts = [
            [word(f"count word {i} at {d}", None) for i in range(len(programs) * self.words_of_row)]
            for d in self.ranks
        ]
        # Memory of one rank.
        self.told = table("told")
        self.planned, self.judged, self.sent, self.received, self.ended = (
            [word(f"{name} {r}") for r in self.ranks]
            for name in ("planned", "judged", "sent", "received", "ended")
        )
        self.plan, self.failed = (
            [word(f"{name} {r}", None) for r in self.ranks] for name in ("plan", "failed")
        )
        # Roles that may read the wrong thing, and say so to the stream: judge, send, receive.
        self.spoiled = [[word(f"spoiled {r} {i}", "") for i in range(3)] for r in self.ranks]
        for rank in self.ranks:
            self.rank(rank)
        if stops is not None:
            let_stop(machine, stops)
        machine.judge = self.judge_end

    # -- one rank ---------------------------------------------------------------------------------

    def rank(self, rank: int) -> None:
        """All processes of a rank."""
        process = self.machine.process
        tellers = [process(f"tell {peer}", rank) for peer in self.ranks]
        judge, send = process("judge", rank), process("send", rank)
        receive, stream = process("receive", rank), process("stream", rank)
        items = 0  # of the stream
        last: Transfer | None = None  # eager zero-copy dispatch before
        for transfer in self.transfers[rank]:
            begins = ((self.ended[rank], items),)
            for peer, teller in zip(self.ranks, tellers, strict=True):
                teller.steps += self.tell(rank, peer, transfer, begins)
            judge.steps += self.judge(rank, transfer, begins)
            send.steps += self.send(rank, transfer, begins)
            receive.steps += self.receive(rank, transfer, begins)
            items += 1
            stream.steps += self.end(rank, transfer, items)
            if not self.in_pools(transfer.call):
                continue
            eager, good = not transfer.call.captured, transfer.fate is Fate.AGREED
            views = [transfer] * good + [last] * eager if last else [transfer] * good
            for view in views:
                items += 1
                stream.steps.append(self.use(rank, view, items))
            last = transfer if eager and good else None  # a replay may have taken either pool

    def tell(
        self, rank: int, peer: int, transfer: Transfer, begins: tuple[tuple[int, int], ...]
    ) -> Iterator[Step]:
        """Head and counts, then the ready word."""
        t, call, comm = transfer.number, transfer.call, self.comms[transfer.call.comm]
        credit = (self.credit[rank][peer], t - 1)
        counts = call.kind is Kind.DISPATCH
        head = Head(rank, t, transfer.says, transfer.pool, comm.mails)
        row: list[Head | Count] = [head]
        if counts:
            rows = [*comm.routing[rank], *([0] * comm.experts)]
            row += [Count(rank, t, call.comm, i, count) for i, count in enumerate(rows)]
        at = self.row_at(peer, rank, call.comm)[: len(row)]

        def write(memory: Memory) -> None:
            for word, value in zip(at, row, strict=True):
                memory[word] = value

        waits = begins
        if self.protocol.heads_wait_for_credit:
            # A wait that fails looks at `failed` between two looks at its word. Once more after
            # that is as if it had seen the word at once.
            if self.astray and not counts and not self.protocol.looks_once_more:
                yield from self.look(rank, peer, t, begins, credit)
            waits = (*begins, credit)
        yield Step(
            f"writes what it says of transfer {t} ({call}) to rank {peer}",
            waits=waits,
            writes=at,
            act=write,
            peer=peer,
            transfer=t,
        )
        yield Step(
            f"raises ready {t} at rank {peer}",
            raises=((self.ready[peer][rank], t), (self.told[rank][peer], t)),
            transfer=t,
        )

    def look(
        self,
        rank: int,
        peer: int,
        t: int,
        begins: tuple[tuple[int, int], ...],
        credit: tuple[int, int],
    ) -> Iterator[Step]:
        """A wait that ends where it finds that its rank has failed."""
        word, least = credit
        failed = self.failed[rank]

        def look(memory: Memory) -> int:
            return 2 if memory[word] >= least else 1

        def give_up(memory: Memory) -> int:
            return 1 if memory[failed] is None else END

        yield Step(
            f"looks at credit {peer}",
            waits=begins,
            reads=(word,),
            act=look,
            peer=peer,
            transfer=t,
        )
        yield Step(
            f"looks at credit {peer} again, unless the call has failed",
            when=lambda memory: memory[word] >= least or memory[failed] is not None,
            reads=(word, failed),
            act=give_up,
            peer=peer,
            transfer=t,
        )

    def row_at(self, d: int, s: int, comm: int) -> tuple[int, ...]:
        """Words of the count row of s in the arena of d, as a communicator sees it."""
        words = 1 + len(self.ranks) + self.comms[comm].experts
        stride = self.words_of_row if self.protocol.one_stride else words
        return tuple(self.counts[d][s * stride : s * stride + words])

    def judge(
        self, rank: int, transfer: Transfer, begins: tuple[tuple[int, int], ...]
    ) -> Iterator[Step]:
        """Compares the heads of all ranks; uncached dispatches: also makes the plan."""
        t, call, protocol = transfer.number, transfer.call, self.protocol
        counts = call.kind is Kind.DISPATCH
        done = ((self.judged[rank], t),)
        if not counts and not protocol.all_compare_heads:
            yield Step("compares nothing", waits=begins, raises=done, transfer=t, quiet=True)
            return
        rows = [self.row_at(rank, s, call.comm) for s in self.ranks]
        if not counts:
            rows = [row[:1] for row in rows]
        told = tuple((word, t) for word in self.told[rank]) if counts else ()
        own, spoiled = transfer.says, self.spoiled[rank][0]

        def compare(memory: Memory) -> int | None:
            heads, table = [], []
            for s, row in zip(self.ranks, rows, strict=True):
                head = memory[row[0]]
                heads.append(head)
                if not isinstance(head, Head) or (head.author, head.transfer) != (s, t):
                    memory[spoiled] = f"the head of rank {s} is: {head}"
                elif counts and head.says == own:
                    for column, word in enumerate(row[1:]):
                        count = memory[word]
                        if not isinstance(count, Count) or count[:4] != (s, t, call.comm, column):
                            memory[spoiled] = f"count {column} of rank {s} is: {count}"
                if counts:
                    count = memory[row[1 + rank]]
                    # Clamped: whatever is there, no more rows than there can be.
                    table.append(count.rows if isinstance(count, Count) else 1)
            agreed = all(isinstance(head, Head) and head.says == own for head in heads)
            if counts:
                memory[self.plan[rank]] = Plan(agreed, tuple(table))
            if agreed or self.survives(heads, call):
                return None
            memory[self.failed[rank]] = (t, "; ".join(map(str, heads)))
            return END

        yield Step(
            f"reads the heads of transfer {t} ({call})",
            waits=(*begins, *told, *((word, t) for word in self.ready[rank])),
            reads=tuple(word for row in rows for word in row),
            writes=(self.plan[rank], self.failed[rank], spoiled),
            raises=((self.planned[rank], t),),
            act=compare,
            peer=rank,
            transfer=t,
        )
        yield Step(f"lets transfer {t} end", raises=done, transfer=t, quiet=True)

    def survives(self, heads: Sequence[Any], call: Call) -> bool:
        """Whether a rank in this call goes on after a disagreement."""
        if not self.comms[call.comm].mails:
            return False
        if not self.protocol.form_decides:
            return call.kind is Kind.DISPATCH
        return all(
            isinstance(head, Head) and head.mails and head.says.kind is Kind.DISPATCH
            for head in heads
        )

    def rows_of(self, call: Call, rank: int) -> list[int]:
        """Ranks that a rank sends a row to."""
        routing = self.comms[call.comm].routing
        if call.kind is Kind.COMBINE:
            return [s for s in self.ranks if s != rank and routing[s][rank]]
        zero_copy = self.comms[call.comm].zero_copy
        return [d for d in self.ranks if (zero_copy or d != rank) and routing[rank][d]]

    def send(
        self, rank: int, transfer: Transfer, begins: tuple[tuple[int, int], ...]
    ) -> Iterator[Step]:
        """Rows, then their arrival flags."""
        t, call, protocol = transfer.number, transfer.call, self.protocol
        counts, zero_copy = call.kind is Kind.DISPATCH, self.in_pools(call)
        waits = begins
        if counts:
            waits += tuple((word, t) for word in self.told[rank])
            if zero_copy:
                waits += ((self.planned[rank], t),)
        if protocol.rows_wait_for_credit:
            waits += tuple((word, t - 1) for word in self.credit[rank])
        if zero_copy:
            waits += tuple((word, t) for word in self.ready[rank])
        room = f"has room for transfer {t} ({call})"
        yield Step(room, waits=waits, peer=rank, transfer=t, quiet=True)
        for d in self.rows_of(call, rank):
            yield self.write_row(rank, d, transfer)
            yield Step(
                f"raises flag {t} at rank {d}", raises=((self.flag[d][rank], t),), transfer=t
            )
        done = ((self.sent[rank], t),)
        yield Step(f"has sent transfer {t}", raises=done, transfer=t, quiet=True)

    def in_pools(self, call: Call) -> bool:
        """Whether its rows go to pools."""
        return self.comms[call.comm].zero_copy and call.kind.dispatches

    def write_row(self, rank: int, d: int, transfer: Transfer) -> Step:
        """Stores a row at its receiver."""
        t, call, protocol = transfer.number, transfer.call, self.protocol
        row = Row(rank, t, transfer.identity)
        label = f"writes the row of transfer {t} to rank {d}"
        if not self.in_pools(call):
            target = self.staged[d][rank]

            def stage(memory: Memory) -> None:
                memory[target] = row

            return Step(label, writes=(target,), act=stage, transfer=t)
        heads = [self.row_at(rank, s, call.comm)[0] for s in self.ranks]
        spoiled, targets = self.spoiled[rank][1], [pool[d][rank] for pool in self.pools]

        def store(memory: Memory) -> int | None:
            pool = transfer.pool
            if protocol.receiver_names_pool:
                said = [memory[word] for word in heads]
                for s, head in zip(self.ranks, said, strict=True):
                    if not isinstance(head, Head) or (head.author, head.transfer) != (s, t):
                        memory[spoiled] = f"the head of rank {s} is: {head}"
                        return 2
                if not protocol.sends_disagreed and any(
                    head.says != transfer.says for head in said
                ):
                    return 2  # no flag either
                pool = said[d].pool
            memory[targets[pool]] = row
            return None

        return Step(
            label + ", into a pool",
            reads=tuple(heads),
            writes=(*targets, spoiled),
            act=store,
            transfer=t,
        )

    def receive(
        self, rank: int, transfer: Transfer, begins: tuple[tuple[int, int], ...]
    ) -> Iterator[Step]:
        """Waits for every row of the plan, or of the handle, and reads it."""
        t, call = transfer.number, transfer.call
        counts = call.kind is Kind.DISPATCH
        routing, plan = self.comms[call.comm].routing, self.plan[rank]
        places = self.protocol.places_disagreed

        def rows_from(memory: Sequence[Any], s: int) -> int:
            if counts:
                return memory[plan].rows[s]
            return routing[rank][s] if call.kind is Kind.COMBINE else routing[s][rank]

        sources = [s for s in self.ranks if s != rank or self.in_pools(call)]
        if counts:
            agreed_only = not (places and not self.comms[call.comm].mails)

            def read_plan(memory: Memory) -> int:
                return 1 if memory[plan].agreed or not agreed_only else 1 + 2 * len(sources)

            yield Step(
                f"reads the plan of transfer {t}",
                waits=(*begins, (self.planned[rank], t)),
                reads=(plan,),
                act=read_plan,
                transfer=t,
            )
        for s in sources:

            def look(memory: Memory, s: int = s) -> int:
                return 1 if rows_from(memory, s) else 2

            yield Step(
                f"looks whether rank {s} sends a row",
                waits=begins,
                reads=(plan,) if counts else (),
                act=look,
                transfer=t,
                quiet=True,
            )
            yield self.read_row(rank, s, transfer)
        yield Step(
            f"has all rows of transfer {t}",
            waits=begins,
            raises=((self.received[rank], t),),
            transfer=t,
            quiet=True,
        )

    def read_row(self, rank: int, s: int, transfer: Transfer) -> Step:
        """Waits for a flag and reads what it promises. Rows in pools are for the caller to read."""
        t, counts = transfer.number, transfer.call.kind is Kind.DISPATCH
        spoiled, plan, at = self.spoiled[rank][2], self.plan[rank], self.staged[rank][s]
        staged = not self.in_pools(transfer.call)
        expected = Row(s, t, transfer.identity)

        def read(memory: Memory) -> None:
            found = memory[at]
            if found == expected:
                return
            if counts and not memory[plan].agreed:
                raise Flaw("placed", f"rank {rank} places {found} in a call that is refused")
            memory[spoiled] = f"the row of rank {s} is {found}"

        return Step(
            f"reads the row of rank {s} in transfer {t}",
            waits=((self.flag[rank][s], t),),
            reads=(at, plan) if staged else (),
            writes=(spoiled,) if staged else (),
            act=read if staged else None,
            peer=s,
            transfer=t,
        )

    def end(self, rank: int, transfer: Transfer, items: int) -> Iterator[Step]:
        """The last block: credits, once all roles are done."""
        t, spoiled, plan = transfer.number, self.spoiled[rank], self.plan[rank]
        done = (*self.told[rank], self.judged[rank], self.sent[rank], self.received[rank])

        def leave(memory: Memory) -> None:
            if transfer.fate is Fate.SURVIVED:
                if memory[plan].agreed:
                    raise Flaw("unequal verdicts", f"rank {rank} does not refuse transfer {t}")
                return
            for word, kind in zip(spoiled, SPOILS, strict=True):
                if memory[word]:
                    raise Flaw(kind, f"transfer {t} ends well on rank {rank}, where {memory[word]}")

        yield Step(
            f"ends transfer {t} ({transfer.call})",
            waits=tuple((word, t) for word in done),
            reads=(*spoiled, plan),
            act=leave,
            transfer=t,
        )
        for d in self.ranks:
            yield Step(f"grants credit {t} to rank {d}", raises=((self.credit[d][rank], t),))
        yield Step(f"has ended transfer {t}", raises=((self.ended[rank], items),), quiet=True)

    def use(self, rank: int, view: Transfer, item: int) -> Step:
        """The caller's own kernel, an item of the stream, reads a view that is still good."""
        rows = self.rows_in(view, rank)

        def look(memory: Memory) -> None:
            for word, row in rows.items():
                if memory[word] != row:
                    text = f"view of transfer {view.number} on rank {rank} holds {memory[word]}"
                    raise Flaw("wrong view", text)

        return Step(
            f"uses the view of transfer {view.number}",
            waits=((self.ended[rank], item - 1),),
            reads=tuple(rows),
            raises=((self.ended[rank], item),),
            act=look,
        )

    def rows_in(self, view: Transfer, rank: int) -> dict[int, Row]:
        """What a view has to hold."""
        routing = self.comms[view.call.comm].routing
        return {
            self.pools[view.pool][rank][s]: Row(s, view.number, view.identity)
            for s in self.ranks
            if routing[s][rank]
        }

    # -- how it has to end ------------------------------------------------------------------------

    def judge_end(self, end: End) -> None:
        """Nobody can go on: is everybody where they have to be?"""
        fates = [transfers[-1].fate if transfers else Fate.AGREED for transfers in self.transfers]
        last = max(len(transfers) for transfers in self.transfers)
        reports = [end.memory[word] for word in self.failed]
        if Fate.KILLED in fates:
            if len(set(reports)) > 1 or reports[0] is None or reports[0][0] != last:
                text = f"ranks are in different calls, and report {reports}"
                raise Flaw("unequal verdicts", text)
            self.check_views(end)
            return
        if any(reports):
            raise Flaw("false alarm", f"nothing is wrong, and ranks report {reports}")
        stuck = {process.rank for process, step in end.left() if process.name == "stream"}
        stuck.discard(-1 if self.stops is None else self.stops)
        culprits = {rank for rank in self.ranks if len(self.transfers[rank]) < last}
        if self.stops is not None:
            culprits.add(self.stops)
        if stuck and not culprits:
            raise Flaw("deadlock", f"nobody is missing, and these wait: {waiting(end)}")
        blame = Blame(end, self.ready, culprits, stuck)
        for rank in stuck:
            if len(self.transfers[rank]) < last and self.stops is None:
                raise Flaw("deadlock", f"rank {rank} has its peers, and waits: {waiting(end)}")
            blame.check(rank)

    def check_views(self, end: End) -> None:
        """A call that was refused has left the caller's last views alone."""
        for rank in self.ranks:
            views = [view for view in self.transfers[rank][:-1] if self.in_pools(view.call)]
            if not views or views[-1].fate is not Fate.AGREED:
                continue
            for word, row in self.rows_in(views[-1], rank).items():
                if end.memory[word] != row:
                    text = f"refused rows lie in the view of transfer {views[-1].number}"
                    raise Flaw("wrong view", f"{text} on rank {rank}: {end.memory[word]}")
