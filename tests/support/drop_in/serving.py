"""The calls of frameworks that serve: vLLM, SGLang, LMDeploy."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor

from expertlink.compat.deep_ep import install
from support.drop_in.inputs import Shapes, Tokens, all_tokens, column_major, from_fp8, to_fp8
from support.drop_in.place import Place
from support.drop_in.reference import by_expert, by_slab, by_token, close, close_fp8

LOW_WORD = 2**32 - 1


def own_tokens(place: Place, shapes: Shapes, seed: int = 0) -> Tokens:
    return all_tokens(Shapes(**{**vars(shapes), "seed": seed}), place)[place.rank]


def weighted_in_fp32(place: Place, shapes: Shapes, received: Any) -> Tensor:
    """Experts over the result of a normal dispatch."""
    rows, ids, weights, *_ = received
    if isinstance(rows, tuple):
        rows = from_fp8(*rows)
    return by_token(place, shapes, rows, ids, weights)


# -- vLLM -----------------------------------------------------------------------------------------


def vllm_high_throughput(place: Place, shapes: Shapes) -> bool:
    """deepep_high_throughput: layout, dispatch, combine; bf16 and fp8; with and without DBO."""
    install()
    import deep_ep  # pyright: ignore

    options: dict[str, Any] = {
        "group": place.group,
        "num_nvl_bytes": 1024 << 20,
        "num_rdma_bytes": 0,
        "low_latency_mode": False,
        "num_qps_per_rank": 1,
        "explicitly_destroy": True,
    }
    buffer = deep_ep.Buffer(**options)
    _ = deep_ep.Config | None, deep_ep.EventOverlap | None, list[deep_ep.EPHandle | None]
    for fp8 in (False, True):
        for micro_batching in (False, True):
            own = own_tokens(place, shapes, seed=fp8 + 2 * micro_batching)
            previous = deep_ep.Buffer.capture() if micro_batching else None
            per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
                topk_idx=own.ids,
                num_experts=shapes.experts,
                previous_event=previous,
                async_finish=False,
                allocate_on_comm_stream=False,
            )
            received = buffer.dispatch(
                x=to_fp8(own.x) if fp8 else own.x,
                handle=None,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_rdma_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                topk_idx=own.ids,
                topk_weights=own.weights,
                expert_alignment=1,
                config=deep_ep.Buffer.get_dispatch_config(place.num_ranks),
                previous_event=previous,
                async_finish=not micro_batching,
                allocate_on_comm_stream=False,
            )
            _, ids, _, counts, handle, event = received
            if event.event is not None:
                event.current_stream_wait()
            assert (event.event is not None) != micro_batching
            assert torch.tensor(counts).sum() == (ids != -1).sum()
            if ids.numel():
                ids = torch.where(ids == -1, 0, ids)
            combined, _, event = buffer.combine(
                x=weighted_in_fp32(place, shapes, received),
                handle=handle,
                topk_weights=None,
                config=deep_ep.Buffer.get_combine_config(place.num_ranks),
                previous_event=previous,
                async_finish=not micro_batching,
                allocate_on_comm_stream=False,
            )
            if event.event is not None:
                event.current_stream_wait()
            output = torch.empty_like(own.x)
            output.copy_(combined)
            (close_fp8 if fp8 else close)(output, own)
    buffer.destroy()
    return True


def vllm_low_latency(place: Place, shapes: Shapes) -> bool:
    """deepep_low_latency: hooks, `out=`, fault tolerance's mask functions."""
    install()
    import deep_ep  # pyright: ignore

    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=shapes.tokens,
        hidden=shapes.hidden,
        num_ranks=place.num_ranks,
        num_experts=shapes.experts,
    )
    buffer = deep_ep.Buffer(
        group=place.group,
        num_nvl_bytes=0,
        num_rdma_bytes=size,
        low_latency_mode=True,
        num_qps_per_rank=shapes.experts // place.num_ranks,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        explicitly_destroy=True,
        enable_shrink=True,
    )
    with torch.inference_mode():
        for fp8 in (False, True):
            for hook_at_combine in (False, True):
                own = own_tokens(place, shapes, seed=fp8)
                rows, counts, handle, event, hook = buffer.low_latency_dispatch(
                    own.x,
                    own.ids,
                    shapes.tokens,
                    shapes.experts,
                    use_fp8=fp8,
                    round_scale=False,
                    use_ue8m0=False,
                    async_finish=False,
                    return_recv_hook=True,
                )
                assert hook is not None
                assert event.event is None
                hook()
                slabs = from_fp8(*rows) if isinstance(rows, tuple) else rows
                made = by_slab(place, shapes, slabs, counts)
                output = torch.empty_like(own.x)
                _, _, hook = buffer.low_latency_combine(
                    made,
                    own.ids,
                    own.weights,
                    handle,
                    async_finish=False,
                    zero_copy=False,
                    return_recv_hook=hook_at_combine,
                    out=output,
                )
                assert (hook is not None) == hook_at_combine
                if hook is not None:
                    hook()
                (close_fp8 if fp8 else close)(output, own)
        status = torch.empty(place.num_ranks, dtype=torch.int32, device=place.device)
        buffer.low_latency_query_mask_buffer(status)
        assert not status.any()
        scratch = buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True)
        assert scratch.numel() == size
        scratch.zero_()
        buffer.low_latency_clean_mask_buffer()
    buffer.destroy()
    return True


