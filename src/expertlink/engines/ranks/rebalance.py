"""What belongs to experts, moved from one placement to another or summed over copies.

In: this rank's tensors in the order of its slots, and the placements. Ranks first agree that they
make the same call with the same arguments; then each knows, without asking, what every rank sends
to every rank: one all-to-all. Moved bits are copied, whatever their type. Sums are the same bits on
every rank that has a copy.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.ranks.agreement import agree, compare, shortened
from expertlink.engines.ranks.handshake import cannot_move
from expertlink.engines.ranks.header import Operation
from expertlink.engines.ranks.wire import Wire
from expertlink.errors import InputError
from expertlink.placement import ExpertPlacement


@dataclass(frozen=True)
class Moves:
    """What one rank copies, sends and receives. Slots are local indices.

    Attributes:
        kept: (new slot, old slot) of experts that the rank has already.
        sent: per destination rank the old slots to send, in the order of its new slots.
        received: per source rank the new slots that it fills, ascending.
    """

    kept: tuple[tuple[int, int], ...]
    sent: tuple[tuple[int, ...], ...]
    received: tuple[tuple[int, ...], ...]


def plan_moves(old: ExpertPlacement, new: ExpertPlacement, rank: int) -> Moves:
    """The part of `rank`. A rank that lacks an expert gets it from a rank that had it.

    Where several had it they take turns, in the order of destination ranks, so that none sends all.
    """
    place: list[dict[int, int]] = [
        {expert: slot for slot, expert in enumerate(experts)} for experts in old.experts_of_rank
    ]
    holders = [
        [source for source, slots in enumerate(place) if expert in slots]
        for expert in range(old.num_experts)
    ]
    kept: list[tuple[int, int]] = []
    sent: list[list[int]] = [[] for _ in place]
    received: list[list[int]] = [[] for _ in place]
    turns: Counter[int] = Counter()
    for destination, experts in enumerate(new.experts_of_rank):
        for slot, expert in enumerate(experts):
            if expert in place[destination]:
                if destination == rank:
                    kept.append((slot, place[rank][expert]))
                continue
            source = holders[expert][turns[expert] % len(holders[expert])]
            turns[expert] += 1
            if source == rank:
                sent[destination].append(place[rank][expert])
            if destination == rank:
                received[source].append(slot)
    return Moves(tuple(kept), tuple(map(tuple, sent)), tuple(map(tuple, received)))


def rebalance(
    wire: Wire,
    config: MoECommunicatorConfig,
    tensors: Sequence[Tensor],
    *,
    old: ExpertPlacement,
    new: ExpertPlacement,
) -> list[Tensor]:
    """`MoECommunicator.rebalance`. Collective."""
    wire.enter(Operation.REBALANCE.title, wire.call + 1)
    with wire.abort_on_error():
        _agree(wire, config, Operation.REBALANCE, tensors, old, new)
        if not tensors:
            return []
        with torch.no_grad():
            moves = plan_moves(old, new, wire.rank)
            return _move(wire, [_Rows.of(tensor) for tensor in tensors], moves)


def sum_copies(
    wire: Wire,
    config: MoECommunicatorConfig,
    tensors: Sequence[Tensor],
    placement: ExpertPlacement,
) -> None:
    """`MoECommunicator.sum_copies`. Collective."""
    wire.enter(Operation.SUM_OF_COPIES.title, wire.call + 1)
    with wire.abort_on_error():
        _agree(wire, config, Operation.SUM_OF_COPIES, tensors, placement, placement)
        if tensors:
            with torch.no_grad():
                _sum_copies(wire, tensors, shared_slots(placement, wire.rank))


def shared_slots(placement: ExpertPlacement, rank: int) -> list[list[int]]:
    """Per other rank the slots of `rank` whose experts that one has too; none for itself.

    Both ranks name the experts in one order.
    """
    own = placement.experts_of_rank[rank]
    return [
        [] if other == rank else [slot for slot, expert in enumerate(own) if expert in experts]
        for other, experts in enumerate(map(set, placement.experts_of_rank))
    ]


def _agree(
    wire: Wire,
    config: MoECommunicatorConfig,
    operation: Operation,
    tensors: Sequence[Tensor],
    old: ExpertPlacement,
    new: ExpertPlacement,
) -> None:
    """Raises on all ranks where they are not in this call, or differ in its arguments."""
    agree(
        wire,
        operation,
        num_experts=config.num_experts,
        max_tokens=config.max_tokens_per_rank,
        device=wire.words_device,
        refused=_problem(wire, operation, tensors, old, new),
    )
    _compare(wire, operation, tensors, old, new)


def _problem(
    wire: Wire,
    operation: Operation,
    tensors: Sequence[Tensor],
    old: ExpertPlacement,
    new: ExpertPlacement,
) -> InputError | None:
    """Why this rank cannot make the call."""
    if wire.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return InputError(f"{operation.title} waits for all ranks: it cannot be captured")
    if not isinstance(tensors, Sequence):
        return InputError(f"tensors is a {type(tensors).__name__}, expected a list of tensors")
    for name, placement in (("old", old), ("new", new)):
        if not isinstance(placement, ExpertPlacement):
            return InputError(
                f"{name} is a {type(placement).__name__}, expected an ExpertPlacement"
            )
        if placement.num_ranks != wire.num_ranks:
            return InputError(
                f"{name} is a placement on {placement.num_ranks} ranks, the group has "
                f"{wire.num_ranks}"
            )
    if old.num_experts != new.num_experts:
        return InputError(
            f"old places {old.num_experts} experts, new places {new.num_experts}: a placement "
            "moves experts, it adds none"
        )
    slots = len(old.experts_of_rank[wire.rank])
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            return InputError(f"tensors[{index}] is a {type(tensor).__name__}, expected a tensor")
        if is_traceable_wrapper_subclass(tensor):
            return InputError(
                f"tensors[{index}] is a {type(tensor).__name__}, which stands for other tensors: "
                "pass what this rank has of it, such as DTensor.to_local()"
            )
        if tensor.device != wire.device:
            return InputError(f"tensors[{index}] is on {tensor.device}, expected {wire.device}")
        if tensor.layout is not torch.strided:
            return InputError(f"tensors[{index}] is {tensor.layout}, expected torch.strided")
        if tensor.dim() < 1 or tensor.shape[0] != slots:
            return InputError(
                f"tensors[{index}] has shape {list(tensor.shape)}, expected [{slots}, ...]: a row "
                f"for each expert that rank {wire.rank} holds in the old placement"
            )
        if operation is Operation.SUM_OF_COPIES and not tensor.dtype.is_floating_point:
            return InputError(f"tensors[{index}] is {tensor.dtype}, expected floating point")
    return None


def _compare(
    wire: Wire,
    operation: Operation,
    tensors: Sequence[Tensor],
    old: ExpertPlacement,
    new: ExpertPlacement,
) -> None:
    """Raises InputError on all ranks where they differ in what they move, or where to."""
    rows = ", ".join(f"{t.dtype} {list(t.shape[1:])}".removeprefix("torch.") for t in tensors)
    mine = {
        "tensors": len(tensors),
        "rows of tensors": shortened(rows),
        "old": shortened(json.dumps(old.experts_of_rank)),
        "new": shortened(json.dumps(new.experts_of_rank)),
    }
    texts = wire.gather_text(json.dumps(mine))
    theirs = [json.loads(text) for text in texts]
    differing = compare({name: [one[name] for one in theirs] for name in mine})
    if differing:
        raise InputError(f"the ranks differ in a {operation.title}; " + "; ".join(differing))


@dataclass(frozen=True)
class _Rows:
    """A tensor as rows of bytes.

    Attributes:
        like: the tensor.
        bytes: `[slots, width]` uint8.
    """

    like: Tensor
    bytes: Tensor

    @staticmethod
    def of(tensor: Tensor) -> _Rows:
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        elements = math.prod(tensor.shape[1:])
        return _Rows(tensor, plain.view(tensor.shape[0], elements).view(torch.uint8))

    def empty(self, slots: int) -> _Rows:
        """Rows of as many slots."""
        return _Rows.of(self.like.new_empty((slots, *self.like.shape[1:])))


def _move(wire: Wire, tensors: list[_Rows], moves: Moves) -> list[Tensor]:
    device = wire.device
    received = [slot for slots in moves.received for slot in slots]
    arriving = _exchange(wire, tensors, moves.sent, moves.received)
    results = [rows.empty(len(moves.kept) + len(received)) for rows in tensors]
    for result, rows in zip(results, tensors, strict=True):
        to, of = ([move[side] for move in moves.kept] for side in (0, 1))
        result.bytes[_index(to, device)] = rows.bytes[_index(of, device)]
    for result, part in zip(results, arriving(), strict=True):
        result.bytes[_index(received, device)] = part
    return [result.like for result in results]


def _sum_copies(wire: Wire, tensors: Sequence[Tensor], shared: list[list[int]]) -> None:
    """Adds up in float32, or the tensor's own type if wider, over ranks ascending."""
    copied = sorted({slot for slots in shared for slot in slots})
    index, lengths = _index(copied, wire.device), _lengths(shared)
    place = {slot: i for i, slot in enumerate(copied)}
    arriving = _exchange(wire, [_Rows.of(tensor) for tensor in tensors], shared, shared)
    for tensor, rows in zip(tensors, arriving(), strict=True):
        terms = rows.contiguous().view(tensor.dtype).view(len(rows), *tensor.shape[1:])
        own = tensor[index]
        total = torch.zeros_like(own, dtype=torch.promote_types(tensor.dtype, torch.float32))
        for rank, part in enumerate(terms.split(lengths)):
            if rank == wire.rank:
                total += own
            elif len(part):
                total.index_add_(
                    0, _index([place[slot] for slot in shared[rank]], wire.device), part.to(total)
                )
        tensor[index] = total.to(tensor.dtype)


