"""Low-latency calls: what DeepEP's test_low_latency asserts, with its tolerances, and more."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expertlink.compat.deep_ep import Buffer
from support.drop_in.inputs import Shapes, all_tokens, calc_diff, from_fp8
from support.drop_in.place import Place

OFFSET = 128  # ranks are told apart by rows of rank - 128
LOW_WORD = 2**32 - 1

FORMATS = (
    {"use_fp8": False},
    {"use_fp8": True},
    {"use_fp8": True, "round_scale": True},
    {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
)

SUMS_DIFFER = 1e-5  # what DeepEP's own test allows: ranks' sums are rounded before the last one


def buffer_for(place: Place, shapes: Shapes, **fields: Any) -> Buffer:
    """A buffer as callers make it for low-latency calls."""
    size = Buffer.get_low_latency_rdma_size_hint(
        shapes.tokens, shapes.hidden, place.num_ranks, shapes.experts
    )
    return Buffer(place.group, 0, size, low_latency_mode=True, **fields)


def plain(rows: Any) -> Tensor:
    """bfloat16 rows, of any format."""
    return from_fp8(*rows) if isinstance(rows, tuple) else rows.clone()


class LowLatency:
    """One rank's part of DeepEP's test."""

    def __init__(self, place: Place, shapes: Shapes, **fields: Any) -> None:
        self.place, self.shapes = place, shapes
        self.buffer: Any = buffer_for(place, shapes, **fields)
        everyone = all_tokens(shapes, place)
        self.all_ids = [tokens.ids for tokens in everyone]
        self.ids = everyone[place.rank].ids
        # Weights of choices -1 are random: they must be left out.
        self.weights = torch.rand(
            self.ids.shape, generator=torch.Generator().manual_seed(place.rank), device="cpu"
        ).to(place.device)
        count = shapes.tokens_of(place.rank)
        x = torch.full((count, shapes.hidden), float(place.rank - OFFSET), device=place.device)
        x[:, -128:] = torch.arange(count, device=place.device)[:, None]
        self.x = x.to(torch.bfloat16)

    def dispatch(self, stats: Tensor | None, hook: bool, form: dict[str, bool]) -> Any:
        rows, count, handle, event, launch = self.buffer.low_latency_dispatch(
            self.x,
            self.ids,
            self.shapes.tokens,
            self.shapes.experts,
            cumulative_local_expert_recv_stats=stats,
            async_finish=not hook,
            return_recv_hook=hook,
            **form,
        )
        if hook:
            assert event.event is None
            assert launch is not None
            launch()
        else:
            assert launch is None
            event.current_stream_wait()
        return rows, count, handle

    def check(self, hook: bool, form: dict[str, bool], calls: int) -> None:
        """One way of calling; with two calls, the first result is dropped."""
        place, shapes = self.place, self.shapes
        local = shapes.experts // place.num_ranks
        for _ in range(calls - 1):
            self.dispatch(None, hook, form)
        stats = torch.zeros(local, dtype=torch.int32, device=place.device)
        rows, count, handle = self.dispatch(stats, hook, form)
        assert torch.equal(stats, count)
        self.check_form(rows, form)
        received = plain(rows)
        assert handle[2:] == (shapes.tokens, shapes.hidden, shapes.experts)
        assert handle[1].dtype is torch.int64
        for expert in range(local):
            self.check_expert(expert, received[expert], count, handle, form)
            received[expert, int(count[expert]) :] = float("nan")
        kept = torch.where(self.ids >= 0, self.weights, 0.0).sum(dim=1, keepdim=True)
        results = []
        for zero_copy in (False, True):  # two combines of one handle
            given = received
            if zero_copy:
                self.buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = received
                given = torch.full_like(received, float("nan"))
            out = torch.empty_like(self.x)
            combined, event, launch = self.buffer.low_latency_combine(
                given,
                self.ids,
                self.weights,
                handle,
                zero_copy=zero_copy,
                async_finish=not hook,
                return_recv_hook=hook,
                out=out,
            )
            if launch is not None:
                launch()
            else:
                event.current_stream_wait()
            assert combined is out
            assert not combined.isnan().any()
            limit = 9e-4 if form["use_fp8"] else 1e-5
            assert calc_diff(self.x.float() * kept, combined) < limit
            results.append(out)
        assert torch.equal(*results)

    def check_form(self, rows: Any, form: dict[str, bool]) -> None:
        """Shapes and strides of what comes out."""
        local = self.shapes.experts // self.place.num_ranks
        slots = self.place.num_ranks * self.shapes.tokens
        if not form["use_fp8"]:
            assert rows.shape == (local, slots, self.shapes.hidden)
            assert rows.dtype is torch.bfloat16
            return
        values, scales = rows
        assert values.shape == (local, slots, self.shapes.hidden)
        assert values.dtype is torch.float8_e4m3fn
        assert values.is_contiguous()
        packed = form.get("use_ue8m0", False)
        columns = self.shapes.hidden // (512 if packed else 128)
        assert scales.shape == (local, slots, columns)
        assert scales.stride() == (columns * slots, 1, slots)
        assert scales.dtype is (torch.int32 if packed else torch.float32)

    def check_expert(
        self, expert: int, slab: Tensor, count: Tensor, handle: Any, form: dict[str, bool]
    ) -> None:
        """Counts, sources and values of one expert's rows."""
        rounded = form.get("round_scale", False)
        number = self.place.rank * len(count) + expert
        ranges, valid = handle[1][expert], int(count[expert])
        assert valid == int((ranges & LOW_WORD).sum())
        assert valid == sum(int((ids == number).sum()) for ids in self.all_ids)
        if not valid:
            return
        rows, sources = slab[:valid].float(), handle[0][expert, :valid]
        lowest = rows[:, :-128].amin(dim=1)
        assert torch.equal(lowest, rows[:, :-128].amax(dim=1))
        if rounded:
            assert calc_diff(rows[:, -1], sources) < 0.007
        else:
            assert torch.equal(rows[:, -128:], sources[:, None].float().expand(-1, 128))
        for source, ids in enumerate(self.all_ids):
            begin, rows_from = int(ranges[source] >> 32), int(ranges[source] & LOW_WORD)
            assert rows_from == int((ids == number).sum())
            if not rounded:
                assert (lowest[begin : begin + rows_from] == source - OFFSET).all()


