"""Calls that torch.compile leaves out of its graphs, and whether it has to.

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
from torch._guards import TracingContext


@torch.compiler.assume_constant_result
def allows_counted_rows() -> bool:
    """Whether the graph that is being traced may hold rows whose number is counted at run time.

    torch does so with `fullgraph=True`, or where `capture_dynamic_output_shape_ops` is set.
    """
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None or context.fake_mode.shape_env is None:
        return False
    return bool(context.fake_mode.shape_env.allow_dynamic_output_shape_ops)


@torch.compiler.disable(reason="docs/guide/compile.md says which calls may be part of a graph")
def uncompiled(method: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`method(*args, **options)`, not compiled."""
    return method(*args, **options)
