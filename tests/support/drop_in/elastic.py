"""`ElasticBuffer`: what DeepEP's test_ep asserts, bit for bit, and more."""

from __future__ import annotations

import functools
import gc
import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertlink.compat.deep_ep import ElasticBuffer, EPHandle, topk_idx_t
from expertlink.domains import Domains
from support.drop_in.decode import refusal
from support.drop_in.inputs import (
    Arrivals,
    Shapes,
    Tokens,
    all_tokens,
    arrivals,
    column_major,
    to_fp8,
)
from support.drop_in.place import Place


def aligned(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


@dataclass(frozen=True)
class Expanded:
    """Rows of a rank, grouped by expert.

    Attributes:
        starts: first row of each expert's group.
        total: rows of all groups.
        arrival_of_row: `[total]` arrival that fills the row, -1 for gaps.
        row_of_lane: `[N, K]` row of every choice of every arrival, or -1.
    """

    starts: list[int]
    total: int
    arrival_of_row: Tensor
    row_of_lane: Tensor


def expanded(expected: Arrivals, alignment: int) -> Expanded:
    """Where arrivals lie when every (token, local expert) has a row."""
    starts, end = [], 0
    for count in expected.per_expert:
        starts.append(end)
        end += aligned(count, alignment)
    arrival_of_row = torch.full((end,), -1, dtype=torch.int64, device=expected.x.device)
    row_of_lane = torch.full_like(expected.ids, -1)
    for expert, start in enumerate(starts):
        arrival, lane = (expected.ids == expert).nonzero(as_tuple=True)
        rows = torch.arange(start, start + len(arrival), device=end_device(expected))
        arrival_of_row[rows] = arrival
        row_of_lane[arrival, lane] = rows
    return Expanded(starts, end, arrival_of_row, row_of_lane)


def end_device(expected: Arrivals) -> torch.device:
    return expected.x.device


def made_by(x: Tensor, expert: int) -> Tensor:
    """What an expert makes of rows: some cancel out, so that the order of sums can be seen."""
    factor = (0.3 + 0.1 * expert, 2.0**20, -(2.0**20))[expert % 3]
    return (x.float() * factor).to(torch.bfloat16)


class Reference:
    """What combine must return, in DeepEP's words: a rank's partial sum, rounded, stands at its
    rightmost lane; the token's rank adds up from left to right, from the biases, and rounds.

    Over several hosts it adds up their sums of ranks, rounded, in ascending order."""

    def __init__(self, shapes: Shapes, domains: Domains, *, by_rank: bool) -> None:
        self.shapes, self.num_ranks, self.domains = shapes, domains.num_ranks, domains
        self.by_rank = by_rank  # ranks in ascending order, not by their rightmost lanes

    def rows_of(self, own: Tokens, *, expand: bool, exact: bool) -> Any:
        """`(rank, highest lane, partial)` of every term of every token."""
        local = self.shapes.experts // self.num_ranks
        for token in range(len(own.x)):
            terms: dict[int, tuple[int, Tensor]] = {}
            for lane, expert in enumerate(own.ids[token].tolist()):
                if expert < 0:
                    continue
                rank = expert // local
                x = own.x[token : token + 1]
                row = made_by(x, expert if expand else rank * local)[0].float()
                if exact:
                    terms[1000 + lane] = (lane, row)
                elif rank in terms and expand:
                    terms[rank] = (lane, terms[rank][1] + row)
                else:
                    terms[rank] = (lane, row)
            order = sorted(terms) if self.by_rank else sorted(terms, key=lambda r: terms[r][0])
            partials = {rank: terms[rank][1].to(torch.bfloat16).float() for rank in order}
            several = self.domains.num_hosts > 1 and not exact
            yield self.of_hosts(partials) if several else list(partials.values())

    def of_hosts(self, partials: dict[int, Tensor]) -> list[Tensor]:
        """Sums of the partials of each host that has any."""
        found = []
        for host in range(self.domains.num_hosts):
            own = [partials[rank] for rank in self.domains.ranks_of(host) if rank in partials]
            if own:
                found.append(functools.reduce(torch.add, own).to(torch.bfloat16).float())
        return found

    def __call__(
        self, own: Tokens, biases: list[Tensor], *, expand: bool, exact: bool = False
    ) -> Tensor:
        total = torch.zeros(own.x.shape, dtype=torch.float32, device=own.x.device)
        for bias in biases:
            total = total + bias.float()
        for token, terms in enumerate(self.rows_of(own, expand=expand, exact=exact)):
            for term in terms:
                total[token] = total[token] + term
        return total.to(torch.bfloat16)


class TestEp:
    """One rank's part of the test."""

    __test__ = False

    def __init__(self, place: Place, shapes: Shapes, **fields: Any) -> None:
        self.place, self.shapes = place, shapes
        self.most = shapes.tokens
        self.buffer: Any = ElasticBuffer(
            place.group,
            num_max_tokens_per_rank=self.most,
            hidden=shapes.hidden,
            num_topk=shapes.topk,
            explicitly_destroy=True,
            **fields,
        )
        self.everyone = all_tokens(shapes, place)
        self.own = self.everyone[place.rank]
        self.expected = arrivals(self.everyone, shapes, place.rank)
        self.per_rank = [
            int((self.expected.source_rank <= source).sum()) for source in range(place.num_ranks)
        ]

    def dispatch(self, x: Any, **options: Any) -> Any:
        result = self.buffer.dispatch(x, **options)
        event = result[-1]
        assert (event.event is not None) == options.get("async_with_compute_stream", False)
        if event.event is not None:
            event.current_stream_wait()
        return result[:-1]

    def check(self, fp8: bool, expand: bool, alignment: int, sync: bool, copies: bool) -> None:
        """One combination of switches."""
        shapes, own, expected = self.shapes, self.own, self.expected
        x: Any = own.x
        rows_sent, scales_sent = to_fp8(own.x)
        if fp8:
            x = (rows_sent, column_major(scales_sent) if copies else scales_sent)
        stats = torch.ones(len(expected.per_expert), dtype=torch.int32, device=own.x.device)
        received, ids, weights, handle = self.dispatch(
            x,
            topk_idx=own.ids.to(topk_idx_t),
            topk_weights=own.weights,
            cumulative_local_expert_recv_stats=stats,
            num_experts=shapes.experts,
            expert_alignment=alignment,
            do_expand=expand,
            do_cpu_sync=sync,
            do_zero_padding=expand,
            do_handle_copy=copies,
            use_tma_aligned_col_major_sf=copies and fp8,
            async_with_compute_stream=copies,
        )
        # 1.
        assert torch.equal(handle.topk_idx, own.ids)
        assert (handle.topk_idx is own.ids) != copies
        assert (stats - 1).tolist() == expected.per_expert
        self.check_handle(handle, expand, alignment, sync)
        self.check_rows(received, ids, weights, handle, fp8, expand, alignment, copies)
        self.check_cached(x, received, ids, weights, handle, expand)
        self.check_combine(handle, weights, expand, alignment)

    def check_handle(self, handle: EPHandle, expand: bool, alignment: int, sync: bool) -> None:
        """5. Counts in both conventions."""
        expected, most = self.expected, self.most
        counts = [aligned(count, alignment) for count in expected.per_expert]
        assert handle.num_unaligned_recv_tokens_per_expert.tolist() == expected.per_expert
        assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == self.per_rank
        assert handle.psum_num_recv_tokens_per_scaleup_rank.dtype is torch.int32
        ends = list(itertools.accumulate(counts))
        if expand:
            starts = [0, *ends[:-1]]
            ends = [s + c for s, c in zip(starts, expected.per_expert, strict=True)]
        assert handle.psum_num_recv_tokens_per_expert.tolist() == ends
        assert handle.psum_num_recv_tokens_per_expert.dtype is torch.int32
        assert handle.num_recv_tokens_per_expert_list == (counts if sync else [])
        ranks, local = self.place.num_ranks, len(counts)
        worst = ranks * most * min(self.shapes.topk, local) + (alignment - 1) * local
        if sync:
            assert handle.num_recv_tokens == len(expected.x)
            assert handle.num_expanded_tokens == sum(counts)
        else:
            assert handle.num_recv_tokens == ranks * most
            assert handle.num_expanded_tokens == aligned(worst, alignment)
        assert handle.dst_buffer_slot_idx.shape == handle.topk_idx.shape

    def check_rows(
        self,
        received: Any,
        ids: Tensor | None,
        weights: Tensor,
        handle: EPHandle,
        fp8: bool,
        expand: bool,
        alignment: int,
        turned: bool,
    ) -> None:
        """2. and 3. What arrives, and the metadata that says where from."""
        expected, most = self.expected, self.most
        count = len(expected.x)
        metadata = handle.recv_src_metadata[:count]
        assert len(handle.recv_src_metadata) == handle.num_recv_tokens
        first = expected.source_rank * most + expected.source_token
        assert torch.equal(metadata[:, 0].long(), first)
        lanes = torch.arange(self.shapes.topk, device=first.device)
        highest = torch.where(expected.ids >= 0, lanes, -1).amax(dim=1)
        assert torch.equal(metadata[:, 1].long(), expected.source_rank * self.shapes.topk + highest)
        rows, scales = received if fp8 else (received, None)
        want, want_scales = to_fp8(expected.x) if fp8 else (expected.x, None)
        total = handle.num_expanded_tokens if expand else handle.num_recv_tokens
        assert len(rows) == total
        if scales is not None and turned:
            assert scales.stride() == (1, aligned(total, 4))
        if not expand:
            assert ids is not None
            assert ids.shape == weights.shape == (total, self.shapes.topk)
            assert torch.equal(ids[:count], expected.ids)
            kept = torch.where(expected.ids >= 0, weights[:count], 0.0)
            assert torch.equal(kept, expected.weights)
            assert torch.equal(rows[:count].view(torch.uint8), want.view(torch.uint8))
            if scales is not None and want_scales is not None:
                assert torch.equal(scales[:count], want_scales)
            return
        assert ids is None
        assert weights.shape == (total,)
        where = expanded(expected, alignment)
        assert torch.equal(metadata[:, 2:].long(), where.row_of_lane)
        filled = where.arrival_of_row >= 0
        source = where.arrival_of_row[filled]
        groups = rows[: where.total]
        assert torch.equal(groups[filled].view(torch.uint8), want[source].view(torch.uint8))
        assert not groups[~filled].view(torch.uint8).any(), "gaps are zero"
        assert not weights[: where.total][~filled].any()
        if scales is not None and want_scales is not None:
            assert torch.equal(scales[: where.total][filled], want_scales[source])
        for arrival, lane in (where.row_of_lane >= 0).nonzero().tolist():
            row = where.row_of_lane[arrival, lane]
            assert weights[row] == expected.weights[arrival, lane]

    def check_cached(
        self, x: Any, received: Any, ids: Any, weights: Any, handle: EPHandle, expand: bool
    ) -> None:
        """4. A cached dispatch brings the same, and returns the very handle."""
        count = self.filled(handle, expand)
        slots, sums = handle.dst_buffer_slot_idx, handle.psum_num_recv_tokens_per_expert
        for given in (None, self.own.weights):
            rows, again_ids, again_weights, same = self.dispatch(
                x, handle=handle, topk_weights=given, do_expand=expand, do_zero_padding=expand
            )
            assert same is handle
            assert same.dst_buffer_slot_idx is slots
            assert same.psum_num_recv_tokens_per_expert is sums
            for old, new in zip(as_tuple(received), as_tuple(rows), strict=True):
                assert len(old) == len(new)
                assert torch.equal(old[:count].float(), new[:count].float())
            if expand:
                assert again_ids is None
            else:
                assert torch.equal(again_ids[:count], ids[:count])
                assert again_ids.data_ptr() != ids.data_ptr()
            if given is None:
                assert again_weights is None
            else:
                assert torch.equal(again_weights[:count], weights[:count])

    def filled(self, handle: EPHandle, expand: bool) -> int:
        if not expand:
            return len(self.expected.x)
        return int(handle.psum_num_recv_tokens_per_expert[-1])

    def check_combine(
        self, handle: EPHandle, weights: Tensor, expand: bool, alignment: int
    ) -> None:
        """6. Sums with 0, 1 and 2 biases; weights come back to every lane exactly."""
        expected, place = self.expected, self.place
        local = len(expected.per_expert)
        total = handle.num_expanded_tokens if expand else handle.num_recv_tokens
        rows = torch.full(
            (total, self.shapes.hidden), float("nan"), dtype=torch.bfloat16, device=place.device
        )
        if expand:
            where = expanded(expected, alignment)
            for expert, (start, count) in enumerate(
                zip(where.starts, expected.per_expert, strict=True)
            ):
                source = where.arrival_of_row[start : start + count]
                number = place.rank * local + expert
                rows[start : start + count] = made_by(expected.x[source], number)
        else:
            rows[: len(expected.x)] = made_by(expected.x, place.rank * local)
        exact = expand and not self.buffer.allow_multiple_reduction and place.device.type == "cpu"
        biases = [self.own.x, (self.own.x.float() * -0.7).to(torch.bfloat16)]
        by_lane = Reference(self.shapes, place.domains, by_rank=False)
        by_rank = Reference(self.shapes, place.domains, by_rank=True)
        for number in range(3):
            given: Any = (None, biases[0], tuple(biases))[number]
            combined, back, event = self.buffer.combine(
                rows,
                handle,
                topk_weights=None if exact else weights,
                bias=given,
                async_with_compute_stream=number == 1,
            )
            if event.event is not None:
                event.current_stream_wait()
            if number:
                want = by_lane(self.own, biases[:number], expand=expand)
            else:
                want = by_rank(self.own, [], expand=expand, exact=exact)
                if place.num_ranks == 2 and not exact:  # two terms: their order is irrelevant
                    assert torch.equal(want, by_lane(self.own, [], expand=expand))
            assert torch.equal(combined, want)
            if exact:
                assert back is None
            else:
                assert torch.equal(back, self.own.weights)


def as_tuple(rows: Any) -> tuple[Tensor, ...]:
    return rows if isinstance(rows, tuple) else (rows,)


def elastic(place: Place, shapes: Shapes, fields: dict[str, Any]) -> bool:
    """The whole test on one rank."""
    test = TestEp(place, shapes, **fields)
    with torch.inference_mode():
        for fp8, expand, sync in itertools.product((False, True), repeat=3):
            test.check(fp8, expand, alignment=1 if fp8 else 8, sync=sync, copies=fp8 == sync)
        test.buffer.barrier()
        # 7.
        options: dict[str, Any] = {"topk_idx": test.own.ids, "num_experts": shapes.experts}
        first, second = (test.dispatch(test.own.x, **options)[0] for _ in range(2))
        assert torch.equal(first, second)
    test.buffer.destroy()
    test.buffer.destroy()
    return True


def handles_that_outlive_communicators(place: Place, shapes: Shapes) -> bool:
    """What handles say is first read once their buffer has grown, and once it was destroyed."""
    test = TestEp(place, shapes)
    options: dict[str, Any] = {"topk_idx": test.own.ids, "topk_weights": test.own.weights}
    options["num_experts"] = shapes.experts

    def dispatched(expand: bool) -> tuple[Any, ...]:
        return test.dispatch(test.own.x, do_expand=expand, **options)

    both = [(expand, [dispatched(expand) for _ in range(2)]) for expand in (False, True)]
    made = [weakref.ref(comm) for comm in test.buffer.runtime._members.values()]
    for expand, results in both:
        test.dispatch(
            test.own.x, do_expand=expand, num_max_tokens_per_rank=50 * shapes.tokens, **options
        )
        rows, ids, weights, handle = results[0]
        test.check_handle(handle, expand, alignment=1, sync=True)
        test.check_rows(rows, ids, weights, handle, False, expand, 1, False)
    test.buffer.destroy()
    gc.collect()
    if not place.kernels:  # elsewhere the test keeps communicators too
        assert [ref() for ref in made] == [None] * len(made), "handles keep no communicator"
    for expand, results in both:
        rows, ids, weights, handle = results[1]
        test.check_handle(handle, expand, alignment=1, sync=True)
        test.check_rows(rows, ids, weights, handle, False, expand, 1, False)
    return True


def constructor(place: Place, shapes: Shapes) -> list[str]:
    """Attributes, hints, and what is refused."""
    group, ranks = place.group, place.num_ranks
    hint = ElasticBuffer.get_buffer_size_hint
    small, large = hint(group, 64, 256, num_topk=2), hint(group, 128, 256, num_topk=2)
    assert 0 < small <= large
    assert small % (2 << 20) == 0
    buffer: Any = ElasticBuffer(
        group,
        num_bytes=small,
        num_max_tokens_per_rank=shapes.tokens,
        explicitly_destroy=True,
    )
    assert (buffer.group, buffer.num_bytes, buffer.rank_idx) == (group, small, place.rank)
    assert (buffer.num_scaleout_ranks, buffer.num_scaleup_ranks) == (1, ranks)
    assert buffer.get_physical_domain_size() == buffer.get_logical_domain_size() == (1, ranks)
    assert (buffer.scaleout_rank_idx, buffer.scaleup_rank_idx) == (0, place.rank)
    assert buffer.num_allocated_qps == 129
    sms = buffer.get_theoretical_num_sms(shapes.experts, shapes.topk)
    assert sms >= 4
    assert sms % 2 == 0
    assert buffer.get_theoretical_num_qps(sms) <= 129
    own = all_tokens(shapes, place)[place.rank]
    x, ids, experts = own.x, own.ids, shapes.experts
    rows, _, weights, handle, _ = buffer.dispatch(x, ids, own.weights, num_experts=experts)
    assert isinstance(rows, Tensor)
    assert weights is not None
    more = torch.cat([x] * (shapes.tokens + 1))[: shapes.tokens + 1]
    more_ids = torch.cat([ids] * (shapes.tokens + 1))[: shapes.tokens + 1]
    said = [
        refusal(lambda: ElasticBuffer(group)),
        refusal(lambda: ElasticBuffer(group, num_bytes=1000)),
        refusal(lambda: ElasticBuffer(group, num_bytes=small, num_cpu_bytes=1)),
        refusal(lambda: buffer.dispatch(x, ids)),
        refusal(lambda: buffer.dispatch(x, num_experts=experts)),
        refusal(lambda: buffer.dispatch(x, ids, handle=handle)),
        refusal(lambda: buffer.dispatch(x, handle=handle, do_cpu_sync=True)),
        refusal(lambda: buffer.dispatch(x, handle=handle, num_experts=experts + ranks)),
        refusal(lambda: buffer.dispatch(more, more_ids, num_experts=experts)),
        refusal(lambda: buffer.dispatch(x, ids, num_experts=experts, do_zero_padding=True)),
        refusal(lambda: buffer.combine(rows[1:], handle)),
        refusal(lambda: buffer.combine(rows, handle, topk_weights=weights[:, 0])),
        refusal(lambda: buffer.combine(rows, (1, 2))),  # type: ignore[arg-type]
        refusal(lambda: buffer.combine(rows, EPHandle(*[None] * 14))),  # type: ignore[arg-type]
        refusal(lambda: buffer.dispatch(x, ids, experts=experts)),  # type: ignore[call-arg]
        refusal(lambda: ElasticBuffer(group, num_bytes=small).destroy()),
    ]
    assert torch.equal(buffer.dispatch(x, handle=handle)[0], rows)  # type: ignore[arg-type]
    other, _, _, same, _ = buffer.dispatch(x, handle=handle, do_expand=True)
    assert same is handle
    direct = buffer.dispatch(x, ids, num_experts=experts, do_expand=True)[0]
    assert torch.equal(other, direct)  # type: ignore[arg-type]
    again = buffer.dispatch(x, handle=handle, do_expand=True)[0]
    assert torch.equal(again, direct)  # type: ignore[arg-type]
    handle.num_sms = 6  # callers assign attributes
    assert handle.num_sms == 6
    buffer.destroy()
    said.append(refusal(lambda: buffer.combine(rows, handle)))
    return said


def in_graph(place: Place, shapes: Shapes) -> bool:
    """Expanded and not, without a host wait, in a CUDA graph that is replayed."""
    test = TestEp(place, shapes)
    stream = torch.cuda.Stream(place.device)
    x, ids = test.own.x.clone(), test.own.ids.clone()
    local = shapes.experts // place.num_ranks
    for expand in (False, True):

        def layer(expand: bool = expand) -> Tensor:
            rows, _, _, handle, _ = test.buffer.dispatch(
                x, ids, num_experts=shapes.experts, do_expand=expand, do_cpu_sync=False
            )
            assert isinstance(rows, Tensor)
            return test.buffer.combine(rows, handle)[0]

        with torch.inference_mode(), torch.cuda.stream(stream):
            layer()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = layer()
            for seed in (1, 2):
                own = all_tokens(Shapes(**{**vars(shapes), "seed": seed}), place)[place.rank]
                x.copy_(own.x)
                ids.copy_(own.ids)
                graph.replay()
                ranks = own.ids // local
                copies = (own.ids >= 0).sum(dim=1)
                if not expand:
                    here = [(ranks == rank).any(dim=1) for rank in range(place.num_ranks)]
                    copies = torch.stack(here).sum(dim=0)
                torch.testing.assert_close(
                    result.float(), own.x.float() * copies[:, None], rtol=0.02, atol=0.02
                )
    return True
