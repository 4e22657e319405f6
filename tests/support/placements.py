"""Jobs that move weights between placements, and what every rank must have afterwards."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from expertlink import ExpertlinkError, MoECommunicator, MoECommunicatorConfig
from expertlink.launch import RankContext
from expertlink.placement import ExpertPlacement, gather_loads
from support.jobs import same_bits

EXPERTS = 5
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64)
SHAPES = ((3, 2), (), (7,), (5,), (0,), (2,))


def drawn(seed: int, ranks: int) -> tuple[ExpertPlacement, ExpertPlacement]:
    """Two placements of the same experts; ranks may be empty."""
    generator = random.Random(seed)

    def one() -> ExpertPlacement:
        most = range(1, ranks + 1)
        holders = [generator.sample(range(ranks), generator.choice(most)) for _ in range(EXPERTS)]
        slots = [tuple(e for e in range(EXPERTS) if r in holders[e]) for r in range(ranks)]
        return ExpertPlacement(EXPERTS, tuple(slots))

    return one(), one()


def config_for(ctx: RankContext, **fields: Any) -> MoECommunicatorConfig:
    defaults: dict[str, Any] = {"num_experts": EXPERTS, "hidden_size": 8, "topk": 2}
    defaults |= {"max_tokens_per_rank": 4, "device": ctx.device, "timeout_s": 30.0}
    return MoECommunicatorConfig(**{**defaults, **fields})


def weights_of(experts: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Rows of every expert, one tensor per dtype; any bits, NaN among them."""
    tensors = []
    for dtype, shape in zip(DTYPES, SHAPES, strict=True):
        rows = []
        for expert in experts:
            generator = torch.Generator().manual_seed(expert)
            if dtype is torch.bool:
                row = torch.rand(shape, generator=generator) < 0.5
            else:
                size = (*shape, dtype.itemsize)
                row = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
                row = row.view(dtype).view(shape)
            rows.append(row)
        empty = torch.empty((0, *shape), dtype=dtype)
        tensors.append((torch.stack(rows) if rows else empty).to(device))
    # Rows that are not contiguous.
    tensors.append(tensors[0].transpose(-1, -2))
    return tensors


def moves(
    ctx: RankContext, pairs: list[tuple[ExpertPlacement, ExpertPlacement]], engine: str = "auto"
) -> None:
    dtype = torch.bfloat16 if ctx.device.type == "cuda" else torch.float32
    config = config_for(ctx, engine=engine, dtype=dtype)
    with MoECommunicator(config) as comm:
        own = comm.placement
        assert own.experts_of_rank[ctx.rank] == tuple(comm.local_experts)
        for old, new in pairs:
            for source, goal in ((old, new), (new, old), (own, old)):
                before = weights_of(source.experts_of_rank[ctx.rank], ctx.device)
                before[0].requires_grad_()
                given = None if source is own else source
                after = comm.rebalance(before, goal, old=given)
                wanted = weights_of(goal.experts_of_rank[ctx.rank], ctx.device)
                for index, (found, right) in enumerate(zip(after, wanted, strict=True)):
                    same_bits(
                        torch.view_as_real(found) if found.is_complex() else found,
                        torch.view_as_real(right) if right.is_complex() else right,
                        f"tensor {index}",
                    )
                    assert not found.requires_grad
        assert comm.rebalance([], own) == []
        counts = torch.tensor(comm.local_experts, device=ctx.device) + 10
        assert gather_loads(comm, counts).tolist() == [10, 11, 12, 13, 14]
        # The communicator is where it was.
        x_TH = torch.ones(4, 8, dtype=dtype, device=ctx.device)
        ids_TK = torch.tensor([[0, 4]] * 4, device=ctx.device)
        received, handle = comm.dispatch(x_TH, ids_TK)
        assert comm.combine(received.tokens, handle).eq(2).all()


def sums(ctx: RankContext, drawn_placements: list[ExpertPlacement]) -> None:
    """Every copy has the sum over copies, rounded once; what has one copy stays as it is."""
    with MoECommunicator(config_for(ctx, dtype=torch.float32)) as comm:
        for placement in drawn_placements:
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                wide = torch.promote_types(dtype, torch.float32)

                def row(rank: int, expert: int, dtype: torch.dtype = dtype) -> Tensor:
                    generator = torch.Generator().manual_seed(100 * rank + expert)
                    return torch.randn(2, 3, generator=generator).to(dtype)

                own = placement.experts_of_rank[ctx.rank]
                found = torch.empty(len(own), 3, 2, dtype=dtype, device=ctx.device)
                found = found.transpose(1, 2)  # not contiguous
                single = torch.ones(len(own), dtype=dtype, device=ctx.device)
                for slot, expert in enumerate(own):
                    found[slot] = row(ctx.rank, expert)
                comm.sum_copies([found, single], placement=placement)
                for slot, expert in enumerate(own):
                    total = torch.zeros(2, 3, dtype=wide)
                    copies = 0
                    for rank, experts in enumerate(placement.experts_of_rank):
                        if expert in experts:
                            total += row(rank, expert).to(wide)
                            copies += 1
                    assert torch.equal(found[slot].cpu(), total.to(dtype))
                    assert single[slot] == copies
        comm.sum_copies([torch.ones(len(comm.local_experts), device=ctx.device)])


def refusals(ctx: RankContext) -> dict[str, str]:
    """What every kind of refusal raises here. Calls after them work."""
    rank, said = ctx.rank, {}
    even = ExpertPlacement.even(4, 2)
    other = ExpertPlacement(4, ((0, 2), (1, 3)))
    with MoECommunicator(config_for(ctx, num_experts=4, dtype=torch.float32)) as comm:

        def attempt(name: str, tensors: Any, new: Any = other, old: Any = even) -> None:
            try:
                comm.rebalance(tensors, new, old=old)
            except ExpertlinkError as error:
                said[name] = f"{type(error).__name__}: {error}"
            [moved] = comm.rebalance([torch.tensor(comm.local_experts)], other, old=even)
            assert tuple(moved.tolist()) == other.experts_of_rank[rank]

        fine = torch.ones(2, 2)
        attempt("shape", [torch.ones(2, 2 + rank)])
        attempt("dtype", [fine.to(torch.float64 if rank else torch.float32)])
        attempt("number", [fine] * (1 + rank))
        attempt("new", [fine], new=even if rank else other)
        attempt("old", [fine], old=even if rank else other)
        attempt("slots", [torch.ones(2 if rank else 3, 2)])
        attempt("ranks", [fine], new=other if rank else ExpertPlacement.even(4, 3))
        attempt("experts", [fine], new=other if rank else ExpertPlacement.even(3, 2))
        attempt("device", [fine if rank else fine.to("meta")])
        attempt("kind", [fine if rank else [1, 2]])
        attempt("wrapper", [fine if rank else TwoTensor(fine, fine)])
        attempt("no list", [fine] if rank else fine)
        attempt("no placement", [fine], new=other if rank else other.expert_map)
        try:
            comm.sum_copies([fine if rank else fine.to(torch.int32)], placement=even)
        except ExpertlinkError as error:
            said["integers"] = f"{type(error).__name__}: {error}"
        if rank == 0:
            attempt("other call", [fine])
        else:
            try:
                comm.dispatch(torch.ones(1, 8), torch.tensor([[0, 1]]))
            except ExpertlinkError as error:
                said["other call"] = f"{type(error).__name__}: {error}"
            comm.rebalance([torch.tensor(comm.local_experts)], other, old=even)
    return said
