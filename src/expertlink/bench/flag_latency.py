"""How long a word takes from one GPU to another: pairs of ranks pass a number back and forth.

Kernel: kernels/bench/flag_latency.cu.
"""

from __future__ import annotations

import torch

from expertlink.jit.compiler import compile_kernel
from expertlink.jit.kernel import Field, Struct, load_kernel

_ROUNDS, _WARM_ROUNDS = 1000, 100

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


class FlagLatency:
    """One rank's end of a pair, of which one leads. `mine` and `theirs` are addresses of words."""

    def __init__(
        self, device: torch.device, *, mine: int, theirs: int, leads: bool, limit_s: float
    ) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        self._device = device
        name, arch = "flag_latency", f"sm_{major}{minor}"
        compiled = compile_kernel(f"bench/{name}", name, arch, prelude=ARGUMENTS.declaration)
        self._kernel = load_kernel(device, compiled)
        self._elapsed = torch.zeros(1, dtype=torch.int64, device=device)
        self._arguments = ARGUMENTS.new(
            mine=mine,
            theirs=theirs,
            elapsed_ns=self._elapsed.data_ptr(),
            limit_ns=int(limit_s * 1e9),
            rounds=_ROUNDS,
            warm_rounds=_WARM_ROUNDS,
            leads=int(leads),
        )

    def measure(self) -> float:
        """Microseconds one way; 0.0 where the other rank did not answer in time.

        Both ranks of the pair call it, equally often.
        """
        self._elapsed.zero_()
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._kernel.launch(self._arguments, grid=1, block=32, shared_bytes=0, stream=stream)
        self._arguments.base += _ROUNDS
        return int(self._elapsed.item()) / (2 * (_ROUNDS - _WARM_ROUNDS)) / 1e3
