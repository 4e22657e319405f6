"""A bare mixture-of-experts layer: route, dispatch, experts, combine, backward.

python examples/moe_layer.py                            # one rank
torchrun --nproc-per-node 4 examples/moe_layer.py       # four ranks, on CPU or on GPUs
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expertlink import MoECommunicator, MoECommunicatorConfig
from expertlink.launch import torchrun_context

TOKENS, HIDDEN, EXPERTS, TOPK = 64, 256, 8, 2


class MoELayer(nn.Module):
    """Experts spread over the ranks of the default process group; the router is on every rank."""

    def __init__(self, comm: MoECommunicator) -> None:
        super().__init__()
        self.comm = comm
        torch.manual_seed(0)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        torch.manual_seed(1 + comm.rank)  # experts differ from rank to rank, the router does not
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))
            for _ in comm.local_experts
        )

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH).softmax(dim=-1, dtype=torch.float32).topk(TOPK)
        received, handle = self.comm.dispatch(x_TH, ids_TK, weights_TK)
        counts = received.num_tokens_per_expert.tolist()
        groups = received.tokens.split(counts)  # the default layout groups rows by expert
        outputs = [expert(rows) for expert, rows in zip(self.experts, groups, strict=True)]
        outputs.append(received.tokens[:0])  # a rank may have no expert
        return self.comm.combine(torch.cat(outputs), handle)  # weighted sum over the experts


def main() -> None:
    context = torchrun_context()  # joins torchrun's process group, if there is one
    device = context.device if context else torch.device("cpu")
    config = MoECommunicatorConfig(
        device=device,
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        topk=TOPK,
        max_tokens_per_rank=TOKENS,
        dtype=torch.float32,
    )
    with MoECommunicator(config) as comm:
        layer = MoELayer(comm).to(device)
        x_TH = torch.randn(TOKENS, HIDDEN, device=device, requires_grad=True)
        y_TH = layer(x_TH)
        y_TH.square().mean().backward()
        assert x_TH.grad is not None
        print(
            f"rank {comm.rank} of {comm.num_ranks} ({comm.engine_name} engine): "
            f"experts {comm.local_experts}, "
            f"output {list(y_TH.shape)}, gradient norm {x_TH.grad.norm():.4f}"
        )
    if context:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
