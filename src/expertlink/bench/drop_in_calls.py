"""The calls of the drop-in for `deep_ep` that are measured, each beside the library's own call.

Every call can be made alone, any number of times: dispatches with a handle and combines use one
that was made before. Results are checked before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expertlink.bench.drop_in_cases import DropInCase
from expertlink.bench.inputs import Drawn
from expertlink.communicator import MoECommunicator
from expertlink.compat.deep_ep import Buffer, Config, ElasticBuffer
from expertlink.compat.deep_ep import pool as pools
from expertlink.errors import ConfigurationError
from expertlink.quantization import dequantize, quantize
from expertlink.types import BlockFormat
from expertlink.workloads.check import mismatch

_FORMAT = BlockFormat.E4M3_FLOAT32


@dataclass(frozen=True)
class TimedCall:
    """A call of the drop-in."""

    name: str  # what records call it
    run: Callable[[], Any]
    own: Callable[[], Any] | None = None  # the same call of the library; None: it has none


@dataclass(frozen=True)
class TimedCalls:
    """Those of one input."""

    calls: list[TimedCall]
    engine: str
    problem: str | None  # what is wrong with the results on this rank


class DropIn:
    """A buffer of the drop-in over all ranks, and its calls. Building and closing are collective.

    Args:
        case: the interface and its shapes.
        device: of this rank.

    Raises:
        ConfigurationError: the drop-in works on another device, or finds other hosts.
    """

    def __init__(self, case: DropInCase, device: torch.device) -> None:
        self._case = case
        with self._pretended_host():
            self.buffer = self._make()
        pool = self.buffer.runtime
        found, hosts = pool.device, pool.domains.host_of
        if found.type != device.type:
            self.close()
            raise ConfigurationError(
                f"device={device.type!r} cannot be measured with --drop-in, which takes the GPU "
                "where there is one; accepted: CUDA_VISIBLE_DEVICES= in the environment"
            )
        if hosts != case.host_of:
            self.close()
            raise ConfigurationError(
                f"the drop-in finds hosts {hosts} of the ranks, not {case.host_of}; accepted: "
                "equally many ranks of torchrun on each host"
            )

    def _pretended_host(self) -> AbstractContextManager[None]:
        """What the drop-in is to find: NCCL does not see hosts whose rail is NVLink."""
        if self._case.rail != "nvlink":
            return nullcontext()
        return pools.on_host(f"virtual-{self._case.host_of[dist.get_rank()]}")

    def _make(self) -> Any:
        case, group = self._case, dist.group.WORLD
        if case.interface == "elastic":
            return ElasticBuffer(
                group,
                num_max_tokens_per_rank=case.tokens,
                hidden=case.hidden,
                num_topk=case.topk,
                explicitly_destroy=True,
            )
        low_latency = case.interface == "low_latency"
        return Buffer(group, low_latency_mode=low_latency, explicitly_destroy=True)

    def close(self) -> None:
        """Releases the buffer's memory."""
        self.buffer.destroy()

    @property
    def num_sms(self) -> int | None:
        """SMs that normal calls may occupy; None: the engine's choice."""
        asked = self._case.num_sms_dispatch
        return Buffer.num_sms if asked is None and self._case.interface == "normal" else asked

    def calls(self, drawn: Drawn) -> TimedCalls:
        """The calls of an input, of which each has been made once. Collective."""
        make = {
            "normal": self._normal,
            "low_latency": self._low_latency,
            "elastic": self._elastic,
        }
        return make[self._case.interface](drawn)

    # -- Buffer.dispatch, Buffer.combine ----------------------------------------------------------

    def _normal(self, drawn: Drawn) -> TimedCalls:
        buffer, case = self.buffer, self._case
        x, rows, scales = _sent(drawn.x_TH, case)
        ids, weights = drawn.topk_ids_TK, drawn.topk_weights_TK
        config = Config(num_sms=self.num_sms or 0)
        per_rank, per_host, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, case.experts)
        layout = {
            "num_tokens_per_rank": per_rank,
            "num_tokens_per_rdma_rank": per_host,  # None on one host
            "is_token_in_rank": in_rank,
            "num_tokens_per_expert": per_expert,
        }

        def dispatch() -> Any:
            return buffer.dispatch(x, topk_idx=ids, topk_weights=weights, config=config, **layout)

        received, *_, handle, _ = dispatch()
        expert_out = _returned(received)
        known = handle.known
        comm: MoECommunicator = buffer.runtime.member(known.routing, rows.shape[1], known.capacity)
        back: MoECommunicator = buffer.runtime.member(known.routing, case.hidden, known.capacity)

        def own_dispatch() -> object:
            output, _ = comm.dispatch(rows, ids, weights, scales)
            return output.topk_ids, output.topk_weights  # the drop-in returns them too

        def combine() -> Any:
            return buffer.combine(expert_out, handle, config=config)

        def pair() -> Any:
            *_, new_handle, _ = dispatch()
            return buffer.combine(expert_out, new_handle, config=config)

        cached = TimedCall(
            "dispatch, cached",
            lambda: buffer.dispatch(x, handle=handle, config=config),
            lambda: comm.dispatch(rows, None, None, scales, previous_handle=known.handle),
        )
        problem = _unequal(cached.run()[0], received, cached.name)
        problem = problem or self._wrong_sum(combine()[0], drawn, in_rank.sum(dim=1))
        calls = [
            TimedCall("get_dispatch_layout", lambda: buffer.get_dispatch_layout(ids, case.experts)),
            TimedCall("dispatch", dispatch, own_dispatch),
            cached,
            TimedCall("combine", combine, lambda: back.combine(expert_out, known.handle)),
            TimedCall("pair", pair),
        ]
        return TimedCalls(calls, comm.engine_name, problem)

    # -- Buffer.low_latency_dispatch, Buffer.low_latency_combine ----------------------------------

    def _low_latency(self, drawn: Drawn) -> TimedCalls:
        buffer, case = self.buffer, self._case
        x, ids, weights = drawn.x_TH, drawn.topk_ids_TK, drawn.topk_weights_TK
        most, fp8 = case.max_tokens_per_rank, case.quantization is not None

        def dispatch() -> Any:
            return buffer.low_latency_dispatch(x, ids, most, case.experts, use_fp8=fp8)

        received, _, handle, *_ = dispatch()
        expert_out = _returned(received)
        out_TH = torch.empty_like(x)
        comm, own = handle.known.form.comm, handle.known.handle

        def combine(of: Any = handle) -> Any:
            return buffer.low_latency_combine(expert_out, ids, weights, of, out=out_TH)

        def own_combine() -> object:
            return comm.combine(expert_out, own, out=out_TH, topk_weights=weights)

        def pair() -> Any:
            return combine(dispatch()[2])

        sums_T = torch.where(ids >= 0, weights, 0.0).sum(dim=1)
        problem = self._wrong_sum(combine()[0], drawn, sums_T)
        calls = [
            TimedCall("dispatch", dispatch, lambda: comm.dispatch(x, ids)),
            TimedCall("combine", combine, own_combine),
            TimedCall("pair", pair),
        ]
        return TimedCalls(calls, comm.engine_name, problem)

    # -- ElasticBuffer ----------------------------------------------------------------------------

    def _elastic(self, drawn: Drawn) -> TimedCalls:
        buffer, case = self.buffer, self._case
        x, rows, scales = _sent(drawn.x_TH, case)
        ids, weights = drawn.topk_ids_TK, drawn.topk_weights_TK
        num_sms = self.num_sms or 0

        def dispatch(**options: Any) -> Any:
            return buffer.dispatch(
                x, ids, weights, num_experts=case.experts, num_sms=num_sms, **options
            )

        received, _, _, handle, _ = dispatch()
        expert_out = _returned(received)
        known = handle.known
        comm: MoECommunicator = buffer.runtime.member(known.routing, rows.shape[1], known.capacity)
        back: MoECommunicator = buffer.runtime.member(known.routing, case.hidden, known.capacity)

        def own_dispatch() -> object:
            output, _ = comm.dispatch(rows, ids, weights, scales)
            return output.topk_ids, output.topk_weights

        def combine() -> Any:
            return buffer.combine(expert_out, handle, num_sms=num_sms)

        def pair() -> Any:
            return buffer.combine(expert_out, dispatch()[3], num_sms=num_sms)

        cached = TimedCall(
            "dispatch, cached",
            lambda: buffer.dispatch(x, handle=handle, num_sms=num_sms),
            lambda: comm.dispatch(rows, None, None, scales, previous_handle=known.handle),
        )
        problem = _unequal(cached.run()[0], received, cached.name)
        owner_TK = ids.div(case.experts // case.ranks, rounding_mode="floor")
        ranks = torch.arange(case.ranks, device=ids.device)
        reached_T = ((owner_TK[..., None] == ranks) & (ids >= 0)[..., None]).any(1).sum(1)
        problem = problem or self._wrong_sum(combine()[0], drawn, reached_T)
        calls = [
            TimedCall("dispatch", dispatch, own_dispatch),
            TimedCall("dispatch, no host wait", lambda: dispatch(do_cpu_sync=False)),
            cached,
            TimedCall("combine", combine, lambda: back.combine(expert_out, known.handle)),
            TimedCall("pair", pair),
        ]
        return TimedCalls(calls, comm.engine_name, problem)

    def _wrong_sum(self, combined_TH: Tensor, drawn: Drawn, times_T: Tensor) -> str | None:
        """What is wrong with the sum of unchanged rows, which is so many times the token."""
        x_TH = drawn.x_TH
        if self._case.quantization is not None:
            x_TH = dequantize(*quantize(x_TH, _FORMAT), _FORMAT, torch.bfloat16)
        expected_TH = x_TH.float() * times_T.float()[:, None]
        return mismatch(combined_TH, expected_TH, wire_dtype=torch.bfloat16)


def _sent(x_TH: Tensor, case: DropInCase) -> tuple[Any, Tensor, Tensor | None]:
    """What a caller dispatches: rows, or rows and scales; and the same as the library takes it."""
    if case.quantization is None:
        return x_TH, x_TH, None
    rows, scales = quantize(x_TH, _FORMAT)
    return (rows, scales), rows, scales


def _returned(received: Any) -> Tensor:
    """Expert outputs: the rows that were received, in memory of their own."""
    if isinstance(received, tuple):
        rows, scales = received
        return dequantize(rows, scales, _FORMAT, torch.bfloat16)
    return received.clone()


def _unequal(received: Any, expected: Any, name: str) -> str | None:
    """Whether a call has received other rows than the first dispatch."""
    parts = (received, expected)
    found, wanted = (one if isinstance(one, tuple) else (one,) for one in parts)
    same = all(
        torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        for one, other in zip(found, wanted, strict=True)
    )
    return None if same else f"{name} received other rows than a plain dispatch"
