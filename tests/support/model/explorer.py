"""Walks all interleavings of processes that share words.

A process is a straight list of steps, and a step is one indivisible action: it waits for words,
then reads and writes some. `explore` takes every order of the steps that can make a difference. It
ends with the first flaw that a step or the final judgement finds, and with the steps before it.

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


class TooManyStates(Exception):  # noqa: N818  (likewise)
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


@dataclass(frozen=True)
class _Words:
    """Bits of the words that steps touch."""

    reads: int = 0
    writes: int = 0
    raises: int = 0

    @staticmethod
    def of(step: Step) -> _Words:
        """Those of one step. What it waits for is not touched."""
        return _Words(_mask(step.reads), _mask(step.writes), _mask(word for word, _ in step.raises))

    def __or__(self, other: _Words) -> _Words:
        return _Words(
            self.reads | other.reads, self.writes | other.writes, self.raises | other.raises
        )

    def changes(self, words: int) -> bool:
        """Whether any of these words gets another value."""
        return bool(words & (self.writes | self.raises))

    def meddles(self, other: _Words) -> bool:
        """Whether the order of two steps makes a difference. That of two that raise does not."""
        return bool(
            (self.writes | self.raises) & other.reads
            or (self.reads | self.writes) & other.writes
            or self.reads & other.raises
        )


class _Walk:
    """Depth first, with the states that were branched at, and the steps taken so far."""

    def __init__(self, machine: Machine, most: int, every_order: bool) -> None:
        self._machine, self._most, self._every_order = machine, most, every_order
        self._steps = [tuple(process.steps) for process in machine.processes]
        everyone = self._everyone = range(len(self._steps))
        # By process and place: words of the step there, and of all steps from there on.
        self._now = [[_Words.of(step) for step in steps] for steps in self._steps]
        self._left: list[list[_Words]] = []
        for now in self._now:
            left = [_Words()]
            for words in reversed(now):
                left.append(left[-1] | words)
            self._left.append(left[::-1])
        # Others that may meddle with the step there, sooner or later.
        self._rivals = [
            [
                tuple(o for o in everyone if o != process and words.meddles(self._left[o][0]))
                for words in now
            ]
            for process, now in enumerate(self._now)
        ]
        self._known_changers: dict[int, list[int]] = {}

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

    def _obstacle(self, process: int, at: tuple[int, ...], memory: tuple[Any, ...]) -> int:
        """Bits of the words that may have to change before a process can go on; 0: it can."""
        step = self._steps[process][at[process]]
        for word, least in step.waits:
            if memory[word] < least:
                return 1 << word
        if step.when is not None and not step.when(memory):
            return self._now[process][at[process]].reads
        return 0

    def _changers(self, words: int) -> list[int]:
        """Processes that change some of these words, sooner or later."""
        known = self._known_changers.get(words)
        if known is None:
            known = [other for other in self._everyone if self._left[other][0].changes(words)]
            self._known_changers[words] = known
        return known

    def _choices(self, at: tuple[int, ...], memory: tuple[Any, ...]) -> list[int]:
        """Processes to be tried in a state: the smallest stubborn set that was found."""
        obstacles: dict[int, int] = {}
        for process in self._everyone:
            if at[process] == len(self._steps[process]):
                continue
            obstacle = obstacles[process] = self._obstacle(process, at, memory)
            if not obstacle and not self._rivals[process][at[process]] and not self._every_order:
                return [process]
        free = [process for process, obstacle in obstacles.items() if not obstacle]
        if len(free) <= 1 or self._every_order:
            return free
        best = free
        for first in free:
            chosen = self._stubborn(first, at, obstacles, len(best))
            if chosen is not None:
                best = [process for process in free if process in chosen]
            if len(best) == 1:
                break
        return best

    def _stubborn(
        self, first: int, at: tuple[int, ...], obstacles: dict[int, int], most: int
    ) -> set[int] | None:
        """A stubborn set around a process, unless as many as `most` of it can go on."""
        chosen, queue, able = {first}, [first], 0
        while queue:
            process = queue.pop()
            obstacle = obstacles[process]
            if obstacle:
                more = [
                    other
                    for other in self._changers(obstacle)
                    if other not in chosen
                    and other in obstacles
                    and self._left[other][at[other]].changes(obstacle)
                ]
            else:
                able += 1
                if able == most:
                    return None
                words = self._now[process][at[process]]
                more = [
                    other
                    for other in self._rivals[process][at[process]]
                    if other not in chosen
                    and other in obstacles
                    and words.meddles(self._left[other][at[other]])
                ]
            chosen.update(more)
            queue += more
        return chosen
