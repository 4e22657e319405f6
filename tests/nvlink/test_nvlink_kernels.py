"""The nvlink engine's kernels compile for every target, without a GPU, within their budgets."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch

from expertlink import MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.hybrid.ll.mode import RailLlMode
from expertlink.engines.nvlink import launch
from expertlink.engines.nvlink.ht.blocks import BlockShape
from expertlink.engines.nvlink.ht.combine import CombinePlanner
from expertlink.engines.nvlink.ht.mode import HtMode
from expertlink.engines.nvlink.launch import KernelName, Program, compile_program
from expertlink.engines.nvlink.ll import plan as ll_plan
from expertlink.engines.nvlink.ll.mode import LlMode
from expertlink.engines.nvlink.mode import Mode
from expertlink.engines.nvlink.rows import RowShape
from expertlink.engines.nvlink.tuning import (
    HT_MAX_WARPS,
    HT_SUM_WARPS,
    SHARED_BYTES,
    STATIC_BYTES,
)
from expertlink.jit import compiler
from expertlink.jit.compiler import CompiledKernel
from support.depth import depth

TWO_BY_EIGHT = Domains((0,) * 8 + (1,) * 8)
ARCHITECTURES = ("sm_90a", "sm_100a")
REGISTERS = 65536  # of a multiprocessor; threads get them in eights
MODEL = {"num_experts": 256, "hidden_size": 7168, "topk": 8, "max_tokens_per_rank": 4096}

Compiled = dict[KernelName, CompiledKernel]

CASES: list[tuple[int, dict[str, Any]]] = [
    (8, {"output_layout": "flat", "expert_alignment": 128}),
    (8, {"output_layout": "token_major"}),
    (8, {"output_layout": "token_major", "static_shapes": True, "check_inputs": True}),
    (4, {"output_layout": "rank_major", "zero_copy": True}),
    (8, {"output_layout": "flat", "expert_alignment": 128, "source_tokens": True}),
    (4, {"output_layout": "token_major", "zero_copy": True, "source_tokens": True}),
    (33, {"output_layout": "token_major", "num_experts": 99, "topk": 32, "source_tokens": True}),
    (4, {"output_layout": "expert_major", "dtype": torch.float16}),
    (1, {"num_experts": 1, "topk": 1, "hidden_size": 8, "max_tokens_per_rank": 1}),
    (72, {"num_experts": 2048, "topk": 32, "hidden_size": 16384}),
    (33, {"output_layout": "token_major", "num_experts": 99, "topk": 32}),
]


DECODE = {**MODEL, "mode": "ll", "static_shapes": True, "max_tokens_per_rank": 128}
LATENCY_CASES: list[tuple[int, dict[str, Any]]] = [
    (8, {"output_layout": "expert_major"}),
    (8, {"output_layout": "expert_major", "mask_lost_peers": True}),
    (8, {"output_layout": "token_major", "mask_lost_peers": True}),
    (8, {"output_layout": "expert_major", "mask_lost_peers": True, "hidden_size": 2048}),
    (8, {"output_layout": "expert_major", "hidden_size": 2048}),
    (4, {"output_layout": "flat", "hidden_size": 4096}),
    (2, {"output_layout": "flat", "hidden_size": 4096, "combine_precision": "exact"}),
    (8, {"output_layout": "flat", "expert_alignment": 128, "quantization": "e4m3_ue8m0"}),
    (8, {"output_layout": "token_major", "quantization": "e4m3_float32"}),
    (4, {"output_layout": "rank_major", "dtype": torch.float16}),
    (4, {"combine_precision": "exact", "dtype": torch.float16}),
    (8, {"combine_precision": "exact", "mask_lost_peers": True}),
    (8, {"combine_precision": "exact", "output_layout": "flat", "mask_lost_peers": True}),
    (1, {"num_experts": 1, "topk": 1, "hidden_size": 8, "max_tokens_per_rank": 1}),
    (72, {"num_experts": 2048, "topk": 32, "hidden_size": 16384, "max_tokens_per_rank": 64}),
    (72, {"num_experts": 576, "topk": 32, "combine_precision": "exact"}),
    (33, {"output_layout": "token_major", "num_experts": 99, "topk": 32}),
    (3, {"num_experts": 1000, "max_tokens_per_rank": 1024}),
]


def config_of(fields: dict[str, Any]) -> MoECommunicatorConfig:
    return MoECommunicatorConfig(device="cpu", **{**MODEL, **fields})


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("ranks", "fields"), CASES)
def test_resources(ranks: int, fields: dict[str, Any], arch: str) -> None:
    config = config_of(fields)
    compiled = check_budgets(config, HtMode, num_ranks=ranks, arch=arch)
    assert compiled == {KernelName.DISPATCH, KernelName.COMBINE}


# Several ranks on one GPU are for tests, which run on sm_90a. Their kernels differ little.
@pytest.mark.parametrize(
    ("ranks", "fields", "arch", "hosted"),
    [(*case, arch, False) for case in LATENCY_CASES for arch in ARCHITECTURES]
    + [(*case, "sm_90a", True) for case in LATENCY_CASES[:: max(1, 4 - depth())]],
)
def test_resources_of_low_latency(
    ranks: int, fields: dict[str, Any], arch: str, hosted: bool
) -> None:
    config = config_of({**DECODE, **fields})
    compiled = check_budgets(config, LlMode, num_ranks=ranks, arch=arch, hosted=hosted)
    names = {KernelName.DISPATCH, KernelName.COMBINE}
    if config.quantization is not None:
        names.add(KernelName.DISPATCH_QUANTIZED)
    if config.layout.expanded and config.combine_precision == "wire":
        names.add(KernelName.COMBINE_WEIGHTS)
    assert compiled == names


@pytest.mark.parametrize(
    ("domains", "fields", "arch"),
    [
        (Domains((0, 1, 0, 1)), {"output_layout": "expert_major"}, "sm_100a"),
        (TWO_BY_EIGHT, {"output_layout": "flat", "quantization": "e4m3_ue8m0"}, "sm_90a"),
    ],
    ids=["2x2", "2x8"],
)
def test_resources_of_low_latency_across_hosts(
    domains: Domains, fields: dict[str, Any], arch: str
) -> None:
    config = config_of({**DECODE, **fields})
    program = RailLlMode.program_of(config, RailLlMode.plan_of(config, domains), domains)
    num_ranks, num_peers = domains.num_ranks, domains.ranks_per_host
    compiled = check_program(config, program, num_ranks=num_ranks, num_peers=num_peers, arch=arch)
    names = {KernelName.DISPATCH, KernelName.COMBINE, KernelName.PACK, KernelName.SUM_HOSTS}
    if config.quantization is not None:
        names.add(KernelName.PACK_QUANTIZED)
    assert compiled == names


def compiled_here(config: MoECommunicatorConfig, program: Program, **options: Any) -> Compiled:
    """`compile_program` with a report of the compiler; a communicator's kernels side by side."""
    compiler.cuda_core().Program  # noqa: B018 - the module loads it here rather than in threads
    with ThreadPoolExecutor() as threads, pytest.MonkeyPatch.context() as patch:
        # NVRTC reports nothing of a kernel that it finds in a cache of its own.
        patch.setitem(compiler._OPTIONS, "no_cache", True)
        compile_anew = partial(threads.submit, compiler.compile_kernel.__wrapped__)
        patch.setattr(launch, "compile_kernel", compile_anew)
        coming: dict[KernelName, Any] = dict(compile_program(config, program, **options))
        return {name: future.result() for name, future in coming.items()}


