"""`Buffer`: the interface of DeepEP's V1, on top of communicators.

Its normal calls are in buffer_normal.py, its low-latency calls in buffer_low_latency.py.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from expertlink.compat.deep_ep import config as configs
from expertlink.compat.deep_ep import pool as pools
from expertlink.compat.deep_ep.buffer_low_latency import LowLatencyBuffer
from expertlink.compat.deep_ep.buffer_normal import NormalBuffer
from expertlink.compat.deep_ep.config import Config
from expertlink.compat.deep_ep.errors import CallError, UnsupportedError, expect
from expertlink.compat.deep_ep.events import EventHandle, EventOverlap
from expertlink.compat.deep_ep.internode import HostCounter
from expertlink.compat.deep_ep.layout import LayoutCounter
from expertlink.compat.deep_ep.life import until_exit
from expertlink.compat.deep_ep.low_latency import LowLatencyCalls
from expertlink.compat.deep_ep.normal import NormalCalls
from expertlink.compat.deep_ep.pool import Pool
from expertlink.compat.deep_ep.streams import Streams, comm_stream


class Buffer(NormalBuffer, LowLatencyBuffer):
    """What DeepEP's `Buffer` does, for one group of ranks.

    All dispatches and combines are collective: every rank makes the same ones in the same order.
    So is the constructor: the ranks tell each other which hosts they are on. Tensors live on CUDA's
    current device, or on the CPU where there is no GPU, whatever the group's backend.

    Args:
        group: process group, NCCL or gloo; NCCL where GPUs are on several hosts.
        num_nvl_bytes: kept as given; memory is made as calls need it.
        num_rdma_bytes: likewise.
        low_latency_mode: the low-latency calls will be used.
        num_qps_per_rank: ignored, as the next four.
        allow_nvlink_for_low_latency_mode: ignored.
        allow_mnnvl: ignored.
        use_fabric: ignored.
        explicitly_destroy: `destroy()` will be called.
        enable_shrink: low-latency calls leave out ranks that do not come in time, in place of
            raising. Only on GPUs of one NVLink domain; elsewhere nobody can be left out.
        comm: MPI communicators are not supported.

    Raises:
        ValueError: no group was given; on this rank alone.
        CallError, UnsupportedError: an argument cannot be; then the other ranks raise PeerError.
        ConfigurationError: `low_latency_mode` or `enable_shrink` differs between ranks; on all.
        PeerTimeoutError: a rank did not come.
    """

    def __init__(
        self,
        group: Any = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        *,
        use_fabric: bool | None = None,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        mpi = UnsupportedError("comm: MPI communicators are not supported; pass a group")
        if group is None:  # there is nobody to tell
            raise (
                mpi
                if comm is not None
                else CallError("group is None; a torch.distributed.ProcessGroup is expected")
            )
        if comm is not None:
            pools.refuse_buffer(group, mpi)
        self.group = group
        self.rank: int = group.rank()
        self.group_size: int = group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        if low_latency_mode:
            self.nvshmem_qp_depth = _queue_depth(group)
        self.runtime: Pool | None = pools.connect(
            group,
            "Buffer",
            low_latency_mode=bool(low_latency_mode),
            enable_shrink=bool(enable_shrink),
        )
        self._device = self.runtime.device
        self._streams = Streams(self._device)
        self._count = LayoutCounter(self._device, self.group_size)
        domains, self._per_host = self.runtime.domains, None
        if domains.num_hosts > 1:
            self._per_host = HostCounter(domains, self._device)
        self._normal = NormalCalls(self.runtime, rank=self.rank, num_ranks=self.group_size)
        self._low_latency: LowLatencyCalls | None = None
        if low_latency_mode:
            self._low_latency = LowLatencyCalls(
                self.runtime, self._streams, num_ranks=self.group_size, masks=enable_shrink
            )
        until_exit(self)

    def destroy(self) -> None:
        """Releases everything. Local; safe to repeat. Needs `explicitly_destroy=True`."""
        expect(self.explicitly_destroy, "destroy() needs Buffer(..., explicitly_destroy=True)")
        if self.runtime is not None:
            self.runtime.close()
        self.runtime = self._low_latency = None

    # -- static -----------------------------------------------------------------------------------

    @staticmethod
    def is_sm90_compiled() -> bool:
        """True: every kernel is there that callers ask for."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Changes `Buffer.num_sms`, for all buffers. It must be even."""
        expect(new_num_sms % 2 == 0, f"num_sms={new_num_sms} must be even")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event on the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """What DeepEP would want as `num_rdma_bytes`; memory is made as calls need it."""
        return configs.low_latency_size_hint(
            num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
        )

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The default of `dispatch(config=)`."""
        return configs.dispatch_config(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The default of `combine(config=)`."""
        return configs.combine_config(num_ranks, Buffer.num_sms)

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The stream of asynchronous calls."""
        expect(self._device.type == "cuda", f"there are no streams on {self._device}")
        return comm_stream(self._device)

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> Tensor:
        """Scratch memory as long as the buffer that DeepEP would have. No call reads it.

        Args:
            dtype: of the elements.
            size: shape of the first elements; None: all of them, in one dimension.
            offset: bytes to leave out at the front.
            use_rdma_buffer: as long as `num_rdma_bytes`, not `num_nvl_bytes`.
        """
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        count = (num_bytes - offset) // dtype.itemsize
        shape = (count,) if size is None else tuple(size)
        expect(torch.Size(shape).numel() <= count, f"{list(shape)} of {dtype}: {count} fit")
        return torch.empty(shape, dtype=dtype, device=self._device)


def _queue_depth(group: Any) -> int:
    """What callers read as `nvshmem_qp_depth`. Collective where the variable holds no number."""
    text = os.environ.get("NVSHMEM_QP_DEPTH", "1024")
    if not text.isdecimal():
        pools.refuse_buffer(group, CallError(f"NVSHMEM_QP_DEPTH={text!r} is no whole number"))
    return int(text)
