"""A mixture-of-experts layer that knows `deep_ep` alone, in the way of Megatron's fused calls.

python examples/deep_ep_megatron.py                        # one rank
torchrun --nproc-per-node 4 examples/deep_ep_megatron.py   # four ranks, on CPU or on GPUs

The drop-in is installed first; the layer below it is code that was written for DeepEP. Dispatch's
backward is a combine, combine's backward is a dispatch with the same handle.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expertlink.compat.deep_ep import install
from expertlink.launch import torchrun_context

install()

from deep_ep import Buffer  # noqa: E402  # pyright: ignore
from deep_ep.utils import EventHandle, EventOverlap  # noqa: E402  # pyright: ignore

TOKENS, HIDDEN, EXPERTS, TOPK = 64, 256, 8, 2

_buffer: Buffer | None = None


def get_buffer(group: Any, hidden_bytes: int) -> Buffer:
    """The buffer of all layers; a larger one in its place where a layer needs more."""
    global _buffer
    nvl_bytes = rdma_bytes = 0
    for config in (
        Buffer.get_dispatch_config(group.size()),
        Buffer.get_combine_config(group.size()),
    ):
        nvl_bytes = max(config.get_nvl_buffer_size_hint(hidden_bytes, group.size()), nvl_bytes)
        rdma_bytes = max(config.get_rdma_buffer_size_hint(hidden_bytes, group.size()), rdma_bytes)
    if (
        _buffer is None
        or _buffer.group != group
        or _buffer.num_nvl_bytes < nvl_bytes
        or _buffer.num_rdma_bytes < rdma_bytes
    ):
        _buffer = Buffer(group, nvl_bytes, rdma_bytes)
    return _buffer


def hidden_bytes_of(x: Tensor) -> int:
    return x.size(1) * max(x.element_size(), 2)


class FusedDispatch(torch.autograd.Function):
    """Sends tokens to their experts; backward brings the gradients back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token_indices: Tensor,
        token_probs: Tensor,
        num_experts: int,
        group: Any,
        async_finish: bool = True,
        allocate_on_comm_stream: bool = True,
    ) -> Any:
        previous_event = EventOverlap(EventHandle()) if async_finish else None
        buffer = get_buffer(group, hidden_bytes_of(x))
        per_rank, per_rdma_rank, per_expert, is_token_in_rank, event = buffer.get_dispatch_layout(
            token_indices,
            num_experts,
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
        )
        recv_x, recv_indices, recv_probs, counts, handle, after = buffer.dispatch(
            x,
            topk_idx=token_indices,
            topk_weights=token_probs,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=event if async_finish else None,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
        )
        if async_finish:
            after.current_stream_wait()
        ctx.group, ctx.handle = group, handle
        ctx.options = async_finish, allocate_on_comm_stream
        tokens_per_expert = torch.tensor(counts)
        return recv_x, recv_indices, recv_probs, tokens_per_expert, handle

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_x, _, grad_probs, *_ = grads
        async_finish, allocate_on_comm_stream = ctx.options
        buffer = get_buffer(ctx.group, hidden_bytes_of(grad_x))
        previous_event = EventOverlap(EventHandle()) if async_finish else None
        combined, combined_probs, after = buffer.combine(
            grad_x.contiguous(),
            ctx.handle,
            topk_weights=grad_probs.float(),
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
        )
        if async_finish:
            after.current_stream_wait()
        return combined, None, combined_probs, None, None, None, None


class FusedCombine(torch.autograd.Function):
    """Adds up what the experts return; backward sends the gradients to the experts."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: Any,
        handle: Any,
        async_finish: bool = True,
        allocate_on_comm_stream: bool = True,
    ) -> Tensor:
        previous_event = EventOverlap(EventHandle()) if async_finish else None
        buffer = get_buffer(group, hidden_bytes_of(x))
        combined, _, after = buffer.combine(
            x,
            handle=handle,
            async_finish=async_finish,
            previous_event=previous_event,
            allocate_on_comm_stream=allocate_on_comm_stream,
        )
        if async_finish:
            after.current_stream_wait()
        ctx.group, ctx.handle = group, handle
        ctx.options = async_finish, allocate_on_comm_stream
        return combined

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        async_finish, allocate_on_comm_stream = ctx.options
        previous_event = EventOverlap(EventHandle()) if async_finish else None
        buffer = get_buffer(ctx.group, hidden_bytes_of(grad))
        grad_x, _, _, _, _, after = buffer.dispatch(
            grad.contiguous(),
            handle=ctx.handle,
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
        )
        if async_finish:
            after.current_stream_wait()
        return grad_x, None, None, None, None


class MoELayer(nn.Module):
    """Experts spread over the ranks of a group; the router is on every rank."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.group = group
        torch.manual_seed(0)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        torch.manual_seed(1 + group.rank())
        self.experts = nn.ModuleList(
            nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS // group.size())
        )

    def forward(self, x_TH: Tensor) -> Tensor:
        probs_TK, ids_TK = self.router(x_TH).softmax(dim=-1, dtype=torch.float32).topk(TOPK)
        rows_NH, ids_NK, probs_NK, counts, handle = FusedDispatch.apply(
            x_TH.bfloat16(), ids_TK, probs_TK, EXPERTS, self.group
        )
        assert counts.sum() == (ids_NK >= 0).sum()
        sums_NH = torch.zeros(rows_NH.shape, dtype=torch.float32, device=rows_NH.device)
        for number, expert in enumerate(self.experts):
            prob_N1 = torch.where(ids_NK == number, probs_NK, 0.0).sum(dim=1, keepdim=True)
            sums_NH = sums_NH + expert(rows_NH.float()) * prob_N1
        return FusedCombine.apply(sums_NH.bfloat16(), self.group, handle).float()


def main() -> None:
    context = torchrun_context()  # joins torchrun's process group, if there is one
    if context is None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    device = context.device if context else torch.device("cpu")
    if context is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    layer = MoELayer(group).to(device)
    x_TH = torch.randn(TOKENS, HIDDEN, device=device, requires_grad=True)
    y_TH = layer(x_TH)
    y_TH.square().mean().backward()
    assert x_TH.grad is not None
    assert layer.router.weight.grad is not None
    print(
        f"rank {group.rank()} of {group.size()}: output {tuple(y_TH.shape)}, "
        f"gradient of the input {float(x_TH.grad.norm()):.3f}, "
        f"of the router {float(layer.router.weight.grad.norm()):.3f}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
