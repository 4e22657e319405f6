"""The calls of frameworks that train: Megatron, Automodel, torchtitan, DeepSpeed, slime."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertlink.compat.deep_ep import install
from support.drop_in.inputs import Shapes, Tokens, all_tokens, arrivals
from support.drop_in.place import Place
from support.drop_in.reference import by_expert, by_token, close, dense

EXAMPLE = Path(__file__).parents[3] / "examples" / "deep_ep_megatron.py"


def megatron_calls() -> Any:
    """The module with Megatron's autograd functions: an example of ours."""
    name = "deep_ep_megatron"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


class Layer:
    """One micro-batch through a layer, with gradients of rows and probabilities."""

    def __init__(self, calls: Any, place: Place, shapes: Shapes, *, asynchronous: bool) -> None:
        self.calls, self.place, self.shapes, self.asynchronous = calls, place, shapes, asynchronous
        self.own = all_tokens(shapes, place)[place.rank]
        self.x = self.own.x.clone().requires_grad_()
        self.probs = self.own.weights.clone().requires_grad_()

    def forward(self) -> None:
        rows, ids, probs, counts, handle = self.calls.FusedDispatch.apply(
            self.x,
            self.own.ids,
            self.probs,
            self.shapes.experts,
            self.place.group,
            self.asynchronous,
            self.asynchronous,
        )
        assert int(counts.sum()) == int((ids != -1).sum())
        assert isinstance(handle, tuple)
        made = by_token(self.place, self.shapes, rows, ids, probs)
        self.y = self.calls.FusedCombine.apply(
            made, self.place.group, handle, self.asynchronous, self.asynchronous
        )
        close(self.y.detach(), self.own)

    def backward(self) -> None:
        torch.manual_seed(self.place.rank)
        grad = torch.randn(self.y.shape).to(self.place.device)
        self.y.backward(grad.to(torch.bfloat16))
        x = self.own.x.float().requires_grad_()
        probs = self.own.weights.clone().requires_grad_()
        dense(Tokens(x, self.own.ids, probs)).backward(grad.to(torch.bfloat16).float())
        assert self.x.grad is not None
        assert self.probs.grad is not None
        assert x.grad is not None
        assert probs.grad is not None
        torch.testing.assert_close(self.x.grad.float(), x.grad, rtol=0.05, atol=0.05)
        wanted = torch.where(self.own.ids >= 0, probs.grad, 0.0)
        scale = float(wanted.abs().max()) if wanted.numel() else 1.0
        torch.testing.assert_close(self.probs.grad, wanted, rtol=0.05, atol=0.02 * scale)


def megatron(place: Place, shapes: Shapes) -> bool:
    """Two micro-batches whose passes interleave; the global buffer is replaced in between."""
    calls = megatron_calls()
    calls._buffer = None
    calls.Buffer.set_num_sms(20 if place.device.type == "cpu" else calls.Buffer.num_sms)
    other = Shapes(**{**vars(shapes), "seed": 1, "tokens": shapes.tokens + 3})
    for asynchronous in (False, True):
        first = Layer(calls, place, shapes, asynchronous=asynchronous)
        second = Layer(calls, place, other, asynchronous=asynchronous)
        first.forward()
        before = calls._buffer
        calls.get_buffer(place.group, 1 << 20)  # another layer needs more
        assert calls._buffer is not before
        del before
        second.forward()
        first.backward()
        second.backward()
        calls._buffer = None
    return True


