"""Kernels of mode "ht" across hosts compile for both targets, without a GPU, within budget."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from expertlink import MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.hybrid.ht.mode import RailHtMode
from expertlink.engines.nvlink import launch
from expertlink.engines.nvlink.launch import compile_program
from expertlink.engines.nvlink.tuning import STATIC_BYTES
from expertlink.jit import compiler

REGISTERS = 65536  # of a multiprocessor; threads get them in eights


@pytest.mark.parametrize(
    ("arch", "domains", "fields"),
    [
        ("sm_90a", (0,) * 8 + (1,) * 8, {"output_layout": "flat", "expert_alignment": 128}),
        ("sm_100a", (0, 0, 1, 1, 2, 2), {"output_layout": "rank_major", "static_shapes": True}),
    ],
)
def test_resources(arch: str, domains: tuple[int, ...], fields: dict[str, Any]) -> None:
    config = MoECommunicatorConfig(
        device="cpu",
        num_experts=256,
        hidden_size=7168,
        topk=8,
        max_tokens_per_rank=4096,
        **fields,
    )
    hosts = Domains(domains)
    program = RailHtMode.program_of(config, RailHtMode.plan_of(config, hosts), hosts)
    compiler.cuda_core().Program  # noqa: B018 - the module loads it here rather than in threads
    with ThreadPoolExecutor() as threads, pytest.MonkeyPatch.context() as patch:
        # NVRTC reports nothing of a kernel that it finds in a cache of its own.
        patch.setitem(compiler._OPTIONS, "no_cache", True)
        compile_anew = partial(threads.submit, compiler.compile_kernel.__wrapped__)
        patch.setattr(launch, "compile_kernel", compile_anew)
        coming: dict[Any, Any] = dict(
            compile_program(
                config,
                program,
                num_ranks=hosts.num_ranks,
                num_peers=hosts.ranks_per_host,
                arch=arch,
            )
        )
        reports = {name: future.result().report for name, future in coming.items()}
    for kernel in program.kernels:
        report = reports[kernel.name]
        assert set(re.findall(r"(\d+) bytes spill", report)) <= {"0"}, report
        assert set(re.findall(r"(\d+) bytes stack frame", report)) == {"0"}, report
        registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
        assert registers
        assert max(registers) <= REGISTERS // (32 * kernel.max_warps) // 8 * 8, report
        assert max(int(size) for size in re.findall(r"(\d+) bytes smem", report)) <= STATIC_BYTES
