"""Which ranks share NVLink: what a rank says of itself, and what follows when all have said it.

A rank's domain is what NCCL_HOSTID names, where that is set, so that hosts can be pretended; the
clique of its NVLink fabric, where GPUs of several machines share one; else its machine.
"""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path
from typing import Any

import torch

from expertlink.domains import Domains
from expertlink.engines.ranks.wire import Wire

HOST_ID = "NCCL_HOSTID"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LIBRARY = "libnvidia-ml.so.1"
_COMPLETED = 3  # NVML_GPU_FABRIC_STATE_COMPLETED


class FabricInfo(ctypes.Structure):
    """nvmlGpuFabricInfo_t of nvml.h."""

    _fields_ = (
        ("cluster_uuid", ctypes.c_ubyte * 16),
        ("status", ctypes.c_int),
        ("clique", ctypes.c_uint),
        ("state", ctypes.c_ubyte),
    )


def discover(wire: Wire) -> Domains:
    """The domains of all ranks, the same on all of them. Collective."""
    return Domains.of(wire.gather_text(domain_label(wire.device)))


def domain_label(device: torch.device) -> str:
    """Names the domain of a rank whose tensors live there."""
    if not os.environ.get(HOST_ID):
        clique = fabric_clique(device)
        if clique is not None:
            return f"fabric {clique}"
    return host_label()


def host_label() -> str:
    """Names this machine, or the one that NCCL_HOSTID pretends."""
    pretended = os.environ.get(HOST_ID)
    if pretended:
        return f"{HOST_ID} {pretended}"
    try:
        boot = _BOOT_ID.read_text().strip()  # names alone may be the same on several machines
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def fabric_clique(device: torch.device) -> str | None:
    """The clique of an NVLink fabric of several machines that a GPU is in; None: there is none."""
    if device.type != "cuda":
        return None
    try:
        nvml = ctypes.CDLL(_LIBRARY)
        uuid = str(torch.cuda.get_device_properties(device).uuid)
    except (OSError, AttributeError, RuntimeError, AssertionError):
        return None
    return clique_of(nvml, uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


def clique_of(nvml: Any, uuid: str) -> str | None:
    """What NVML says of the fabric of the GPU with that UUID; None where that is no fabric."""
    try:
        if nvml.nvmlInit_v2():
            return None
        try:
            handle, info = ctypes.c_void_p(), FabricInfo()
            if nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
                return None
            if nvml.nvmlDeviceGetGpuFabricInfo(handle, ctypes.byref(info)):
                return None
        finally:
            nvml.nvmlShutdown()
    except AttributeError:  # an older driver
        return None
    cluster = bytes(info.cluster_uuid)
    # One machine's own NVSwitches are a fabric too, whose cluster has no number.
    if info.state != _COMPLETED or info.status or not any(cluster):
        return None
    return f"{cluster.hex()} {info.clique}"