def automodel(place: Place, shapes: Shapes) -> bool:
    """Megatron's calls, and a replay: activation checkpoints dispatch again with the handle."""
    install()
    from deep_ep import Buffer  # pyright: ignore
    from deep_ep.utils import EventHandle, EventOverlap  # pyright: ignore

    assert importlib.util.find_spec("deep_ep") is not None
    assert Buffer.is_sm90_compiled()
    buffer = Buffer(place.group, 1 << 20, 0, explicitly_destroy=True)
    own = all_tokens(shapes, place)[place.rank]

    def options(event: Any = None) -> dict[str, Any]:
        return {
            "previous_event": event or EventOverlap(EventHandle()),
            "async_finish": True,
            "allocate_on_comm_stream": True,
        }

    layout = buffer.get_dispatch_layout(own.ids, shapes.experts, **options())
    per_rank, per_rdma_rank, per_expert, in_rank, event = layout
    rows, ids, weights, counts, handle, event = buffer.dispatch(
        own.x,
        topk_idx=own.ids,
        topk_weights=own.weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        **options(event),
    )
    event.current_stream_wait()
    assert sum(counts) == int((ids >= 0).sum())
    record = handle, ids, weights
    results = []
    for replay in range(3):
        if replay:
            rows, *nothing, event = buffer.dispatch(own.x, handle=record[0], **options())
            assert nothing == [None] * 4
            event.current_stream_wait()
        made = by_token(place, shapes, rows, *record[1:])
        combined, _, event = buffer.combine(made, handle=record[0], **options())
        event.current_stream_wait()
        close(combined, own)
        results.append(combined)
        _, grads, event = buffer.combine(rows, record[0], topk_weights=weights, **options())
        event.current_stream_wait()
        torch.testing.assert_close(grads, own.weights, rtol=0, atol=0)
    assert torch.equal(results[0], results[2])
    buffer.destroy()
    return True


