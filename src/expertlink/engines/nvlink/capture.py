"""The current stream, and which capture of a CUDA graph a stream is in."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from functools import cache

import torch

from expertlink.jit.kernel import CudaError

_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE

# Every call asks, so without a function in between where there is none.
is_capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)
"""Whether torch's current stream is in a capture."""


def capture_of(stream: int) -> int:
    """Number of the capture that a stream, by its handle, is in; 0 for none.

    Streams that were forked from each other in one capture have the same number, and no two
    captures of a process have.
    """
    status, number = ctypes.c_int(), ctypes.c_uint64()
    error = _capture_info()(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    if error:
        raise CudaError(f"cuStreamGetCaptureInfo failed: error {error}")
    return int(number.value) if status.value == _ACTIVE else 0


@cache
def _capture_info() -> Callable[..., int]:
    info = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    info.argtypes = [ctypes.c_void_p] * 6
    info.restype = ctypes.c_int
    return info


def raw_stream(device: torch.device) -> Callable[[], int]:
    """What gives the handle of torch's current stream of a GPU, without making a stream object."""
    return functools.partial(torch._C._cuda_getCurrentRawStream, device.index)
