"""The handshake of a new communicator: do the ranks agree, and where do the experts live?

In: a configuration per rank. Out: the placement of the experts, alike on all ranks, and a wire that
knows the other processes and a number of this communicator's own.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.ranks.agreement import compare, shortened
from expertlink.engines.ranks.wire import Peer, Wire
from expertlink.errors import ConfigurationError, PeerError
from expertlink.routing import Placement, even_blocks

_COMMON_FIELDS = (
    "num_experts",
    "hidden_size",
    "topk",
    "max_tokens_per_rank",
    "mode",
    "expert_alignment",
    "max_recv_tokens_per_rank",
    "zero_copy",
    "static_shapes",
    "mask_lost_peers",
    "combine_precision",
    "scale_order",
    "source_tokens",
)


_REFUSED = "refused: "  # no other text of a handshake begins like this


def handshake(
    wire: Wire,
    config: MoECommunicatorConfig,
    *,
    engine: str,
    check_inputs: bool,
    shared_with: int | None = None,
) -> Placement:
    """Compares configurations and returns the placement of the experts. Collective.

    Gives the wire the ranks' processes, and a key and a number of this communicator's own.

    Args:
        wire: the ranks' connection.
        config: this rank's.
        engine: the engine that this rank would use.
        check_inputs: as configured, or the device's default.
        shared_with: `Wire.number` of the communicator whose memory this one uses, or None.

    Raises:
        ConfigurationError: on every rank, naming the fields and the ranks that differ, or what is
            wrong with the placement.
        PeerError: another rank refused, on every rank that did not.
        PeerTimeoutError: a rank did not arrive within `wire.timeout_s`.
    """
    here = Peer.here()
    common: dict[str, object] = {name: getattr(config, name) for name in _COMMON_FIELDS}
    common |= {
        "output_layout": config.layout.value,
        "dtype": str(config.dtype),
        "quantization": config.block_format and config.block_format.value,
        "domains": None if config.domains is None else shortened(str(list(config.domains))),
        "expert_map": _fingerprint(config.expert_map),
        "num_local_experts given": config.num_local_experts is not None,
        "local_expert_start given": config.local_expert_start is not None,
        "check_inputs": check_inputs,
        "device type": wire.device.type,
        "engine": engine,
        "share_with": shared_with,
    }
    mine = {
        "block": [config.local_expert_start, config.num_local_experts],
        "peer": [here.host, here.pid],
        "key": uuid.uuid4().hex,
    }
    answers = agree_on(wire, common, mine, what="configuration")
    wire.peers = [Peer(*answer["peer"]) for answer in answers]
    wire.set_key(answers[0]["key"])
    wire.number = int(answers[0]["key"][:7], 16)
    wire.call = 0
    return Placement.from_ranks(
        _rank_of_expert(config, [tuple(answer["block"]) for answer in answers]),
        num_ranks=wire.num_ranks,
        device=wire.device,
    )


def agree_on(
    wire: Wire, common: Mapping[str, object], own: Mapping[str, object], *, what: str
) -> list[dict[str, Any]]:
    """What every rank has of its own, where all have the same in common. Collective.

    In the order of the group's handshakes.

    Args:
        wire: the ranks' connection.
        common: what has to be the same on all ranks, by name.
        own: what need not be.
        what: as of `texts_of`.

    Raises:
        ConfigurationError: on every rank, naming what differs and on which ranks.
        PeerError, PeerTimeoutError: see `texts_of`.
    """
    answers: list[dict[str, Any]] = []
    mine = json.dumps({**own, "common": common})
    for rank, text in enumerate(texts_of(wire, mine, what=what)):
        try:
            answers.append(json.loads(text))
        except ValueError as error:
            raise ConfigurationError(
                f"rank {rank} sent an unreadable {what}: make sure that all ranks run the "
                "same version of expertlink, and no other collective on this group meanwhile"
            ) from error
    check_common([answer["common"] for answer in answers], what=what)
    return answers


def check_common(common: Sequence[Mapping[str, object]], *, what: str) -> None:
    """Raises the ConfigurationError of `agree_on` where ranks differ; `common` of every rank."""
    names = dict.fromkeys(name for one in common for name in one)
    differing = compare({name: [one.get(name) for one in common] for name in names})
    if differing:
        raise ConfigurationError(f"ranks disagree about the {what}; " + "; ".join(differing))


def largest_of(wire: Wire, number: int) -> int:
    """The largest of all ranks' numbers. Collective; in the order of the group's handshakes.

    Raises:
        What `texts_of` raises.
    """
    return max(int(text) for text in texts_of(wire, str(number), what="tokens"))


def refuse(wire: Wire, error: Exception) -> NoReturn:
    """Raises `error`, after telling the ranks that come to a handshake. Collective.

    They raise PeerError with the same text.

    Raises:
        PeerTimeoutError: a rank did not arrive within `wire.timeout_s`.
    """
    _meet(wire)
    wire.gather_text(f"{_REFUSED}{type(error).__name__}: {error}")
    raise error


def texts_of(wire: Wire, text: str, *, what: str) -> list[str]:
    """Every rank's text. Collective; in the order of the group's handshakes.

    Args:
        wire: the ranks' connection.
        text: this rank's.
        what: a word for what the texts are, the same on all ranks.

    Raises:
        PeerError: another rank refused.
        ConfigurationError: on every rank: some exchange something else.
        PeerTimeoutError: a rank did not arrive within `wire.timeout_s`.
    """
    _meet(wire)
    texts = wire.gather_text(f"{what}: {text}")
    refused = {
        rank: text.removeprefix(_REFUSED)
        for rank, text in enumerate(texts)
        if text.startswith(_REFUSED)
    }
    if refused:
        reasons = "; ".join(f"rank {rank} refused it: {why}" for rank, why in refused.items())
        raise PeerError(f"a handshake of the ranks has failed: {reasons}", ranks=list(refused))
    words = [text.partition(": ")[0] for text in texts]
    if len(set(words)) > 1:
        found = "; ".join(f"rank {rank}: {shortened(word)}" for rank, word in enumerate(words))
        raise ConfigurationError(
            f"ranks came to different handshakes of their group ({found}): all have to make the "
            "same communicators, buffers and first calls in the same order"
        )
    return [text.removeprefix(f"{what}: ") for text in texts]


def _meet(wire: Wire) -> None:
    """Waits for all ranks to come to the same handshake of their group."""
    wire.enter("initialize", 0)
    wire.wait_for_all()


def _fingerprint(expert_map: object) -> str | None:
    if expert_map is None:
        return None
    return hashlib.sha256(json.dumps(expert_map).encode()).hexdigest()[:16]


def _rank_of_expert(
    config: MoECommunicatorConfig, blocks: list[tuple[int | None, int | None]]
) -> list[int]:
    if config.expert_map is not None:
        return [int(rank) for rank in config.expert_map]
    if config.num_local_experts is None:
        return even_blocks(config.num_experts, len(blocks))
    owner: list[int | None] = [None] * config.num_experts
    next_start = 0
    for rank, (given_start, count) in enumerate(blocks):
        assert count is not None
        start = next_start if given_start is None else given_start
        next_start = start + count
        if next_start > config.num_experts:
            raise ConfigurationError(
                f"local_expert_start={start} with num_local_experts={count} on rank {rank} ends "
                f"beyond num_experts={config.num_experts}"
            )
        for expert in range(start, next_start):
            if owner[expert] is not None:
                raise ConfigurationError(
                    f"expert {expert} is local to ranks {owner[expert]} and {rank}: the blocks of "
                    "local_expert_start and num_local_experts must not overlap"
                )
            owner[expert] = rank
    unplaced = [expert for expert, rank in enumerate(owner) if rank is None]
    if unplaced:
        raise ConfigurationError(
            f"no rank holds expert {unplaced[0]} ({len(unplaced)} of {config.num_experts} experts "
            "have no rank): num_local_experts must add up to num_experts over the ranks"
        )
    return [rank for rank in owner if rank is not None]


def resolve_device(requested: torch.device | str | None, group: Any | None) -> torch.device:
    """The device of a communicator, with its index if it is a GPU.

    None: CUDA's current device if there is one and the group can use it, else CPU.

    Raises:
        ConfigurationError: there is no such device, or the group has no backend for the host, where
            that is the device. Whether it can move rows of a GPU is asked where an engine needs it.
    """
    if requested is None:
        usable = group is None or "nccl" in str(group.name()).lower()
        requested = "cuda" if torch.cuda.is_available() and usable else "cpu"
    device = torch.device(requested)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigurationError(
                f"device={str(requested)!r} is not possible: CUDA is not available to torch here; "
                "accepted: 'cpu'"
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise ConfigurationError(
                f"device={str(requested)!r} is not possible: this process sees {found} GPUs"
            )
        device = torch.device("cuda", index)
    reason = cannot_move(group, device)
    if reason is not None and device.type == "cpu":
        raise ConfigurationError(f"device={str(requested)!r} is not possible: {reason}")
    return device


def cannot_move(group: Any | None, device: torch.device) -> str | None:
    """Why a process group cannot exchange tensors of a device, as far as torch tells."""
    if group is None or group.size() == 1:
        return None
    try:
        backend = group._get_backend(device).name().lower()
    except RuntimeError:
        backend = None
    except AttributeError:  # not one of torch's own groups
        return None
    if backend is None:
        return (
            f"the process group has no backend for {device.type} tensors; "
            'init_process_group("cpu:gloo,cuda:nccl") gives it one for each device'
        )
    if device.type == "cuda" and backend == "gloo":
        return (
            "the process group's backend for cuda tensors is gloo, which does not exchange them; "
            'init_process_group("cpu:gloo,cuda:nccl") does'
        )
    return None
