"""Dispatch and combine as operators of torch, for graphs: torch.compile, export, checkpoints.

`MoECommunicator.dispatch` and `combine` go through these operators where torch.compile traces them
and where a `TorchDispatchMode` is active, such as that of selective activation checkpointing. Other
calls go straight to the engine.

library.py   the operators: names, schemas, backward
calls.py     what they do
shapes.py    what they return
traced.py    the methods of a communicator, in a graph

What stands for communicators and handles there, a string and tensors, is in graph_names.py.

Attributes:
    DISPATCH_OPS: operators of dispatches, cached ones too, for policies that name operators.
    COMBINE_OPS: those of combines.
"""

from __future__ import annotations

from expertlink.ops.library import COMBINE_OPS, DISPATCH_OPS

__all__ = ["COMBINE_OPS", "DISPATCH_OPS"]
