"""Calls that torch.compile leaves out of its graphs.

Every call that talks to other ranks begins with `if torch.compiler.is_dynamo_compiling()`, which is
False unless torch.compile traces it. Then it goes on in `uncompiled`: a graph break, and nothing
below it is traced. The full name matters: torch.compile does not trace a function that has neither
tensors nor the name `torch` in it, and would go on with what it calls.

Imported only there, because it imports torch._dynamo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="calls to other ranks are no part of a graph")
def uncompiled(method: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`method(*args, **options)`, not compiled."""
    return method(*args, **options)
