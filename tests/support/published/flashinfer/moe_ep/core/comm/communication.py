"""The base class of communications, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

_registered: dict[str, Any] = {}


@dataclass(frozen=True)
class MoEEpCommParams:
    num_experts: int
    top_k: int
    max_tokens_per_rank: int
    hidden_size: int
    dtype: torch.dtype | None = None
    dispatch_format: Any = None
    invalid_expert_id: int = -1

    @property
    def token_dtype(self) -> torch.dtype:
        return self.dtype or torch.bfloat16


@dataclass(frozen=True)
class MoEEpDispatchResult:
    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor | None
    tokens_per_rank: int
    hidden_states_scale: Tensor | None = None
    eplb_gathered_stats: Tensor | None = None


class MoEEpCommunication(ABC):
    backend_name: ClassVar[str]
    supports_cuda_graph: ClassVar[bool] = True

    def __init__(self, bootstrap: Any, params: MoEEpCommParams) -> None:
        if not self.is_platform_supported():
            raise RuntimeError("this platform is not supported")
        self.bootstrap, self.params = bootstrap, params
        self.ep_rank: int = bootstrap.rank
        self.ep_size: int = bootstrap.world_size
        if params.num_experts % self.ep_size:
            raise ValueError(
                f"num_experts ({params.num_experts}) must be divisible by the EP size "
                f"({self.ep_size})"
            )
        self.num_local_experts: int = params.num_experts // self.ep_size

    @classmethod
    @abstractmethod
    def is_platform_supported(cls) -> bool: ...

    def is_workload_feasible(self, max_tokens_per_rank: int) -> bool:
        return max_tokens_per_rank <= self.params.max_tokens_per_rank

    @abstractmethod
    def dispatch(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor | None = None,
        *,
        hidden_states_scale: Tensor | None = None,
        max_tokens_per_rank: int | None = None,
        eplb_local_stats: Tensor | None = None,
    ) -> MoEEpDispatchResult: ...

    @abstractmethod
    def combine(self, expert_output: Tensor, *, output: Tensor | None = None) -> Tensor: ...

    def get_combine_input_buffer(self, dtype: torch.dtype) -> Tensor | None:
        return None

    def destroy(self) -> None:
        return


def register_communication(name: str) -> Callable[[type], type]:
    def register(cls: Any) -> Any:
        cls.backend_name = name
        _registered[name] = cls
        return cls

    return register


def create_communication(
    bootstrap: Any, params: MoEEpCommParams, backend: Any, **options: Any
) -> MoEEpCommunication:
    name = getattr(backend, "backend_name", backend)
    if name not in _registered:
        raise KeyError(f"unknown communication backend {name!r}")
    if not isinstance(backend, str):
        options["config"] = backend
    return _registered[name](bootstrap, params, **options)
