"""What normal calls have beside those of one host where the group spans several.

A host is an NVLink domain, as engines find them; `deep_ep` calls it an RDMA rank. Hosts are
numbered by their lowest rank. They may differ in size, and their ranks need not be neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink.compat.deep_ep.handles import Dispatched, TensorTuple, with_rows
from expertlink.domains import Domains
from expertlink.engines.outputs import OutputSource, lasting_source
from expertlink.types import DispatchOutput

_META_BYTES = 8  # of a row's source: two int32


class HostCounter:
    """Counts the tokens of one rank for each host.

    Args:
        domains: hosts of the ranks.
        device: where tensors usually live.
    """

    def __init__(self, domains: Domains, device: torch.device) -> None:
        self._num_hosts = domains.num_hosts
        self._host_R = torch.tensor(domains.host_of, dtype=torch.int64, device=device)

    def __call__(self, is_token_in_rank: Tensor) -> Tensor:
        """`[num_hosts]` int32: tokens with an expert on each host; `is_token_in_rank` `[T, R]`."""
        host_R = self._host_R.to(is_token_in_rank.device)
        shape = (is_token_in_rank.shape[0], self._num_hosts)
        ranks_TN = torch.zeros(shape, dtype=torch.int32, device=host_R.device)
        ranks_TN.index_add_(1, host_R, is_token_in_rank.to(torch.int32))
        return (ranks_TN > 0).sum(dim=0, dtype=torch.int32)


class InternodeHandle(TensorTuple):
    """The ten tensors of a normal dispatch over several hosts.

    0. `[T, R]` bool: `is_token_in_rank` of the call.
    1. `[hosts, 1]`, 2. `[R, 1]`, 3. `[hosts, 1]`, 5. `[R, 1]` int32, -1: DeepEP's channels, which
       do not exist here.
    4. `[hosts]` int32: rows of this rank from hosts 0 to n. DeepEP also counts those that this rank
       forwards to others, which do not exist here.
    6. `[R]` int32: rows of this rank from ranks 0 to r.
    7. `[N, 8]` uint8: two int32 for every row, the host and the token that it comes from; -1 in
       padding. DeepEP has bits of the ranks in place of the token.
    8. `[T, hosts]`, 9. `[0, ranks of this host]` int32, -1: DeepEP's own.
    """

    KEY = 7
    LENGTH = 10

    known: Dispatched
    _source: OutputSource
    _domains: Domains
    _rank: int

    @staticmethod
    def of(
        dispatched: Dispatched,
        output: DispatchOutput,
        is_token_in_rank: Tensor,
        *,
        rank: int,
        domains: Domains,
    ) -> InternodeHandle:
        """The handle of a dispatch.

        Args:
            dispatched: what the library knows of it.
            output: of the dispatch; only its counts and source tokens are kept.
            is_token_in_rank: `[T, R]` bool, the caller's.
            rank: this rank.
            domains: hosts of the ranks.
        """
        handle = InternodeHandle(_TEN)
        handle.known, handle._rank, handle._domains = dispatched, rank, domains
        handle._source = source = lasting_source(output)
        handle.kept = tuple(source.memories)
        handle._made = {0: is_token_in_rank}
        return handle

    def _make(self, position: int) -> Tensor:
        per_rank = self._source.make("num_tokens_per_rank")
        assert per_rank is not None
        domains, device = self._domains, per_rank.device
        if position == 6:
            return per_rank.cumsum(0, dtype=torch.int32)
        host_R = torch.tensor(domains.host_of, dtype=torch.int64, device=device)
        if position == 4:
            per_host = torch.zeros(domains.num_hosts, dtype=torch.int64, device=device)
            return per_host.index_add_(0, host_R, per_rank.long()).cumsum(0, dtype=torch.int32)
        if position == self.KEY:
            return self._origins(per_rank, host_R)
        ranks, hosts = domains.num_ranks, domains.num_hosts
        num_tokens = self._made[0].shape[0]
        local = len(domains.ranks_of(domains.host_of[self._rank]))
        shape = {8: (num_tokens, hosts), 9: (0, local), 1: (hosts, 1), 3: (hosts, 1)}.get(
            position, (ranks, 1)
        )
        return torch.full(shape, -1, dtype=torch.int32, device=device)

    def _origins(self, per_rank: Tensor, host_R: Tensor) -> Tensor:
        """`[N, 8]` bytes: host and token that rows come from."""
        sources = self._source.make("source_tokens")
        assert sources is not None
        tokens = with_rows(sources, self.known.padded_rows, -1)
        row = torch.arange(tokens.shape[0], dtype=torch.int64, device=tokens.device)
        rank = torch.searchsorted(per_rank.long().cumsum(0), row, right=True)
        host = host_R[rank.clamp(max=len(host_R) - 1)].to(torch.int32)
        pairs = torch.stack([torch.where(tokens < 0, -1, host), tokens], dim=1)
        return pairs.contiguous().view(torch.uint8).view(-1, _META_BYTES)


_TEN = (None,) * InternodeHandle.LENGTH