def vllm_v2(place: Place, shapes: Shapes) -> bool:
    """deepep_v2: expanded prefill with host counts, decode of fixed shapes."""
    install()
    import deep_ep  # pyright: ignore

    buffer = deep_ep.ElasticBuffer(
        group=place.group,
        num_max_tokens_per_rank=shapes.tokens,
        hidden=shapes.hidden,
        num_topk=shapes.topk,
        use_fp8_dispatch=False,
        allow_hybrid_mode=True,
        prefer_overlap_with_compute=False,
        allow_multiple_reduction=False,
        explicitly_destroy=True,
    )
    assert buffer.get_theoretical_num_sms(num_experts=shapes.experts, num_topk=shapes.topk) >= 4
    with torch.inference_mode():
        for prefill in (True, False):
            own = own_tokens(place, shapes, seed=prefill)
            rows, ids, weights, handle, event = buffer.dispatch(
                x=own.x,
                topk_idx=own.ids,
                topk_weights=own.weights,
                num_experts=shapes.experts,
                num_max_tokens_per_rank=16 if prefill else None,
                do_expand=prefill,
                do_cpu_sync=prefill,
                async_with_compute_stream=False,
            )
            assert event.event is None
            assert isinstance(rows, Tensor)
            assert weights is not None
            if prefill:
                counts = handle.num_recv_tokens_per_expert_list
                assert sum(counts) == len(rows)
                made = by_expert(place, shapes, rows, counts)
                made = (made.float() * weights[:, None]).to(torch.bfloat16)
            else:
                assert ids is not None
                received = handle.psum_num_recv_tokens_per_scaleup_rank[-1]
                tail = torch.arange(len(ids), device=ids.device) >= received
                ids[tail] = -1  # in place, as vLLM's kernel does
                made = by_token(place, shapes, rows, ids, weights)
            asynchronous = prefill
            combined, _, event = buffer.combine(
                x=made,
                handle=handle,
                topk_weights=None,
                async_with_compute_stream=asynchronous,
                allocate_on_comm_stream=asynchronous,
            )
            if event.event is not None:
                event.current_stream_wait()
            close(combined, own)
    buffer.destroy()
    return True


# -- SGLang ---------------------------------------------------------------------------------------


def sglang_buffer(place: Place, shapes: Shapes) -> Any:
    """One buffer for normal and low-latency calls, as large as both want it."""
    from deep_ep import Buffer, Config  # pyright: ignore

    ranks, nvl_bytes, rdma_bytes = place.num_ranks, 0, 0
    configs = [
        Config(num_sms=24, num_max_nvl_chunked_send_tokens=16),
        Buffer.get_dispatch_config(ranks),
        Buffer.get_combine_config(ranks),
    ]
    for config in configs:
        hidden_bytes = 2 * shapes.hidden
        nvl_bytes = max(config.get_nvl_buffer_size_hint(hidden_bytes, ranks), nvl_bytes)
        rdma_bytes = max(config.get_rdma_buffer_size_hint(hidden_bytes, ranks), rdma_bytes)
    hint = Buffer.get_low_latency_rdma_size_hint(
        shapes.tokens, shapes.hidden, ranks, shapes.experts
    )
    assert Buffer.num_sms % 2 == 0
    return Buffer(
        place.group,
        nvl_bytes,
        max(hint, rdma_bytes),
        low_latency_mode=True,
        num_qps_per_rank=shapes.experts // ranks,
        allow_mnnvl=False,
        use_fabric=True,
    )


