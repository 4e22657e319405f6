"""Compiles what many cases need side by side: one after the other, a grid would take longer to
compile than to measure."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from expertlink.bench.cases import Case
from expertlink.bench.environment import usable_cores
from expertlink.jit import compiler

logger = logging.getLogger("expertlink")

_FEWEST = 3  # communicators; fewer are compiled when they are opened


def compile_ahead(cases: Sequence[Case]) -> int:
    """Fills the cache of kernels for cases of the nvlink engine on one host; returns how many
    communicators were compiled for. Where that fails, for whatever reason, ranks compile when they
    open a communicator, and say what is wrong."""
    wanted = {
        (case.communicator, case.calls.static, case.calls.zero_copy): case
        for case in cases
        if _takes_kernels(case)
    }
    if len(wanted) < _FEWEST or compiler.unavailable_reason() is not None:
        return 0
    context = multiprocessing.get_context("spawn")
    workers = min(len(wanted), usable_cores())
    compiled = 0
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            # In another process: this one leaves the GPUs to its ranks.
            arch = pool.submit(_architecture).result()
        except Exception as error:
            logger.info("nothing is compiled ahead: %s", error)
            return 0
        futures = [pool.submit(compile_for, case, arch) for case in wanted.values()]
        for future in futures:
            try:
                future.result()
                compiled += 1
            except Exception as error:
                logger.info("not compiled ahead: %s", error)
    return compiled


def compile_for(case: Case, arch: str) -> None:
    """Compiles the kernels of a case's communicator, unless the cache has them. Needs no GPU."""
    from expertlink.engines.nvlink.build import mode_of
    from expertlink.engines.nvlink.launch import compile_program
    from expertlink.routing import Placement, even_blocks

    config = case.config(torch.device("cuda", 0), timeout_s=1.0)
    placement = Placement.from_ranks(even_blocks(case.experts, case.ranks), num_ranks=case.ranks)
    mode = mode_of(config, placement)
    program = mode.program(config, mode.plan(config, case.ranks), num_ranks=case.ranks)
    compile_program(config, program, num_ranks=case.ranks, arch=arch)


def _takes_kernels(case: Case) -> bool:
    return type(case) is Case and case.engine in ("auto", "nvlink") and case.hosts == 1


def _architecture() -> str:
    from expertlink.jit.kernel import architecture

    return architecture(torch.device("cuda", 0))
