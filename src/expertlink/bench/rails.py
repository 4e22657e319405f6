"""The rails alone: exchanges between hosts of as many bytes as a dispatch or combine moves there,
in the same chunks, measured beside it.

Hosts may be pretended: ranks of one machine that NCCL takes for several, or whose rails are NVLink
with few thread blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from expertlink.bench.cases import Case, Plan
from expertlink.bench.ceilings import Moves
from expertlink.bench.clock import Clock
from expertlink.domains import Domains
from expertlink.engines.hybrid.connect import connect
from expertlink.engines.hybrid.monitor import Monitor, Neighbours
from expertlink.engines.hybrid.rail import Rail
from expertlink.engines.hybrid.schedule import chunk_sizes, rows_per_chunk, splits
from expertlink.engines.hybrid.watched_rail import WatchedRail
from expertlink.engines.hybrid.words import HostWords
from expertlink.routing import even_blocks, rows_per_host
from expertlink.settings import RAIL_CTAS

KIND = "rail"


def rail_environment(
    rank: int, *, ranks: int, hosts: int, rail: str | None, ctas: int | None
) -> dict[str, str]:
    """Variables of a rank of pretended hosts, to be set before NCCL starts."""
    variables: dict[str, str] = {}
    if hosts > 1 and rail == "sockets":
        variables["NCCL_HOSTID"] = f"virtual-{rank * hosts // ranks}"
        variables |= {"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}
    if hosts > 1 and ctas is not None:
        variables[RAIL_CTAS.name] = str(ctas)
    return variables


def rows_to_hosts(ids_TK: Tensor, case: Case) -> Tensor:
    """`[N]` int64 rows that a rank's tokens send to every host: one per (token, host)."""
    ranks = torch.tensor(even_blocks(case.experts, case.ranks), device=ids_TK.device)
    host_of = torch.cat([ranks * case.hosts // case.ranks, ranks.new_tensor([case.hosts])])
    return rows_per_host(host_of[ids_TK.long()], case.hosts)  # an id of -1 is the last entry


class RailCeiling:
    """The rail of this rank, for the cases of one communicator. Building is collective.

    Args:
        case: one of them.
        plan: bounds the waits.
        clock: of the same ranks.
    """

    def __init__(self, case: Case, plan: Plan, clock: Clock) -> None:
        self._clock = clock
        self._rail: Rail | None = None
        if case.hosts == 1:
            return
        group = dist.group.WORLD
        assert group is not None
        self.domains = domains = Domains(case.host_of)
        rank = dist.get_rank()
        self._host, local = domains.host_of[rank], domains.local_of(rank)
        store = group.get_group_store()
        number = _next_number(clock, store, rank)
        rail = connect(
            dist.PrefixStore(f"expertlink-bench-{number}-rail-{local}", store),
            index=self._host,
            size=case.hosts,
            device=clock.device,
            max_ctas=RAIL_CTAS.read(),
            timeout_s=plan.timeout_s,
        )
        self._rail = rail if clock.on_gpu else _bounded(rail, domains, rank, plan.timeout_s)

    def moves(self, case: Case, ids_of_inputs: Sequence[Tensor]) -> list[Moves]:
        """For each input of a case, the exchanges of a dispatch and a combine. Collective.

        `ids_of_inputs`: `[T, K]` each.
        """
        if self._rail is None:
            return [{} for _ in ids_of_inputs]
        mine = torch.stack([rows_of_chunks(ids_TK.cpu(), case) for ids_TK in ids_of_inputs])
        everyone = self._clock.gather(mine)
        own = self.domains.rail(self.domains.local_of(dist.get_rank()))
        return [
            self._moves_of(case, rows_CNN.tolist())
            for rows_CNN in everyone[list(own)].permute(1, 2, 0, 3)  # inputs, chunks, from, to
        ]

    def _moves_of(self, case: Case, rows_CNN: list[list[list[int]]]) -> Moves:
        back_CNN = [[list(column) for column in zip(*rows, strict=True)] for rows in rows_CNN]
        return {
            (phase, KIND): self._exchanges(rows, case.row_bytes(phase))
            for phase, rows in (("dispatch", rows_CNN), ("combine", back_CNN))
        }

    def _exchanges(self, rows_CNN: list[list[list[int]]], row_bytes: int) -> Callable[[], None]:
        rail, device = self._rail, self._clock.device
        assert rail is not None
        parts = [splits(rows_NN, self._host) for rows_NN in rows_CNN]
        most = max((max(sum(to), sum(of)) for to, of in parts), default=0)
        send, receive = (
            torch.zeros((most, row_bytes), dtype=torch.uint8, device=device) for _ in range(2)
        )
        calls = [(send[: sum(to)], receive[: sum(of)], to, of) for to, of in parts]

        def exchange() -> None:
            for call in calls:
                rail.exchange(*call)

        return exchange

    def bytes_sent(self, case: Case, ids_of_inputs: Sequence[Tensor]) -> dict[str, float]:
        """By phase, bytes that a rank sends in `moves`, its mean over ranks and inputs. Collective.

        `ids_of_inputs`: `[T, K]` each.
        """
        if self._rail is None:
            return {}
        mine = torch.stack([rows_of_chunks(ids.cpu(), case).sum(0) for ids in ids_of_inputs])
        mine[:, self._host] = 0
        rows = self._clock.gather(mine.sum(dim=1)).double().mean().item()
        # As many rows come back as have been sent.
        return {phase: rows * case.row_bytes(phase) for phase in ("dispatch", "combine")}

    def close(self) -> None:
        """Releases the rail. Safe to repeat."""
        rail, self._rail = self._rail, None
        if rail is not None:
            rail.close()


def rows_of_chunks(ids_TK: Tensor, case: Case) -> Tensor:
    """`[C, N]` int64 rows that a rank's tokens send to every host in each chunk of a call.

    Chunks are those of the hybrid engine. In mode "ll" there is one, with room for all tokens.
    """
    if case.mode == "ll":
        return torch.full((1, case.hosts), case.tokens)
    row_bytes, max_tokens = case.row_bytes("combine"), case.max_tokens_per_rank or case.tokens
    most = rows_per_chunk(case.hosts, row_bytes=row_bytes, max_tokens=max_tokens)
    starts = itertools.accumulate(chunk_sizes(max_tokens, most=most), initial=0)
    parts = [ids_TK[begin:end] for begin, end in itertools.pairwise(starts)]
    return torch.stack([rows_to_hosts(part_TK, case) for part_TK in parts])


def _bounded(rail: Rail, domains: Domains, rank: int, timeout_s: float) -> Rail:
    """A rail of ranks on CPUs whose waits end."""
    words = HostWords()
    ranks = Neighbours(
        rank=rank,
        domains=domains,
        describe=lambda other: f"of {domains.num_ranks}",
        has_exited=lambda other: False,
    )
    monitor = Monitor(
        words=words,
        ranks=ranks,
        status=None,
        timeout_s=timeout_s,
        doing=lambda: ("rail", 0),
        end=[rail.abort],
    )
    return WatchedRail(rail, words=words, monitor=monitor)


def _next_number(clock: Clock, store: dist.Store, rank: int) -> int:
    """Tells rails apart that one store serves; the same on all ranks. Collective."""
    mine = store.add("expertlink-bench-rails", 1) if rank == 0 else 0
    return int(clock.gather(torch.tensor([mine])).max())
