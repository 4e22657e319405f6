"""The sequence of roundings, of combine and of its backward: every form gives the same bits."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertlink import reduction
from expertlink.engines.collective.ordered_sum import OrderedSum
from expertlink.engines.weighted_backward import WeightedBackward
from expertlink.reduction import ordered_sum, weighted_backward
from support.depth import deep

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Sums(NamedTuple):
    """Arguments of `ordered_sum`."""

    rows: Tensor
    slots: Tensor
    weights: Tensor | None
    hosts: Tensor | None


def reference(drawn: Sums) -> Tensor:
    """Term by term, one result at a time."""
    rows, slots, weights, hosts = drawn
    wide = torch.float64 if rows.dtype is torch.float64 else torch.float32
    out = torch.zeros((slots.shape[0], rows.shape[1]), dtype=wide)
    for m, result in enumerate(slots.tolist()):
        of_hosts: dict[int, Tensor] = {}
        for c, slot in enumerate(result):
            if slot >= 0:
                term = rows[slot].to(wide)
                if weights is not None:
                    term = term * weights[m, c].to(wide)
                host = 0 if hosts is None else int(hosts[slot])
                of_hosts[host] = of_hosts.get(host, torch.zeros_like(out[m])) + term
        if hosts is None:
            out[m] = of_hosts.get(0, out[m])
            continue
        for host in sorted(of_hosts):
            out[m] = out[m] + of_hosts[host].to(rows.dtype).to(wide)
    return out.to(rows.dtype)


@st.composite
def sums(draw: st.DrawFn) -> Sums:
    gen = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    dtype = draw(st.sampled_from(DTYPES))
    results, terms = draw(st.integers(0, 6)), draw(st.integers(1, 9))
    hidden, total = draw(st.sampled_from([1, 7, 8, 64, 136])), draw(st.integers(0, 12))
    rows = torch.randn((total, hidden), generator=gen, dtype=torch.float64)
    rows *= draw(st.sampled_from([1.0, 1e-5, 1e-25, 1e-38]))  # products and results that underflow
    rows[torch.rand(rows.shape, generator=gen) < 0.2] = -0.0
    absent = torch.rand((results, terms), generator=gen) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    slots = torch.randint(0, max(total, 1), (results, terms), generator=gen)
    slots = torch.where(absent | (total == 0), -1, slots)
    weights = hosts = None
    kind = draw(st.sampled_from(["plain", "weighted", "by_host"]))
    if kind == "by_host":
        most = draw(st.sampled_from([1, 2, 3, 9]))
        hosts = torch.randint(0, most, (total,), generator=gen, dtype=torch.int32)
    if kind == "weighted":
        weights = torch.randn((results, terms), generator=gen, dtype=torch.float64)
        weights *= draw(st.sampled_from([1.0, 1e-20]))
        weights = weights.to(torch.float64 if dtype is torch.float64 else torch.float32)
    return Sums(rows.to(dtype), slots, weights, hosts)


def same(actual: Tensor, expected: Tensor) -> bool:
    return torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 1 << 21])
def test_plain_torch_equals_the_definition(chunk_bytes: int, monkeypatch) -> None:
    monkeypatch.setattr(reduction, "_CHUNK_BYTES", chunk_bytes)

    @settings(max_examples=deep(60))
    @given(sums())
    def check(drawn: Sums) -> None:
        rows, slots, weights, hosts = drawn
        expected = reference(drawn)
        out = torch.full_like(expected, float("nan"))
        ordered_sum(rows, slots, weights, hosts_S=hosts, out=out)
        assert same(out, expected), (out, expected)
        if rows.numel():
            out = torch.full_like(expected, float("nan"))
            reduction._sum_by_columns(rows, slots, weights, hosts, out)
            assert same(out, expected), (out, expected)

    check()


@settings(max_examples=deep(60))
@given(sums())
def test_one_host_changes_nothing(drawn: Sums) -> None:
    rows, slots, _, _ = drawn
    plain, by_host = (torch.empty((len(slots), rows.shape[1]), dtype=rows.dtype) for _ in range(2))
    ordered_sum(rows, slots, out=plain)
    host = torch.full((len(rows),), 5, dtype=torch.int32)
    ordered_sum(rows, slots, hosts_S=host, out=by_host)
    assert same(by_host, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_hosts_round_where_a_plain_sum_does_not(dtype: torch.dtype) -> None:
    """1 + e/2 rounds to 1 on the first host; the e/2 of the other then has nobody to join."""
    half = torch.finfo(dtype).eps / 2
    rows = torch.tensor([[1.0], [half], [half]], dtype=dtype)
    slots = torch.tensor([[0, 1, 2]])
    plain, by_host = torch.empty((2, 1, 1), dtype=dtype)
    ordered_sum(rows, slots, out=plain)
    ordered_sum(rows, slots, hosts_S=torch.tensor([0, 0, 1], dtype=torch.int32), out=by_host)
    expected = 1.0 if dtype is torch.float32 else 1.0 + 2 * half
    assert plain.item() == expected
    assert by_host.item() == 1.0
    # The same terms, the small ones together: nothing is lost.
    ordered_sum(rows, slots, hosts_S=torch.tensor([1, 0, 0], dtype=torch.int32), out=by_host)
    assert by_host.item() == 1.0 + 2 * half


def test_rows_that_no_slot_names_are_not_read() -> None:
    rows = torch.full((3, 8), float("nan"))
    rows[1] = 2.0
    out = torch.empty(1, 8)
    slots = torch.tensor([[-1, 1, -1]])
    ordered_sum(
        rows, slots, torch.full((1, 3), float("nan")).index_fill(1, torch.tensor(1), 3.0), out=out
    )
    assert torch.equal(out, torch.full((1, 8), 6.0))


@pytest.mark.gpu
def test_kernel_equals_the_definition() -> None:
    device = torch.device("cuda", 0)
    kernels = {dtype: OrderedSum(device, dtype=dtype, by_host=True) for dtype in DTYPES}

    @settings(max_examples=deep(150))
    @given(sums(), st.booleans())
    def check(drawn: Sums, odd: bool) -> None:
        rows, slots, weights, hosts = drawn
        expected = reference(drawn)
        # An odd start address forbids 16-byte accesses.
        padded = torch.full((rows.numel() + 1,), float("nan"), dtype=rows.dtype, device=device)
        placed = padded[1:] if odd else padded[:-1]
        placed = placed.view(rows.shape).copy_(rows)
        out = torch.full(expected.shape, float("nan"), dtype=rows.dtype, device=device)
        moved = None if weights is None else weights.to(device)
        of = None if hosts is None else hosts.to(device)
        slots = slots.to(device)
        ordered_sum(placed, slots, moved, hosts_S=of, out=out, kernel=kernels[rows.dtype])
        assert same(out, expected), (out, expected)
        if rows.numel() and expected.numel():
            ordered_sum(placed, slots, moved, hosts_S=of, out=out.fill_(float("nan")))
            assert same(out, expected), "plain torch on the GPU"

    check()


@pytest.mark.gpu
@pytest.mark.parametrize("by_host", [False, True])
def test_kernel_on_many_rows(by_host: bool) -> None:
    """More results than blocks, and a shape as a model has it."""
    gen = torch.Generator().manual_seed(0)
    device = torch.device("cuda", 0)
    rows = torch.randn((5000, 7168), generator=gen).bfloat16()
    slots = torch.randint(-3, 5000, (3000, 32 if by_host else 8), generator=gen).clamp(min=-1)
    weights = hosts = moved_weights = moved_hosts = None
    if by_host:
        hosts = torch.randint(0, 9, (5000,), generator=gen, dtype=torch.int32)
        moved_hosts = hosts.to(device)
    else:
        weights = torch.rand((3000, 8), generator=gen)
        moved_weights = weights.to(device)
    out = torch.empty((3000, 7168), dtype=torch.bfloat16)
    ordered_sum(rows, slots, weights, hosts_S=hosts, out=out)
    kernel = OrderedSum(device, dtype=torch.bfloat16, by_host=True)
    moved = torch.empty_like(out, device=device)
    ordered_sum(
        rows.to(device),
        slots.to(device),
        moved_weights,
        hosts_S=moved_hosts,
        out=moved,
        kernel=kernel,
    )
    assert same(moved, out)


# -- backward of weighted rows --------------------------------------------------------------------

WIDTHS = (1, 7, 8, 40, 256, 257, 264, 1000, 2056)


def backward_reference(grads: Tensor, weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Element by element, over all rows at once: scaled gradients, and the weights' gradients."""
    wide = weights.dtype
    parts = [torch.zeros(len(rows), dtype=wide) for _ in range(256)]
    for h in range(rows.shape[1]):
        parts[h % 256] = parts[h % 256] + grads[:, h].to(wide) * rows[:, h].to(wide)
    while len(parts) > 1:
        parts = [one + other for one, other in zip(parts[::2], parts[1::2], strict=True)]
    scaled = (grads.to(wide) * weights[:, None]).to(grads.dtype)
    return scaled, parts[0]


