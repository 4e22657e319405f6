"""The emulator itself: number formats as torch has them, and an end to everything."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from expertlink import DispatchLayout
from support import emulator, jobs, lost_ranks
from support.cases import Shape
from support.emulator import EmulatedKernel
from support.emulator.translate import translate
from support.hosted import fleet_of, run_hosted
from support.oracle import Case
from support.wrong_arguments import CULPRIT

pytestmark = emulator.needs_compiler()

_ARGUMENTS = """
struct Arguments {
    const float* in;
    unsigned* out;
    int what;
};
"""
_NUMBERS = """
__global__ void numbers(const Arguments* all) {
    const Arguments& a = all[blockIdx.y];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned pair;
    unsigned short bytes;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(a.in[i]));
    a.out[3 * i] = pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(a.in[i]));
    a.out[3 * i + 1] = pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(0.0f), "f"(a.in[i]));
    a.out[3 * i + 2] = bytes;
}
"""
_FAULTS = """
__device__ void wait_for_ever(const unsigned* word) {
    unsigned value = 0;
    while (value == 0)
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
}

__global__ void faults(const Arguments* all) {
    const Arguments& a = all[blockIdx.y];
    extern __shared__ __align__(128) char memory[];
    const int lane = threadIdx.x;
    if (a.what == 0) wait_for_ever(a.out);
    if (a.what == 1 && lane == 0) asm volatile("bar.sync %0, %1;" ::"r"(1), "r"(64) : "memory");
    if (a.what == 2)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                         static_cast<unsigned>(__cvta_generic_to_shared(memory))),
                     "l"(a.in + 1)
                     : "memory");
    if (a.what == 3 && lane < 31) a.out[1] = __shfl_sync(0x7fffffffu, lane, 0);
    if (a.what == 4) __cvta_generic_to_shared(a.in);
    if (a.what == 5) a.out[lane] = __syncthreads_or(lane == 3) + __syncthreads_or(0);
}
"""


SMALL: dict[str, Any] = {"num_sms_dispatch": 1, "num_sms_combine": 1}


def tiny() -> Case:
    layout = DispatchLayout.TOKEN_MAJOR
    return Shape(2, layout, hidden=8, experts=4, topk=2, max_tokens=12).case((12, 9))


def launched(kernel: EmulatedKernel, given: torch.Tensor, out: torch.Tensor, what: int = 0) -> None:
    struct = torch.tensor([given.data_ptr(), out.data_ptr(), what])
    kernel.launch(
        SimpleNamespace(table=struct.data_ptr()),
        grid=(max(1, len(given) // 32), 1),
        block=32,
        shared_bytes=256,
    )


def test_roundings_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, generator=generator) * 2.0 ** torch.randint(
        -30, 20, (2048,), generator=generator
    )
    edges = [0.0, -0.0, 448.0, 464.0, 464.1, 1e6, float("inf"), 2.0**-10, 3 * 2.0**-10, 65519.0]
    edges += [65520.0, 2.0**-25, 1.0625, 1.1875, 15.5, 0.0155, 2.0**-6, 1.0 + 2.0**-8, -1.9375]
    x[: len(edges)] = torch.tensor(edges)
    out = torch.zeros(len(x), 3, dtype=torch.int32)
    launched(EmulatedKernel(_ARGUMENTS + _NUMBERS, "numbers"), x, out)
    for column, dtype in enumerate([torch.bfloat16, torch.float16]):
        assert torch.equal(out[:, column], x.to(dtype).view(torch.int16).int() & 0xFFFF)
    e4m3 = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(out[:, 2], e4m3.view(torch.uint8).int())


def test_what_no_gpu_does_ends_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "LIMIT_S", 0.2)
    kernel = EmulatedKernel(_ARGUMENTS + _FAULTS, "faults")
    given, out = torch.zeros(32), torch.zeros(64, dtype=torch.int32)
    faults = [
        r"32 threads still run after 0\.2 s",
        r"1 threads wait at barriers for ever \(rank 0, block 0, thread 0\)",
        "a copy of 16 bytes at 0x",
        "not all lanes take part: 7fffffff",
        "is not in the block's shared memory",
    ]
    for what, reason in enumerate(faults):
        with pytest.raises(RuntimeError, match=reason):
            launched(kernel, given, out, what)
    launched(kernel, given, out, len(faults))  # and the next one works
    assert out[:32].tolist() == [1] * 32


def test_unknown_ptx_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not know the PTX 'bar\.red %0;'"):
        translate('void f() { asm volatile("bar.red %0;" ::"r"(1) : "memory"); }')


@pytest.mark.parametrize("mode", ["ht", "ll"])
def test_a_rank_that_stays_away_is_reported(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of kernels are bounded by the clock, as on GPUs."""
    emulator.emulate(monkeypatch)
    case = tiny()
    fleet = fleet_of(mode, case, warps=2, timeout_s=0.3, **SMALL)
    combine = 1  # the second launch
    fleet.skip = lambda launch: (CULPRIT,) if launch == combine else ()
    results = run_hosted(fleet, lost_ranks.lose_a_rank, case, "combine", CULPRIT)
    lost_ranks.check_lost(results[0], "combine", 0.3)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums whose second element is missing differ from the oracle's."""
    emulator.emulate(monkeypatch)
    right, wrong = "narrow_pair(sum[0], sum[1])", "narrow_pair(sum[0], 0.0f)"
    patch = monkeypatch.setattr
    patch(emulator, "translate", lambda text: translate(text.replace(right, wrong)))
    fleet = fleet_of("ht", tiny(), warps=2, **SMALL)
    with pytest.raises(AssertionError, match="combine differs"):
        run_hosted(fleet, jobs.contracts, [tiny()])
