"""Steps of optimizers where an expert is on several ranks: refused with gradients of single copies.

A backward pass gives each copy the gradients of its own rows. Their sum is made by whoever owns the
copies (`nn.MoELayer.sum_copies_gradients`); here is what notices that it was not made.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from expertlink.errors import InputError


class HasCopies(Protocol):
    """A layer of experts some of which may be on several ranks.

    Attributes:
        copies_summed: names of the experts' parameters whose gradients are sums over all copies.
    """

    copies_summed: set[str]

    @property
    def experts(self) -> nn.Module:
        """This rank's experts."""
        ...

    @property
    def has_copies(self) -> bool:
        """Whether an expert is on several ranks."""
        ...


_with_copies: weakref.WeakSet[HasCopies] = weakref.WeakSet()
_hooks: list[Any] = []


def guard(layer: HasCopies) -> None:
    """From now on no optimizer of torch steps with the gradients of single copies."""
    if not layer.has_copies:
        return
    _with_copies.add(layer)
    for name, parameter in layer.experts.named_parameters():
        if parameter.requires_grad:
            # What a backward pass adds is not summed, and a step before it may have been left out.
            parameter.register_post_accumulate_grad_hook(
                partial(_unmark, layer.copies_summed, name)
            )
    if not _hooks:
        check, note = (cast(Any, torch.compiler.disable(f)) for f in (_check_step, _note_step))
        _hooks.append(register_optimizer_step_pre_hook(check))
        _hooks.append(register_optimizer_step_post_hook(note))


def _unmark(summed: set[str], name: str, parameter: Tensor) -> None:
    summed.discard(name)


def _held(optimizer: torch.optim.Optimizer) -> Iterator[tuple[HasCopies, str, Tensor]]:
    """Parameters of experts with copies that an optimizer has."""
    if not _with_copies:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in list(_with_copies):
        for name, parameter in layer.experts.named_parameters():
            if id(parameter) in held:
                yield layer, name, parameter


def _check_step(optimizer: torch.optim.Optimizer, args: Any, options: Any) -> Any:
    """Before a step; one with a closure gets its gradients from that."""
    positional = len(args) > 1  # behind the optimizer itself
    closure = args[1] if positional else options.get("closure")
    if not callable(closure):
        _check_gradients(optimizer)
        return None
    if next(_held(optimizer), None) is None:
        return None

    def checked() -> Any:
        loss = closure()
        _check_gradients(optimizer)
        return loss

    if positional:
        return (args[0], checked, *args[2:]), options
    return args, {**options, "closure": checked}


def _check_gradients(optimizer: torch.optim.Optimizer) -> None:
    for layer, name, parameter in _held(optimizer):
        if parameter.grad is not None and name not in layer.copies_summed:
            raise InputError(
                f"{type(optimizer).__name__}.step: gradients of {name} are those of single copies "
                "of experts; call sum_copies_gradients() after backward, on all ranks, or "
                "mark_copies_summed() where you have added them up"
            )


def _note_step(optimizer: torch.optim.Optimizer, args: Any, options: Any) -> None:
    for layer, name, _ in _held(optimizer):
        layer.copies_summed.discard(name)
