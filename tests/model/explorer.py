"""Walks all interleavings of processes that share words.

A process is a straight list of steps, and a step is one indivisible action: it waits for words, then
reads and writes some. `explore` takes every order of the steps that can make a difference. It ends
with the first flaw that a step or the final judgement finds, and with the steps that led there.

Most orders make no difference. In every state the explorer takes a *stubborn set*: some processes
such that nothing that the others may still do meddles with, or enables, what these do next. Trying
the steps of that set alone reaches every deadlock, and every order of two steps that touch the same
word. Two kinds of words are told apart for that:

- *counters* only grow, and steps wait until one has reached a value. Raising it can only let others
  go on, so such a step may be taken at once: ready, credit and flag words, ends of kernels.
- *cells* hold anything. Writing one meddles with whoever reads or writes it: heads, rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

END = 1 << 30  # what an action returns to end its process

Memory = list[Any]
Action = Callable[[Memory], int | None]
Guard = Callable[[Sequence[Any]], bool]


class Flaw(Exception):  # noqa: N818  (a finding, not an error of the program)
    """An invariant is broken.

    Attributes:
        kind: which one, in a word or two.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass(frozen=True)
class Step:
    """One action of a process.

    Attributes:
        label: what a trace says of it.
        waits: counters, each with the value that it has to reach first.
        when: what else has to hold first; looks at `reads` alone.
        reads: cells that `when` and `act` look at.
        writes: cells that `act` changes.
        raises: counters, each with the value that it has afterwards at least.
        act: changes the memory. Returns how many steps to go on by (none: 1), or `END`.
        peer: the rank that the step waits for, if it is one.
        transfer: that the step belongs to.
        quiet: bookkeeping; a trace leaves it out.
    """

    label: str
    waits: tuple[tuple[int, int], ...] = ()
    when: Guard | None = None
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    raises: tuple[tuple[int, int], ...] = ()
    act: Action | None = None
    peer: int | None = None
    transfer: int = 0
    quiet: bool = False


@dataclass
class Process:
    """What one warp, block or stream does, step by step."""

    name: str
    rank: int
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True)
class End:
    """A state in which no process can go on."""

    machine: Machine
    at: tuple[int, ...]
    memory: tuple[Any, ...]

    def left(self) -> list[tuple[Process, Step]]:
        """Processes that still wait, each with the step that it cannot take."""
        return [
            (process, process.steps[at])
            for process, at in zip(self.machine.processes, self.at, strict=True)
            if at < len(process.steps)
        ]


@dataclass
class Machine:
    """Words, processes, and what must be true when nobody can go on.

    Attributes:
        names: of the words.
        memory: their first values.
        processes: in the order in which they are tried.
        judge: raises `Flaw` about an end.
    """

    names: list[str] = field(default_factory=list)
    memory: list[Any] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    judge: Callable[[End], None] = lambda end: None

    def word(self, name: str, value: Any = 0) -> int:
        """A new word."""
        self.names.append(name)
        self.memory.append(value)
        return len(self.names) - 1

    def process(self, name: str, rank: int) -> Process:
        """A new process."""
        self.processes.append(Process(name, rank))
        return self.processes[-1]


@dataclass(frozen=True)
class Found:
    """What an exploration has found.

    Attributes:
        flaw: the first broken invariant, or None.
        trace: the steps that led to it.
        states: that were branched at.
        ends: different final states.
    """

    flaw: Flaw | None
    trace: tuple[str, ...]
    states: int
    ends: int

    def __str__(self) -> str:
        if self.flaw is None:
            return f"nothing in {self.states} states"
        lines = [f"{number:3d}  {line}" for number, line in enumerate(self.trace, 1)]
        return "\n".join([str(self.flaw), *lines])


class TooManyStates(Exception):  # noqa: N818
    """The machine is larger than was asked for."""


def explore(machine: Machine, *, most: int = 1_000_000, every_order: bool = False) -> Found:
    """Walks a machine to its ends.

    Args:
        machine: what is walked.
        most: states to branch at.
        every_order: also those orders that make no difference.

    Raises:
        TooManyStates: there are more.
    """
    return _Walk(machine, most, every_order).run()


def _mask(words: Iterable[int]) -> int:
    mask = 0
    for word in words:
        mask |= 1 << word
    return mask


