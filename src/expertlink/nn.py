"""A mixture-of-experts layer over a communicator, for models that have no framework of their own.

`MoELayer` is the layer, `GroupedExperts` this rank's experts, `SwiGLU` one MLP. All are plain
modules: the router is the caller's, and so are losses and optimizers.

Shape suffixes: T tokens of this rank, H hidden size, K choices per token, N received rows, C slots
per expert, E local experts, I width of an expert, F = 2 I.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertlink import copies
from expertlink.communicator import MoECommunicator
from expertlink.errors import ConfigurationError, InputError
from expertlink.grouped_product import (
    GROUP_BYTES,
    GroupedProduct,
    find_grouped_product,
    is_traceable,
    looped_product,
)
from expertlink.placement import ExpertPlacement
from expertlink.types import DispatchLayout, DispatchOutput

Router = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Rows `[T, H]` to ids `[T, K]`, -1 for none, and weights `[T, K]`."""

_GROUP_ROWS = 8  # `GROUP_BYTES` of the narrowest rows
_IDS = "expert_ids"
_PARTS = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))  # names in checkpoints


class Calls(Protocol):
    """Dispatch and combine: a communicator, or what measures or replaces it."""

    def dispatch(
        self, input: Tensor, topk_ids: Tensor, weights: Tensor, /
    ) -> tuple[DispatchOutput, Any]:
        """As `MoECommunicator.dispatch`."""
        ...

    def combine(self, expert_output: Tensor, handle: Any, /) -> Tensor:
        """As `MoECommunicator.combine`."""
        ...