def sglang(place: Place, shapes: Shapes) -> bool:
    """Prefill and decode in turns on one buffer; two batches overlap; tensors are disposed of."""
    install()

    buffer = sglang_buffer(place, shapes)
    assert buffer.low_latency_mode
    assert buffer.group_size == place.num_ranks
    with torch.inference_mode():
        for turn in range(2):
            batches = [own_tokens(place, shapes, seed=10 * turn + i) for i in range(2)]
            received = [sglang_dispatch(buffer, own, shapes, fp8=bool(turn)) for own in batches]
            for own, result in zip(batches, received, strict=True):  # A, B, then A, B
                sglang_combine(place, buffer, own, shapes, result, fp8=bool(turn))
            buffer.clean_low_latency_buffer(shapes.tokens, shapes.hidden, shapes.experts)
            for hook in (False, True):
                sglang_decode(place, buffer, batches[turn], shapes, hook=hook, fp8=bool(turn))
    return True


def sglang_dispatch(buffer: Any, own: Tokens, shapes: Shapes, *, fp8: bool) -> Any:
    previous = buffer.capture()
    per_rank, per_rdma_rank, per_expert, in_rank, previous = buffer.get_dispatch_layout(
        own.ids,
        shapes.experts,
        previous_event=previous,
        async_finish=True,
        allocate_on_comm_stream=previous is not None,
    )
    x: Any = own.x
    if fp8:
        rows, scales = to_fp8(own.x)
        x = rows, column_major(scales)
    rows, ids, weights, counts, handle, event = buffer.dispatch(
        x,
        topk_idx=own.ids,
        topk_weights=own.weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=previous,
        async_finish=True,
        allocate_on_comm_stream=True,
        expert_alignment=128,
        config=None,
    )
    event.current_stream_wait()
    assert isinstance(counts, list)
    assert all(count % 128 == 0 for count in counts)
    return rows, ids, weights, handle


def sglang_combine(
    place: Place, buffer: Any, own: Tokens, shapes: Shapes, received: Any, *, fp8: bool
) -> None:
    rows, ids, weights, handle = received
    made = by_token(place, shapes, from_fp8(*rows) if fp8 else rows, ids, weights)
    for tensor in rows if fp8 else (rows,):
        tensor.set_()  # disposed of
    previous = buffer.capture()
    combined, _, event = buffer.combine(
        made,
        handle,
        async_finish=True,
        previous_event=previous,
        allocate_on_comm_stream=previous is not None,
        config=None,
    )
    event.current_stream_wait()
    (close_fp8 if fp8 else close)(combined, own)


def sglang_decode(
    place: Place, buffer: Any, own: Tokens, shapes: Shapes, *, hook: bool, fp8: bool
) -> None:
    rows, counts, handle, event, launch = buffer.low_latency_dispatch(
        own.x,
        own.ids,
        shapes.tokens,
        shapes.experts,
        use_fp8=fp8,
        async_finish=not hook,
        return_recv_hook=hook,
        round_scale=False,
        use_ue8m0=False,
    )
    launch() if hook else event.current_stream_wait()
    made = by_slab(place, shapes, from_fp8(*rows) if fp8 else rows, counts)
    combined, event, launch = buffer.low_latency_combine(
        x=made,
        topk_idx=own.ids,
        topk_weights=own.weights,
        handle=handle,
        async_finish=not hook,
        return_recv_hook=hook,
    )
    launch() if hook else event.current_stream_wait()
    (close_fp8 if fp8 else close)(combined, own)


