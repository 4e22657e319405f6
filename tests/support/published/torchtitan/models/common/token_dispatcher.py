"""Token dispatchers: the local one, and the contract of those that exchange tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtitan.config import Configurable


class LocalTokenDispatcher(Configurable):
    """Groups a rank's own tokens by expert."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        num_experts: int
        top_k: int

    def __init__(self, config: Any) -> None:
        self.num_experts: int = config.num_experts
        self.top_k: int = config.top_k

    def wire_meshes(self, *, ep_mesh: Any) -> None:
        """Nothing to do on one rank."""

    def dispatch(
        self,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> tuple[Tensor, Tensor, Any]:
        order = topk_expert_ids_TK.flatten().argsort(stable=True)
        tokens = order // self.top_k
        return x_TD[tokens], num_local_tokens_per_expert_E, (tokens, topk_scores_TK, order)

    def combine(self, routed_output_RD: Tensor, metadata: Any, x_TD: Tensor) -> Tensor:
        tokens, scores_TK, order = metadata
        rows = routed_output_RD * scores_TK.flatten()[order, None]
        return torch.zeros_like(x_TD).index_add(0, tokens, rows)


class BaseEPTokenDispatcher(LocalTokenDispatcher, ABC):
    """Tells a dispatcher its mesh, then calls `init_buffer`."""

    @dataclass(kw_only=True, slots=True)
    class Config(LocalTokenDispatcher.Config):
        pass

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.ep_mesh: Any = None

    def wire_meshes(self, *, ep_mesh: Any) -> None:
        self.ep_mesh = ep_mesh
        self.init_buffer()

    def init_buffer(self) -> None: ...

    @abstractmethod
    def dispatch(
        self,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> tuple[Tensor, Tensor, object]: ...

    @abstractmethod
    def combine(self, routed_output_RD: Tensor, metadata: object, x_TD: Tensor) -> Tensor: ...


class AllToAllTokenDispatcher(BaseEPTokenDispatcher):
    """What most configurations name; here it is there to be replaced."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseEPTokenDispatcher.Config):
        pass


class TorchAOTokenDispatcher(AllToAllTokenDispatcher):
    """One whose groups of rows are padded."""

    @dataclass(kw_only=True, slots=True)
    class Config(AllToAllTokenDispatcher.Config):
        pad_multiple: int
