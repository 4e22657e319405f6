"""What is where in the messages of low-latency calls across hosts; what such calls do not serve."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from expertlink import MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.hybrid.ll.memory import Messages, message_regions
from expertlink.engines.hybrid.ll.messages import CombineMessage, DispatchMessage, most_bytes
from expertlink.engines.hybrid.ll.mode import unavailable_reason
from expertlink.engines.hybrid.ll.tables import RailTableLayout
from expertlink.engines.hybrid.rail import CopyRail
from support.depth import deep

DECODE: dict[str, Any] = {
    "num_experts": 256,
    "hidden_size": 7168,
    "topk": 8,
    "max_tokens_per_rank": 128,
    "mode": "ll",
    "static_shapes": True,
    "device": "cpu",
}
TWO_BY_EIGHT = Domains((0,) * 8 + (1,) * 8)


@pytest.mark.parametrize("seed", range(deep(20)))
def test_parts_of_a_message_lie_side_by_side(seed: int) -> None:
    draw = random.Random(seed)
    bound, topk = draw.randint(1, 300), draw.randint(1, 32)
    row_bytes, scale_bytes = 16 * draw.randint(0, 900), draw.choice([0, 4, 60, 224, 900])
    there = DispatchMessage.of(bound=bound, topk=topk, row_bytes=row_bytes, scale_bytes=scale_bytes)
    sizes = [4 * bound * topk, 4 * bound * topk, bound * scale_bytes, bound * row_bytes]
    _side_by_side(
        [there.ids_at, there.weights_at, there.scales_at, there.rows_at, there.nbytes], sizes
    )
    for grads in (False, True):
        back = CombineMessage.of(bound=bound, topk=topk, row_bytes=row_bytes, grads=grads)
        sizes = [4 * bound * topk * grads, bound * row_bytes]
        _side_by_side([back.grads_at, back.rows_at, back.nbytes], sizes)


def _side_by_side(starts: list[int], sizes: list[int]) -> None:
    """Aligned parts behind a header, without more room than alignment needs."""
    assert starts[0] >= 64
    for at, end, size in zip(starts, starts[1:], sizes, strict=False):
        assert at % 128 == 0
        assert at + size <= end < at + size + 128


def test_memory_holds_the_largest_messages() -> None:
    config = MoECommunicatorConfig(
        **{**DECODE, "output_layout": "expert_major", "quantization": "e4m3_float32"}
    )
    rows = 128 * 14336
    assert rows <= most_bytes(config) <= rows * 1.2
    plain = DispatchMessage.of(bound=128, topk=8, row_bytes=14336, scale_bytes=0)
    small = DispatchMessage.of(bound=128, topk=8, row_bytes=7168, scale_bytes=224)
    assert small.nbytes < 0.53 * plain.nbytes, "e4m3 halves what crosses the rail"
    regions = message_regions(config, 2)
    assert set(regions.values()) == {2 * 2 * most_bytes(config)}
    rail = CopyRail.connected(2, timeout_s=1.0)[1]
    domains, cpu = Domains((0, 0, 1, 1)), torch.device("cpu")
    messages = Messages(config, domains=domains, rank=2, rail=rail, device=cpu)
    taken = {
        part.data_ptr(): part.nbytes for at in messages._sets for part in (at.send, at.receive)
    }
    assert sum(taken.values()) == sum(regions.values())


def test_tables_have_the_tokens_of_a_rail() -> None:
    config = MoECommunicatorConfig(**{**DECODE, "output_layout": "expert_major"})
    tables = RailTableLayout(config, num_ranks=16, num_local=16, num_hosts=2)
    assert tables.copies == 8
    bound = 5
    block = torch.zeros(tables.words(2 * bound), dtype=torch.int32)
    assert tables.view(block, "slots", 2 * bound).shape == (10, 8)
    assert tables.view(block, "rail_ids").shape == (256, 8)
    assert tables.view(block, "rows_to").shape == (16,)


@pytest.mark.parametrize(
    ("domains", "fields", "reason"),
    [
        (TWO_BY_EIGHT, {"combine_precision": "exact"}, "exact"),
        (TWO_BY_EIGHT, {"mask_lost_peers": True}, "wait for all"),
        (Domains(tuple(range(33))), {"num_experts": 33}, "33 hosts"),
        (TWO_BY_EIGHT, {"output_layout": "flat", "static_shapes": False}, "static_shapes"),
    ],
)
def test_what_is_not_served(domains: Domains, fields: dict[str, Any], reason: str) -> None:
    config = MoECommunicatorConfig(**{**DECODE, **fields})
    text = unavailable_reason(config, domains, num_local=16)
    assert text is not None
    assert reason in text
    usual = MoECommunicatorConfig(**{**DECODE, "output_layout": "expert_major"})
    assert unavailable_reason(usual, TWO_BY_EIGHT, num_local=16) is None
