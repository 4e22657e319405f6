"""Compiles the kernels of the GPU tests into the kernel cache, in parallel. Needs no GPU.

EXPERTLINK_CACHE_DIR=/a/private/folder PYTHONPATH=src python tests/precompile.py [sm_90a]

What tests with hosted ranks ask for is found out by running them dry: communicators are made, and
no call is. What processes ask for is listed, in `support/cases.py` and here.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest
import torch

from expertlink import BlockFormat, DispatchLayout, MoECommunicatorConfig
from expertlink.bench import ceilings, flag_latency
from expertlink.compat.deep_ep import layout
from expertlink.domains import Domains
from expertlink.engines import weighted_backward
from expertlink.engines.collective import ordered_sum, send_order
from expertlink.engines.hybrid import words
from expertlink.engines.hybrid.ht.mode import RailHtMode
from expertlink.engines.hybrid.ht.plan import HybridPlan
from expertlink.engines.hybrid.ll.mode import RailLlMode
from expertlink.engines.nvlink import launch, tuning
from expertlink.engines.nvlink.build import mode_of
from expertlink.engines.nvlink.ht.mode import HtMode
from expertlink.engines.nvlink.launch import Program, compile_program
from expertlink.engines.nvlink.ll.mode import LlMode
from expertlink.jit.compiler import compile_kernel
from expertlink.routing import Placement, even_blocks
from support.across_hosts import fields_of, hosts_of
from support.cases import (
    LL,
    Kernels,
    ht_kernels,
    ht_process_kernels,
    ll_kernels,
    ll_process_kernels,
    usual,
)
from support.jobs import config_of
from support.soak.settings import config_for, settings, settings_across

ROOT = Path(__file__).parents[1]
DRY = ("tests/ht", "tests/ll", "tests/nvlink", "tests/hybrid", "tests/compat")
HOSTS = ((2, 2), (2, 4), (4, 4))  # hosts and ranks of tests with processes
Request = tuple[str, str, str]
"""Source, instance and prelude of a kernel."""


class Requests:
    """The kernels that somebody has asked for, each once."""

    def __init__(self) -> None:
        self.found: dict[Request, None] = {}

    def note(self, source: str, instance: str, arch: str, *, prelude: str = "") -> mock.Mock:
        """Takes the place of `compile_kernel`."""
        del arch
        self.found[source, instance, prelude] = None
        return mock.Mock()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Kernels are noted in place of being compiled."""
        with mock.patch.object(launch, "compile_kernel", self.note):
            yield


# -- what is listed -------------------------------------------------------------------------------


def note_listed(requests: Requests) -> None:
    """Communicators of `support/cases.py`, and those of processes on several hosts and of soaks;
    and kernels that no communicator specialises."""
    requests.found |= dict.fromkeys(_single_kernels())
    with requests.noted():
        for wanted in (*ll_kernels(), *ll_process_kernels(), *ht_kernels(), *ht_process_kernels()):
            _note(wanted)
        for hosts, ranks in HOSTS:
            _note_hosts(hosts_of(hosts, ranks))
        for seed in range(2):
            for setting in settings(4, seed):
                _note_config(config_for(setting, "cuda:0"), 4)


def _single_kernels() -> Iterator[Request]:
    for dtype in (torch.bfloat16, torch.float16):
        for instance in weighted_backward.instances(dtype).values():
            yield "backward/weighted_backward", instance, weighted_backward.PRELUDE
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for instance in ordered_sum.instances(dtype).values():
            yield "collective/ordered_sum", instance, ordered_sum.PRELUDE
    orders = (send_order.count_instances(), send_order.order_instances())
    for instance in (instance for found in orders for instance in found.values()):
        yield "collective/send_order", instance, send_order.PRELUDE
    for instance in layout.instances().values():
        yield "compat/token_layout", instance, layout.PRELUDE
    for instance in ("put_rows", "get_rows"):
        yield "bench/ceiling", instance, ceilings.PRELUDE
    yield "bench/flag_latency", "flag_latency", flag_latency.ARGUMENTS.declaration
    yield "hybrid/rail_mark", "rail_mark", words.ARGUMENTS.declaration