def check_budgets(
    config: MoECommunicatorConfig, mode: type[Mode], *, num_ranks: int, **options: Any
) -> set[KernelName]:
    """Compiles all kernels of a communicator; returns their names."""
    program = mode.program(config, mode.plan(config, num_ranks), num_ranks=num_ranks)
    return check_program(config, program, num_ranks=num_ranks, **options)


def check_program(
    config: MoECommunicatorConfig, program: Program, **options: Any
) -> set[KernelName]:
    """Compiles all kernels of a program; returns their names."""
    compiled = compiled_here(config, program, **options)
    for kernel in program.kernels:
        report = compiled[kernel.name].report
        assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}, report
        assert set(re.findall(r"(\d+) bytes stack frame", report)) == {"0"}, report
        registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
        assert registers
        assert max(registers) <= REGISTERS // (32 * kernel.max_warps) // 8 * 8, report
        memory = [int(size) for size in re.findall(r"(\d+) bytes smem", report)]
        assert max(memory, default=0) <= STATIC_BYTES, report
    return set(compiled)


@pytest.mark.parametrize(("ranks", "fields"), CASES)
def test_blocks_fit_a_multiprocessor(ranks: int, fields: dict[str, Any]) -> None:
    config = config_of(fields)
    shape = BlockShape(config, num_ranks=ranks, num_local=-(-config.num_experts // ranks))
    for row_bytes in (0, 16, RowShape.of(config).row):
        assert shape.unavailable_reason(row_bytes) is None
        for movers in (shape.dispatch(row_bytes), shape.combine(row_bytes)):
            assert 1 <= movers.warps <= max(HT_MAX_WARPS, HT_SUM_WARPS)
            assert movers.slot_bytes >= row_bytes
            assert 1 <= movers.batch <= 32 // config.topk
            for counts in (True, False):
                needed = shape.shared_bytes(movers, counts=counts)
                assert movers.warps * movers.warp_bytes <= needed
                assert needed + STATIC_BYTES <= SHARED_BYTES


@pytest.mark.parametrize(
    ("row_bytes", "warps", "batch"), [(14336, 14, 1), (7168, 13, 2), (4096, 14, 3), (256, 15, 4)]
)
def test_short_rows_share_the_memory_of_a_warp(row_bytes: int, warps: int, batch: int) -> None:
    shape = BlockShape(config_of({"expert_alignment": 1}), num_ranks=4, num_local=64)
    movers = shape.dispatch(row_bytes)
    assert (movers.warps, movers.batch) == (warps, batch)


@pytest.mark.parametrize(
    ("layout", "row_bytes", "warps", "batch"),
    [
        ("token_major", 14336, 15, 1),
        ("token_major", 4096, 15, 3),
        ("token_major", 32768, 6, 1),
        ("flat", 14336, 23, 1),
        ("flat", 4096, 23, 1),
    ],
)
def test_warps_of_a_combine(layout: str, row_bytes: int, warps: int, batch: int) -> None:
    """Deduplicated layouts hold whole rows, expanded ones parts of the rows that they sum up."""
    config = config_of({"output_layout": layout})
    movers = BlockShape(config, num_ranks=4, num_local=64).combine(row_bytes)
    assert movers.warps == warps
    assert layout == "flat" or movers.batch == batch
    few = BlockShape(config, num_ranks=4, num_local=64, max_warps=4).combine(row_bytes)
    assert few == movers._replace(warps=4), "where ranks share a GPU, blocks are small"


@pytest.mark.parametrize(
    ("layout", "ranks", "row_bytes", "senders"),
    [
        ("token_major", 4, 14336, 14),
        ("token_major", 4, 4096, 17),
        ("flat", 4, 4096, 19),
        ("flat", 2, 4096, 21),
    ],
)
def test_blocks_of_a_combine_that_send(
    layout: str, ranks: int, row_bytes: int, senders: int
) -> None:
    config = config_of({"output_layout": layout})
    shape = BlockShape(config, num_ranks=ranks, num_local=64)
    plan = CombinePlanner(config, shape, num_sms=132)(row_bytes, 24)
    assert (plan.num_senders, plan.launch.grid) == (senders, 24)


@pytest.mark.parametrize(
    ("ranks", "topk", "layout", "sms"),
    [
        (2, 8, "flat", 64),
        (2, 4, "expert_major", 40),
        (4, 8, "flat", 32),
        (8, 8, "flat", 24),
        (2, 8, "token_major", 24),
        (4, 2, "rank_major", 24),
        (1, 1, "flat", 64),
    ],
)
def test_sms_of_high_throughput_follow_what_they_move(
    ranks: int, topk: int, layout: str, sms: int
) -> None:
    config = config_of({"topk": topk, "output_layout": layout})
    assert BlockShape(config, num_ranks=ranks, num_local=8).default_sms == sms


def test_short_rows_need_lanes_for_all_choices() -> None:
    shape = BlockShape(config_of({"topk": 32}), num_ranks=4, num_local=64)
    assert shape.dispatch(256).batch == 1


@pytest.mark.parametrize(
    ("hidden", "layout", "place", "sum_depth"),
    [
        (2048, "expert_major", (4, 4), 4),
        (4096, "expert_major", (3, 6), 4),
        (7168, "expert_major", (3, 6), 3),
        (2048, "rank_major", (4, 4), 4),
        (7168, "rank_major", (3, 6), 4),
    ],
)
def test_short_rows_of_low_latency_are_cut_evenly(
    hidden: int, layout: str, place: tuple[int, int], sum_depth: int
) -> None:
    config = config_of({**DECODE, "hidden_size": hidden, "output_layout": layout})
    constants = ll_plan.constants_of(config, ll_plan.LlPlan.of(config, 4), num_ranks=4)
    assert (constants["kPlaceDepth"], constants["kPlaceMost"]) == place
    assert constants["kSumDepth"] == sum_depth


@pytest.mark.parametrize(
    ("ranks", "layout", "sms"),
    [(2, "expert_major", (64, 96)), (4, "expert_major", (32, 64)), (2, "rank_major", (32, 64))],
)
def test_sms_of_low_latency(ranks: int, layout: str, sms: tuple[int, int]) -> None:
    config = config_of({**DECODE, "output_layout": layout})
    assert ll_plan.default_sms(config, ranks) == sms


@pytest.mark.parametrize(("ranks", "fields"), LATENCY_CASES)
def test_blocks_of_low_latency_fit_a_multiprocessor(ranks: int, fields: dict[str, Any]) -> None:
    config = config_of({**DECODE, **fields})
    local = -(-config.num_experts // ranks)
    assert ll_plan.unavailable_reason(config, num_ranks=ranks, num_local=local) is None
    for sends, receives in ((True, False), (False, True), (True, True)):
        words = ll_plan.shared_words(
            config, num_ranks=ranks, num_local=local, sends=sends, receives=receives
        )
        assert 4 * words + STATIC_BYTES <= SHARED_BYTES


@pytest.mark.parametrize(
    ("ranks", "fields", "reason"),
    [
        (8, {"output_layout": "token_major", "zero_copy": True}, "views"),
        (8, {"output_layout": "flat", "static_shapes": False}, "without static_shapes"),
        (72, {"num_experts": 2048, "max_tokens_per_rank": 16384}, "shared memory"),
        (2, {"num_experts": 8, "max_tokens_per_rank": 1 << 16}, "16 bits"),
    ],
)
def test_what_low_latency_does_not_serve(ranks: int, fields: dict[str, Any], reason: str) -> None:
    config = config_of({**DECODE, **fields})
    local = -(-config.num_experts // ranks)
    text = ll_plan.unavailable_reason(config, num_ranks=ranks, num_local=local)
    assert text is not None
    assert reason in text


def test_rows_that_are_too_large_are_refused() -> None:
    config = config_of({"hidden_size": 128 << 10})
    shape = BlockShape(config, num_ranks=8, num_local=32)
    reason = shape.unavailable_reason(RowShape.of(config).row)
    assert reason is not None
    assert "shared memory" in reason
