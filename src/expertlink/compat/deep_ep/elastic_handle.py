"""`EPHandle`: the routing of a dispatch of `ElasticBuffer`, and what callers read of it.

Attributes that take work are made when they are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertlink.compat.deep_ep.errors import CallError
from expertlink.compat.deep_ep.handles import Dispatched
from expertlink.handles import tables_of
from expertlink.layouts import align
from expertlink.types import DispatchOutput


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a dispatch was asked for.

    Attributes:
        do_expand: a row per (token, local expert), grouped by expert.
        num_experts: E.
        expert_alignment: multiple of the groups' sizes.
        num_max_tokens_per_rank: largest T of any rank.
        num_sms: SMs of its calls.
        num_ranks: R.
        synced: the host knows the counts.
    """

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    num_ranks: int
    synced: bool


class EPHandle:
    """The routing of a dispatch; any number of combines and cached dispatches may use it.

    Attributes can be read for as long as the handle lives: also once its buffer has grown, or was
    destroyed. The tensors belong to the handle.

    Attributes:
        do_expand, num_experts, expert_alignment, num_max_tokens_per_rank, num_sms: of the dispatch.
        topk_idx: `[T, K]`.
        num_recv_tokens: N, the tokens received; without a host wait the most that can arrive.
        num_expanded_tokens: rows of all experts, their groups aligned; likewise.
        num_recv_tokens_per_expert_list: aligned counts; `[]` without a host wait.
        psum_num_recv_tokens_per_scaleup_rank: `[R]` int32, rows of ranks 0 to r, whatever host they
            are on.
        psum_num_recv_tokens_per_expert: `[E_loc]` int32: aligned rows of experts 0 to e; expanded:
            where the rows of expert e end.
        num_unaligned_recv_tokens_per_expert: `[E_loc]` int32.
        recv_src_metadata: `[N, K + 2]` int32: source rank * `num_max_tokens_per_rank` + source
            token; source rank * K + the highest choice that lives here; the expanded row of every
            choice, or -1.
        dst_buffer_slot_idx: `[T, K]` int32, -1: DeepEP's own.
        token_metadata_at_forward, channel_linked_list, cached_recv_src_metadata_before_sort: None.
    """

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    psum_num_recv_tokens_per_scaleup_rank: Tensor
    psum_num_recv_tokens_per_expert: Tensor
    num_unaligned_recv_tokens_per_expert: Tensor
    recv_src_metadata: Tensor
    dst_buffer_slot_idx: Tensor

    kept: tuple[Tensor, ...] = ()
    """Tensors that others are made of."""

    _known: tuple[Dispatched, Geometry] | None = None
    twin: EPHandle | None = None
    """The same routing in the other layout, once a cached dispatch asked for it."""

    def __init__(
        self,
        do_expand: bool,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        topk_idx: Tensor,
        num_recv_tokens: int,
        num_expanded_tokens: int,
        num_recv_tokens_per_expert_list: list[int],
        psum_num_recv_tokens_per_scaleup_rank: Tensor,
        psum_num_recv_tokens_per_expert: Tensor,
        num_unaligned_recv_tokens_per_expert: Tensor,
        recv_src_metadata: Tensor,
        dst_buffer_slot_idx: Tensor,
        token_metadata_at_forward: Tensor | None = None,
        channel_linked_list: Tensor | None = None,
    ) -> None:
        given = dict(locals())
        del given["self"]
        vars(self).update(given, cached_recv_src_metadata_before_sort=None, _makers={})

    def __getattr__(self, name: str) -> Any:
        makers = vars(self).get("_makers", {})
        if name not in makers:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        value = makers[name]()
        setattr(self, name, value)
        return value

    @property
    def known(self) -> Dispatched:
        """What the library knows of the dispatch.

        Raises:
            CallError: the handle was not made by a dispatch.
        """
        return self._of_dispatch()[0]

    @property
    def geometry(self) -> Geometry:
        """What the dispatch was asked for; raises like `known`."""
        return self._of_dispatch()[1]

    def _of_dispatch(self) -> tuple[Dispatched, Geometry]:
        if self._known is None:
            raise CallError("this EPHandle was not returned by a dispatch")
        return self._known

    @staticmethod
    def of(
        known: Dispatched,
        geometry: Geometry,
        topk_idx: Tensor,
        output: DispatchOutput,
    ) -> EPHandle:
        """The handle of a dispatch.

        Args:
            known: what the library knows of it.
            geometry: what it was asked for.
            topk_idx: `[T, K]`.
            output: of the dispatch; its counts and source tokens are kept.
        """
        handle = EPHandle.__new__(EPHandle)
        views = _Views(known, geometry, topk_idx, output)
        vars(handle).update(
            _known=(known, geometry),
            _makers=views.makers(),
            kept=views.kept(),
            do_expand=geometry.do_expand,
            num_experts=geometry.num_experts,
            expert_alignment=geometry.expert_alignment,
            num_max_tokens_per_rank=geometry.num_max_tokens_per_rank,
            num_sms=geometry.num_sms,
            topk_idx=topk_idx,
            token_metadata_at_forward=None,
            channel_linked_list=None,
            cached_recv_src_metadata_before_sort=None,
        )
        return handle


