"""`Config`, the tables of default configurations, and the hints of buffer sizes.

Only `num_sms` has an effect here. The sizes are DeepEP's arithmetic: callers compare hints with the
bytes that a buffer was made with, and rebuild it where those are fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

from expertlink.compat.deep_ep.errors import expect
from expertlink.layouts import align

RANKS_PER_DOMAIN = 8  # of DeepEP's NVLink domains, in its formulas
_MAX_TOPK = 128
_MAX_SCALES = 128
_SOURCE_BYTES = 8  # of the metadata that travels with a row


@dataclass(frozen=True)
class Config:
    """How many SMs a call may use, and chunk sizes, which are accepted and ignored.

    Raises:
        CallError: values that DeepEP refuses (an AssertionError).
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        expect(self.num_sms >= 0, f"num_sms={self.num_sms}: at least 0")
        nvl = self.num_max_nvl_chunked_send_tokens, self.num_max_nvl_chunked_recv_tokens
        rdma_send = self.num_max_rdma_chunked_send_tokens
        rdma = rdma_send, self.num_max_rdma_chunked_recv_tokens
        expect(min(*nvl, *rdma) > 0, f"chunks of {nvl} and {rdma} tokens: at least 1 each")
        expect(nvl[0] < nvl[1], f"nvl chunks: sent {nvl[0]} must be less than received {nvl[1]}")
        received = -(-rdma[1] // rdma_send) * rdma_send
        object.__setattr__(self, "num_max_rdma_chunked_recv_tokens", received)
        expect(
            rdma_send <= received // 2 and rdma_send < received,
            f"rdma chunks: sent {rdma_send} must be at most half of received {received}",
        )

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes that DeepEP would want for its NVLink buffer."""
        expect(
            num_ranks < RANKS_PER_DOMAIN or num_ranks % RANKS_PER_DOMAIN == 0,
            f"num_ranks={num_ranks}: fewer than 8, or a multiple of 8",
        )
        channels = self.num_sms // 2
        peers = min(num_ranks, RANKS_PER_DOMAIN)
        domains = max(num_ranks // RANKS_PER_DOMAIN, 1)
        words = channels * peers * (2 * domains + 3) * 4
        rows = channels * peers * self.num_max_nvl_chunked_recv_tokens * _row_bytes(hidden_bytes)
        return align(words + rows, 128)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of such chunks between hosts of 8 ranks each, sent and received; 0 for one host.

        Of the size that DeepEP would want, not its very number.
        """
        if num_ranks <= RANKS_PER_DOMAIN:
            return 0
        expect(
            num_ranks % RANKS_PER_DOMAIN == 0,
            f"num_ranks={num_ranks}: at most 8, or a multiple of 8",
        )
        rings = self.num_sms // 2 * (num_ranks // RANKS_PER_DOMAIN) * 2
        words = 4 * (2 * RANKS_PER_DOMAIN + 2)
        rows = self.num_max_rdma_chunked_recv_tokens * (_row_bytes(hidden_bytes) + 16)
        return align(rings * (words + rows), 128)


def _row_bytes(hidden_bytes: int) -> int:
    """A row and what travels with it."""
    return hidden_bytes + _SOURCE_BYTES + _MAX_TOPK * 8 + _MAX_TOPK * 4 + _MAX_SCALES * 4


_DISPATCH_CHUNKS = {2: 24, 4: 6, 8: 6}
_COMBINE_CHUNKS = {2: 10, 4: 9, 8: 4}


def dispatch_config(num_ranks: int, num_sms: int) -> Config:
    """DeepEP's default for a dispatch."""
    return Config(num_sms, _DISPATCH_CHUNKS.get(num_ranks, 6), 256, 6, 128)


def combine_config(num_ranks: int, num_sms: int) -> Config:
    """DeepEP's default for a combine."""
    return Config(num_sms, _COMBINE_CHUNKS.get(num_ranks, 4), 256, 6, 128)


def low_latency_size_hint(
    num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
) -> int:
    """Bytes that DeepEP would want for low-latency calls."""
    tokens, scales = num_max_dispatch_tokens_per_rank, hidden // 128
    dispatched = 16 + max(2 * hidden, hidden + 4 * scales)
    combined = 4 * scales + 2 * hidden
    send = max(tokens * dispatched, num_experts * tokens * combined)
    receive = max(num_experts * tokens * dispatched, num_experts * tokens * combined)
    signals = -(-4 * num_experts // 128) * 128
    total = 2 * (send + receive + signals)
    return (total + 128) // 128 * 128
