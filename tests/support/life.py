"""Communicators beyond their calls: groups, inference mode, copies and pickles, peak memory."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from expertlink import (
    DispatchLayout,
    ExpertlinkError,
    MoECommunicator,
    MoECommunicatorConfig,
    NotPicklableError,
)
from expertlink.launch import RankContext
from support.jobs import check_contract, check_output, config_of, rows_for, same_bits
from support.oracle import Case, combined_of, inputs_of

CASE = Case((4, 3), 8, experts=4, topk=2, layout=DispatchLayout.FLAT, dtype=torch.float32)


def refusal(**fields: Any) -> str:
    """What building a configuration with these fields raises."""
    try:
        config_of(CASE, "cpu", **fields)
    except ExpertlinkError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def groups(ctx: RankContext) -> list[str]:
    """A mesh serves as its group; what other things are refused with."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    with MoECommunicator(config_of(CASE, "cpu", group=mesh["ep"])) as comm:
        assert comm.config.group is mesh.get_group("ep")
        check_contract(comm, CASE)
    pair = [dist.new_group([0]), dist.new_group([1])]
    return [refusal(group=group) for group in (mesh, "ep", pair[1 - ctx.rank], object())]


def copies(ctx: RankContext) -> list[str]:
    """Copies share communicator and group; pickling says what to do instead."""
    said = []
    with MoECommunicator(config_of(CASE, ctx.device, group=dist.group.WORLD)) as comm:
        model = nn.Linear(2, 2)
        model.comm = comm  # type: ignore[assignment]
        twin = copy.deepcopy(model)
        assert twin.comm is comm
        assert twin.weight is not model.weight
        assert copy.copy(comm) is comm
        assert copy.deepcopy(comm.config) == comm.config
        assert copy.deepcopy(comm.config).group is comm.config.group
        for save in (
            lambda: pickle.dumps(model),
            lambda: torch.save(model, io.BytesIO()),
            lambda: pickle.dumps(comm.config),
        ):
            try:
                save()
            except NotPicklableError as error:
                said.append(str(error))
        torch.save(model.state_dict(), io.BytesIO())
    plain: MoECommunicatorConfig = config_of(CASE, "cpu")
    assert pickle.loads(pickle.dumps(plain)) == plain
    return said


def inference(ctx: RankContext, case: Case) -> bool:
    """What is made in inference mode is good outside of it, and the other way round."""
    own = inputs_of(case, ctx.rank)
    x_TH, ids_TK, weights_TK = own.x_TH, own.ids_TK, own.weights_TK
    expected = combined_of(case, ctx.rank)
    first, second = torch.inference_mode, torch.no_grad
    for before, after in ((first, second), (second, first)):
        with MoECommunicator(config_of(case, ctx.device)) as comm:
            with before():
                buffers, totals = comm.create_buffers(), comm.enable_statistics()
                request = comm.dispatch_async(x_TH, ids_TK, weights_TK)
                out, late = comm.dispatch(x_TH, ids_TK, weights_TK, async_finish=True)
                hooked, hooked_handle, hook = comm.dispatch(
                    x_TH, ids_TK, weights_TK, return_recv_hook=True
                )
            with after():
                received, handle = request.wait()
                late.wait()
                hook()
                for one in (received, out, hooked):
                    check_output(case, ctx.rank, one)
                _, placed = comm.dispatch(x_TH, ids_TK, weights_TK, output_buffer=buffers)
            rows = rows_for(case, ctx.rank, handle)
            with before():
                sums = comm.combine_async(rows, handle)
                later = comm.combine(rows, late, async_finish=True)
                hooked_sums, hook = comm.combine(rows, hooked_handle, return_recv_hook=True)
            with after():
                late.wait()
                hook()
                for result in (sums.wait(), later, hooked_sums, comm.combine(rows, placed)):
                    assert isinstance(result, torch.Tensor)
                    same_bits(result, expected, "combine")
            assert int(totals.rows_sent.sum()) > 0
    return True


def inference_then_training(ctx: RankContext, case: Case) -> bool:
    """Tensors of inference mode in a call that autograd follows."""
    own = inputs_of(case, ctx.rank)
    with MoECommunicator(config_of(case, ctx.device)) as comm:
        with torch.inference_mode():
            x_TH, ids_TK = own.x_TH.clone(), own.ids_TK.clone()
            _, first = comm.dispatch(x_TH, ids_TK, own.weights_TK)
            rows = rows_for(case, ctx.rank, first)
            rows = rows.clone()
        same_bits(comm.combine(rows, first), combined_of(case, ctx.rank), "combine")
        leaf = own.x_TH.clone().requires_grad_()
        out, again = comm.dispatch(leaf, None, previous_handle=first)
        result = comm.combine(out.tokens, again)
        assert isinstance(result, torch.Tensor)
        result.sum().backward()
        return leaf.grad is not None


def with_timeout(ctx: RankContext, case: Case, seconds: float) -> bool:
    """Calls with time-outs that no clock counts to."""
    fields: dict[str, Any] = {"timeout_s": seconds, "startup_timeout_s": seconds}
    with MoECommunicator(config_of(case, ctx.device, **fields)) as comm:
        check_contract(comm, case)
        comm.set_timeouts(timeout_s=seconds, startup_timeout_s=seconds)
        check_contract(comm, case)
    return True


def experts_raise(ctx: RankContext, case: Case) -> Any:
    """Rank 0 leaves its block by an exception while the other one waits for its combine."""
    try:
        with MoECommunicator(config_of(case, ctx.device)) as comm:
            own = inputs_of(case, ctx.rank)
            out, handle = comm.dispatch(own.x_TH, own.ids_TK, own.weights_TK)
            if ctx.rank == 0:
                raise ValueError("no such expert")
            comm.combine(out.tokens, handle)
    except ExpertlinkError as error:
        return error
    except ValueError as error:
        return type(error).__name__
    return "nothing raised"


# -- peak memory, as the operating system counts it -----------------------------------------------

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


def peak_of_backward(ctx: RankContext, case: Case) -> float:
    """Peak of a combine's backward, its results included, in units of the expert outputs."""
    own = inputs_of(case, ctx.rank)
    assert own.weights_TK is not None
    with MoECommunicator(config_of(case, ctx.device)) as comm:
        out, handle = comm.dispatch(own.x_TH, own.ids_TK, own.weights_TK.requires_grad_())
        rows = torch.ones_like(out.tokens).requires_grad_()
        del out
        result = comm.combine(rows, handle)
        grads = torch.ones_like(result)
        begin_to_count()
        before = resident("VmRSS")
        result.backward(grads)
        peak = resident("VmHWM") - before
    assert rows.grad is not None
    return peak / rows.nbytes
