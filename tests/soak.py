"""A soak of any length: PYTHONPATH=src python tests/soak.py [calls] [seed] [ranks] [hosts].

A rank per GPU; on CPUs where there are not as many GPUs. Several hosts are pretended ones.
"""

from __future__ import annotations

import sys

import torch

from expertlink.launch import DeviceType
from support.across_hosts import pool_on
from support.soak import runs

RANKS = 4
TIMEOUT_S = 3600.0


def main() -> None:
    given = [int(word) for word in sys.argv[1:]]
    calls, seed, ranks, hosts = [*given, *(10_000, 0, RANKS, 1)[len(given) :]]
    device: DeviceType = "cuda" if torch.cuda.device_count() >= ranks else "cpu"
    with pool_on(hosts, ranks, device) as pool:
        done = pool.run(runs.soak, calls, seed, hosts, timeout_s=TIMEOUT_S)
    where = f"{len(done)} ranks of {hosts} hosts, {device}"
    sys.stdout.write(f"{done[0]} calls on {where}, every bit right\n")


if __name__ == "__main__":
    main()
