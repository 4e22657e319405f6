"""Two numbers that say whether a rank is in a step of its rail: steps begun, and steps done.

Steps are written in the order of the stream, replays of CUDA graphs included, and read by the
monitor (monitor.py). On GPUs they lie in pinned host memory. Kernel: kernels/hybrid/rail_mark.cu;
other kernels can write them themselves, with kernels/hybrid/rail_words.cuh.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple, Protocol

import torch

from expertlink.jit.compiler import compile_kernel
from expertlink.jit.kernel import Arguments, Field, Struct, architecture, load_kernel

RANGE = 1 << 32
"""Numbers wrap around there."""

RAIL_WORDS = Struct(
    "RailWords",
    (
        Field("unsigned", "begun", "steps that this rank has begun"),
        Field("unsigned", "done", "those that are done"),
    ),
)
ARGUMENTS = Struct(
    "RailMarkArguments",
    (
        Field("unsigned*", "counter", "number of the last step, in the memory of the GPU"),
        Field("unsigned*", "word", "the same for the host, in its memory"),
    ),
)

# Words of rails that nobody has closed: a kernel may still write them, so they are kept.
_abandoned: list[torch.Tensor] = []


class Words(Protocol):
    """Counts the steps of one rail.

    Attributes:
        marks: for kernels that count steps themselves; None: none can.
    """

    @property
    def marks(self) -> Marks | None: ...

    def begin(self, stream: torch.cuda.Stream | None = None) -> None:
        """One more step begins, in the order of the stream; None: the current one."""
        ...

    def end(self, stream: torch.cuda.Stream | None = None) -> None:
        """It is done."""
        ...

    def read(self) -> tuple[int, int]:
        """Steps begun and done, modulo `RANGE`."""
        ...

    def release(self) -> None:
        """Lets the memory go. No kernel writes to it any more."""
        ...


class Mark(NamedTuple):
    """Addresses that a kernel passes to `count_step` in kernels/hybrid/rail_words.cuh."""

    counter: int
    word: int


class Marks(NamedTuple):
    """What kernels need to write the words themselves."""

    begun: Mark
    done: Mark


class HostWords:
    """Words of ranks whose calls wait on the host."""

    marks = None

    def __init__(self) -> None:
        self._begun = self._done = 0

    def begin(self, stream: torch.cuda.Stream | None = None) -> None:
        """See `Words`."""
        self._begun = (self._begun + 1) % RANGE

    def end(self, stream: torch.cuda.Stream | None = None) -> None:
        """See `Words`."""
        self._done = self._begun

    def read(self) -> tuple[int, int]:
        """See `Words`."""
        done = self._done  # first: a step that begins in between is seen as begun
        return self._begun, done

    def release(self) -> None:
        """See `Words`."""


class DeviceWords:
    """Words that kernels write in stream order.

    Attributes:
        address: of the `RailWords` in host memory.
        counters: `[2]` int32 on the GPU: steps begun, steps done. Whoever raises one stores it into
            its word.
        marks: where both are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = torch.zeros(
            RAIL_WORDS.size, dtype=torch.uint8, device="cpu", pin_memory=True
        )
        self.address: int = self._pinned.data_ptr()
        self._words = RAIL_WORDS.at(self.address)
        self.counters = torch.zeros(2, dtype=torch.int32, device=device)
        compiled = compile_kernel(
            "hybrid/rail_mark", "rail_mark", architecture(device), prelude=ARGUMENTS.declaration
        )
        self._kernel = load_kernel(device, compiled)
        counter = self.counters.data_ptr()
        self.marks = Marks(
            *(
                Mark(counter + 4 * index, self.address + RAIL_WORDS.offset(name))
                for index, name in enumerate(("begun", "done"))
            )
        )
        self._begin, self._end = (ARGUMENTS.new(**mark._asdict()) for mark in self.marks)
        self._forget = weakref.finalize(self, _abandoned.append, self._pinned)
        self._forget.atexit = False

    def begin(self, stream: torch.cuda.Stream | None = None) -> None:
        """See `Words`."""
        self._mark(self._begin, stream)

    def end(self, stream: torch.cuda.Stream | None = None) -> None:
        """See `Words`."""
        self._mark(self._end, stream)

    def _mark(self, arguments: Arguments, stream: torch.cuda.Stream | None) -> None:
        stream = stream or torch.cuda.current_stream(self._device)
        self._kernel.launch(arguments, grid=1, block=32, shared_bytes=0, stream=stream.cuda_stream)

    def read(self) -> tuple[int, int]:
        """See `Words`."""
        done = self._words.done
        return self._words.begun, done

    def release(self) -> None:
        """See `Words`."""
        self._forget.detach()