def _note(wanted: Kernels) -> None:
    shape = wanted.shape
    fields: dict[str, Any] = {
        "zero_copy": wanted.zero_copy,
        "static_shapes": wanted.static_shapes,
        "check_inputs": wanted.check_inputs,
        "source_tokens": wanted.source_tokens,
    }
    if wanted.mode == "ll":
        quantization = "e4m3_float32" if wanted.quantized else None
        masks = wanted.mask_lost_peers
        fields = {**LL, "quantization": quantization, "mask_lost_peers": masks}
    config = config_of(shape.case(), "cuda:0", **fields)
    masks_of_block = wanted.mask_words or tuning.LL_MASK_WORDS
    mode = LlMode if wanted.mode == "ll" else HtMode
    with mock.patch.object(tuning, "LL_MASK_WORDS", masks_of_block):
        plan = mode.plan(config, shape.ranks)
        program = mode.program(config, plan, num_ranks=shape.ranks)
        _ask(config, program, num_ranks=shape.ranks, hosted=wanted.hosted)


def _note_config(config: MoECommunicatorConfig, num_ranks: int) -> None:
    """A communicator of processes on one host."""
    owners = even_blocks(config.num_experts, num_ranks)
    mode = mode_of(config, Placement.from_ranks(owners, num_ranks=num_ranks))
    program = mode.program(config, mode.plan(config, num_ranks), num_ranks=num_ranks)
    _ask(config, program, num_ranks=num_ranks)


def _note_hosts(domains: tuple[int, ...]) -> None:
    """Communicators of processes on several hosts."""
    ranks = len(domains)
    for received in DispatchLayout:
        case = usual(ranks, received).case(domains=domains)
        for mode, fields in (("ht", {}), ("ht", {"static_shapes": True}), ("ll", {})):
            _note_across(config_of(case, "cuda:0", **fields_of(mode, "hybrid", **fields)), domains)
        for fmt in BlockFormat:
            fields = fields_of("ll", "hybrid", quantization=fmt.value)
            _note_across(config_of(case, "cuda:0", **fields), domains)
    for setting in settings_across(domains, len(set(domains)), engine="hybrid"):
        _note_across(config_for(setting, "cuda:0"), domains)


def _note_across(config: MoECommunicatorConfig, hosts: tuple[int, ...]) -> None:
    domains = Domains(hosts)
    if config.mode == "ll":
        program = RailLlMode.program_of(config, RailLlMode.plan_of(config, domains), domains)
    else:
        plan = HybridPlan.across(config, domains, chunk_rows=None)
        program = RailHtMode.program_of(config, plan, domains)
    peers = domains.ranks_per_host
    _ask(config, program, num_ranks=len(hosts), num_peers=peers)


def _ask(config: MoECommunicatorConfig, program: Program, **options: Any) -> None:
    compile_program(config, program, arch="", **options)


# -- what tests ask for ---------------------------------------------------------------------------


class DryRun:
    """Runs tests of one GPU up to their first call; which of them fail then is of no matter."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keeps the tests that need one GPU."""
        items[:] = [item for item in items if _gpus_of(item) == 1]


def _gpus_of(item: pytest.Item) -> int:
    marker = item.get_closest_marker("gpu")
    return 0 if marker is None else int(marker.args[0]) if marker.args else 1


def _no_call(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("a dry run makes no call")


def note_dry_run(requests: Requests, folders: tuple[str, ...] = DRY) -> None:
    """Communicators that hosted tests make."""
    from expertlink.launch import RankPool
    from support import emulator, hosted, side_by_side

    with pytest.MonkeyPatch.context() as patch, requests.noted():
        emulator.emulate(patch)
        patch.setattr(launch, "compile_kernel", requests.note)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(hosted, "prepare", lambda *_: None)
        patch.setattr(hosted, "run_hosted", lambda *_: [])
        patch.setattr(hosted, "run_cases", lambda *_: None)
        for kind in (side_by_side.Rank, hosted.HostedCommunicator):
            for call in ("dispatch", "dispatch_in_line"):
                patch.setattr(kind, call, _no_call)
        patch.setattr(RankPool, "__init__", _no_call)
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no", "--timeout=60"]
        with contextlib.redirect_stdout(io.StringIO()):
            pytest.main([*options, *(str(ROOT / one) for one in folders)], plugins=[DryRun()])


# -- compiling ------------------------------------------------------------------------------------


def compile_one(request: Request, arch: str) -> None:
    """Compiles a kernel, unless the cache has it."""
    source, instance, prelude = request
    compile_kernel(source, instance, arch, prelude=prelude)


def main() -> None:
    started = time.monotonic()
    arch = sys.argv[1] if len(sys.argv) > 1 else "sm_90a"
    requests = Requests()
    note_listed(requests)
    note_dry_run(requests)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for future in [pool.submit(compile_one, request, arch) for request in requests.found]:
            future.result()
    seconds = time.monotonic() - started
    sys.stdout.write(f"{len(requests.found)} kernels in {seconds:.0f} s\n")


if __name__ == "__main__":
    main()
