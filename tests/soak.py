"""A soak of any length: PYTHONPATH=src python tests/soak.py [calls] [seed] [ranks], one per GPU."""

from __future__ import annotations

import sys

from expertlink.launch import RankPool
from support import soak

RANKS = 4
TIMEOUT_S = 3600.0


def main() -> None:
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    ranks = int(sys.argv[3]) if len(sys.argv) > 3 else RANKS
    with RankPool(num_ranks=ranks, device="cuda") as pool:
        done = pool.run(soak.soak, calls, seed, timeout_s=TIMEOUT_S)
    sys.stdout.write(f"{done[0]} calls on {len(done)} ranks, every bit right\n")


if __name__ == "__main__":
    main()
