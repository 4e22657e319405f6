"""Which engine serves a communicator, and why, in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from expertlink.config import NVLINK_ONLY, MoECommunicatorConfig
from expertlink.engines.base import Engine
from expertlink.engines.collective.engine import CollectiveEngine
from expertlink.engines.nvlink import build
from expertlink.engines.ranks.handshake import cannot_move
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import ConfigurationError, EngineUnavailableError
from expertlink.routing import Placement


@dataclass(frozen=True)
class EngineChoice:
    """An engine's name and the reason it was picked."""

    name: str
    reason: str


def choose_engine(
    config: MoECommunicatorConfig, *, device: torch.device, group: Any | None = None
) -> EngineChoice:
    """The engine for a configuration, as far as this rank can tell alone.

    Raises:
        ConfigurationError: `engine="collective"` with a group that cannot move the rows.
        EngineUnavailableError: the requested engine cannot run here, or none can.
    """
    if config.engine == "collective":
        hindrance = cannot_move(group, device)
        if hindrance is not None:
            raise ConfigurationError(f"device={str(device)!r} is not possible: {hindrance}")
        return EngineChoice("collective", "engine='collective' was asked for")
    reason = build.unavailable_reason(config, device) or _not_in_mode(config)
    if reason is None:
        asked = (
            "engine='nvlink' was asked for"
            if config.engine == "nvlink"
            else "all GPUs share one NVLink domain"
        )
        return EngineChoice("nvlink", asked)
    if _must_be_nvlink(config):
        raise _unavailable(config, reason)
    return _collective(f"the nvlink engine cannot be used: {reason}", group, device)


def build_engine(
    choice: EngineChoice,
    config: MoECommunicatorConfig,
    *,
    wire: Wire,
    placement: Placement,
    check_inputs: bool,
    share_with: Engine | None = None,
) -> tuple[EngineChoice, Engine]:
    """The engine, ready for calls, and the choice that the ranks agree on. Collective.

    Args:
        choice: what every rank chose alone.
        config: the communicator's.
        wire: the ranks' connection.
        placement: where the experts live.
        check_inputs: as configured.
        share_with: engine of another communicator whose memory serves this one too.

    Raises:
        EngineUnavailableError: on every rank: they cannot use the engine that was asked for.
    """
    if config.engine == "auto" and wire.device.type == "cuda":
        # What hinders one rank hinders all.
        texts = wire.gather_text("" if choice.name == "nvlink" else choice.reason)
        reasons = [text for text in texts if text]
        if reasons:
            choice = _collective(reasons[0], wire.group, wire.device)
    if choice.name == "nvlink":
        try:
            engine: Engine = build.build(
                config,
                wire=wire,
                placement=placement,
                check_inputs=check_inputs,
                share_with=share_with,
            )
            return choice, engine
        except EngineUnavailableError as error:
            if _must_be_nvlink(config):
                raise _unavailable(config, str(error)) from error
            reason = f"the nvlink engine cannot be used: {error}"
            choice = _collective(reason, wire.group, wire.device)
    engine = CollectiveEngine(config, wire=wire, placement=placement, check_inputs=check_inputs)
    return choice, engine


def _collective(reason: str, group: Any | None, device: torch.device) -> EngineChoice:
    """The choice of torch.distributed in place of the other engine, if the group moves rows.

    Ranks have groups of the same backends, so what they choose together is refused on all of them.
    """
    hindrance = cannot_move(group, device)
    if hindrance is not None:
        raise EngineUnavailableError(
            f"no engine can be used: {reason}; the collective engine cannot move rows: {hindrance}"
        )
    return EngineChoice("collective", reason)


def _not_in_mode(config: MoECommunicatorConfig) -> str | None:
    """What the nvlink engine does not have in the configured mode, or None."""
    if config.mode == "ht" and config.combine_precision == "exact":
        return "it has combine_precision='exact' with mode='ll' only"
    return None


def _must_be_nvlink(config: MoECommunicatorConfig) -> bool:
    return config.engine == "nvlink" or any(getattr(config, name) for name in NVLINK_ONLY)


def _unavailable(config: MoECommunicatorConfig, reason: str) -> EngineUnavailableError:
    asked = "engine='nvlink'"
    if config.engine != "nvlink":
        name = next(name for name in NVLINK_ONLY if getattr(config, name))
        asked = f"{name}=True, which needs the nvlink engine,"
    return EngineUnavailableError(f"{asked} cannot be used: {reason}")
