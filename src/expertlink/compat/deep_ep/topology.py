"""Domains of ranks: RDMA ranks are hosts, that is NVLink domains, as engines find them."""

from __future__ import annotations

from typing import Any

from expertlink.compat.deep_ep import pool as pools
from expertlink.domains import Domains


def get_physical_domain_size(group: Any) -> tuple[int, int]:
    """`(RDMA ranks, NVLink ranks)`: hosts, and the ranks on one. Collective."""
    return physical_size(pools.connect(group, "domain size").domains)


def get_logical_domain_size(group: Any, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """`(scale-out ranks, scale-up ranks)`: as above; `(1, R)` without hybrid mode. Collective."""
    domains = pools.connect(group, "domain size").domains
    return logical_size(domains, allow_hybrid_mode=allow_hybrid_mode)


def physical_size(domains: Domains) -> tuple[int, int]:
    """Hosts, and the ranks on one; where these differ in number, those on the largest."""
    sizes = [len(domains.ranks_of(host)) for host in range(domains.num_hosts)]
    return domains.num_hosts, max(sizes)


def logical_size(domains: Domains, *, allow_hybrid_mode: bool) -> tuple[int, int]:
    """The same where calls tell hosts apart, else one domain of all ranks."""
    return physical_size(domains) if allow_hybrid_mode else (1, domains.num_ranks)
