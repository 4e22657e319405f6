"""torch.compile around a model with calls of every form; tests/compile has those in a graph."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from expertlink import DispatchLayout
from support import training
from support.oracle import Case
from support.small_calls import good, make, works


@pytest.mark.parametrize(
    ("backend", "form"),
    [("aot_eager", "plain"), ("aot_eager", "request"), ("eager", "later"), ("eager", "hook")],
)
def test_compiled_models_give_the_same(rank_pools, backend: str, form: str) -> None:
    layout = DispatchLayout.EXPERT_MAJOR
    case = Case((5, 4), 6, experts=4, topk=2, layout=layout, dtype=torch.float64)
    for worst in rank_pools(2).run(training.compiled, case, backend, form, timeout_s=120):
        assert worst < 1e-12


def test_calls_that_leave_the_graph_are_one_break_each() -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    with make(output_layout="expert_major") as comm:
        fields = good()
        buffer = comm.create_buffers()

        @torch.no_grad()
        def layer(x: torch.Tensor) -> torch.Tensor:
            out, handle = comm.dispatch(
                x.sin(), fields["topk_ids"], fields["weights"], output_buffer=buffer
            )
            return comm.combine(out.tokens.cos(), handle).tan()

        fast: Any = torch.compile(layer, backend=count)
        torch.testing.assert_close(fast(fields["input"]), layer(fields["input"]))
        assert len(graphs) == 3
        fast(fields["input"] + 1)
        assert len(graphs) == 3, "compiled again"
        works(comm)


def test_calls_do_not_load_the_compiler() -> None:
    """torch._dynamo takes seconds to import."""
    source = """
        import sys, torch
        from expertlink import MoECommunicator, MoECommunicatorConfig
        config = MoECommunicatorConfig(num_experts=2, hidden_size=4, topk=1, max_tokens_per_rank=3)
        comm = MoECommunicator(config)
        x = torch.ones(3, 4, dtype=torch.bfloat16, requires_grad=True)
        out, handle = comm.dispatch_async(x, torch.zeros(3, 1).long()).wait()
        comm.combine_async(out.tokens, handle).wait().sum().backward()
        assert "torch._dynamo" not in sys.modules
    """
    lines = [line.strip() for line in source.strip().splitlines()]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=120)
