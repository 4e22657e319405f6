"""A mixture-of-experts layer: route, dispatch, experts, combine, beside a shared expert; backward.

python examples/moe_layer.py                            # one rank
torchrun --nproc-per-node 4 examples/moe_layer.py       # four ranks, on CPU or on GPUs
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expertlink import MoECommunicator, MoECommunicatorConfig
from expertlink.launch import torchrun_context
from expertlink.nn import MoELayer

TOKENS, HIDDEN, EXPERTS, TOPK = 64, 256, 8, 2


class Router(nn.Module):
    """Softmax over all experts, then the best of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        weights_TK, ids_TK = self.gate(x_TH).softmax(dim=-1, dtype=torch.float32).topk(TOPK)
        return ids_TK, weights_TK


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
        torch.manual_seed(0)  # the same on all ranks: so are the routers, and experts differ by id
        layer = MoELayer(
            comm,
            intermediate_size=4 * HIDDEN,
            router=Router().to(device),
            shared_intermediate_size=HIDDEN,
        )
        torch.manual_seed(1 + comm.rank)
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