def sglang_v2(place: Place, shapes: Shapes) -> bool:
    """deepep_v2: prefill, expanded decode without host counts, an idle rank's dummy token."""
    install()
    from deep_ep import ElasticBuffer  # pyright: ignore

    buffer = ElasticBuffer(
        place.group,
        num_max_tokens_per_rank=shapes.tokens,
        hidden=shapes.hidden,
        num_topk=shapes.topk,
        use_fp8_dispatch=True,
        allow_hybrid_mode=True,
        sl_idx=0,
        prefer_overlap_with_compute=False,
    )
    assert buffer.num_bytes % (2 << 20) == 0
    with torch.inference_mode():
        for prefill in (True, False):
            own = own_tokens(place, shapes, seed=prefill)
            idle = place.rank == place.num_ranks - 1
            if idle:  # one token with distinct experts, whose result is dropped
                ids = torch.arange(shapes.topk, device=place.device)[None]
                own = Tokens(own.x[:1], ids, torch.zeros_like(own.weights[:1]))
            rows, ids, weights, handle, _ = buffer.dispatch(
                to_fp8(own.x),
                topk_idx=own.ids,
                topk_weights=own.weights,
                num_experts=shapes.experts,
                num_max_tokens_per_rank=shapes.tokens,
                expert_alignment=128,
                num_sms=8,
                use_tma_aligned_col_major_sf=True,
                do_cpu_sync=prefill,
                do_expand=not prefill,
            )
            assert isinstance(rows, tuple)
            assert weights is not None
            values, scales = rows
            assert scales.stride() == (1, -(-len(values) // 4) * 4)
            if prefill:
                assert ids is not None
                received = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1].item())
                assert received == len(values)
                made = by_token(place, shapes, from_fp8(values, scales), ids, weights)
            else:
                assert weights.shape == (values.shape[0],)
                ends = handle.psum_num_recv_tokens_per_expert.tolist()
                made = torch.full(values.shape, float("nan"), dtype=torch.bfloat16).to(place.device)
                begin, slabs = 0, from_fp8(values, scales)
                for number, end in enumerate(ends):  # groups begin where the last one's gap ends
                    group = by_slab(
                        dataclasses.replace(place, group=None),
                        shapes,
                        slabs[None, begin:end].expand(len(ends), -1, -1),
                        torch.tensor([end - begin] * len(ends)),
                    )[number]
                    made[begin:end] = (group.float() * weights[begin:end, None]).to(torch.bfloat16)
                    begin = -(-end // 128) * 128
            combined, _, _ = buffer.combine(made, handle=handle, topk_weights=None)
            assert len(combined) == len(own.x)
            if not idle:
                close_fp8(combined, own)
    buffer = None
    return True


# -- LMDeploy -------------------------------------------------------------------------------------


def lmdeploy(place: Place, shapes: Shapes) -> bool:
    """One buffer for both modes; it counts references before it disposes of tensors."""
    install()
    from deep_ep import Buffer  # pyright: ignore

    Buffer.set_num_sms(Buffer.num_sms)  # at import, before there is a GPU
    options: dict[str, Any] = {
        "num_nvl_bytes": 1 << 20,
        "num_rdma_bytes": 1 << 20,
        "low_latency_mode": True,
        "num_qps_per_rank": shapes.experts // place.num_ranks,
    }
    buffer = Buffer(place.group, **options, allow_mnnvl=True, explicitly_destroy=True)
    assert isinstance(buffer, Buffer)
    assert buffer.group == place.group
    buffer.set_num_sms(Buffer.num_sms)
    with torch.inference_mode():
        own = own_tokens(place, shapes)
        previous = buffer.capture()
        per_rank, per_rdma_rank, per_expert, in_rank, previous = buffer.get_dispatch_layout(
            own.ids,
            shapes.experts,
            previous_event=previous,
            async_finish=False,
            allocate_on_comm_stream=False,
        )
        received = buffer.dispatch(
            to_fp8(own.x),
            topk_idx=own.ids,
            topk_weights=own.weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=previous,
            async_finish=False,
            allocate_on_comm_stream=False,
            expert_alignment=128,
        )
        made = weighted_in_fp32(place, shapes, received)
        combined, _, _ = buffer.combine(made, received[4], config=None, async_finish=False)
        close_fp8(combined, own)
        buffer.clean_low_latency_buffer(shapes.tokens, shapes.hidden, shapes.experts)
        for hook in (False, True):
            rows, counts, handle, event, launch = buffer.low_latency_dispatch(
                own.x,
                own.ids,
                shapes.tokens,
                shapes.experts,
                use_fp8=True,
                async_finish=not hook,
                return_recv_hook=hook,
            )
            launch() if launch is not None else event.current_stream_wait()
            parts = list(rows)
            assert len(parts) == 2
            del rows, event, launch
            made = by_slab(place, shapes, from_fp8(*parts), counts)
            for part in parts:
                del part
            values, scales = parts
            del parts
            assert sys.getrefcount(values) == 2
            assert sys.getrefcount(scales) == 2
            values.set_()
            scales.set_()
            combined, event, launch = buffer.low_latency_combine(
                made, own.ids, own.weights, handle, async_finish=not hook, return_recv_hook=hook
            )
            launch() if launch is not None else event.current_stream_wait()
            close_fp8(combined, own)
    buffer.destroy()
    return True
