"""Peak memory of a rank's calls, as the operating system counts it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from expertlink import MoECommunicator
from expertlink.launch import RankContext
from support.oracle import Case, inputs_of
from support.rank_jobs import config_of

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak since the last reset) in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field}")


def begin_to_count() -> None:
    """Resets the peak, without what is free: calls would find it, or not, as it happens to lie."""
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")


@torch.no_grad()  # as in serving: with gradients enabled padding is zeroed, and thus touched
def peaks(ctx: RankContext, case: Case) -> dict[str, float]:
    """Peak of dispatch and of combine beyond inputs and outputs, in units of the rows received."""
    own = inputs_of(case, ctx.rank)
    with MoECommunicator(config_of(case, ctx.device)) as comm:
        out, handle = comm.dispatch(own.x_TH[:8], own.ids_TK[:8])
        comm.combine(torch.ones_like(out.tokens), handle)
        del out, handle
        gc.collect()

        def peak_of(outputs: int, before: int) -> int:
            return resident("VmHWM") - before - outputs

        begin_to_count()
        before = resident("VmRSS")
        out, handle = comm.dispatch(own.x_TH, own.ids_TK, own.weights_TK)
        sent, received = comm.wire_rows(handle)
        unit = max(sum(received), sum(sent)) * case.hidden * case.dtype.itemsize
        # Padding that nobody writes is no memory yet: count the rows that are filled.
        copies = out.num_tokens_per_expert_list if case.layout.expanded else received
        assert copies is not None
        dispatch = peak_of(sum(copies) * case.hidden * case.dtype.itemsize, before)
        rows = torch.ones_like(out.tokens)
        del out
        begin_to_count()
        # What dispatch keeps for the next call counts here as well: it is memory held.
        result = comm.combine(rows, handle)
        combine = peak_of(rows.nbytes + result.nbytes, before)
    return {"dispatch": dispatch / unit, "combine": combine / unit, "unit": unit}
