"""Chunks: every row crosses the rail once, none is too large, and all ranks derive the same."""

from __future__ import annotations

import itertools
import random

import pytest

from expertlink.engines.hybrid import schedule as schedules
from expertlink.engines.hybrid.schedule import FIRST, TAPER, chunk_sizes, rail_bytes, splits
from support.depth import deep

ROW = 7168 * 2
Hosts = list[list[set[int]]]
"""By host that sends, by token: the hosts that it goes to."""


def drawn_hosts(draw: random.Random, hosts: int, most: int) -> Hosts:
    every = range(hosts)
    counts = [draw.choice((0, 1, most, draw.randint(0, most))) for _ in every]
    return [[set(draw.choices(every, k=3)) for _ in range(count)] for count in counts]


@pytest.mark.parametrize("first", range(0, deep(100), 50))
def test_every_row_travels_once(first: int) -> None:
    for seed in range(first, first + 50):
        draw = random.Random(seed)
        num_hosts, most = draw.randint(1, 5), draw.choice((1, 7, 255, 256, 257, 512, 600))
        max_tokens = draw.choice((1, 300, 1000, 1300))
        hosts, tokens = range(num_hosts), drawn_hosts(draw, num_hosts, max_tokens)
        starts = itertools.accumulate(chunk_sizes(max_tokens, most=most), initial=0)
        travelled = {(s, d): 0 for s in hosts for d in hosts}
        for begin, end in itertools.pairwise(starts):
            part = [own[begin:end] for own in tokens]
            rows_NN = [[sum(d in to for to in part[s]) for d in hosts] for s in hosts]
            of_host = [splits(rows_NN, host) for host in hosts]
            for s, d in travelled:
                assert of_host[s][0][d] == of_host[d][1][s], "sender and receiver disagree"
                assert of_host[s][0][d] <= most
                travelled[s, d] += of_host[s][0][d]
        for (s, d), rows in travelled.items():
            assert rows == (0 if s == d else sum(d in to for to in tokens[s]))


@pytest.mark.parametrize("first", range(0, deep(200), 50))
def test_sizes_fall_towards_the_ends(first: int) -> None:
    for seed in range(first, first + 50):
        draw = random.Random(seed)
        tokens, most = draw.randint(0, 6000), draw.randint(1, 2500)
        sizes = chunk_sizes(tokens, most=most)
        assert sum(sizes) == tokens
        assert all(0 < size <= most for size in sizes)
        if sizes and sizes[0] < max(sizes):  # what leaves before counts are known is little
            assert sizes[0] == min(most, tokens) // FIRST
            sizes = sizes[1:]
        assert sizes == sorted(sizes, reverse=True)
        # No more chunks than needed, but for those that begin and end the call.
        assert len(sizes) <= -(-tokens // most) + len(TAPER)


def test_sizes_of_known_calls() -> None:
    assert chunk_sizes(4096, most=2048) == [512, 1408, 1408, 512, 256]
    assert chunk_sizes(600, most=2048) == [150, 450]
    assert chunk_sizes(511, most=2048) == [127, 384]
    assert chunk_sizes(1092, most=512) == [128, 354, 354, 256]
    assert chunk_sizes(3, most=2048) == [3]
    assert chunk_sizes(0, most=2048) == []


def test_messages_are_large_enough_where_they_can() -> None:
    def most(hosts: int, row_bytes: int, tokens: int) -> int:
        return schedules.rows_per_chunk(hosts, row_bytes=row_bytes, max_tokens=tokens)

    assert most(2, ROW, 4096) == 2048
    assert most(8, ROW, 4096) == 292
    assert most(8, 2048, 4096) == 512, "1 MiB to each host"
    assert most(8, 2048, 128) == 128, "there are no more tokens"


def test_bytes_of_a_drawn_routing() -> None:
    """What is expected of a token is what drawn tokens do, and what the counts say they did."""
    hosts, experts, topk, tokens = 4, 32, 4, 4000
    draw = random.Random(0)
    rows_NN = [[0] * hosts for _ in range(hosts)]
    for host in range(hosts):
        for _ in range(tokens):
            for other in {e * hosts // experts for e in draw.sample(range(experts), topk)}:
                rows_NN[host][other] += 1
    expected = schedules.rows_on_rail(hosts, num_experts=experts, topk=topk)
    for host in range(hosts):
        sent, received = rail_bytes(rows_NN, host, row_bytes=ROW)
        assert sent / ROW / tokens == pytest.approx(expected, rel=0.02)
        assert received == sum(rows_NN[s][host] for s in range(hosts) if s != host) * ROW


def test_rows_of_known_cases() -> None:
    """256 experts, 8 chosen; the figures stand for choices that may repeat, a little fewer."""
    for hosts, rows in ((2, 0.996), (4, 2.70), (8, 4.60)):
        found = schedules.rows_on_rail(hosts, num_experts=256, topk=8)
        assert found == pytest.approx(rows, rel=1.2e-2)
