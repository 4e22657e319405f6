"""What NCCL would send rows to other hosts through, as far as files and the environment tell."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RDMA_DEVICES = Path("/sys/class/infiniband")
VARIABLES = ("NCCL_NET", "NCCL_NET_PLUGIN", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_SOCKET_IFNAME")
"""Of NCCL, that decide about the network."""


@dataclass(frozen=True)
class Port:
    """An active port of an RDMA device.

    Attributes:
        device: such as mlx5_0.
        number: from 1.
        gbits: Gbit/s; 0: unknown.
        link: "InfiniBand" or "Ethernet" (RoCE).
    """

    device: str
    number: int
    gbits: int
    link: str

    def __str__(self) -> str:
        rate = f"{self.gbits} Gb/s " if self.gbits else ""
        return f"{self.device}:{self.number} ({rate}{self.link})"


def accepts(listed: str, name: str, port: int | None = None) -> bool:
    """Whether a list in NCCL's form has a name: prefixes; "=": whole names; "^": all but those.

    Args:
        listed: such as "mlx5_0,mlx5_1", "=eth0", "^docker"; empty: everything.
        name: of a device or an interface.
        port: of the device; entries may end with ":" and a port.
    """
    exact = excluded = False
    while listed[:1] in ("=", "^"):
        exact, excluded = exact or listed[0] == "=", excluded or listed[0] == "^"
        listed = listed[1:]
    entries = [entry.strip() for entry in listed.split(",") if entry.strip()]
    if not entries:
        return True
    found = False
    for entry in entries:
        prefix, _, wanted = entry.partition(":")
        fits = name == prefix if exact else name.startswith(prefix)
        found |= fits and (not wanted or port is None or wanted == str(port))
    return found != excluded


def rdma_ports(environment: Mapping[str, str], root: Path = RDMA_DEVICES) -> list[Port]:
    """Active ports that NCCL may use."""
    if environment.get("NCCL_IB_DISABLE", "0").strip() == "1":
        return []
    found: list[Port] = []
    for folder in sorted(root.glob("*/ports/*")):
        device, number = folder.parts[-3], folder.name
        if "ACTIVE" not in _line(folder / "state") or not number.isdecimal():
            continue
        if not accepts(environment.get("NCCL_IB_HCA", ""), device, int(number)):
            continue
        rate = _line(folder / "rate").split(" ")[0]  # "400 Gb/sec (4X NDR)"
        gbits = int(float(rate)) if rate.replace(".", "", 1).isdecimal() else 0
        found.append(Port(device, int(number), gbits, _line(folder / "link_layer") or "unknown"))
    return found


def interfaces(environment: Mapping[str, str], names: Sequence[str] | None = None) -> list[str]:
    """Network interfaces that NCCL's TCP transport may use, the likeliest first.

    Without NCCL_SOCKET_IFNAME, it takes docker's and the loopback only where there is no other.
    """
    if names is None:
        names = [name for _, name in socket.if_nameindex()]
    listed = environment.get("NCCL_SOCKET_IFNAME", "")
    if listed:
        return [name for name in names if accepts(listed, name)]
    for usual in ("ib", "^lo,docker", "docker", "lo"):
        found = [name for name in names if accepts(usual, name)]
        if found:
            return found
    return []


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
