"""Calls that torch.compile leaves out of its graphs.

Every method that talks to other ranks begins with `if torch.compiler.is_dynamo_compiling()`, which
is True only where torch.compile traces it. There it calls itself through `uncompiled`: a graph
break, below which nothing is traced.

- The full name matters. torch.compile skips a function that has neither tensors nor the name
  `torch` in it, and would trace what that function calls.
- The import is inside of the `if`, because this module imports torch._dynamo, which takes seconds.
- It is no decorator. A wrapper adds 0.2 us to a call that takes 3, and all methods would share its
  code object, and with it torch.compile's limit of recompilations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="calls to other ranks are no part of a graph")
def uncompiled(method: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`method(*args, **options)`, not compiled."""
    return method(*args, **options)
