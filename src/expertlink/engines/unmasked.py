"""What engines say that always need all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink.engines.ranks.wire import Wire
from expertlink.errors import ConfigurationError


class Unmasked:
    """The part of `engines.base.Engine` about masks, for engines that cannot leave out a rank."""

    _wire: Wire

    def query_mask(self) -> Tensor:
        """`[R]` bool on the device: nobody is masked."""
        return torch.zeros(self._wire.num_ranks, dtype=torch.bool, device=self._wire.device)

    def mask_peer(self, rank: int) -> None:
        """Refuses."""
        raise ConfigurationError(
            f"rank {rank} cannot be masked: peers can be masked with mode='ll' on the nvlink engine"
        )

    def clear_mask(self) -> None:
        """There is nothing to clear."""
