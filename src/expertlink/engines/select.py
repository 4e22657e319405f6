"""Which engine serves a communicator, and why, in one sentence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import Engine
from expertlink.engines.collective import CollectiveEngine
from expertlink.engines.wire import Wire
from expertlink.errors import EngineUnavailableError
from expertlink.routing import Placement


@dataclass(frozen=True)
class EngineChoice:
    """An engine's name and the reason it was picked."""

    name: str
    reason: str


def choose_engine(requested: str, *, device: torch.device) -> EngineChoice:
    """The engine for a configuration's `engine` field.

    Raises:
        EngineUnavailableError: the requested engine cannot run here.
    """
    obstacle = nvlink_obstacle(device)
    if requested == "nvlink":
        raise EngineUnavailableError(f"engine='nvlink' cannot be used: {obstacle}")
    if requested == "collective":
        return EngineChoice("collective", "engine='collective' was asked for")
    return EngineChoice("collective", f"the nvlink engine cannot be used: {obstacle}")


def nvlink_obstacle(device: torch.device) -> str:
    """Why direct NVLink transport is out of reach for tensors on `device`."""
    if device.type != "cuda":
        return f"tensors live on {device.type}, it moves rows between GPUs"
    return "this version of expertlink does not contain it"


def build_engine(
    choice: EngineChoice,
    config: MoECommunicatorConfig,
    *,
    wire: Wire,
    placement: Placement,
    check_inputs: bool,
) -> Engine:
    """The chosen engine, ready for calls."""
    assert choice.name == CollectiveEngine.name
    return CollectiveEngine(config, wire=wire, placement=placement, check_inputs=check_inputs)
