"""Products that leave SMs to the calls beside them, with torch's carve-out, which not all heed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from expertlink.communicator import MoECommunicator


def product_sms(
    comm: MoECommunicator, operations: Sequence[str] = ("dispatch", "combine")
) -> int | None:
    """SMs that any of these calls leaves to products. None: products cannot be limited, because
    tensors live on the CPU, the engine does not say how many SMs it takes, it takes all, or this
    torch has no carve-out."""
    if comm.device.type != "cuda" or not hasattr(torch._C, "_set_sm_carveout_experimental"):
        return None
    left = min(comm.compute_sms(name) for name in operations)
    return left if 0 < left < _total(comm.device) else None


@contextmanager
def products_on(num_sms: int | None, device: torch.device) -> Iterator[None]:
    """Products of this process that are launched here leave all but so many SMs free; None: no
    limit. In the end the carve-out is as before."""
    torch_C: Any = torch._C
    if device.type != "cuda" or not hasattr(torch_C, "_set_sm_carveout_experimental"):
        yield
        return
    before = torch_C._get_sm_carveout_experimental()
    torch_C._set_sm_carveout_experimental(None if num_sms is None else _total(device) - num_sms)
    try:
        yield
    finally:
        torch_C._set_sm_carveout_experimental(before)


def _total(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
