"""Which operations torch carries out in a call."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from expertlink import combining, dispatching


class Operations(TorchDispatchMode):
    """Notes their names, oldest first.

    Communicators do not notice it: in a mode of torch, most of their calls would be operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Operations:
        for module in (dispatching, combining):
            self._patch.setattr(module, "is_in_torch_dispatch_mode", lambda: False)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