def _exchange(
    wire: Wire,
    tensors: list[_Rows],
    sent: Sequence[Sequence[int]],
    received: Sequence[Sequence[int]],
) -> Callable[[], list[Tensor]]:
    """Starts to send slots to every rank; returns what waits for as many rows from each.

    These are, for each tensor, rows of bytes in the order of ranks, on the device.
    """
    device = wire.device
    staging = torch.device("cpu") if cannot_move(wire.group, device) else device
    slots = _index([slot for part in sent for slot in part], device)
    widths = [rows.bytes.shape[1] for rows in tensors]
    outgoing = torch.empty((len(slots), sum(widths)), dtype=torch.uint8, device=device)
    for part, rows in zip(outgoing.split(widths, dim=1), tensors, strict=True):
        part.copy_(rows.bytes[slots])
    outgoing = outgoing.to(staging)
    lengths = _lengths(received)
    incoming = torch.empty((sum(lengths), sum(widths)), dtype=torch.uint8, device=staging)
    transfer = wire.exchange(outgoing, incoming, _lengths(sent), lengths)

    def wait() -> list[Tensor]:
        transfer.wait()
        return list(incoming.to(device).split(widths, dim=1))

    return wait


def _index(slots: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(slots, dtype=torch.int64, device=device)


def _lengths(slots_of_rank: Sequence[Sequence[int]]) -> list[int]:
    return [len(slots) for slots in slots_of_rank]
