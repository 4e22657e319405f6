"""No more than three times the rows received, beyond inputs and outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertlink import DispatchLayout
from expertlink.launch import RankPool
from support import life
from support.oracle import Case


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters")
@pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
def test_peak_memory(layout: DispatchLayout) -> None:
    case = Case((6000, 5000), 2048, experts=8, topk=3, layout=layout)
    with RankPool(num_ranks=2) as pool:  # fresh processes: nothing freed earlier is reused
        for peaks in pool.run(life.peaks, case, timeout_s=120):
            assert peaks["dispatch"] <= 3.0, peaks
            assert peaks["combine"] <= 3.0, peaks
            assert peaks["dispatch"] > 0.5, "the rows sent are a copy: the counter must see them"
