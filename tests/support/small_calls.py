"""A small communicator on the CPU, good arguments for it, and a check that it works."""

from __future__ import annotations

from typing import Any

import torch

from expertlink import MoECommunicator, MoECommunicatorConfig

T, H, K, E = 4, 8, 2, 6


def make(**fields: Any) -> MoECommunicator:
    defaults: dict[str, Any] = {
        "num_experts": E,
        "hidden_size": H,
        "topk": K,
        "max_tokens_per_rank": T,
        "dtype": torch.float32,
        "device": "cpu",
    }
    return MoECommunicator(MoECommunicatorConfig(**{**defaults, **fields}))


def good() -> dict[str, Any]:
    return {
        "input": torch.randn(T, H),
        "topk_ids": torch.tensor([[0, 1], [2, 3], [4, 5], [-1, 0]]),
        "weights": torch.rand(T, K),
    }


def works(comm: MoECommunicator) -> None:
    fields = good()
    out, handle = comm.dispatch(**fields)
    result = comm.combine(out.tokens, handle)
    assert isinstance(result, torch.Tensor)
    kept = torch.where(fields["topk_ids"] >= 0, fields["weights"], 0.0).sum(1, keepdim=True)
    torch.testing.assert_close(result, fields["input"] * kept)
