"""Which engine serves a communicator, and why, in one sentence.

one domain                                   nvlink, else collective
several domains of equal size, GPUs, NCCL    hybrid, else collective
anything else                                collective
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from expertlink.config import NOT_COLLECTIVE, MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.base import Engine
from expertlink.engines.collective.engine import CollectiveEngine
from expertlink.engines.hybrid import build as hybrid_build
from expertlink.engines.hybrid.discovery import discover
from expertlink.engines.nvlink import build
from expertlink.engines.ranks.handshake import cannot_move
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import ConfigurationError, EngineUnavailableError
from expertlink.routing import Placement

_NOT_HYBRID = ("zero_copy", "mask_lost_peers")


class HybridBuilder(Protocol):
    """Builds the hybrid engine. Collective; what hinders one rank is raised on all."""

    def __call__(
        self,
        config: MoECommunicatorConfig,
        *,
        wire: Wire,
        placement: Placement,
        domains: Domains,
        check_inputs: bool,
        share_with: Engine | None = None,
    ) -> Engine:
        """As `nvlink.build.build`, for hosts of equally many ranks.

        Raises:
            EngineUnavailableError: the engine cannot be built.
        """
        ...


build_hybrid: HybridBuilder = hybrid_build.build

AUTO_TAKES_HYBRID = False
"""Whether "auto" chooses the hybrid engine. Not until it has been measured on several GPUs: which
of two engines serves decides time, not bits."""


@dataclass(frozen=True)
class EngineChoice:
    """An engine's name and the reason it was picked."""

    name: str
    reason: str


def choose_engine(
    config: MoECommunicatorConfig, *, device: torch.device, group: Any | None = None
) -> EngineChoice:
    """The engine for a configuration, as far as this rank can tell alone.

    Without `config.domains` the ranks count as one domain until they have met.

    Raises:
        ConfigurationError: `engine="collective"` with a group that cannot move the rows, or
            `domains` do not fit the group.
        EngineUnavailableError: the requested engine cannot run here, or none can.
    """
    domains = _domains_of(config, 1 if group is None else group.size())
    if config.engine == "collective":
        hindrance = cannot_move(group, device)
        if hindrance is not None:
            raise ConfigurationError(f"device={str(device)!r} is not possible: {hindrance}")
        return EngineChoice("collective", "engine='collective' was asked for")
    refused: dict[str, str] = {}
    if config.engine in ("auto", "nvlink"):
        reason = _nvlink_reason(config, device=device, domains=domains)
        if reason is None:
            return EngineChoice("nvlink", _why(config, "all GPUs share one NVLink domain"))
        refused["nvlink"] = reason
    if config.engine == "hybrid" or (config.engine == "auto" and _several(domains)):
        reason = hybrid_reason(config, device=device, group=group, domains=domains)
        if reason is None:
            return EngineChoice("hybrid", _why(config, "the GPUs are in several NVLink domains"))
        refused["hybrid"] = reason
    return _in_place_of(refused, config, group, device)


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
    group, device = wire.group, wire.device
    domains = _domains_of(config, wire.num_ranks)
    if config.engine == "auto" and device.type == "cuda":
        # What hinders one rank hinders all.
        reason = _anybodys(wire, choice.reason if choice.name == "collective" else None)
        if reason is not None:
            choice = _collective(reason, group, device)
    refused: dict[str, str] = {}
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
            refused["nvlink"] = str(error)
    if domains is None and (choice.name == "hybrid" or (config.engine == "auto" and refused)):
        domains = discover(wire)
    if choice.name == "hybrid" or (config.engine == "auto" and refused and _several(domains)):
        reason = hybrid_reason(config, device=device, group=group, domains=domains)
        reason = _anybodys(wire, reason)
        if reason is None:
            assert domains is not None
            try:
                engine = build_hybrid(
                    config,
                    wire=wire,
                    placement=placement,
                    domains=domains,
                    check_inputs=check_inputs,
                    share_with=share_with,
                )
                why = _why(config, "the GPUs are in several NVLink domains")
                return EngineChoice("hybrid", why), engine
            except EngineUnavailableError as error:
                reason = str(error)
        refused["hybrid"] = reason
    if refused:
        choice = _in_place_of(refused, config, group, device)
    engine = CollectiveEngine(config, wire=wire, placement=placement, check_inputs=check_inputs)
    return choice, engine


