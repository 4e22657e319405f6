"""What DeepEP's test_intranode asserts of normal calls, in its order, with its tolerances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expertlink.compat.deep_ep import Buffer, Config
from support.drop_in.inputs import (
    Shapes,
    all_tokens,
    calc_diff,
    choices_per_expert,
    column_major,
    from_fp8,
    members,
    to_fp8,
)
from support.drop_in.place import Place

Rows = Tensor | tuple[Tensor, Tensor]


def plain(rows: Rows) -> Tensor:
    """Rows as bfloat16."""
    return from_fp8(*rows) if isinstance(rows, tuple) else rows


def check_constant(values: Tensor, prefixes: Tensor) -> None:
    """Rows from source i hold i; they lie between the prefixes of sources i - 1 and i."""
    assert torch.equal(values.amin(dim=1), values.amax(dim=1))
    begin = 0
    for source in range(len(prefixes)):
        end = int(prefixes[source])
        assert (values[begin:end] == source).all()
        begin = end
    assert begin == len(values)


class Intranode:
    """One rank's part of the test."""

    def __init__(self, place: Place, shapes: Shapes) -> None:
        self.place, self.shapes = place, shapes
        self.buffer: Any = Buffer(place.group, int(2e9), 0, low_latency_mode=False)
        everyone = all_tokens(shapes, place)
        own = everyone[place.rank]
        num_tokens, rank = shapes.tokens, place.rank
        ones = torch.ones_like
        self.random_x = own.x
        self.constant_x = ones(own.x) * rank
        quantized, scales = to_fp8(self.constant_x)
        self.fp8_x = (quantized, column_major(scales))
        self.ids = own.ids
        self.random_weights = own.weights
        self.constant_weights = ones(own.weights) * rank
        self.config = Config(8, 8, 256)
        self.member_TR = members(self.ids, shapes, place.num_ranks)
        self.per_rank = torch.stack(
            [members(t.ids, shapes, place.num_ranks).sum(dim=0) for t in everyone]
        ).sum(dim=0)
        totals = [choices_per_expert(t.ids, shapes) for t in everyone]
        self.per_expert = [sum(column) for column in zip(*totals, strict=True)]
        assert num_tokens == len(own.x)

    def check_layout(self) -> None:
        """1. Layout tensors equal a reference."""
        got = self.buffer.get_dispatch_layout(self.ids, self.shapes.experts)
        self.num_tokens_per_rank, per_host, self.num_tokens_per_expert, self.in_rank, event = got
        self.check_hosts(per_host)
        assert event.event is None
        assert torch.equal(self.num_tokens_per_rank.long(), self.member_TR.sum(dim=0))
        assert self.num_tokens_per_expert.tolist() == choices_per_expert(self.ids, self.shapes)
        assert torch.equal(self.in_rank, self.member_TR)
        assert (self.num_tokens_per_rank.dtype, self.in_rank.dtype) == (torch.int32, torch.bool)

    def check_hosts(self, per_host: Tensor | None) -> None:
        assert per_host is None

    def prefixes(self, handle: Any) -> Tensor:
        """`[R]` rows from ranks 0 to i."""
        return handle[0][:, self.place.rank]

    def num_rows(self, handle: Any) -> int:
        """Rows, as callers read it of a handle."""
        return handle[3].shape[0]

    def arguments(self, previous: bool, asynchronous: bool) -> dict[str, Any]:
        options: dict[str, Any] = {"async_finish": asynchronous, "config": self.config}
        if previous:
            options["previous_event"] = Buffer.capture()
        return options

    def dispatch(self, x: Rows, previous: bool, asynchronous: bool, **more: Any) -> Any:
        options = self.arguments(previous, asynchronous)
        if "handle" not in more:
            options |= {
                "num_tokens_per_rank": self.num_tokens_per_rank,
                "is_token_in_rank": self.in_rank,
                "num_tokens_per_expert": self.num_tokens_per_expert,
            }
        result = self.buffer.dispatch(x=x, **options, **more)
        event = result[-1]
        assert (event.event is not None) == asynchronous
        if asynchronous:
            event.current_stream_wait()
        return result[:-1]

    def check_round(self, x: Rows, previous: bool, asynchronous: bool, with_topk: bool) -> None:
        """2. to 6. for one way of calling."""
        rank, random = self.place.rank, x is self.random_x
        weights = self.random_weights if random else self.constant_weights
        topk = {"topk_idx": self.ids, "topk_weights": weights} if with_topk else {}
        received, ids, recv_weights, counts, handle = self.dispatch(
            x, previous, asynchronous, **topk
        )
        rows = plain(received)
        prefixes = self.prefixes(handle)
        num_local = self.shapes.experts // self.place.num_ranks
        # 2.
        assert len(rows) == int(self.per_rank[rank])
        assert counts == self.per_expert[rank * num_local : (rank + 1) * num_local]
        if not random:
            check_constant(rows, prefixes)
        if with_topk:  # 3.
            assert ((ids == -1) | ((ids >= 0) & (ids < num_local))).all()
            for expert, count in enumerate(counts):
                assert int((ids == expert).sum()) == count
            kept = recv_weights.clone()
            if not random:
                largest = recv_weights.amax(dim=1, keepdim=True).expand_as(recv_weights)
                recv_weights[ids == -1] = largest[ids == -1]
                check_constant(recv_weights, prefixes)
            self.check_worst(x, previous, asynchronous, topk, (received, ids, kept))
        else:  # 5.
            again, *nothing = self.dispatch(x, previous, asynchronous, handle=handle)
            assert nothing == [None, None, None, None]
            assert torch.equal(plain(again), rows)
            if not random:
                check_constant(plain(again), prefixes)
        # 6.
        options = self.arguments(previous, asynchronous)
        if with_topk:
            options["topk_weights"] = recv_weights
        combined, combined_weights, event = self.buffer.combine(x=rows, handle=handle, **options)
        if asynchronous:
            event.current_stream_wait()
        copies = self.in_rank.sum(dim=1, keepdim=True)
        expected = self.random_x if random else self.constant_x
        assert calc_diff(combined.float() / copies, expected) < 5e-6
        if not with_topk:
            assert combined_weights is None
        elif random:
            assert calc_diff(combined_weights, self.random_weights) < 1e-9
        else:
            assert calc_diff(combined_weights / copies, self.constant_weights) < 1e-9

    def check_worst(
        self,
        x: Rows,
        previous: bool,
        asynchronous: bool,
        topk: dict[str, Tensor],
        usual: tuple[Rows, Tensor, Tensor],
    ) -> None:
        """4. A fixed number of rows."""
        worst = self.shapes.tokens * self.place.num_ranks
        received, ids, weights, counts, handle = self.dispatch(
            x, previous, asynchronous, num_worst_tokens=worst, **topk
        )
        count = len(usual[1])
        assert counts == []
        assert self.num_rows(handle) == worst
        for tensor in (plain(received), ids, weights):
            assert len(tensor) == worst
        assert torch.equal(plain(received)[:count], plain(usual[0]))
        assert torch.equal(ids[:count], usual[1])
        assert torch.equal(weights[:count], usual[2])
        assert (ids[count:] == -1).all()
        rows = plain(received).clone()
        rows[count:] = float("nan")
        combined, _, _ = self.buffer.combine(rows, handle)
        again, _, _ = self.buffer.combine(plain(usual[0]), handle=self.last(x, topk))
        assert torch.equal(combined, again)

    def last(self, x: Rows, topk: dict[str, Tensor]) -> Any:
        """The handle of another plain dispatch."""
        return self.dispatch(x, False, False, **topk)[4]

    def check_tuning(self) -> None:
        """7. One handle serves many combines and cached dispatches, with any configuration."""
        rows, _, _, _, handle = self.dispatch(self.random_x, False, False)
        first, _, _ = self.buffer.combine(rows, handle)
        for chunk in range(2, 8):
            config = Config(8, chunk, 256)
            again = self.buffer.dispatch(self.random_x, handle=handle, config=config)[0]
            assert torch.equal(again, rows)
            assert torch.equal(self.buffer.combine(rows, handle, config=config)[0], first)
        default = Buffer.get_combine_config(self.place.num_ranks)
        assert default.num_sms == Buffer.num_sms
        assert torch.equal(self.buffer.combine(rows, handle, config=default)[0], first)


def intranode(place: Place, shapes: Shapes) -> bool:
    """The whole test on one rank."""
    test = Intranode(place, shapes)
    test.check_layout()
    for previous in (False, True):
        for asynchronous in (False, True):
            for x in (test.random_x, test.constant_x, test.fp8_x):
                for with_topk in (False, True):
                    test.check_round(x, previous, asynchronous, with_topk)
    test.check_tuning()
    return True
