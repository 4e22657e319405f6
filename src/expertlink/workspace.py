"""Memory that calls borrow. On CPU, touching fresh pages costs more than copying rows into them.

On CUDA, torch's caching allocator reuses memory in stream order, so borrowing is allocation there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ROUND_UP = 8  # buffers are an eighth larger than needed: a slightly larger call still fits


class Workspace:
    """Free buffers of one communicator. A buffer that is never given back is freed by torch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[torch.UntypedStorage] = []

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized contiguous tensor; it holds what its last user left."""
        if self._device.type != "cpu":
            return torch.empty(tuple(shape), dtype=dtype, device=self._device)
        needed = math.prod(shape) * dtype.itemsize
        # The smallest that fits; of equal ones the last used, which may still be in the cache.
        sizes = [storage.nbytes() for storage in self._free]
        fitting = [(size, -index) for index, size in enumerate(sizes) if size >= needed]
        if fitting:
            storage = self._free.pop(-min(fitting)[1])
        else:
            if sizes:  # outgrown: the new buffer replaces the largest one
                self._free.pop(sizes.index(max(sizes)))
            storage = torch.UntypedStorage(needed + needed // _ROUND_UP, device=self._device)
        return torch.empty(0, dtype=dtype, device=self._device).set_(storage, 0, tuple(shape))  # type: ignore[arg-type]

    def give_back(self, *tensors: Tensor) -> None:
        """Ends loans; the tensors must not be used any more."""
        if self._device.type == "cpu":
            self._free.extend(tensor.untyped_storage() for tensor in tensors)

    def settle(self, loans: list[Tensor]) -> None:
        """Ends loans and takes them off the list, so that nothing is given back twice."""
        while loans:
            self.give_back(loans.pop())

    def clear(self) -> None:
        """Frees what is not on loan."""
        self._free.clear()
