"""Chunks, messages and steps of mode "ht" across hosts: pure functions."""

from __future__ import annotations

import itertools
import random
import types
from typing import Any

import pytest
import torch

from expertlink import MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.hybrid.ht.chunks import exchange, full_message
from expertlink.engines.hybrid.ht.messages import Messages
from expertlink.engines.hybrid.ht.mode import seats_of, unavailable_reason
from expertlink.engines.hybrid.ht.order import Step, combine_steps, dispatch_steps
from expertlink.engines.hybrid.ht.plan import (
    RING,
    HybridPlan,
    Message,
    chunk_starts,
    head_rows,
    largest_row,
    message,
)
from expertlink.engines.hybrid.rail import CopyRail
from expertlink.engines.nvlink.ht.plan import ARENA_ALIGNMENT
from expertlink.engines.nvlink.shared import HEADER_WORDS

MODEL = {"num_experts": 256, "hidden_size": 7168, "topk": 8, "max_tokens_per_rank": 4096}
TWO_BY_EIGHT = Domains((0,) * 8 + (1,) * 8)


def plan_of(domains: Domains = TWO_BY_EIGHT, **fields: object) -> HybridPlan:
    chunk_rows = fields.pop("chunk_rows", None)
    config = MoECommunicatorConfig(device="cpu", **{**MODEL, **fields})  # type: ignore[arg-type]
    assert chunk_rows is None or isinstance(chunk_rows, int)
    return HybridPlan.across(config, domains, chunk_rows=chunk_rows)


def test_chunks_hold_every_token_once() -> None:
    rng = random.Random(1)
    for _ in range(200):
        tokens, most = rng.randint(1, 9000), rng.randint(1, 3000)
        starts = chunk_starts(tokens, most=most)
        sizes = [end - begin for begin, end in itertools.pairwise(starts)]
        assert starts[0] == 0
        assert starts[-1] == tokens
        assert all(0 < size <= most for size in sizes)


@pytest.mark.parametrize("steps_of", [dispatch_steps, combine_steps])
def test_no_message_is_written_before_the_last_one_there_was_read(steps_of: object) -> None:
    for num_chunks in range(1, 3 * RING + 2):
        steps = list(steps_of(num_chunks))  # type: ignore[operator]
        place = {step: index for index, step in enumerate(steps)}
        assert len(place) == len(steps) == 3 * num_chunks
        order = [chunk for step, chunk in steps if step is Step.DRAIN]
        assert sorted(order) == list(range(num_chunks))
        for turn, chunk in enumerate(order):
            assert place[Step.FILL, chunk] < place[Step.DRAIN, chunk]
            assert place[Step.OWN, chunk] < place[Step.DRAIN, chunk]
            if turn >= RING:
                before = order[turn - RING]
                assert before % RING == chunk % RING, "a message of the same memory"
                assert place[Step.DRAIN, before] < place[Step.FILL, chunk]


def test_own_sums_of_a_combine_are_used_before_the_next_ones_are_made() -> None:
    steps = [step for step in combine_steps(7) if step[0] is not Step.FILL]
    order = reversed(range(7))  # the short chunks of the end first
    assert steps == [(step, chunk) for chunk in order for step in (Step.OWN, Step.DRAIN)]


def test_messages_have_a_head_and_nothing_for_the_own_host() -> None:
    lengths = message([5, 9, 0], [1, 9, 2], host=1, head=1)
    assert (lengths.send, lengths.receive) == ((6, 0, 1), (2, 0, 3))


def test_what_came_goes_back_in_a_combine() -> None:
    plan = plan_of(Domains((0, 1, 2)), chunk_rows=512)
    moved: list[tuple[Message, int]] = []

    def note(chunk: int, rows: Message, stride: int) -> None:
        moved.append((rows, stride))

    messages: Any = types.SimpleNamespace(plan=plan, exchange=note)
    told: Any = types.SimpleNamespace(message_bytes=0, head_rows=1, rail_stride=64)
    rows = [([4, 0, 7], [1, 0, 2])]
    exchange(told, messages, 0, rows, host=1)
    exchange(told, messages, 0, rows, host=1, back=True)
    (there, _), (back, _) = moved
    assert (there.send, there.receive) == (back.receive, back.send) == ((5, 0, 8), (2, 0, 3))
    told.message_bytes = full_message(told, plan, 0)
    exchange(told, messages, 0, None, host=1)
    static, stride = moved[-1]
    assert static.send == static.receive
    assert [rows * stride for rows in static.send] == [size := 64 * (plan.starts[1] + 1), 0, size]


