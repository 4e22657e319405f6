"""How long a word takes from one GPU to another: pairs of ranks pass a number back and forth.

Kernel: kernels/bench/flag_latency.cu.
"""

from __future__ import annotations

import torch

from expertlink.jit.compiler import CompiledKernel, compile_kernel
from expertlink.jit.kernel import Field, Struct, load_kernel

ROUNDS, WARM_ROUNDS = 1000, 100
"""Numbers of one launch, and those of them that come before the clock starts."""

ARGUMENTS = Struct(
    "FlagLatencyArguments",
    [
        Field("const unsigned*", "mine", "word that the other rank writes"),
        Field("unsigned*", "theirs", "word of the other rank"),
        Field("unsigned long long*", "elapsed_ns", "time of the rounds, unless one is late"),
        Field("unsigned long long", "limit_ns", "longest wait for a number"),
        Field("unsigned", "base", "number before the first one, the same on both ranks"),
        Field("unsigned", "rounds", "numbers that go back and forth"),
        Field("unsigned", "warm_rounds", "those that are not timed"),
        Field("int", "leads", "1: this rank begins, 0: it answers"),
    ],
)


def compile_flag_latency(arch: str) -> CompiledKernel:
    """The kernel; needs no GPU."""
    return compile_kernel("bench/flag_latency", "flag_latency", arch, prelude=ARGUMENTS.declaration)


class FlagLatency:
    """One rank's end of a pair.

    Args:
        device: this rank's GPU.
        mine: address of a word that the other rank of the pair writes.
        theirs: address of its word.
        leads: whether this rank begins; the other one does not.
        limit_s: longest wait for a number, in seconds.
    """

    def __init__(
        self, device: torch.device, *, mine: int, theirs: int, leads: bool, limit_s: float
    ) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        self._device = device
        self._kernel = load_kernel(device, compile_flag_latency(f"sm_{major}{minor}"))
        self._elapsed = torch.zeros(1, dtype=torch.int64, device=device)
        self._arguments = ARGUMENTS.new(
            mine=mine,
            theirs=theirs,
            elapsed_ns=self._elapsed.data_ptr(),
            limit_ns=int(limit_s * 1e9),
            rounds=ROUNDS,
            warm_rounds=WARM_ROUNDS,
            leads=int(leads),
        )

    def measure(self) -> float:
        """Microseconds one way; 0.0 where the other rank did not answer in time.

        Both ranks of the pair call it, equally often.
        """
        self._elapsed.zero_()
        self._kernel.launch(
            self._arguments,
            grid=1,
            block=32,
            shared_bytes=0,
            stream=torch.cuda.current_stream(self._device).cuda_stream,
        )
        self._arguments.base += ROUNDS
        elapsed_ns = int(self._elapsed.item())
        return elapsed_ns / (2 * (ROUNDS - WARM_ROUNDS)) / 1e3
