"""Every kernel compiles for every target, without a GPU, within its budget of resources."""

from __future__ import annotations

import re
from importlib import resources

import pytest
import torch

from expertlink import EngineUnavailableError
from expertlink.bench import ceilings, flag_latency
from expertlink.compat.deep_ep import layout
from expertlink.engines import weighted_backward
from expertlink.engines.collective import ordered_sum, send_order
from expertlink.engines.hybrid import words
from expertlink.jit import compiler
from expertlink.jit.compiler import compile_kernel

ARCHITECTURES = ("sm_90a", "sm_100a")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Most registers per thread and bytes of shared memory per block: 256 threads a block.
BUDGETS = {
    "backward/weighted_backward": (64, 0),
    "bench/ceiling": (64, 1024),
    "bench/flag_latency": (32, 0),
    "collective/ordered_sum": (64, 1024),
    "collective/send_order": (96, 24 << 10),
    "hybrid/rail_mark": (16, 0),
    "compat/token_layout": (64, 64),
}
PRELUDES = {
    "backward/weighted_backward": weighted_backward.PRELUDE,
    "bench/ceiling": ceilings.PRELUDE,
    "bench/flag_latency": flag_latency.ARGUMENTS.declaration,
    "collective/ordered_sum": ordered_sum.PRELUDE,
    "collective/send_order": send_order.PRELUDE,
    "hybrid/rail_mark": words.ARGUMENTS.declaration,
    "compat/token_layout": layout.PRELUDE,
}
INSTANCES = [
    ("bench/flag_latency", "flag_latency"),
    ("hybrid/rail_mark", "rail_mark"),
    *(
        ("backward/weighted_backward", instance)
        for dtype in DTYPES
        for instance in weighted_backward.instances(dtype).values()
    ),
    *(("bench/ceiling", f"{kind}_rows") for kind in ceilings.KINDS),
    *(
        ("collective/ordered_sum", instance)
        for dtype in DTYPES
        for instance in ordered_sum.instances(dtype).values()
    ),
    *(("collective/send_order", instance) for instance in send_order.count_instances().values()),
    *(("collective/send_order", instance) for instance in send_order.order_instances().values()),
    *(("compat/token_layout", instance) for instance in layout.instances().values()),
]


def test_every_kernel_is_covered() -> None:
    folders = [item for item in resources.files("expertlink.kernels").iterdir() if item.is_dir()]
    names = {
        f"{folder.name}/{item.name.removesuffix('.cu')}"
        for folder in folders
        for item in folder.iterdir()
        if item.name.endswith(".cu")
    }
    others = {f"{mode}/{call}" for mode in ("ht", "ll") for call in ("dispatch", "combine")}
    others |= {"hybrid/ll_pack", "hybrid/ll_sum"}
    steps = ("pack", "count", "plan", "dispatch", "combine", "sum")
    others |= {f"hybrid/ht_{step}" for step in steps}
    assert names - others == set(BUDGETS) == {name for name, _ in INSTANCES}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("name", "instance"), INSTANCES)
def test_resources(name: str, instance: str, arch: str) -> None:
    report = compile_kernel(name, instance, arch, prelude=PRELUDES[name]).report
    registers, shared = BUDGETS[name]
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report
    assert "0 bytes stack frame" in report, report
    used = re.search(r"Used (\d+) registers", report)
    assert used is not None, report
    assert int(used[1]) <= registers, report
    memory = re.search(r"(\d+) bytes smem", report)
    assert memory is None or int(memory[1]) <= shared, report


def test_missing_compiler_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: "cuda.core is not installed")
    with pytest.raises(EngineUnavailableError, match="cuda.core is not installed"):
        ordered_sum.compile_instance("ordered_sum<float, 1, kPlain>", "sm_80")
