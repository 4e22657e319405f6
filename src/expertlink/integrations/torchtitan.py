"""A token dispatcher for torchtitan, by its mechanism of overrides.

    --override.imports expertlink.integrations.torchtitan.expertlink_dispatch

or `OverrideConfig(imports=["expertlink.integrations.torchtitan.expertlink_dispatch"])` takes the
place of the token dispatchers of all MoE layers that exchange tokens, whatever `comm_backend` says.
Tested with torchtitan 0.3.0.

The name exists where torchtitan is installed: its registry of overrides is filled at import, and
this module is imported by it alone. All layers of a group share their communicators. Without an
expert-parallel mesh a layer does what torchtitan's local dispatcher does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from expertlink.communicator import MoECommunicator
from expertlink.errors import ConfigurationError, HandleError
from expertlink.integrations.growing import Communicators, shared
from expertlink.integrations.versions import require
from expertlink.types import DispatchHandle

SINCE, BEFORE = "0.3.0", "0.4"


@dataclass(frozen=True, kw_only=True)
class DispatchState:
    """What a dispatch leaves for its combine.

    Attributes:
        comm: the communicator that dispatched.
        handle: the routing.
    """

    comm: MoECommunicator
    handle: DispatchHandle


@functools.cache
def dispatcher_class() -> type:
    """The dispatcher, a subclass of torchtitan's `BaseEPTokenDispatcher`. Imports torchtitan.

    Raises:
        FrameworkVersionError: torchtitan is missing, or of a version that was not tested.
    """
    require("torchtitan", since=SINCE, before=BEFORE)
    from torchtitan.models.common import token_dispatcher as titan

    class ExpertlinkTokenDispatcher(titan.BaseEPTokenDispatcher):
        """Rows arrive in FLAT order: by expert, source rank, source token. Combine weights them."""

        @dataclass(kw_only=True, slots=True)
        class Config(titan.BaseEPTokenDispatcher.Config):
            """Fields beside the number of experts and top-k.

            Attributes:
                num_max_tokens_per_rank: most tokens of a rank in any call; None: memory grows.
                pad_multiple: every expert's rows are padded with zeros to a multiple of it.
            """

            num_max_tokens_per_rank: int | None = None
            pad_multiple: int | None = None

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self._max_tokens: int | None = config.num_max_tokens_per_rank
            self._alignment: int = config.pad_multiple or 1
            self._communicators: Communicators | None = None

        def init_buffer(self) -> None:
            """Called once the mesh is known. Memory is made by the first dispatch."""
            if self.ep_mesh is None:
                return
            if self.num_experts % self.ep_mesh.size():
                raise ConfigurationError(
                    f"{self.num_experts} experts do not divide evenly among "
                    f"{self.ep_mesh.size()} ranks of the expert-parallel mesh"
                )
            self._communicators = shared(
                self.ep_mesh,
                num_experts=self.num_experts,
                max_tokens_per_rank=self._max_tokens,
                expert_alignment=self._alignment,
            )

        def dispatch(
            self,
            x_TD: Tensor,
            topk_scores_TK: Tensor,
            topk_expert_ids_TK: Tensor,
            num_local_tokens_per_expert_E: Tensor,
        ) -> tuple[Tensor, Tensor, object]:
            """Collective. Returns rows `[R, D]`, their numbers `[E_loc]`, and a state."""
            if self._communicators is None:
                return titan.LocalTokenDispatcher.dispatch(
                    self, x_TD, topk_scores_TK, topk_expert_ids_TK, num_local_tokens_per_expert_E
                )
            received, handle, comm = self._communicators.dispatch(
                x_TD, topk_expert_ids_TK, topk_scores_TK
            )
            counts_e = received.num_tokens_per_expert
            if self._alignment > 1:
                assert received.expert_offsets is not None
                counts_e = torch.diff(received.expert_offsets)
            return received.tokens, counts_e, DispatchState(comm=comm, handle=handle)

        def combine(self, routed_output_RD: Tensor, metadata: object, x_TD: Tensor) -> Tensor:
            """Collective. Returns `[T, D]`, the sums of expert outputs times scores."""
            if isinstance(metadata, DispatchState):
                return metadata.comm.combine(routed_output_RD, metadata.handle)
            if self._communicators is not None:
                raise HandleError(
                    f"combine was given a {type(metadata).__name__}, not what dispatch returned"
                )
            return titan.LocalTokenDispatcher.combine(self, routed_output_RD, metadata, x_TD)

    return ExpertlinkTokenDispatcher


def expertlink_dispatch(config: Any, *, num_max_tokens_per_rank: int | None = None) -> Any:
    """The override: this library's dispatcher in place of the one that `config` is for.

    Args:
        config: of the dispatcher that is replaced; what both have in common is kept.
        num_max_tokens_per_rank: most tokens of a rank in any call; None: that of `config`, if it
            has one, else memory grows as needed.

    Raises:
        FrameworkVersionError: torchtitan is missing, or of a version that was not tested.
    """
    target: Any = dispatcher_class()
    from torchtitan.config import derive

    if num_max_tokens_per_rank is None:
        return derive(config, target.Config)
    return derive(config, target.Config, num_max_tokens_per_rank=num_max_tokens_per_rank)


def _register() -> None:
    require("torchtitan", since=SINCE, before=BEFORE)
    from torchtitan.config import override
    from torchtitan.models.common.token_dispatcher import BaseEPTokenDispatcher

    override(target=BaseEPTokenDispatcher.Config, description="expertlink")(expertlink_dispatch)


if find_spec("torchtitan") is not None:
    _register()
