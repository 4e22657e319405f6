"""What DeepEP's test_internode asserts of normal calls over several hosts, and more."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from expertlink.compat.deep_ep import (
    Buffer,
    ElasticBuffer,
    get_logical_domain_size,
    get_physical_domain_size,
)
from expertlink.compat.deep_ep import pool as pools
from expertlink.engines.hybrid.discovery import HOST_ID
from expertlink.errors import ConfigurationError
from expertlink.launch import RankContext
from support.drop_in.decode import refusal
from support.drop_in.inputs import Shapes, calc_diff
from support.drop_in.intranode import Intranode
from support.drop_in.normal import outputs, sums
from support.drop_in.place import Place


class Internode(Intranode):
    """One rank's part of the test: that of one host, with the tensors of several."""

    def check_hosts(self, per_host: Tensor | None) -> None:
        """Each token counts once for a host, whatever number of its ranks it goes to."""
        assert per_host is not None
        domains = self.place.domains
        assert per_host.dtype is torch.int32
        assert per_host.tolist() == [
            int(self.member_TR[:, list(domains.ranks_of(host))].any(dim=1).sum())
            for host in range(domains.num_hosts)
        ]

    def prefixes(self, handle: Any) -> Tensor:
        assert isinstance(handle, tuple)
        assert len(handle) == 10
        assert handle[-4].dtype is torch.int32
        return handle[-4]

    def num_rows(self, handle: Any) -> int:
        return handle[7].shape[0]

    def check_biases(self) -> None:
        """Biases are added up first; two, as the test has them, and one."""
        rows, _, _, _, handle = self.dispatch(self.random_x, False, False)
        generator = torch.Generator().manual_seed(self.place.rank)
        biases = [
            self.place.tensor(
                torch.randn(self.random_x.shape, generator=generator, device="cpu").bfloat16()
            )
            for _ in range(2)
        ]
        copies = self.in_rank.sum(dim=1, keepdim=True)
        for given in (biases[0], tuple(biases)):
            total = sum(b.float() for b in (given if isinstance(given, tuple) else (given,)))
            assert isinstance(total, Tensor)
            combined, _, _ = self.buffer.combine(rows, handle, bias=given)
            expected = sums(
                [self.random_x] * self.place.num_ranks, self.member_TR, self.place.domains, total
            )
            assert torch.equal(combined, expected)
            alone = torch.where(copies > 0, (combined.float() - total) / copies, self.random_x)
            assert calc_diff(alone, self.random_x) < 5e-4

    def check_names(self) -> None:
        """The calls by their own names are those that dispatch and combine make."""
        rows, _, _, counts, handle = self.dispatch(self.random_x, False, False)
        again = self.buffer.internode_dispatch(
            self.random_x,
            num_tokens_per_rank=self.num_tokens_per_rank,
            is_token_in_rank=self.in_rank,
            num_tokens_per_expert=self.num_tokens_per_expert,
        )
        assert torch.equal(again[0], rows)
        assert again[3] == counts
        made = outputs(rows, self.place.rank)
        combined, _, _ = self.buffer.internode_combine(made, again[4])
        assert torch.equal(combined, self.buffer.combine(made, handle)[0])


def internode(place: Place, shapes: Shapes) -> bool:
    """The whole test on one rank."""
    test = Internode(place, shapes)
    test.check_layout()
    kinds = (test.random_x, test.constant_x, test.fp8_x)
    flags_of_calls = [(False, False), (True, True)]
    if place.num_ranks == 2:
        flags_of_calls += [(False, True), (True, False)]
    for (previous, asynchronous), (x, with_topk) in itertools.product(
        flags_of_calls, itertools.product(kinds, (False, True))
    ):
        test.check_round(x, previous, asynchronous, with_topk)
    test.check_tuning()
    test.check_biases()
    test.check_names()
    return True


def domains(place: Place) -> bool:
    """What buffers and functions say of the hosts."""
    found, rank = place.domains, place.rank
    sizes = [len(found.ranks_of(host)) for host in range(found.num_hosts)]
    size = (found.num_hosts, max(sizes))
    assert get_physical_domain_size(place.group) == get_logical_domain_size(place.group) == size
    assert get_logical_domain_size(place.group, allow_hybrid_mode=False) == (1, place.num_ranks)
    for hybrid in (True, False):
        buffer = ElasticBuffer(place.group, num_bytes=2 << 20, allow_hybrid_mode=hybrid)
        assert (buffer.num_rdma_ranks, buffer.num_nvlink_ranks) == size
        logical = size if hybrid else (1, place.num_ranks)
        assert (buffer.num_scaleout_ranks, buffer.num_scaleup_ranks) == logical
        assert (buffer.scaleout_rank_idx, buffer.scaleup_rank_idx) == (
            (found.host_of[rank], found.local_of(rank)) if hybrid else (0, rank)
        )
    kept = Buffer(place.group, 256, 384)
    assert (kept.num_nvl_bytes, kept.num_rdma_bytes) == (256, 384)
    assert kept.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True).shape == (384,)
    return True


def gloo_between_gpus(ctx: RankContext, hosts: tuple[int, ...]) -> list[str]:
    """What constructors of ranks with GPUs say of a group with gloo that spans these hosts."""
    group = dist.group.WORLD
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOST_ID, f"host {hosts[ctx.rank]}")
        patch.setattr(pools, "current_device", lambda: torch.device("cuda", 0))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        if len(set(hosts)) == 1:
            return [str(pools.connect(group, "Buffer").device)]
        return [
            refusal(lambda: Buffer(group)),
            refusal(lambda: Buffer(group, low_latency_mode=True)),
            refusal(lambda: ElasticBuffer(group, num_bytes=2 << 20)),
        ]


def different_constructors(place: Place) -> str:
    """What ranks say of which one makes a buffer while the others dispatch."""
    buffer: Any = Buffer(place.group)
    ids = torch.zeros(4, 1, dtype=torch.int64, device=place.device)
    x = torch.ones(4, 8, dtype=torch.bfloat16, device=place.device)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, place.num_ranks)

    def dispatch() -> Any:
        return buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=ids,
            topk_weights=ids.float(),
        )

    said = ""
    try:
        Buffer(place.group) if place.rank else dispatch()
    except ConfigurationError as error:
        said = str(error)
    rows, *_ = dispatch()
    assert len(rows) == (0 if place.rank else 4 * place.num_ranks)
    return said


def bad_calls(place: Place) -> list[str]:
    """What is said of calls that several hosts do not have."""
    buffer: Any = Buffer(place.group, low_latency_mode=True, enable_shrink=True)
    status = torch.full((place.num_ranks,), 7, dtype=torch.int32, device=place.device)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * place.num_ranks
    buffer.low_latency_clean_mask_buffer()
    other = (place.rank + 1) % place.num_ranks
    return [
        refusal(lambda: buffer.low_latency_update_mask_buffer(other, True)),
        refusal(lambda: buffer.combine(torch.zeros(1, 8), (1,) * 10)),
    ]
