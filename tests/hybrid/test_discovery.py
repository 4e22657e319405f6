"""Ranks find out which of them share NVLink."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from expertlink.engines.hybrid import discovery
from expertlink.engines.hybrid.discovery import FabricInfo, clique_of, discover, domain_label
from expertlink.engines.ranks.wire import Wire

CPU = torch.device("cpu")


class Nvml:
    """NVML of a driver whose GPUs are in such a fabric."""

    def __init__(self, *, cluster: int, state: int = 3, status: int = 0, result: int = 0) -> None:
        self.answer = (cluster, state, status, result)
        self.open = 0

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        return 0 if uuid == b"GPU-1" else 6

    def nvmlDeviceGetGpuFabricInfo(self, handle: Any, pointer: Any) -> int:
        info = ctypes.cast(pointer, ctypes.POINTER(FabricInfo)).contents
        cluster, info.state, info.status, result = self.answer
        info.cluster_uuid[15] = cluster
        info.clique = 7
        return result


@pytest.mark.parametrize(
    ("fields", "uuid", "clique"),
    [
        ({"cluster": 5}, "GPU-1", f"{'00' * 15}05 7"),
        ({"cluster": 5}, "GPU-2", None),
        ({"cluster": 0}, "GPU-1", None),  # one machine with NVSwitches
        ({"cluster": 5, "state": 2}, "GPU-1", None),
        ({"cluster": 5, "status": 1}, "GPU-1", None),
        ({"cluster": 5, "result": 3}, "GPU-1", None),
    ],
)
def test_a_fabric_is_known_by_its_cluster(
    fields: dict[str, int], uuid: str, clique: str | None
) -> None:
    nvml = Nvml(**fields)
    assert clique_of(nvml, uuid) == clique
    assert nvml.open == 0


def test_an_old_driver_knows_no_fabric() -> None:
    assert clique_of(object(), "GPU-1") is None


def test_hosts_can_be_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(discovery.HOST_ID, raising=False)
    real = domain_label(CPU)
    assert real == domain_label(CPU)
    monkeypatch.setattr(discovery, "fabric_clique", lambda device: "12 0")
    assert domain_label(torch.device("cuda", 0)) == "fabric 12 0"
    monkeypatch.setenv(discovery.HOST_ID, "a")
    assert domain_label(torch.device("cuda", 0)) == domain_label(CPU) == "NCCL_HOSTID a" != real


def test_all_ranks_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ["b", "b", "a", "b", "a", "c"]
    wire = Wire(None, device=CPU, timeout_s=1.0)
    monkeypatch.setattr(wire, "gather_text", lambda text: [*labels[:5], text])
    monkeypatch.setenv(discovery.HOST_ID, "c")
    found = discover(wire)
    assert found.host_of == (0, 0, 1, 0, 1, 2)
    assert found.ranks_per_host is None