class _Walk:
    """Depth first, with the states that were branched at, and the steps taken so far."""

    def __init__(self, machine: Machine, most: int, every_order: bool) -> None:
        self._machine, self._most, self._every_order = machine, most, every_order
        self._steps = [tuple(process.steps) for process in machine.processes]
        # Of the step at hand: cells read, cells written, counters raised. Of all that are left: same.
        self._now: list[list[tuple[int, int, int]]] = []
        self._left: list[list[tuple[int, int, int]]] = []
        for steps in self._steps:
            now = [
                (_mask(step.reads), _mask(step.writes), _mask(word for word, _ in step.raises))
                for step in steps
            ]
            left = [(0, 0, 0)]
            for reads, writes, raises in reversed(now):
                before = left[-1]
                left.append((before[0] | reads, before[1] | writes, before[2] | raises))
            self._now.append(now)
            self._left.append(left[::-1])
        self._everyone = range(len(self._steps))

    def run(self) -> Found:
        at: tuple[int, ...] = (0,) * len(self._steps)
        memory = tuple(self._machine.memory)
        seen: set[object] = set()
        ends: set[object] = set()
        trace: list[tuple[int, int]] = []
        stack: list[tuple[tuple[int, ...], tuple[Any, ...], int, int]] = []  # taken back to
        try:
            while True:
                choices = self._choices(at, memory)
                if not choices:
                    if (at, memory) not in ends:
                        ends.add((at, memory))
                        self._machine.judge(End(self._machine, at, memory))
                elif len(choices) > 1:
                    if (at, memory) in seen:
                        choices = []
                    elif len(seen) >= self._most:
                        raise TooManyStates(f"more than {self._most} states")
                    else:
                        seen.add((at, memory))
                        stack += [(at, memory, process, len(trace)) for process in choices[1:]]
                if choices:
                    process = choices[0]
                elif stack:
                    at, memory, process, length = stack.pop()
                    del trace[length:]
                else:
                    return Found(None, (), len(seen), len(ends))
                trace.append((process, at[process]))
                at, memory = self._take(at, memory, process)
        except Flaw as flaw:
            return Found(flaw, tuple(self._lines(trace)), len(seen), len(ends))

    def _lines(self, trace: Iterable[tuple[int, int]]) -> Iterator[str]:
        for number, at in trace:
            process = self._machine.processes[number]
            step = process.steps[at]
            if not step.quiet:
                yield f"rank {process.rank} {process.name}: {step.label}"

    def _take(
        self, at: tuple[int, ...], memory: tuple[Any, ...], process: int
    ) -> tuple[tuple[int, ...], tuple[Any, ...]]:
        here = at[process]
        step = self._steps[process][here]
        on = 1
        if step.act is not None or step.raises:
            words = list(memory)
            if step.act is not None:
                on = step.act(words) or 1
            for word, value in step.raises:
                if words[word] < value:
                    words[word] = value
            memory = tuple(words)
        there = min(here + on, len(self._steps[process]))
        return (*at[:process], there, *at[process + 1 :]), memory

    def _obstacle(self, process: int, at: tuple[int, ...], memory: tuple[Any, ...]) -> int | None:
        """Words that may have to change before the process can go on; None: it can."""
        step = self._steps[process][at[process]]
        for word, least in step.waits:
            if memory[word] < least:
                return 1 << word
        if step.when is not None and not step.when(memory):
            return self._now[process][at[process]][0]
        return None

    def _choices(self, at: tuple[int, ...], memory: tuple[Any, ...]) -> list[int]:
        """Processes to be tried in a state: the smallest stubborn set that was found."""
        obstacles: dict[int, int | None] = {}
        for process in self._everyone:
            if at[process] < len(self._steps[process]):
                obstacles[process] = self._obstacle(process, at, memory)
        free = [process for process, obstacle in obstacles.items() if obstacle is None]
        if len(free) <= 1 or self._every_order:
            return free
        left = {process: self._left[process][at[process]] for process in obstacles}
        best = free
        for first in free:
            chosen, queue, able = {first}, [first], 0
            while queue:
                process = queue.pop()
                obstacle = obstacles[process]
                if obstacle is None:
                    able += 1
                    if able >= len(best):
                        break
                    reads, writes, raises = self._now[process][at[process]]
                    touched, changed = writes | raises, reads | writes
                    for other, (their_reads, their_writes, their_raises) in left.items():
                        if other not in chosen and (
                            touched & their_reads or changed & their_writes or reads & their_raises
                        ):
                            chosen.add(other)
                            queue.append(other)
                else:
                    for other, (_, their_writes, their_raises) in left.items():
                        if other not in chosen and obstacle & (their_writes | their_raises):
                            chosen.add(other)
                            queue.append(other)
            else:
                best = [process for process in free if process in chosen]
                if len(best) == 1:
                    return best
        return best