def hybrid_reason(
    config: MoECommunicatorConfig,
    *,
    device: torch.device,
    group: Any | None,
    domains: Domains | None,
) -> str | None:
    """Why this rank cannot use the hybrid engine, or None.

    Args:
        config: the communicator's.
        device: where tensors live.
        group: the ranks' process group.
        domains: hosts of the ranks; None: not known yet, so nothing is said of them.
    """
    reason = build.unavailable_reason(config, device)
    if reason is not None:
        return reason
    if config.combine_precision == "exact":
        return "it has combine_precision='wire' only"
    for name in _NOT_HYBRID:
        if getattr(config, name):
            return f"it does not have {name}"
    if domains is not None and not _several(domains):
        return "all ranks are on one host, it connects several"
    if domains is not None and domains.ranks_per_host is None:
        sizes = [len(domains.ranks_of(host)) for host in range(domains.num_hosts)]
        return f"the hosts have {', '.join(map(str, sizes))} ranks, it needs equally many on each"
    backend = _backend_of(group, device)
    if backend != "nccl":
        return f"the process group's backend for cuda tensors is {backend}, it needs nccl"
    if config.engine == "auto" and not AUTO_TAKES_HYBRID:
        return "it serves where engine='hybrid' asks for it"
    return None


def _nvlink_reason(
    config: MoECommunicatorConfig, *, device: torch.device, domains: Domains | None
) -> str | None:
    """Why this rank cannot use the nvlink engine, or None."""
    if domains is not None and _several(domains):
        return f"domains has {domains.num_hosts} hosts, it moves rows inside one"
    reason = build.unavailable_reason(config, device)
    if reason is None and config.mode == "ht" and config.combine_precision == "exact":
        return "it has combine_precision='exact' with mode='ll' only"
    return reason


def _in_place_of(
    refused: Mapping[str, str],
    config: MoECommunicatorConfig,
    group: Any | None,
    device: torch.device,
) -> EngineChoice:
    """What serves instead of the engines that cannot.

    Args:
        refused: why not, by the engine's name.
        config: the communicator's.
        group: the ranks' process group.
        device: where tensors live.

    Raises:
        EngineUnavailableError: the configuration asks for one of them, or nothing can serve.
    """
    reasons = "; ".join(f"the {name} engine cannot be used: {why}" for name, why in refused.items())
    if config.engine in refused:
        raise EngineUnavailableError(
            f"engine={config.engine!r} cannot be used: {refused[config.engine]}"
        )
    needed = next((name for name in NOT_COLLECTIVE if getattr(config, name)), None)
    if needed is not None and len(refused) == 1:
        ((name, why),) = refused.items()
        raise EngineUnavailableError(
            f"{needed}=True, which needs the {name} engine, cannot be used: {why}"
        )
    if needed is not None:
        raise EngineUnavailableError(
            f"{needed}=True, which the collective engine does not have, cannot be used: {reasons}"
        )
    return _collective(reasons, group, device)


def _collective(reason: str, group: Any | None, device: torch.device) -> EngineChoice:
    """The choice of torch.distributed in place of the other engines, if the group moves rows.

    Ranks have groups of the same backends, so what they choose together is refused on all of them.
    """
    hindrance = cannot_move(group, device)
    if hindrance is not None:
        raise EngineUnavailableError(
            f"no engine can be used: {reason}; the collective engine cannot move rows: {hindrance}"
        )
    return EngineChoice("collective", reason)


def _domains_of(config: MoECommunicatorConfig, num_ranks: int) -> Domains | None:
    """The configured domains, or None.

    Raises:
        ConfigurationError: they are those of another number of ranks.
    """
    if config.domains is None:
        return None
    domains = Domains.of(list(config.domains))
    if domains.num_ranks != num_ranks:
        raise ConfigurationError(
            f"domains has {domains.num_ranks} entries; accepted: one per rank of the group, which "
            f"has {num_ranks}"
        )
    return domains


def _several(domains: Domains | None) -> bool:
    return domains is not None and domains.num_hosts > 1


def _why(config: MoECommunicatorConfig, found: str) -> str:
    """The reason for an engine: it was asked for, or what "auto" found."""
    return found if config.engine == "auto" else f"engine={config.engine!r} was asked for"


def _anybodys(wire: Wire, reason: str | None) -> str | None:
    """The first rank's reason that has one, on all ranks; None: nobody has. Collective."""
    return next((text for text in wire.gather_text(reason or "") if text), None)


def _backend_of(group: Any | None, device: torch.device) -> str:
    """The backend with which a group exchanges tensors of a device."""
    try:
        return "none" if group is None else group._get_backend(device).name().lower()
    except (AttributeError, RuntimeError):  # not one of torch's own groups, or none for the device
        return "none"