@pytest.mark.parametrize("fields", [{}, {"hidden_size": 8}, {"output_layout": "flat"}])
def test_a_message_that_leaves_before_counts_are_known_has_room(fields: dict[str, Any]) -> None:
    """Whatever rows a rank sends, others expect that size: they have not compared any yet."""
    for hosts in (2, 3, 8):
        domains = Domains(tuple(range(hosts)))
        plan = plan_of(domains, **fields)
        config = MoECommunicatorConfig(device="cpu", **{**MODEL, **fields})
        largest = largest_row(config, domains)
        for stride in (largest, 16):
            rows = head_rows(HEADER_WORDS, stride) + plan.starts[1]
            assert rows * stride <= plan.first_message
        assert plan.first_message % 16 == 0
        assert (hosts - 1) * plan.first_message <= plan.messages


def test_heads_are_whole_rows() -> None:
    assert head_rows(HEADER_WORDS, 16) * 16 >= 4 * HEADER_WORDS, "rows of gradients are as short"
    assert [head_rows(words, 64) for words in (1, 16, 17, 33)] == [1, 1, 2, 3]


def test_communicators_of_other_rows_cut_alike() -> None:
    """So that a routing serves them all."""
    hosts = Domains(tuple(range(32)))
    assert plan_of(hosts, hidden_size=64).starts == plan_of(hosts, hidden_size=7168).starts


def test_seats_are_neighbours_on_a_host() -> None:
    assert seats_of(Domains((0, 1, 1, 0))) == [0, 2, 3, 1]


def test_memory_has_room_for_the_largest_messages() -> None:
    plan = plan_of()
    shape = plan.stride
    assert plan.rows == 16 * plan.chunk_rows * shape
    assert plan.messages >= plan.chunk_rows * 14336 + 4 * plan.count_words
    assert plan.total == sum(plan.regions().values())
    assert plan.holds(plan_of(num_experts=128))
    assert not plan.holds(plan_of(num_experts=512))
    assert not plan.holds(plan_of(chunk_rows=512))


def test_memory_that_is_taken_is_that_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    plan = plan_of(hidden_size=64)
    rail = CopyRail.connected(2, timeout_s=1.0)[0]
    messages = Messages(plan, rail=rail, device=torch.device("cpu"))
    assert plan.message_regions() == {
        "messages of the rail": messages.send.nbytes + messages.receive.nbytes,
        "sums of the own host": messages.own_sums.nbytes,
    }


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_memory_by_region(hosts: int) -> None:
    """Staging is of chunks, not of all tokens; messages are of other hosts, both ways."""
    plan = plan_of(Domains(tuple(rank // 8 for rank in range(8 * hosts))))
    largest = max(end - begin for begin, end in itertools.pairwise(plan.starts))
    staged = 14336 + 1024  # a row of the model with room for what travels with it
    regions = {**plan.regions(), **plan.message_regions()}
    assert list(regions) == [
        "flags",
        "counts",
        "rows in transit",
        "messages of the rail",
        "sums of the own host",
    ]
    rows = 8 * hosts * largest
    assert rows * 14336 < regions["rows in transit"] <= rows * staged
    messages = 2 * RING * (hosts - 1) * largest
    heads = 2 * RING * (hosts - 1) * (4 * plan.count_words + staged) + 2 * RING * ARENA_ALIGNMENT
    assert messages * 14336 < regions["messages of the rail"] <= messages * staged + heads
    assert largest * 14336 < regions["sums of the own host"] <= largest * staged


@pytest.mark.parametrize(
    ("domains", "fields", "text"),
    [
        ((0, 0), {}, "one host"),
        ((0, 0, 1), {}, "different numbers"),
        ((0, 1), {"zero_copy": True, "output_layout": "token_major"}, "zero_copy"),
        ((0, 1), {"combine_precision": "exact"}, "exact"),
        ((0, 1), {}, None),
    ],
)
def test_what_is_not_served(
    domains: tuple[int, ...], fields: dict[str, object], text: str | None
) -> None:
    config = MoECommunicatorConfig(device="cpu", **{**MODEL, **fields})  # type: ignore[arg-type]
    reason = unavailable_reason(config, Domains(domains))
    assert (reason is None) == (text is None)
    assert text is None or text in str(reason)