class SwiGLU(nn.Module):
    """`(silu(x @ gate) * (x @ up)) @ down`, the MLP of most models.

    Checkpoints may have `gate_proj.weight`, `up_proj.weight` and `down_proj.weight`, as linear
    layers keep them, or `w1`, `w3` and `w2`.

    Attributes:
        gate_up: `[H, 2I]`, gate and up projection side by side.
        down: `[I, H]`.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, **style: Any) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(hidden_size, 2 * intermediate_size, **style))
        self.down = nn.Parameter(torch.empty(intermediate_size, hidden_size, **style))
        with torch.no_grad():
            for weight in (self.gate_up, self.down):
                weight.normal_(std=weight.shape[0] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """In the shape of `x`, `[..., H]`."""
        return swiglu(x @ self.gate_up.to(x.dtype)) @ self.down.to(x.dtype)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        if f"{prefix}gate_up" not in given and given:
            try:
                given[f"{prefix}gate_up"], given[f"{prefix}down"] = _take_linear(given, prefix)
            except InputError as error:
                error_msgs.append(str(error))
                return
        super()._load_from_state_dict(
            given, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class GroupedExperts(nn.Module):
    """SwiGLU MLPs of this rank's experts, over rows of any layout.

    Where torch has grouped products for the device and the dtype, FLAT, TOKEN_MAJOR and RANK_MAJOR
    take one product for all experts, and no count is read on the host. Elsewhere a loop over the
    experts takes their place, which waits for the counts. So it does on CUDA with gradients of FLAT
    unless groups are multiples of 16 bytes: for 2-byte rows configure `expert_alignment=8`.
    EXPERT_MAJOR is a batched product over all slots, up to the busiest expert's last row where the
    host knows counts. All of that compiles into one graph.

    The state dict has `gate_up`, `down` and `expert_ids`, the experts that they belong to. Three
    kinds are loaded, and only local experts are kept: such a one, of whatever experts; all experts'
    `gate_up [num_experts, H, 2I]` and `down`, without ids; and `{expert}.gate_proj.weight` and so
    on for each expert, with the names of `SwiGLU`. An expert that is missing is an error.

    Args:
        hidden_size: H.
        intermediate_size: I.
        expert_ids: the experts of this rank's slots, in local order.
        num_experts: experts of the model, without copies.
        expert_alignment: of the groups of FLAT, as configured.
        row_dtype: of the rows, if it is not that of the parameters.

    Attributes:
        gate_up: `[E, H, 2I]`, gate and up projection side by side. Weights of an expert are drawn
            by its id and one number of torch's default generator: ranks that have seeded it alike
            make the same model, whatever the placement.
        down: `[E, I, H]`.
        expert_ids: as above; `MoELayer.rebalance` changes them.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        expert_ids: Sequence[int],
        num_experts: int,
        expert_alignment: int = 1,
        row_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        count, width = len(expert_ids), intermediate_size
        style: dict[str, Any] = {"device": device, "dtype": dtype}
        self.expert_ids, self.num_experts = tuple(expert_ids), num_experts
        self._expert_alignment = expert_alignment
        self.gate_up = nn.Parameter(torch.empty(count, hidden_size, 2 * width, **style))
        self.down = nn.Parameter(torch.empty(count, width, hidden_size, **style))
        # Tried here, since torch.compile cannot trace the trial.
        device, row_dtype = self.down.device, row_dtype or self.down.dtype
        self._products = {(device.type, row_dtype): find_grouped_product(device, row_dtype)}
        self._draw(int(torch.randint(2**40, (1,), device="cpu")))

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        if self.gate_up.is_meta:
            return
        generator = torch.Generator(self.gate_up.device)
        for slot, expert in enumerate(self.expert_ids):
            generator.manual_seed(seed + expert)
            for weight in (self.gate_up[slot], self.down[slot]):
                weight.normal_(std=weight.shape[0] ** -0.5, generator=generator)

    # -- products ---------------------------------------------------------------------------------

    def forward(self, received: DispatchOutput) -> Tensor:
        """What combine takes, in the shape of `received.tokens`.

        TOKEN_MAJOR and RANK_MAJOR: the weighted sum over the local experts of each row, added up in
        top-k order in float32 (float64 for float64 rows) and rounded once. Without weights in
        `received` the plain sum.
        """
        if not self.expert_ids:
            return received.tokens
        if received.layout is DispatchLayout.FLAT:
            assert received.expert_offsets is not None
            ends_E = received.expert_offsets[1:]
            return self._grouped(received.tokens, ends_E, alignment=self._expert_alignment)
        if received.layout is DispatchLayout.EXPERT_MAJOR:
            return self._batched(received)
        return self._deduplicated(received)

    def _grouped(self, rows_NH: Tensor, ends_E: Tensor, *, alignment: int) -> Tensor:
        """Rows that lie grouped by expert; what those behind the last group give, nobody reads."""
        gate_up, down = self.gate_up.to(rows_NH.dtype), self.down.to(rows_NH.dtype)
        product = self._product(rows_NH, alignment)
        return product(swiglu(product(rows_NH, gate_up, offs=ends_E)), down, offs=ends_E)

    def _product(self, rows_NH: Tensor, alignment: int) -> GroupedProduct:
        """Torch's grouped product where it takes such rows, else the loop."""
        row_bytes = rows_NH.element_size()
        sizes = [self.gate_up.shape[1] * row_bytes, self.down.shape[1] * row_bytes]
        if rows_NH.is_cuda and torch.is_grad_enabled():
            sizes.append(alignment * row_bytes)
        if any(size % GROUP_BYTES for size in sizes):
            return looped_product
        if torch.compiler.is_compiling():
            if not is_traceable(rows_NH.dtype):
                return looped_product
        elif len(rows_NH) == 0:
            return looped_product
        key = (rows_NH.device.type, rows_NH.dtype)
        if key not in self._products:
            self._products[key] = find_grouped_product(rows_NH.device, rows_NH.dtype)
        return self._products[key] or looped_product

    def _batched(self, received: DispatchOutput) -> Tensor:
        """EXPERT_MAJOR: what padding gives, nobody reads."""
        rows_ECH, counts = received.tokens, received.num_tokens_per_expert_list
        padding = 0 if counts is None else rows_ECH.shape[1] - max(counts)
        if padding:
            rows_ECH = rows_ECH[:, :-padding]
        hidden_ECI = swiglu(torch.bmm(rows_ECH, self.gate_up.to(rows_ECH.dtype)))
        outputs_ECH = torch.bmm(hidden_ECI, self.down.to(rows_ECH.dtype))
        return F.pad(outputs_ECH, (0, 0, 0, padding)) if padding else outputs_ECH

    def _deduplicated(self, received: DispatchOutput) -> Tensor:
        """TOKEN_MAJOR, RANK_MAJOR: every local expert of a row reads it, from a copy in its group.

        The row behind all rows is zero and stands for "none", here and among the outputs.
        """
        assert received.topk_ids is not None
        rows_NH, ids_NK = received.tokens.flatten(0, -2), received.topk_ids.flatten(0, -2)
        (num_rows, topk), counts = ids_NK.shape, received.num_tokens_per_expert_list
        most = num_rows * topk if counts is None else sum(counts)
        most += len(self.expert_ids) * (_GROUP_ROWS - 1)
        slot_NK, ends_E = _slots_of_choices(ids_NK, len(self.expert_ids), none=most)
        rows = torch.arange(num_rows, device=ids_NK.device).repeat_interleave(topk)
        row_of_slot = rows.new_full((most + 1,), num_rows).scatter_(0, slot_NK.flatten(), rows)
        row_of_slot[most:].fill_(num_rows)  # choices of other ranks have been there
        copies_MH = _with_none(rows_NH)[row_of_slot[:most]]
        outputs_MH = _with_none(self._grouped(copies_MH, ends_E, alignment=_GROUP_ROWS))
        wide = torch.promote_types(rows_NH.dtype, torch.float32)
        summed_NH = torch.zeros_like(rows_NH, dtype=wide)
        for choice, slot_N in enumerate(slot_NK.unbind(dim=1)):
            part_NH = outputs_MH[slot_N].to(wide)
            if received.topk_weights is not None:
                weights_NK = received.topk_weights.flatten(0, -2)
                part_NH = part_NH * weights_NK[:, choice, None]
            summed_NH = summed_NH + part_NH
        return summed_NH.to(rows_NH.dtype).view_as(received.tokens)

    # -- checkpoints ------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + _IDS] = torch.tensor(self.expert_ids, dtype=torch.int64, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            local = self._local_part(state_dict, prefix)
        except InputError as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            local, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _local_part(self, state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """A state dict with this rank's experts in the order of its slots."""
        given = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        for name, fused in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
            if prefix + fused in given:
                given[prefix + name] = given.pop(prefix + fused).transpose(1, 2)
        numbers = {key.removeprefix(prefix).partition(".")[0] for key in given}
        found = sorted(int(number) for number in numbers if number.isdecimal())
        if found:
            self._check_complete(found, prefix)
            mlps = {expert: _take_linear(given, f"{prefix}{expert}.") for expert in found}
            for side, name in enumerate(("gate_up", "down")):
                own = [mlps[expert][side] for expert in self.expert_ids]
                given[prefix + name] = torch.stack(own) if own else getattr(self, name).detach()
            return given
        ids = given.pop(prefix + _IDS, None)
        for name in ("gate_up", "down"):
            stacked = given.get(prefix + name)
            if stacked is not None:
                ids_E = range(self.num_experts) if ids is None else ids.tolist()
                given[prefix + name] = self._select(stacked, list(ids_E), prefix + name)
        return given

    def _select(self, stacked: Tensor, ids: list[int], name: str) -> Tensor:
        if stacked.dim() != 3 or stacked.shape[0] != len(ids):
            raise InputError(
                f"{name} has shape {list(stacked.shape)}, expected [{len(ids)}, ...]: a matrix for "
                "each of the experts that are saved with it, without ids for all of the model"
            )
        self._check_complete(ids, name)
        place = {expert: slot for slot, expert in enumerate(ids)}
        slots = [place[expert] for expert in self.expert_ids]
        return stacked[torch.tensor(slots, dtype=torch.int64, device=stacked.device)]

    def _check_complete(self, found: Sequence[int], name: str) -> None:
        missing = sorted(set(self.expert_ids).difference(found))
        if missing:
            raise InputError(
                f"{name} has no expert {missing[0]} ({len(missing)} of the {len(self.expert_ids)} "
                f"experts of this rank are missing); it has {len(found)} experts, "
                f"{min(found, default='none')} to {max(found, default='none')}"
            )


class MoELayer(nn.Module):
    """Routes rows to experts of all ranks and adds up what these return. Collective to call.

    The parameters of `experts` are this rank's own, and their gradients are sums over all ranks'
    tokens. `router` and `shared` are replicated: sum up, or average, their gradients as those of
    the rest of the model. Copies of an expert are parameters of their own: training calls
    `sum_copies_gradients` before every step of the optimizer, which raises otherwise. See
    docs/guide/training.md.

    Args:
        comm: an open communicator, for any layout and mode; layers may have one together.
        intermediate_size: I, width of an expert.
        router: called with rows `[T, H]` where the call brings no choices; returns ids `[T, K]`
            and weights `[T, K]`. A module becomes part of this one.
        shared_intermediate_size: width of an expert that every row goes to; 0: there is none.
        placement: the experts in the slots of `comm`, which was made for it (`num_experts=
            placement.num_physical, expert_map=placement.expert_map`). The router's ids are logical
            then. None: ids are those of `comm`.
        dtype: of the parameters; None: that of `comm`. Products are made in that of `comm`.

    Raises:
        ConfigurationError: `comm` was made for other slots, or its rows arrive quantized.
    """

    def __init__(
        self,
        comm: MoECommunicator,
        *,
        intermediate_size: int,
        router: Router | None = None,
        shared_intermediate_size: int = 0,
        placement: ExpertPlacement | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = comm.config
        if config.block_format is not None:
            raise ConfigurationError(
                f"quantization={config.block_format.value!r} is not possible: MoELayer multiplies "
                "rows as they arrive; accepted: None"
            )
        self.comm, self.router = comm, router
        self.placement = placement or comm.placement
        self._physical = None
        if placement is not None:
            _check_slots(comm, placement)
            self._physical = placement.to_physical(comm.device)
        style: dict[str, Any] = {"device": comm.device, "dtype": dtype or config.dtype}
        self.shared = None
        if shared_intermediate_size:
            self.shared = SwiGLU(config.hidden_size, shared_intermediate_size, **style)
        self.experts = GroupedExperts(
            config.hidden_size,
            intermediate_size,
            expert_ids=self.placement.experts_of_rank[comm.rank],
            num_experts=self.placement.num_experts,
            expert_alignment=config.expert_alignment,
            row_dtype=config.dtype,
            **style,
        )
        self.copies_summed: set[str] = set()  # experts' parameters whose gradients copies share
        copies.guard(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy."""
        super().__setstate__(state)
        copies.guard(self)

    @property
    def has_copies(self) -> bool:
        """Whether an expert is on several ranks."""
        return self.placement.num_physical > self.placement.num_experts

    def forward(
        self,
        x: Tensor,
        topk_ids: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        calls: Calls | None = None,
    ) -> Tensor:
        """The weighted sum of the experts' outputs, in the shape and dtype of `x`.

        Args:
            x: `[..., H]` rows, T in all; T may differ between ranks and be 0.
            topk_ids: `[T, K]` experts, -1 for none; None: the router chooses.
            topk_weights: `[T, K]` their weights; given with ids.
            calls: makes dispatch and combine in place of the communicator.

        Raises:
            InputError: ids without weights or the reverse, or neither of them and no router; and
                what dispatch and combine raise.
        """
        config, calls = self.comm.config, calls or self.comm
        x_TH = x.reshape(-1, x.shape[-1])
        if topk_ids is None and topk_weights is None and self.router is not None:
            topk_ids, topk_weights = self.router(x_TH)
        if topk_ids is None or topk_weights is None:
            self.comm.refuse(
                "dispatch", InputError("topk_ids and topk_weights are both needed without a router")
            )
        if self._physical is not None:
            topk_ids = self._physical(topk_ids, first=self.comm.rank)
        received, handle = calls.dispatch(
            x_TH.to(config.dtype), topk_ids, topk_weights.to(config.weight_dtype)
        )
        y_TH = calls.combine(self.experts(received), handle)
        y = y_TH.to(x.dtype).view(x.shape)
        return y if self.shared is None else y + self.shared(x)

    def sum_copies_gradients(self) -> None:
        """Adds up the gradients of the copies of each expert, in place. Collective.

        Call it on all ranks once for every step of the optimizer: after the last backward, before
        gradients are clipped. All copies then have the same bits, so steps keep them equal. A
        missing gradient counts as zero; parameters without `requires_grad`, alike on all ranks,
        are left out. Without copies nothing is done.

        Raises:
            What `MoECommunicator.sum_copies` raises.
        """
        if not self.has_copies:
            return
        both = (self.experts.gate_up, self.experts.down)
        parameters = [parameter for parameter in both if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not grads:  # all are frozen
            return
        self.comm.sum_copies(grads, placement=self.placement)
        self.mark_copies_summed()

    def mark_copies_summed(self) -> None:
        """Says that the gradients of copies are added up, whoever did it. It holds up to the next
        step or backward pass."""
        self.copies_summed.update(name for name, _ in self.experts.named_parameters())

    def rebalance(
        self, new: ExpertPlacement, *, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Moves the experts' weights to another placement, in place. Collective.

        From then on the router's ids are logical ones of `new`. Parameters and tables keep their
        addresses, so graphs that were captured go on; their gradients are dropped.

        Args:
            new: a placement with the slots of the communicator.
            optimizer: whose states of these weights move along, those of their shape. Without it
                states stay in their slots, where they belong to other experts from then on.

        Raises:
            ConfigurationError: `new` has other slots than the communicator.
            InputError: ranks differ; and what `MoECommunicator.rebalance` raises.
        """
        parameters = [self.experts.gate_up, self.experts.down]
        states = [] if optimizer is None else [optimizer.state.get(p, {}) for p in parameters]
        tensors: list[Tensor] = [p.data for p in parameters]
        for parameter, state in zip(parameters, states, strict=False):
            named = sorted(state.items())
            tensors += [v for _, v in named if isinstance(v, Tensor) and v.shape == parameter.shape]
        moved = self.comm.rebalance(tensors, new, old=self.placement)
        _check_slots(self.comm, new)  # ranks have agreed on it: all raise, or none
        for tensor, after in zip(tensors, moved, strict=True):
            tensor.copy_(after)
        for parameter in parameters:
            parameter.grad = None
        self.copies_summed.clear()
        self.placement = new
        self.experts.expert_ids = new.experts_of_rank[self.comm.rank]
        if self._physical is None:
            self._physical = new.to_physical(self.comm.device)
        else:
            self._physical.set_(new)


def sum_copies_gradients(model: nn.Module) -> None:
    """`MoELayer.sum_copies_gradients` of every layer of a model, in their order. Collective."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.sum_copies_gradients()


def merge_state_dicts(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One state dict of a whole model, from those that its ranks have saved.

    Experts are put in the order of their ids, `[num_experts, ...]`. Everything else is replicated,
    and taken from the first part.

    Raises:
        InputError: an expert is missing, or copies of one have different weights.
    """
    parts = list(parts)
    if not parts:
        raise InputError("there are no state dicts to merge")
    merged = dict(parts[0])
    for key in [key for key in merged if key.rpartition(".")[2] == _IDS]:
        prefix = key.removesuffix(_IDS)
        ids = [part[key].tolist() for part in parts]
        count = 1 + max((expert for local in ids for expert in local), default=-1)
        for name in ("gate_up", "down"):
            found: dict[int, Tensor] = {}
            for local, part in zip(ids, parts, strict=True):
                for expert, weight in zip(local, part[prefix + name], strict=True):
                    if not torch.equal(found.setdefault(expert, weight), weight):
                        raise InputError(f"{prefix}{name}: copies of expert {expert} differ")
            missing = sorted(set(range(count)).difference(found))
            if missing or not count:
                raise InputError(f"{prefix}{name}: no part has expert {missing[0] if count else 0}")
            merged[prefix + name] = torch.stack([found[expert] for expert in range(count)])
        del merged[key]
    return merged


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[..., 2I]` projections side by side: `[..., I]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _slots_of_choices(ids_NK: Tensor, num_experts: int, *, none: int) -> tuple[Tensor, Tensor]:
    """Slot of every choice where choices lie grouped by expert, in the order of rows; group ends.

    Groups are padded to a multiple of `_GROUP_ROWS`. Choices without a local expert get `none`.

    Returns:
        `[N, K]` int64 and `[E]` int32.
    """
    expert = torch.where(ids_NK < 0, num_experts, ids_NK).flatten()
    ordered, order = expert.sort(stable=True)
    first_E = torch.searchsorted(ordered, torch.arange(num_experts + 1, device=expert.device))
    sizes_E = first_E.diff() + (_GROUP_ROWS - 1)
    sizes_E = sizes_E - sizes_E % _GROUP_ROWS
    ends_E = sizes_E.cumsum(0)
    shift_E = F.pad(ends_E - sizes_E - first_E[:-1], (0, 1))
    slots = torch.arange(len(order), device=expert.device) + shift_E[ordered]
    slots = torch.where(ordered < num_experts, slots, none)
    slot_NK = torch.empty_like(slots).scatter_(0, order, slots).view(ids_NK.shape)
    return slot_NK, ends_E.to(torch.int32)


def _with_none(rows_NH: Tensor) -> Tensor:
    """The rows, and a row of zeros behind them."""
    return F.pad(rows_NH, (0, 0, 0, 1))


def _take_linear(given: dict[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    """Removes the three linear layers of an MLP; returns its `gate_up` and `down`."""
    layers: list[Tensor] = []
    for names in _PARTS:
        keys = [f"{prefix}{name}.weight" for name in names]
        found = [given.pop(key) for key in keys if key in given]
        if len(found) != 1:
            raise InputError(f"expected one of {' and '.join(keys)}, found {len(found)}")
        layers.append(found[0])
    gate, up, down = layers
    if gate.dim() != 2 or not gate.shape == up.shape == down.shape[::-1]:
        shapes = ", ".join(str(list(layer.shape)) for layer in layers)
        raise InputError(
            f"{prefix} has projections of shapes {shapes}, expected [I, H], [I, H] and [H, I]"
        )
    return torch.cat([gate.t(), up.t()], dim=1), down.t()


def _check_slots(comm: MoECommunicator, placement: ExpertPlacement) -> None:
    """Raises ConfigurationError where a communicator was made for other slots."""
    slots = comm.placement
    if slots.logical_ids != tuple(range(slots.num_experts)) or (
        slots.slots_per_rank != placement.slots_per_rank
    ):
        raise ConfigurationError(
            f"the communicator has {slots.num_experts} experts, {list(slots.slots_per_rank)} per "
            f"rank, the placement has {placement.num_physical} slots, "
            f"{list(placement.slots_per_rank)} per rank; accepted: a communicator with num_experts="
            "placement.num_physical and expert_map=placement.expert_map"
        )