class _Views:
    """Makes the attributes of a handle that take work; arguments as of `EPHandle.of`."""

    def __init__(
        self,
        known: Dispatched,
        geometry: Geometry,
        topk_idx: Tensor,
        output: DispatchOutput,
    ) -> None:
        self._known, self._geometry, self._topk_idx = known, geometry, topk_idx
        self._sources = output.source_tokens
        self._per_expert, self._offsets = output.num_tokens_per_expert, output.expert_offsets
        self._per_expert_list = output.num_tokens_per_expert_list
        assert output.num_tokens_per_rank is not None
        self._per_rank = output.num_tokens_per_rank

    def kept(self) -> tuple[Tensor, ...]:
        tensors = self._sources, self._per_expert, self._offsets, self._per_rank, self._topk_idx
        return tuple(tensor for tensor in tensors if tensor is not None)

    def makers(self) -> dict[str, Callable[[], Any]]:
        return {
            "num_recv_tokens": self._num_received,
            "num_expanded_tokens": self._num_expanded,
            "num_recv_tokens_per_expert_list": self._list,
            "psum_num_recv_tokens_per_scaleup_rank": self._per_rank_sums,
            "psum_num_recv_tokens_per_expert": self._per_expert_sums,
            "num_unaligned_recv_tokens_per_expert": lambda: self._per_expert,
            "recv_src_metadata": self._metadata,
            "dst_buffer_slot_idx": lambda: torch.full_like(self._topk_idx, -1, dtype=torch.int32),
        }

    def _num_received(self) -> int:
        geometry = self._geometry
        if not geometry.synced:
            return geometry.num_ranks * geometry.num_max_tokens_per_rank
        if not geometry.do_expand:
            return self._known.rows
        return int(self._per_rank.sum())

    def _num_expanded(self) -> int:
        if self._geometry.synced:
            return sum(self._list())
        return worst_rows(self._geometry, self._topk_idx.shape[1], do_expand=True)

    def _list(self) -> list[int]:
        if not self._geometry.synced or self._per_expert_list is None:
            return []
        alignment = self._geometry.expert_alignment
        return [align(count, alignment) for count in self._per_expert_list]

    def _per_rank_sums(self) -> Tensor:
        return self._per_rank.cumsum(0, dtype=torch.int32)

    def _per_expert_sums(self) -> Tensor:
        if self._offsets is not None:
            return self._offsets[:-1] + self._per_expert
        alignment = self._geometry.expert_alignment
        aligned = (self._per_expert + (alignment - 1)) // alignment * alignment
        return aligned.cumsum(0, dtype=torch.int32)

    def _metadata(self) -> Tensor:
        geometry, sources = self._geometry, self._sources
        assert sources is not None
        arrivals_NK = tables_of(self._known.handle).arrivals()
        num_rows, topk = arrivals_NK.shape
        row = torch.arange(num_rows, dtype=torch.int64, device=arrivals_NK.device)
        ends = self._per_rank.cumsum(0)
        rank = torch.searchsorted(ends, row, right=True)
        lane = torch.arange(topk, dtype=torch.int64, device=row.device)
        highest = torch.where(arrivals_NK >= 0, lane, -1).max(dim=1).values if topk else row
        if geometry.do_expand:
            # Any of a token's rows says which token it is.
            token = sources[arrivals_NK.max(dim=1).values]
            expanded = arrivals_NK
        else:
            token = sources[:num_rows]
            expanded = torch.full_like(arrivals_NK, -1)
        first = rank * geometry.num_max_tokens_per_rank + token
        rows = torch.cat([first[:, None], (rank * topk + highest)[:, None], expanded], dim=1)
        rows = rows.to(torch.int32)
        missing = self._num_received() - num_rows
        if missing <= 0:
            return rows
        return torch.nn.functional.pad(rows, (0, 0, 0, missing), value=-1)


def worst_rows(geometry: Geometry, topk: int, *, do_expand: bool) -> int:
    """The most rows that a dispatch can bring, as DeepEP counts them."""
    arrivals = geometry.num_ranks * geometry.num_max_tokens_per_rank
    if not do_expand:
        return arrivals
    num_local = geometry.num_experts // geometry.num_ranks
    alignment = geometry.expert_alignment
    return align(arrivals * min(topk, num_local) + (alignment - 1) * num_local, alignment)
