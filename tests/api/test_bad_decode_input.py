"""Bad arguments of decode features: weights of a combine, buffers, ranges, masks."""

from __future__ import annotations

import pytest
import torch

from expertlink import BlockFormat, CapacityError, ConfigurationError, HandleError, InputError
from expertlink.quantization import quantize
from support.small_calls import H, K, T, good, make


@pytest.mark.parametrize("tracking", [True, False])
def test_combine_refuses_wrong_weights(tracking: bool) -> None:
    with torch.set_grad_enabled(tracking), make() as comm:
        out, handle = comm.dispatch(**good())
        for bad, message in [
            (torch.rand(T, K), r"weights has shape \(4, 2\); expected \(7\)"),
            (torch.rand(7).double(), "weights has dtype torch.float64; accepted: torch.float32"),
            (torch.rand(7, device="meta"), "weights is on meta"),
            ([1.0] * 7, "weights must be a torch.Tensor, not list"),
        ]:
            with pytest.raises(InputError, match=message):
                comm.combine(out.tokens, handle, weights=bad)  # type: ignore[arg-type]
        for bad, message in [
            (torch.rand(7), r"topk_weights has shape \(7,\); expected \(4, 2\)"),
            (torch.rand(T, K).double(), "topk_weights has dtype torch.float64; accepted: torch.fl"),
            (torch.rand(T, K, device="meta"), "topk_weights is on meta"),
            ([[1.0] * K] * T, "topk_weights must be a torch.Tensor, not list"),
        ]:
            with pytest.raises(InputError, match=message):
                comm.combine(out.tokens, handle, topk_weights=bad)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="weights and topk_weights exclude each other"):
            comm.combine(out.tokens, handle, weights=torch.rand(7), topk_weights=torch.rand(T, K))
        strided = torch.arange(14.0)[::2]  # rows lie by expert: tokens 0, 3, 0, 1, 1, 2, 2
        result = comm.combine(torch.ones_like(out.tokens), handle, weights=strided)
        assert result[:, 0].tolist() == [0.0 + 4, 6.0 + 8, 10.0 + 12, 2.0]
    with make(output_layout="token_major") as comm:
        out, handle = comm.dispatch(**good())
        with pytest.raises(InputError, match="weights cannot be given for layout token_major"):
            comm.combine(out.tokens, handle, weights=torch.rand(4))
        with pytest.raises(InputError, match="topk_weights cannot be given for layout token_major"):
            comm.combine(out.tokens, handle, topk_weights=torch.rand(T, K))


def test_what_gradients_exclude() -> None:
    with make() as comm:
        fields = good()
        tracked = {**fields, "input": fields["input"].clone().requires_grad_()}
        buffers = comm.create_buffers()
        with pytest.raises(InputError, match="output_buffer cannot be used where gradients"):
            comm.dispatch(**tracked, output_buffer=buffers)
        with pytest.raises(InputError, match="return_recv_hook cannot be used where gradients"):
            comm.dispatch(**tracked, return_recv_hook=True)
        out, handle = comm.dispatch(**tracked)
        with pytest.raises(InputError, match="weights cannot be used where gradients"):
            comm.combine(out.tokens, handle, weights=torch.rand(7))
        with pytest.raises(InputError, match="return_recv_hook cannot be used where gradients"):
            comm.combine(out.tokens, handle, return_recv_hook=True)
        out, handle = comm.dispatch(**fields, output_buffer=buffers)
        with pytest.raises(InputError, match="DispatchBuffers cannot be combined where gradients"):
            comm.combine(out.tokens.clone().requires_grad_(), handle)
        comm.combine(out.tokens, handle)


def test_buffers_are_checked() -> None:
    q, scales = quantize(torch.randn(T, H), BlockFormat.E4M3_FLOAT32)
    ids, layout = good()["topk_ids"], "token_major"
    with make(output_layout=layout) as comm, make(output_layout=layout) as other:
        for examples, message in [
            ((torch.randn(2, H).half(),), "input has dtype torch.float16"),
            ((None, scales), "input must be a torch.Tensor, not NoneType"),
            ((q, scales[:1]), "scales has shape"),
        ]:
            with pytest.raises(InputError, match=message):
                comm.create_buffers(*examples)
        for buffers, message in [
            (other.create_buffers(), "output_buffer belongs to another communicator"),
            (comm.create_buffers(weighted=False), r"create_buffers\(weighted=False\)"),
            (
                comm.create_buffers(q, scales),
                "made for torch.float8_e4m3fn rows of 8 elements with 1 torch.float32 scales; "
                "this dispatch has torch.float32 rows of 8 elements",
            ),
        ]:
            with torch.no_grad(), pytest.raises(InputError, match=message):
                comm.dispatch(**good(), output_buffer=buffers)
        with pytest.raises(InputError, match="made for torch.float32 rows of 8 elements; this"):
            comm.dispatch(q, ids, scales=scales, output_buffer=comm.create_buffers())
        # Buffers without weights are good for rows without weights.
        out, _ = comm.dispatch(
            good()["input"], ids, output_buffer=comm.create_buffers(weighted=False)
        )
        assert out.topk_weights is None
        out, _ = comm.dispatch(good()["input"], ids, output_buffer=comm.create_buffers())
        assert out.topk_weights is None


def test_buffers_that_are_too_small_are_a_capacity_error() -> None:
    with make(max_recv_tokens_per_rank=6) as comm:
        buffers = comm.create_buffers()
        assert buffers.output.tokens.shape == (6, H)
        with pytest.raises(CapacityError, match="rank 0 would receive 7 rows.* room for 6"):
            comm.dispatch(**good(), output_buffer=buffers)


def test_ranges_need_a_row_per_expert() -> None:
    with make(output_layout="rank_major") as comm:
        _, handle = comm.dispatch(**good())
        with pytest.raises(InputError, match="flat, expert_major.*not rank_major"):
            comm.expert_ranges(handle)
    with make() as comm, pytest.raises(HandleError, match="belongs to another"):
        comm.expert_ranges(handle)


def test_masks_need_another_engine() -> None:
    with make() as comm:
        assert comm.query_mask().tolist() == [False]
        comm.clear_mask()
        for rank, message in ((1, "rank=1: ranks are 0..0"), (True, "rank=True"), (0, "itself")):
            with pytest.raises(InputError, match=message):
                comm.mask_peer(rank)
        comm.num_ranks = 2  # as if there were a peer
        with pytest.raises(ConfigurationError, match="mode='ll' on the nvlink engine"):
            comm.mask_peer(1)