@st.composite
def weighted_rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    dtype = draw(st.sampled_from(DTYPES))
    slots, hidden = draw(st.integers(0, 20)), draw(st.sampled_from(WIDTHS))
    grads, rows = torch.randn((2, slots, hidden), generator=gen, dtype=torch.float64)
    grads *= draw(st.sampled_from([1.0, 1e-5, 1e-25]))  # products that underflow
    rows *= draw(st.sampled_from([1.0, 1e-20]))
    rows[torch.rand(rows.shape, generator=gen) < 0.2] = -0.0
    if slots and draw(st.booleans()):
        rows[0], grads[-1] = -0.0, float("inf")
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    weights = torch.randn(slots, generator=gen, dtype=torch.float64).to(wide)
    return grads.to(dtype), weights, rows.to(dtype)


def equal(actual: Tensor, expected: Tensor) -> bool:
    """Bitwise, but for the sign and payload of NaN."""
    actual, expected = actual.cpu().flatten(), expected.flatten()
    nan = expected.isnan()
    zero = torch.zeros((), dtype=expected.dtype)
    return torch.equal(actual.isnan(), nan) and same(
        torch.where(nan, zero, actual), torch.where(nan, zero, expected)
    )


@pytest.mark.parametrize("chunk_bytes", [1, 20000, 1 << 21])
def test_plain_torch_equals_the_definition_of_backward(chunk_bytes: int, monkeypatch) -> None:
    monkeypatch.setattr(reduction, "_CHUNK_BYTES", chunk_bytes)

    @settings(max_examples=deep(40))
    @given(weighted_rows())
    def check(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
        grads, weights, rows = drawn
        scaled, sums = backward_reference(grads, weights, rows)
        given_rows, only_scaled = rows.clone(), grads.clone()
        actual = weighted_backward(grads, weights, rows)
        assert actual is not None
        assert equal(actual, sums), (actual, sums)
        assert equal(grads, scaled), (grads, scaled)
        assert same(rows, given_rows)
        assert weighted_backward(only_scaled, weights) is None
        assert equal(only_scaled, scaled)

    check()


def test_rows_in_any_order_of_memory() -> None:
    """Saved tensors may come back with other strides."""
    grads, weights, rows = (
        torch.ones(2, 3, 8),
        torch.ones(2, 3),
        torch.rand(8, 3, 2).transpose(0, 2),
    )
    expected = weighted_backward(grads.clone(), weights, rows.contiguous())
    actual = weighted_backward(grads, weights, rows)
    assert actual is not None
    assert expected is not None
    assert same(actual, expected)


@pytest.mark.gpu
def test_backward_kernel_equals_the_definition() -> None:
    device = torch.device("cuda", 0)
    kernels = {dtype: WeightedBackward(device, dtype=dtype) for dtype in DTYPES}

    @settings(max_examples=deep(150))
    @given(weighted_rows(), st.booleans(), st.booleans())
    def check(drawn: tuple[Tensor, Tensor, Tensor], odd: bool, kernel: bool) -> None:
        grads, weights, rows = drawn
        scaled, sums = backward_reference(grads, weights, rows)
        for with_rows in (True, False):
            # An odd start address forbids 16-byte accesses; nothing outside may be written.
            padded = torch.full((grads.numel() + 9,), 7.0, dtype=grads.dtype, device=device)
            placed = padded[1:-8] if odd else padded[:-9]
            placed = placed.view(grads.shape).copy_(grads)
            moved = rows.to(device)
            actual = weighted_backward(
                placed,
                weights.to(device),
                moved if with_rows else None,
                kernel=kernels[rows.dtype] if kernel else None,
            )
            assert equal(placed, scaled), (placed, scaled)
            assert torch.all(padded[-8:] == 7.0)
            assert not odd or padded[0] == 7.0
            assert same(moved, rows)
            assert (actual is None) != with_rows
            assert actual is None or equal(actual, sums), (actual, sums)

    check()


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [8, 2048, 7168, 16384])
def test_backward_kernel_on_many_rows(hidden: int) -> None:
    gen = torch.Generator().manual_seed(0)
    grads, rows = (torch.randn((5003, hidden), generator=gen).bfloat16() for _ in range(2))
    weights = torch.rand(5003, generator=gen)
    device = torch.device("cuda", 0)
    kernel = WeightedBackward(device, dtype=torch.bfloat16)
    moved = grads.to(device)
    actual = weighted_backward(moved, weights.to(device), rows.to(device), kernel=kernel)
    expected = weighted_backward(grads, weights, rows)
    assert actual is not None
    assert expected is not None
    assert same(actual, expected)
    assert same(moved, grads)