def low_latency(place: Place, shapes: Shapes) -> bool:
    """The whole test on one rank."""
    test = LowLatency(place, shapes)
    with torch.inference_mode():
        for hook, form, calls in itertools.product((False, True), FORMATS, (1, 2)):
            test.check(hook, form, calls)
    return True


def handles_that_outlive_buffers(place: Place, shapes: Shapes) -> bool:
    """What a handle says is first read once its buffer was destroyed."""
    test = LowLatency(place, shapes, explicitly_destroy=True)
    for form in FORMATS[:2]:  # on one host of GPUs they share memory
        rows, count, handle = test.dispatch(None, False, form)
        if form["use_fp8"]:
            test.buffer.destroy()
        for expert, received in enumerate(plain(rows)):
            test.check_expert(expert, received, count, handle, form)
        assert handle[2:] == (shapes.tokens, shapes.hidden, shapes.experts)
    return True


def weighted(rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """float32 sums in top-k order of what expert e makes of a row (times e + 1), rounded once."""
    total = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    for lane in range(ids.shape[1]):
        scale = (ids[:, lane, None] + 1).float()
        made = (rows.float() * scale).to(torch.bfloat16).float()
        term = made * weights[:, lane, None]
        total = torch.where(ids[:, lane, None] >= 0, total + term, total)
    return total.to(torch.bfloat16)


def experts(place: Place, shapes: Shapes, rows: Tensor) -> Tensor:
    """Expert e multiplies by e + 1."""
    local = shapes.experts // place.num_ranks
    numbers = torch.arange(local, device=rows.device, dtype=torch.float32) + local * place.rank + 1
    return (rows.float() * numbers[:, None, None]).to(torch.bfloat16)


def micro_batches(place: Place, batches: list[Shapes]) -> bool:
    """Two threads take turns on one buffer, each with a call between its halves."""
    buffer = buffer_for(place, batches[0])
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    failures: list[BaseException] = []

    def batch(index: int, shapes: Shapes) -> None:
        def hand_over() -> None:
            turns[1 - index].release()
            turns[index].acquire()

        turns[index].acquire()
        try:
            own = all_tokens(shapes, place)[place.rank]
            weights = own.weights
            for _ in range(3):
                rows, _, handle, _, hook = buffer.low_latency_dispatch(
                    own.x,
                    own.ids,
                    shapes.tokens,
                    shapes.experts,
                    use_fp8=False,
                    return_recv_hook=True,
                )
                hand_over()
                assert hook is not None
                hook()
                assert isinstance(rows, Tensor)
                made = experts(place, shapes, rows)
                result, _, hook = buffer.low_latency_combine(
                    made, own.ids, weights, handle, return_recv_hook=True
                )
                hand_over()
                assert hook is not None
                hook()
                assert calc_diff(result, weighted(own.x, weights, own.ids)) < SUMS_DIFFER
        except BaseException as error:
            failures.append(error)
        turns[1 - index].release()
        turns[1 - index].release()

    stream = torch.cuda.current_stream(place.device) if place.device.type == "cuda" else None

    def on_stream(index: int, shapes: Shapes) -> None:
        with torch.inference_mode():
            if stream is None:
                batch(index, shapes)
                return
            with torch.cuda.device(place.device), torch.cuda.stream(stream):
                batch(index, shapes)

    threads = [threading.Thread(target=on_stream, args=pair) for pair in enumerate(batches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return True


def references(place: Place, shapes: Shapes) -> bool:
    """Nothing of ours refers to outputs once they are readable, so that callers can free them."""
    buffer = buffer_for(place, shapes)
    own = all_tokens(shapes, place)[place.rank]
    with torch.inference_mode():
        for hook in (False, True):
            result = buffer.low_latency_dispatch(
                own.x, own.ids, shapes.tokens, shapes.experts, return_recv_hook=hook
            )
            rows, _, handle, event, launch = result
            del result
            if launch is not None:
                launch()
            values, scales = rows
            del rows
            assert sys.getrefcount(values) == 2
            assert sys.getrefcount(scales) == 2
            made = experts(place, shapes, from_fp8(values, scales))
            combined, _, launch = buffer.low_latency_combine(
                made, own.ids, own.weights, handle, return_recv_hook=hook
            )
            if launch is not None:
                launch()
            assert sys.getrefcount(combined) == 2
            assert sys.getrefcount(made) == 2
            del event
    return True


def masks_without_gpus(place: Place, shapes: Shapes) -> list[str]:
    """What the mask functions do where no engine can leave out a rank."""
    buffer = buffer_for(place, shapes, enable_shrink=True, explicitly_destroy=True)
    status = torch.full((place.num_ranks,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * place.num_ranks
    buffer.low_latency_clean_mask_buffer()
    other = (place.rank + 1) % place.num_ranks
    return [
        refusal(lambda: buffer.low_latency_update_mask_buffer(other, True)),
        refusal(lambda: buffer.low_latency_update_mask_buffer(other)),
        refusal(lambda: buffer.low_latency_query_mask_buffer(status.long())),
        refusal(lambda: buffer_for(place, shapes).low_latency_clean_mask_buffer()),
    ]


def masks(place: Place, shapes: Shapes) -> bool:
    """Every rank leaves out the others, and lets them in again."""
    buffer = buffer_for(place, shapes, enable_shrink=True)
    own = all_tokens(shapes, place)[place.rank]
    local = shapes.experts // place.num_ranks
    status = torch.empty(place.num_ranks, dtype=torch.int32, device=place.device)

    def layer() -> Tensor:
        rows, _, handle, _, _ = buffer.low_latency_dispatch(
            own.x, own.ids, shapes.tokens, shapes.experts, use_fp8=False
        )
        assert isinstance(rows, Tensor)
        made = experts(place, shapes, rows)
        return buffer.low_latency_combine(made, own.ids, own.weights, handle)[0]

    with torch.inference_mode():
        assert calc_diff(layer(), weighted(own.x, own.weights, own.ids)) < SUMS_DIFFER
        for other in range(place.num_ranks):
            if other != place.rank:
                buffer.low_latency_update_mask_buffer(other, True)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [int(r != place.rank) for r in range(place.num_ranks)]
        alone = torch.where(own.ids // local == place.rank, own.ids, -1)
        assert calc_diff(layer(), weighted(own.x, own.weights, alone)) < SUMS_DIFFER
        buffer.low_latency_clean_mask_buffer()
        buffer.low_latency_query_mask_buffer(status)
        assert status.sum() == 0
        assert calc_diff(layer(), weighted(own.x, own.weights, own.ids)) < SUMS_DIFFER
    return True


def bad_calls(place: Place, shapes: Shapes) -> list[str]:
    """What is said of wrong calls; the buffer goes on."""
    buffer = buffer_for(place, shapes, explicitly_destroy=True)
    own = all_tokens(shapes, place)[place.rank]
    x, ids, weights = own.x, own.ids, own.weights
    most, count = shapes.tokens, shapes.experts

    def dispatch(**options: Any) -> Any:
        return buffer.low_latency_dispatch(x, ids, most, count, use_fp8=False, **options)

    rows, _, handle, _, _ = dispatch()

    def combine(**options: Any) -> Any:
        return buffer.low_latency_combine(rows, ids, weights, handle, **options)

    said = [
        refusal(lambda: dispatch(async_finish=True, return_recv_hook=True)),
        refusal(lambda: buffer.low_latency_dispatch(x, ids, most, count, use_ue8m0=True)),
        refusal(lambda: buffer.low_latency_dispatch(x.float(), ids, most + 4, count)),
        refusal(lambda: buffer.low_latency_dispatch(x, ids, most, count + 1)),
        refusal(lambda: dispatch(x_global_scale=weights)),
        refusal(lambda: dispatch(use_nvfp4=True)),
        refusal(lambda: combine(use_logfmt=True)),
        refusal(lambda: combine(overlap=True)),
        refusal(lambda: combine(zero_copy=True)),
        refusal(lambda: buffer.low_latency_combine(rows, ids, weights, tuple(range(5)))),
        refusal(lambda: dispatch(use_mxfp4=True)),
        refusal(lambda: dispatch(dispatch_wait_recv_cost_stats=weights)),
    ]
    copy = tuple(handle)
    assert type(copy) is tuple
    first = combine()[0]
    assert torch.equal(buffer.low_latency_combine(rows, ids, weights, copy)[0], first)
    buffer.clean_low_latency_buffer(most, shapes.hidden, count)
    buffer.destroy()
    said.append(refusal(dispatch))
    return said


def refusal(call: Callable[[], Any]) -> str:
    """What a call raises."""
    try:
        call()
    except (AssertionError, TypeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("the call was not refused")


def in_graphs(place: Place, shapes: Shapes) -> bool:
    """Hooks and asynchronous calls in CUDA graphs, replayed with other routings."""
    buffer = buffer_for(place, shapes)
    stream = torch.cuda.Stream(place.device)
    routings = [
        all_tokens(
            Shapes(**{**vars(shapes), "fewer": 0, "seed": seed}),
            place,
        )[place.rank]
        for seed in range(3)
    ]
    x, ids, weights = (value.clone() for value in vars(routings[0]).values())

    def layer(hook: bool) -> Tensor:
        rows, _, handle, event, launch = buffer.low_latency_dispatch(
            x,
            ids,
            shapes.tokens,
            shapes.experts,
            use_fp8=False,
            async_finish=not hook,
            return_recv_hook=hook,
        )
        launch() if launch is not None else event.current_stream_wait()
        assert isinstance(rows, Tensor)
        made = experts(place, shapes, rows)
        result, event, launch = buffer.low_latency_combine(
            made, ids, weights, handle, async_finish=not hook, return_recv_hook=hook
        )
        launch() if launch is not None else event.current_stream_wait()
        return result

    with torch.inference_mode(), torch.cuda.stream(stream):
        for hook in (True, False):
            layer(hook)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = layer(hook)
            for own in routings * 2:
                for target, value in zip((x, ids, weights), vars(own).values(), strict=True):
                    target.copy_(value)
                graph.replay()
                assert calc_diff(result, weighted(own.x, own.weights, own.ids)) < SUMS_DIFFER
    return True
