"""The nvlink engine's kernels compile for every target, without a GPU, within their budgets."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from expertlink import MoECommunicatorConfig
from expertlink.engines.nvlink.arena import ArenaPlan, RowShape
from expertlink.engines.nvlink.kernels import (
    SHARED_BYTES,
    STATIC_BYTES,
    BlockShape,
    compile_for,
)

ARCHITECTURES = ("sm_90a", "sm_100a")
MOST_REGISTERS = 128  # of a thread: a block of 512 is the largest
MODEL = {"num_experts": 256, "hidden_size": 7168, "topk": 8, "max_tokens_per_rank": 4096}

CASES: list[tuple[int, dict[str, Any]]] = [
    (8, {"output_layout": "flat", "expert_alignment": 128}),
    (8, {"output_layout": "token_major"}),
    (4, {"output_layout": "rank_major", "zero_copy": True}),
    (4, {"output_layout": "expert_major", "dtype": torch.float16}),
    (1, {"num_experts": 1, "topk": 1, "hidden_size": 8, "max_tokens_per_rank": 1}),
    (72, {"num_experts": 2048, "topk": 32, "hidden_size": 16384}),
    (33, {"output_layout": "token_major", "num_experts": 99, "topk": 32}),
]


def config_of(fields: dict[str, Any]) -> MoECommunicatorConfig:
    return MoECommunicatorConfig(device="cpu", **{**MODEL, **fields})


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("ranks", "fields"), CASES)
def test_resources(ranks: int, fields: dict[str, Any], arch: str) -> None:
    config = config_of(fields)
    compiled = compile_for(config, ArenaPlan.of(config, ranks), num_ranks=ranks, arch=arch)
    assert set(compiled) == {"dispatch", "combine"}
    for code in compiled.values():
        report = code.report
        assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}, report
        assert set(re.findall(r"(\d+) bytes stack frame", report)) == {"0"}, report
        registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
        assert registers
        assert max(registers) <= MOST_REGISTERS, report
        memory = [int(size) for size in re.findall(r"(\d+) bytes smem", report)]
        assert max(memory) <= STATIC_BYTES, report


@pytest.mark.parametrize(("ranks", "fields"), CASES)
def test_blocks_fit_a_multiprocessor(ranks: int, fields: dict[str, Any]) -> None:
    config = config_of(fields)
    shape = BlockShape(config, num_ranks=ranks, num_local=-(-config.num_experts // ranks))
    for row_bytes in (0, 16, RowShape.of(config).row):
        assert shape.obstacle(row_bytes) is None
        assert shape.threads(row_bytes) <= 512
        for counts in (True, False):
            needed = shape.shared_bytes(row_bytes, counts=counts)
            assert shape.warps(row_bytes) * shape.slot_bytes(row_bytes) <= needed
            assert needed + STATIC_BYTES <= SHARED_BYTES


def test_rows_that_are_too_large_are_refused() -> None:
    config = config_of({"hidden_size": 128 << 10})
    shape = BlockShape(config, num_ranks=8, num_local=32)
    reason = shape.obstacle(RowShape.of(config).row)
    assert reason is not None
    assert "shared memory" in reason
