"""What the calls of a `Buffer` share: its parts, and checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from expertlink.compat.deep_ep.errors import CallError, expect
from expertlink.compat.deep_ep.internode import HostCounter
from expertlink.compat.deep_ep.layout import LayoutCounter
from expertlink.compat.deep_ep.low_latency import LowLatencyCalls
from expertlink.compat.deep_ep.normal import NormalCalls
from expertlink.compat.deep_ep.pool import Pool
from expertlink.compat.deep_ep.streams import Streams
from expertlink.errors import ExpertlinkError

DESTROYED = "this buffer has been destroyed"


class BufferParts:
    """The parts of a buffer; `Buffer` makes them."""

    num_sms: ClassVar[int] = 20

    group: Any
    group_size: int
    enable_shrink: bool
    runtime: Pool | None
    _device: torch.device
    _streams: Streams
    _count: LayoutCounter
    _per_host: HostCounter | None  # None: all ranks share a host
    _normal: NormalCalls
    _low_latency: LowLatencyCalls | None

    def _refused(self, refuse: Callable[[], NoReturn]) -> ExpertlinkError:
        return self._streams.refused(refuse)

    def _check_several_hosts(self, name: str, instead: str) -> None:
        self._check_alive()
        if self._per_host is None:
            raise CallError(f"{name}: all ranks share a host; {instead}() serves them")

    def _check_alive(self) -> None:
        expect(self.runtime is not None, DESTROYED)

    def _check_experts(self, num_experts: int) -> None:
        if num_experts <= 0 or num_experts % self.group_size:
            raise CallError(
                f"num_experts={num_experts} is not a multiple of the group's {self.group_size} "
                "ranks"
            )

    def _check_tensor(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self._device:
            raise CallError(f"{name} is on {tensor.device}; this buffer works on {self._device}")