def slime(place: Place, shapes: Shapes) -> bool:
    """Rows of 16 elements, a row per (token, choice), then sums of wide rows with that handle."""
    install()
    from deep_ep import Buffer  # pyright: ignore

    original, seen = Buffer.__init__, []

    def replaced(self: Any, *args: Any, **options: Any) -> None:
        seen.append(len(args))
        original(self, *args, **options)

    Buffer.__init__ = replaced  # type: ignore[method-assign]
    try:
        buffer = Buffer(place.group, 1 << 20, 0)
    finally:
        Buffer.__init__ = original  # type: ignore[method-assign]
    assert seen == [3]
    own = all_tokens(shapes, place)[place.rank]
    count, topk = own.ids.shape
    flat = own.ids.reshape(-1, 1)
    prints = own.x[:, :16].repeat_interleave(topk, dim=0).contiguous()
    per_rank, _, per_expert, in_rank, event = buffer.get_dispatch_layout(
        flat, shapes.experts, async_finish=False, allocate_on_comm_stream=False
    )
    ones = torch.ones(flat.shape, dtype=torch.float32, device=place.device)
    rows, _, _, counts, handle, event = buffer.dispatch(
        prints,
        topk_idx=flat,
        topk_weights=ones,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=event,
        async_finish=False,
        allocate_on_comm_stream=False,
    )
    assert isinstance(handle, tuple)
    assert len(handle) in (6, 10)
    assert handle[3 if len(handle) == 6 else 7].shape[0] == len(rows) == sum(counts)
    choices = [
        Tokens(
            t.x[:, :16].repeat_interleave(topk, dim=0),
            t.ids.reshape(-1, 1),
            torch.ones(t.ids.numel(), 1, device=place.device),
        )
        for t in all_tokens(shapes, place)
    ]
    expected = arrivals(choices, shapes, place.rank)
    assert torch.equal(rows, expected.x), "source rank, then source order"
    wide = rows.repeat(1, 2 * shapes.hidden // 16)
    combined, _, _ = buffer.combine(wide, handle)
    present = (flat >= 0).to(torch.bfloat16)
    assert torch.equal(combined, prints.repeat(1, 2 * shapes.hidden // 16) * present)
    # K = topk elsewhere on the same buffer.
    layout = buffer.get_dispatch_layout(own.ids, shapes.experts)
    rows, ids, weights, _, handle, _ = buffer.dispatch(
        own.x,
        topk_idx=own.ids,
        topk_weights=own.weights,
        num_tokens_per_rank=layout[0],
        is_token_in_rank=layout[3],
        num_tokens_per_expert=layout[2],
    )
    made = by_token(place, shapes, rows, ids, weights)
    close(buffer.combine(made, handle)[0], own)
    assert len(own.x) == count
    return True


def torchtitan(place: Place, shapes: Shapes) -> bool:
    """V2: two combines and one cached dispatch for every handle; weights are the model's."""
    install()
    from deep_ep import ElasticBuffer  # pyright: ignore

    group, most = place.group, shapes.tokens
    needed = ElasticBuffer.get_buffer_size_hint(
        group, most, shapes.hidden, num_topk=shapes.topk, use_fp8_dispatch=False
    )
    buffer = ElasticBuffer(
        group,
        num_bytes=needed,
        num_max_tokens_per_rank=most,
        hidden=shapes.hidden,
        num_topk=shapes.topk,
        use_fp8_dispatch=False,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        explicitly_destroy=True,
    )
    assert buffer.group == group
    assert buffer.num_bytes >= needed
    num_sms = buffer.get_theoretical_num_sms(shapes.experts, shapes.topk)
    num_sms = num_sms if place.device.type == "cpu" else 8
    for step in range(2):
        own = all_tokens(Shapes(**{**vars(shapes), "seed": step}), place)[place.rank]
        rows, ids, weights, handle, _ = buffer.dispatch(
            own.x,
            topk_idx=own.ids,
            topk_weights=own.weights,
            num_experts=shapes.experts,
            num_max_tokens_per_rank=most,
            num_sms=num_sms,
            do_expand=False,
            do_cpu_sync=True,
        )
        assert isinstance(rows, Tensor)
        assert ids is not None
        assert weights is not None
        ends = handle.psum_num_recv_tokens_per_expert
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        assert counts.tolist() == handle.num_recv_tokens_per_expert_list
        made = by_token(place, shapes, rows, ids, weights)
        combined, _, event = buffer.combine(
            made, handle=handle, topk_weights=None, async_with_compute_stream=True
        )
        event.current_stream_wait()
        close(combined, own)
        # Backward of combine, then of dispatch.
        grad_rows, _, _, same, _ = buffer.dispatch(
            own.x, handle=handle, num_sms=handle.num_sms, do_cpu_sync=False
        )
        assert same is handle
        assert isinstance(grad_rows, Tensor)
        assert torch.equal(grad_rows, rows)
        grad_x, grad_scores, _ = buffer.combine(
            grad_rows, handle=handle, topk_weights=weights.float()
        )
        assert grad_scores is not None
        assert torch.equal(grad_scores, own.weights)
        local = shapes.experts // place.num_ranks
        ranks = own.ids // local
        copies = torch.stack([(ranks == r).any(dim=1) for r in range(place.num_ranks)]).sum(dim=0)
        torch.testing.assert_close(
            grad_x.float(), own.x.float() * copies[:, None], rtol=0.02, atol=0.02
        )
    return True


def deepspeed(place: Place, shapes: Shapes) -> bool:
    """V2 expanded: rows in groups without padding, weights of rows, replays and backward."""
    install()
    import deep_ep  # pyright: ignore

    num_sms = 8
    buffer = deep_ep.ElasticBuffer(
        place.group,
        num_max_tokens_per_rank=shapes.tokens,
        hidden=shapes.hidden,
        num_topk=shapes.topk,
        use_fp8_dispatch=False,
        num_allocated_qps=num_sms * 16 + 1,
        allow_hybrid_mode=True,
        explicitly_destroy=True,
    )
    everyone = all_tokens(shapes, place)
    own, expected = everyone[place.rank], arrivals(everyone, shapes, place.rank)
    rows, ids, weights, handle, _ = buffer.dispatch(
        own.x,
        topk_idx=own.ids.to(deep_ep.topk_idx_t),
        topk_weights=own.weights.float(),
        num_experts=shapes.experts,
        do_expand=True,
        expert_alignment=1,
        num_sms=num_sms,
    )
    assert isinstance(rows, Tensor)
    assert weights is not None
    assert ids is None
    assert handle.do_expand
    assert torch.equal(handle.topk_idx, own.ids)
    assert len(rows) == sum(expected.per_expert)
    for _ in range(2):  # forward, and a replay in backward
        made = by_expert(place, shapes, rows, expected.per_expert)
        made = (made.float() * weights[:, None]).to(torch.bfloat16)
        combined, _, _ = buffer.combine(made, handle=handle, num_sms=num_sms)
        close(combined, own)
        again, _, again_weights, same, _ = buffer.dispatch(
            own.x,
            handle=handle,
            num_sms=num_sms,
            do_expand=handle.do_expand,
            topk_weights=own.weights,
        )
        assert same is handle
        assert torch.equal(again, rows)  # type: ignore[arg-type]
        assert torch.equal(again_weights, weights)  # type: ignore[arg-type]
    _, grads, _ = buffer.combine(rows, handle=handle, num_sms=num_sms, topk_weights=weights)
    assert torch.equal(grads, own.weights)  # type: ignore[arg-type]
    buffer.destroy()
    return True
