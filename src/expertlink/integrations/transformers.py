"""Expert parallelism of transformers' MoE models, by this library's dispatch and combine.

With transformers 5.23, which has a registry of implementations:

    register()
    distributed = DistributedConfig(fsdp_size=4, ep_size=4, ep_implementation="expertlink")
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=distributed)

With older ones, down to 5.17, `parallelize(model, group)` cuts the expert blocks of a model that
is there already. Tested with 5.17.0 and 5.23.0.
"""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

from torch import Tensor, nn

from expertlink.integrations.experts import DispatchedExperts, slice_of, whole
from expertlink.integrations.growing import Communicators, group_of, shared
from expertlink.integrations.versions import UnsupportedModelError, require

OLDEST, REGISTRY, UNTESTED = "5.17", "5.23", "5.24"
FAMILIES = (
    "DeepseekV3Experts",
    "GptOssExperts",
    "MixtralExperts",
    "OlmoeExperts",
    "Qwen3MoeExperts",
)
"""Classes of the expert blocks that `parallelize` knows."""

Model = TypeVar("Model", bound=nn.Module)


def register(name: str = "expertlink", *, max_tokens_per_rank: int | None = None) -> type:
    """Registers this library as an `ep_implementation` of `DistributedConfig`. Local; repeatable.

    Call it on every rank, before `from_pretrained`. Every model whose expert plan has the rule
    "ep_dispatch_experts" can use it. Ranks of a tensor-parallel group dispatch a slice each of the
    tokens that they share.

    Args:
        name: what `ep_implementation` will say.
        max_tokens_per_rank: most tokens of a rank in any forward; None: memory grows as needed.

    Returns:
        The class that was registered, a subclass of transformers' `EPImplementation`.

    Raises:
        FrameworkVersionError: transformers is missing, or not of a version with that registry.
    """
    remedy = "; before 5.23 use parallelize(model, group)"
    require("transformers", since=REGISTRY, before=UNTESTED, remedy=remedy)
    expert_parallel: Any = importlib.import_module("transformers.distributed.expert_parallel")

    class ExpertlinkEP(expert_parallel.EPImplementation):
        """One per experts module; those of a model share their communicators."""

        def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            if not getattr(experts, "_is_expert_parallel", False):
                raise UnsupportedModelError(
                    f"{type(experts).__name__}: the expert plan dispatches tokens to these "
                    'experts, but has no "grouped_gemm" rule that cuts their parameters'
                )
            num_experts = self.num_local_experts * ep_mesh.size()
            fields = {"num_experts": num_experts, "max_tokens_per_rank": max_tokens_per_rank}
            communicators = shared(ep_mesh, **fields)
            self._dispatched = DispatchedExperts(self.experts_forward, communicators)

        def __call__(
            self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
        ) -> Tensor:
            arguments = (hidden_states, top_k_index, top_k_weights)
            if self.tp_mesh.size() == 1:
                return self._dispatched(*arguments)
            own = [slice_of(tensor, self.tp_mesh) for tensor in arguments]
            return whole(self._dispatched(*own), self.tp_mesh, hidden_states.shape)

    expert_parallel.EPImplementationInterface.register(name, ExpertlinkEP)
    return ExpertlinkEP


def parallelize(
    model: Model, group: Any = None, *, max_tokens_per_rank: int | None = None
) -> Model:
    """Spreads the experts of a model over the ranks of a group, in place. Local.

    Every rank calls it with the same weights loaded, before an optimizer or FSDP takes the
    parameters, and keeps E / R experts of every block: rank r those from r * E / R. Each rank then
    runs the model on tokens of its own. All ranks make the same forward and backward calls.
    Gradients of experts are sums over the tokens of all ranks; all other gradients are of this
    rank's tokens, for DDP or the caller to reduce. `state_dict()` has this rank's experts alone.

    Args:
        model: a model with expert blocks of `FAMILIES`.
        group: process group, or device mesh of one dimension; None: the default group.
        max_tokens_per_rank: most tokens of a rank in any forward; None: memory grows as needed.

    Returns:
        The model.

    Raises:
        FrameworkVersionError: transformers is missing, or of a version that was not tested.
        UnsupportedModelError: no known expert blocks, or blocks that cannot be cut. The model is as
            it was.
    """
    require("transformers", since=OLDEST, before=UNTESTED)
    group = group_of(group)
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    named = [(name, module) for name, module in model.named_modules() if _is_known(module)]
    if not named:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no expert blocks of a known family: {', '.join(FAMILIES)}"
        )
    for name, block in named:
        _check_block(name, block, size)
    communicators: dict[int, Communicators] = {}
    for _, block in named:
        block: Any
        total, count = block.num_experts, block.num_experts // size
        if total not in communicators:
            communicators[total] = Communicators(
                group, num_experts=total, max_tokens_per_rank=max_tokens_per_rank
            )
        for name, parameter in list(block.named_parameters(recurse=False)):
            own = parameter.detach()[rank * count : (rank + 1) * count].clone()
            setattr(block, name, nn.Parameter(own, requires_grad=parameter.requires_grad))
        block.num_experts = count
        block.forward = DispatchedExperts(block.forward, communicators[total])
    return model


def _is_known(module: nn.Module) -> bool:
    return type(module).__name__ in FAMILIES


def _check_block(name: str, block: Any, size: int) -> None:
    if "forward" in vars(block):
        raise UnsupportedModelError(f"{name}: its forward was replaced already")
    if block.num_experts % size:
        raise UnsupportedModelError(
            f"{name}: {block.num_experts} experts do not divide evenly among {size} ranks"
        )
    for parameter, tensor in block.named_parameters():
        if "." in parameter or tensor.shape[0] != block.num_experts:
            raise UnsupportedModelError(
                f"{name}.{parameter} has shape {tuple(tensor.shape)}; "
                f"{block.num_experts} experts along the first dimension are expected"
            )
