"""The blocks of the guide to frameworks run: inside the frameworks, or what stands for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from expertlink.launch import RankContext
from support import frameworks, moe_models
from support.moe_models import needs_registry, needs_transformers, preloads
from support.pages import marked_blocks

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "frameworks.md"


def block(mark: str, number: int = 0) -> str:
    return [code for found, code in marked_blocks(PAGE) if found == mark][number]


def run_block(ctx: RankContext, code: str, framework: str = "", module: str = "") -> bool:
    """Runs a block with the names that it goes on from."""
    weights, ids = torch.rand(16, 8).topk(2)
    names: dict[str, Any] = {"torch": torch, "dist": dist, "ids": ids, "weights": weights}
    names["x"] = torch.randn(16, 64)
    if not framework:
        exec(compile(code, PAGE.name, "exec"), names)
        return bool(torch.isfinite(names["logits"]).all()) if "logits" in names else True
    with frameworks.importable(framework, module), torch.no_grad():
        exec(compile(code, PAGE.name, "exec"), names)
    return True


@needs_registry
@preloads
def test_transformers(rank_pools, tmp_path: Path) -> None:
    code = block("torchrun", 0)
    assert "path/to/model" in code
    rank_pools(4).run(moe_models.written, "qwen3_moe", tmp_path, timeout_s=100)
    code = code.replace("path/to/model", str(tmp_path))
    assert all(rank_pools(4).run(run_block, code, timeout_s=100))


@needs_transformers
@preloads
def test_older_transformers(rank_pools) -> None:
    assert all(rank_pools(2).run(run_block, block("torchrun", 1), timeout_s=100))


@pytest.mark.parametrize(
    ("framework", "module"),
    [
        ("torchtitan", "torchtitan.models.common.token_dispatcher"),
        ("flashinfer", "flashinfer.moe_ep.core.comm.communication"),
    ],
)
def test_plug_ins(rank_pools, framework: str, module: str) -> None:
    code = block(framework)
    assert all(rank_pools(2).run(run_block, code, framework, module, timeout_s=100))
