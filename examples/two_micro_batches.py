"""Two micro-batches in turn: one computes while rows of the other one travel.

python examples/two_micro_batches.py                                  # one rank
torchrun --nproc-per-node 4 examples/two_micro_batches.py             # training: mode "ht"
torchrun --nproc-per-node 4 examples/two_micro_batches.py --mode ll   # decode: mode "ll"

On CPU or on GPUs. A micro-batch is a generator that yields wherever its rows are on their way. Run
in turn, both make the same calls as one after the other, so all results are equal bit for bit.
What else decides whether time is saved: docs/guide/overlap.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expertlink import DispatchOutput, MoECommunicator, MoECommunicatorConfig
from expertlink.launch import torchrun_context

LAYERS, TOKENS, HIDDEN, EXPERTS, TOPK = 2, 32, 256, 8, 2

MicroBatch = Generator[None, None, Tensor]
"""Yields while its rows travel; returns `[T, H]`."""


class Layer(nn.Module):
    """A dense part, which stands for attention, a router, and this rank's experts."""

    def __init__(self, comm: MoECommunicator, *, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.dense = nn.Linear(HIDDEN, HIDDEN)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        torch.manual_seed(1000 * (1 + comm.rank) + seed)  # experts differ from rank to rank
        self.w_EHH = nn.Parameter(torch.randn(comm.num_local_experts, HIDDEN, HIDDEN) / 16)

    def begin(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before dispatch: tokens, ids, weights."""
        h_TH = x_TH + self.dense(x_TH).tanh()
        weights_TK, ids_TK = self.router(h_TH).softmax(dim=-1, dtype=torch.float32).topk(TOPK)
        return h_TH, ids_TK, weights_TK

    def experts(self, received: DispatchOutput) -> Tensor:
        """What comes between dispatch and combine."""
        tokens = received.tokens
        if tokens.dim() == 3:  # EXPERT_MAJOR: a padded group of rows for every expert
            return (tokens @ self.w_EHH).relu()
        counts = received.num_tokens_per_expert_list  # FLAT: the rows of the experts in turn
        assert counts is not None
        groups = zip(tokens.split(counts), self.w_EHH, strict=True)
        outputs = [rows @ w_HH for rows, w_HH in groups]
        return torch.cat([*outputs, tokens[:0]]).relu()  # a rank may have no expert


def in_one_piece(comm: MoECommunicator, layers: Sequence[Layer], x_TH: Tensor) -> Tensor:
    """Without overlap."""
    for layer in layers:
        h_TH, ids_TK, weights_TK = layer.begin(x_TH)
        received, handle = comm.dispatch(h_TH, ids_TK, weights_TK)
        x_TH = h_TH + comm.combine(layer.experts(received), handle)
    return x_TH


def with_requests(comm: MoECommunicator, layers: Sequence[Layer], x_TH: Tensor) -> MicroBatch:
    """Mode "ht": calls run on the communicator's stream, beside what the other one computes."""
    for layer in layers:
        h_TH, ids_TK, weights_TK = layer.begin(x_TH)
        dispatching = comm.dispatch_async(h_TH, ids_TK, weights_TK)
        yield
        received, handle = dispatching.wait()
        combining = comm.combine_async(layer.experts(received), handle)
        yield
        x_TH = h_TH + combining.wait()
    return x_TH


def with_hooks(comm: MoECommunicator, layers: Sequence[Layer], x_TH: Tensor) -> MicroBatch:
    """Mode "ll": calls in halves on one stream. Between the halves they hold no SM."""
    for layer in layers:
        h_TH, ids_TK, weights_TK = layer.begin(x_TH)
        received, handle, receive = comm.dispatch(h_TH, ids_TK, weights_TK, return_recv_hook=True)
        yield
        receive()
        result_TH, receive = comm.combine(layer.experts(received), handle, return_recv_hook=True)
        yield
        receive()
        x_TH = h_TH + result_TH
    return x_TH


def in_turn(*micro_batches: MicroBatch) -> list[Tensor]:
    """Runs each up to its next `yield`, the first one first, until all have returned."""
    results: dict[int, Tensor] = {}
    while len(results) < len(micro_batches):
        for i, micro_batch in enumerate(micro_batches):
            try:
                if i not in results:
                    next(micro_batch)
            except StopIteration as end:
                results[i] = end.value
    return [results[i] for i in range(len(micro_batches))]


def run(
    forward: Callable[[Sequence[Tensor]], list[Tensor]], batches: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs and, where gradients are enabled, gradients of the inputs."""
    tracked = torch.is_grad_enabled()
    inputs = [x_TH.clone().requires_grad_(tracked) for x_TH in batches]
    outputs = forward(inputs)
    if tracked:
        torch.stack([y_TH.float().square().mean() for y_TH in outputs]).sum().backward()
    return outputs + [x_TH.grad for x_TH in inputs if x_TH.grad is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description="Two micro-batches in turn.")
    parser.add_argument("--mode", choices=("ht", "ll"), default="ht")
    parser.add_argument("--num-sms", type=int, help="that a dispatch or combine may occupy")
    arguments = parser.parse_args()
    context = torchrun_context()  # joins torchrun's process group, if there is one
    device = context.device if context else torch.device("cpu")
    config = MoECommunicatorConfig(
        device=device,
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        topk=TOPK,
        max_tokens_per_rank=TOKENS,
        mode=arguments.mode,
        num_sms_dispatch=arguments.num_sms,
        num_sms_combine=arguments.num_sms,
    )
    overlapped = with_requests if config.mode == "ht" else with_hooks
    with (
        MoECommunicator(config) as comm,
        torch.set_grad_enabled(config.mode == "ht"),  # halves are for inference
    ):
        layers = [Layer(comm, seed=i).to(device, config.dtype) for i in range(LAYERS)]
        torch.manual_seed(100 + comm.rank)
        batches = [torch.randn(TOKENS, HIDDEN).to(device, config.dtype) for _ in range(2)]
        expected = run(lambda inputs: [in_one_piece(comm, layers, x) for x in inputs], batches)
        results = run(
            lambda inputs: in_turn(*(overlapped(comm, layers, x) for x in inputs)), batches
        )
        same = sum(map(torch.equal, results, expected))
        if same != len(expected):
            raise SystemExit(f"rank {comm.rank}: {same} of {len(expected)} results are the same")
        print(
            f"rank {comm.rank} of {comm.num_ranks} ({comm.engine_name} engine): "
            f"{same} results of two micro-batches in turn are those of one after the other"
        )
        if device.type == "cuda" and comm.rank == 0:
            left = [comm.compute_sms(op) for op in ("dispatch", "combine")]
            print(f"SMs that compute beside a dispatch: {left[0]}, beside a combine: {left[1]}")
    if context:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
