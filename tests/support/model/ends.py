"""What both models say of ranks that stop, and of those that wait for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from .explorer import End, Flaw, Machine, Memory, Process, Step


def let_stop(machine: Machine, rank: int) -> None:
    """Lets all processes of a rank stop for ever, at any moment."""
    alive = machine.word(f"rank {rank} is alive", True)

    def living(step: Step) -> Step:
        when = step.when
        return dataclasses.replace(
            step,
            when=lambda memory: memory[alive] and (when is None or when(memory)),
            reads=(*step.reads, alive),
        )

    def stop(memory: Memory) -> None:
        memory[alive] = False

    for process in machine.processes:
        if process.rank == rank:
            process.steps = [living(step) for step in process.steps]
    machine.processes.append(Process("fate", rank, [Step("stops", writes=(alive,), act=stop)]))


def waiting(end: End) -> str:
    """Who waits for what."""
    return "; ".join(f"rank {process.rank} {step.label}" for process, step in end.left())


@dataclass(frozen=True)
class Blame:
    """Whom the ranks that wait for ever name when their time is up.

    Attributes:
        end: where they wait.
        ready: counters: `ready[d][s]` is what s has told d of the transfers that it has begun.
        culprits: ranks that are really missing.
        stuck: ranks that wait for ever.
    """

    end: End
    ready: Sequence[Sequence[int]]
    culprits: set[int]
    stuck: set[int]

    def check(self, rank: int) -> None:
        """The name leads to a culprit, perhaps over others that wait.

        Raises:
            Flaw: it does not.
        """
        todo, blamed = [rank], {rank}
        while todo:
            names = self.named_by(todo.pop())
            if not names:
                raise Flaw("no name", f"rank {rank} has nobody to name: {waiting(self.end)}")
            if names & self.culprits:
                return
            if not names <= self.stuck:
                raise Flaw("wrong name", f"rank {rank} names {names}, who are not late")
            todo += names - blamed
            blamed |= names
        raise Flaw("wrong name", f"rank {rank} names {blamed}, of whom nobody is missing")

    def named_by(self, rank: int) -> set[int]:
        """Ranks that its reports may name, by the rule of report() in kernels/common/sync.cuh.

        The one furthest behind of those that have not begun the transfer, else the awaited one.
        """
        names: set[int] = set()
        for process, step in self.end.left():
            if process.rank != rank or step.peer is None:
                continue
            words = {peer: word for peer, word in enumerate(self.ready[rank]) if peer != rank}
            begun = {peer: self.end.memory[word] for peer, word in words.items()}
            behind = [peer for peer, number in begun.items() if number < step.transfer]
            if behind:
                names.add(min(behind, key=lambda peer: begun[peer]))
            elif step.peer != rank:
                names.add(step.peer)
        return names
