"""Chunks: every row crosses the rail once, none is too large, and all ranks derive the same."""

from __future__ import annotations

import random

import pytest

from expertlink.engines.hybrid import schedule as schedules
from expertlink.engines.hybrid.schedule import TAPER, chunk_sizes, schedule, splits
from support.depth import deep

ROW = 7168 * 2


def drawn(seed: int) -> tuple[list[list[int]], int, int]:
    draw = random.Random(seed)
    hosts, most = draw.randint(1, 5), draw.choice((1, 7, 255, 256, 257, 512, 1024, 2048))
    highest = draw.choice((0, 1, 300, 1000, 5000))
    rows_NN = [
        [draw.choice((0, draw.randint(0, highest))) for _ in range(hosts)] for _ in range(hosts)
    ]
    return rows_NN, most, draw.choice((1, 74, 300, 600))


@pytest.mark.parametrize("first", range(0, deep(200), 50))
def test_every_row_travels_once(first: int) -> None:
    for seed in range(first, first + 50):
        _every_row_travels_once(seed)


def _every_row_travels_once(seed: int) -> None:
    rows_NN, most, least = drawn(seed)
    hosts = range(len(rows_NN))
    chunks = schedule(rows_NN, most=most, least=least)
    travelled = {(s, d): list[int]() for s in hosts for d in hosts}
    for chunk in chunks:
        assert 0 < chunk.rows <= most
        parts = [splits(rows_NN, chunk, host) for host in hosts]
        for s in hosts:
            assert parts[s][0][s] == parts[s][1][s] == 0
            for d in hosts:
                assert parts[s][0][d] == parts[d][1][s], "a sender and its receiver disagree"
                assert parts[s][0][d] <= chunk.rows
                travelled[s, d] += range(chunk.start, chunk.start + parts[s][0][d])
    for (s, d), rows in travelled.items():
        assert rows == ([] if s == d else list(range(rows_NN[s][d])))
    assert not chunks or max(
        splits(rows_NN, chunks[-1], host)[0][d] for host in hosts for d in hosts
    )


@pytest.mark.parametrize("first", range(0, deep(100), 50))
def test_own_rows_change_nothing(first: int) -> None:
    for seed in range(first, first + 50):
        _own_rows_change_nothing(seed)


def _own_rows_change_nothing(seed: int) -> None:
    """They do not use the rail, and other ranks of it need not know them."""
    rows_NN, most, least = drawn(seed)
    other = [[row[d] + (s == d) * 9999 for d in range(len(row))] for s, row in enumerate(rows_NN)]
    assert schedule(rows_NN, most=most, least=least) == schedule(other, most=most, least=least)


@pytest.mark.parametrize("first", range(0, deep(200), 50))
def test_sizes_fall_towards_the_end(first: int) -> None:
    for seed in range(first, first + 50):
        _sizes_fall_towards_the_end(seed)


def _sizes_fall_towards_the_end(seed: int) -> None:
    draw = random.Random(seed)
    rows, most = draw.randint(0, 6000), draw.randint(1, 2500)
    least = draw.choice((1, 74, 300, 600))
    sizes = chunk_sizes(rows, most=most, least=least)
    assert sum(sizes) == rows
    assert all(0 < size <= most for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
    # No more chunks than needed, but for those that end the call.
    assert len(sizes) <= -(-rows // most) + len(TAPER)


def test_sizes_of_known_calls() -> None:
    assert chunk_sizes(4096, most=2048) == [1664, 1664, 512, 256]
    assert chunk_sizes(600, most=2048) == [344, 256]
    assert chunk_sizes(511, most=2048) == [511]
    assert chunk_sizes(600, most=2048, least=300) == [600]
    assert chunk_sizes(1100, most=2048, least=300) == [588, 512]
    assert chunk_sizes(0, most=2048) == []


def test_messages_are_large_enough_where_they_can() -> None:
    def most(hosts: int, row_bytes: int, tokens: int) -> int:
        return schedules.rows_per_chunk(hosts, row_bytes=row_bytes, max_tokens=tokens)

    assert most(2, ROW, 4096) == 2048
    assert most(8, ROW, 4096) == 292
    assert most(8, 2048, 4096) == 512, "1 MiB to each host"
    assert most(8, 2048, 128) == 128, "there are no more rows"


@pytest.mark.parametrize(("tokens", "most"), [(1, 1), (128, 2048), (4096, 292), (4097, 2048)])
def test_static_chunks_have_room_for_all(tokens: int, most: int) -> None:
    chunks = schedules.static_schedule(tokens, most=most)
    assert len(chunks) == -(-tokens // most)
    assert [row for c in chunks for row in range(c.start, c.start + c.rows)] == list(range(tokens))
    assert all(chunk.rows == most for chunk in chunks[:-1])
    assert schedules.static_splits(3, chunks[0], 1) == [chunks[0].rows, 0, chunks[0].rows]


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
        sent, received = schedules.rail_bytes(rows_NN, host, ROW)
        assert sent / ROW / tokens == pytest.approx(expected, rel=0.02)
        assert received == sum(rows_NN[s][host] for s in range(hosts) if s != host) * ROW


def test_bytes_of_known_cases() -> None:
    """256 experts, 8 chosen; the figures stand for choices that may repeat, a little fewer."""
    for hosts, rows in ((2, 0.996), (4, 2.70), (8, 4.60)):
        found = schedules.rows_on_rail(hosts, num_experts=256, topk=8)
        assert found == pytest.approx(rows, rel=1.2e-2)
        static = schedules.static_rows_on_rail(hosts, max_tokens=4096, tokens=4096)
        assert static / found == pytest.approx({2: 1.00, 4: 1.11, 8: 1.52}[hosts], rel=1.2e-2)
