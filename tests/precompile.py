"""Compiles the kernels of all nvlink tests into the kernel cache, in parallel. Needs no GPU.

EXPERTLINK_CACHE_DIR=/a/private/folder PYTHONPATH=src python tests/precompile.py [sm_90a]
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.ht.mode import HtMode
from expertlink.engines.nvlink.launch import compile_program
from expertlink.engines.nvlink.ll.mode import LlMode
from support.cases import (
    LL,
    Kernels,
    ht_kernels,
    ht_process_kernels,
    ll_kernels,
    ll_process_kernels,
)
from support.jobs import config_of


def compile_one(wanted: Kernels, arch: str) -> None:
    """Compiles one communicator's kernels, unless the cache has them."""
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
    usual_words = tuning.LL_MASK_WORDS
    try:
        if wanted.mask_words is not None:
            tuning.LL_MASK_WORDS = wanted.mask_words
        mode = LlMode if wanted.mode == "ll" else HtMode
        plan = mode.plan(config, shape.ranks)
        program = mode.program(config, plan, num_ranks=shape.ranks)
        compile_program(config, program, num_ranks=shape.ranks, arch=arch, hosted=wanted.hosted)
    finally:
        tuning.LL_MASK_WORDS = usual_words


def compile_all(arch: str, *, workers: int | None = None) -> int:
    """Compiles all of them; returns their number."""
    work = [*ll_kernels(), *ll_process_kernels(), *ht_kernels(), *ht_process_kernels()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
        for future in [pool.submit(compile_one, wanted, arch) for wanted in work]:
            future.result()
    return len(work)


def main() -> None:
    started = time.monotonic()
    count = compile_all(sys.argv[1] if len(sys.argv) > 1 else "sm_90a")
    sys.stdout.write(f"{count} pairs of kernels in {time.monotonic() - started:.0f} s\n")


if __name__ == "__main__":
    main()
