"""What decode asks of a communicator, on every rank, bit for bit against the oracle.

Jobs take a communicator that is there already, so that hosted ranks run them too; `on_a_rank` makes
one in a rank's own process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from expertlink import (
    DispatchBuffers,
    DispatchHandle,
    DispatchOutput,
    HandleError,
    InputError,
    MoECommunicator,
)
from expertlink.engines.nvlink.ll.tables import BufferTables
from expertlink.launch import RankContext
from support.jobs import (
    ROUNDS,
    Job,
    check_output,
    combine_case,
    config_of,
    counts_stay_on_device,
    dispatch_case,
    filled_up,
    rows_for,
    same_bits,
    without_gradients,
)
from support.oracle import (
    Case,
    combined_of,
    expected_of,
    inputs_of,
    ranges_of,
    returned_grads,
    slot_grads,
    slot_weights,
    weights_of_combine,
)


def on_a_rank(ctx: RankContext, job: Job, cases: list[Case], *args: Any, **fields: Any) -> int:
    """Runs a job for each case, with a communicator for each, without gradients, as decode does."""
    for case in cases:
        with MoECommunicator(config_of(case, ctx.device, **fields)) as comm:
            without_gradients(comm, job, [case], *args)
    return len(cases)


# -- weights of the combine -----------------------------------------------------------------------


def own_weights(comm: MoECommunicator, case: Case) -> None:
    """`weights` of a combine replace the routing weights, of which there may be none."""
    _, handle = dispatch_case(comm, case)
    given = slot_weights_for(case, comm.rank, handle)
    rows = rows_for(case, comm.rank, handle)
    expected = combined_of(case, comm.rank, own_weights=True)
    same_bits(comm.combine(rows, handle, weights=given), expected, "combine with weights")
    # The routing weights are as they were.
    own = inputs_of(case, comm.rank)
    _, cached = comm.dispatch(own.x_TH.to(comm.device), None, previous_handle=handle)
    same_bits(comm.combine(rows, cached), combined_of(case, comm.rank), "combine without weights")


def slot_weights_for(case: Case, rank: int, handle: DispatchHandle) -> Tensor:
    """`slot_weights` in the shape that the handle's combine takes."""
    return filled_up(slot_weights(case, rank), handle.rows_shape[:-1], handle.topk_ids.device)


def weights_on_one_rank(comm: MoECommunicator, case: Case) -> None:
    """Exact combines send weights with the rows: all ranks pass them or none."""
    _, handle = dispatch_case(comm, dataclasses.replace(case, weighted=False))
    rows = rows_for(case, comm.rank, handle)
    given = slot_weights_for(case, comm.rank, handle) if comm.rank == 0 else None
    with pytest.raises(InputError, match="scales and weights: 4 on rank 0, 0 on ranks? 1"):
        comm.combine(rows, handle, weights=given)


def topk_weights(comm: MoECommunicator, case: Case) -> None:
    """Weights that a combine is given by the tokens' ranks replace those of any dispatch."""
    rank, device = comm.rank, comm.device
    given = [weights_of_combine(case, rank, number).to(device) for number in range(3)]
    expected = [combined_of(case, rank, topk_weights=number) for number in range(3)]
    weighted = dataclasses.replace(case, weighted=True)
    for own in (weighted, dataclasses.replace(case, weighted=False)):
        _, handle = dispatch_case(comm, own)
        rows = rows_for(case, rank, handle)
        for number in range(2):
            result = comm.combine(rows, handle, topk_weights=given[number])
            same_bits(result, expected[number], "combine with weights of the tokens' ranks")
        # The weights of the dispatch are as they were.
        same_bits(comm.combine(rows, handle), combined_of(own, rank), "combine without weights")

    x_TH = inputs_of(case, rank).x_TH.to(device)
    _, cached = comm.dispatch(x_TH, None, previous_handle=handle)
    out = torch.empty_like(x_TH)
    strided = given[2].repeat_interleave(2, dim=1)[:, ::2]
    assert comm.combine(rows, cached, out=out, topk_weights=strided) is out
    same_bits(out, expected[2], "combine into out of a cached dispatch")

    slots = filled_up(slot_grads(case, rank), cached.rows_shape[:-1], device)
    result, grads_TK = comm.combine(rows, cached, topk_weights=given[0], weight_grads=slots)
    same_bits(result, expected[0], "combine with weights and gradients of weights")
    same_bits(grads_TK, returned_grads(case, rank), "gradients of weights")

    results = [
        comm.combine(rows, handle, topk_weights=weights, return_recv_hook=True)
        for weights in given[1:]
    ]
    for number, (result, hook) in enumerate(results, start=1):
        hook()
        same_bits(result, expected[number], "combine in halves with weights")
    request = comm.combine_async(rows, handle, topk_weights=given[0])
    same_bits(request.wait(), expected[0], "asynchronous combine with weights")


def topk_weights_on_one_rank(comm: MoECommunicator, case: Case) -> None:
    """All ranks pass them or none, even where they do not travel."""
    for weighted in (True, False):
        _, handle = dispatch_case(comm, dataclasses.replace(case, weighted=weighted))
        rows = rows_for(case, comm.rank, handle)
        given = weights_of_combine(case, 0, 0) if comm.rank == 0 else None
        with pytest.raises(InputError, match="bytes of a row: 8 on rank 0, 0 on ranks? 1"):
            comm.combine(rows, handle, topk_weights=given)


# -- halves ---------------------------------------------------------------------------------------


def halves(comm: MoECommunicator, case: Case) -> None:
    """Both halves of every call apart; hooks called once, repeatedly, or by the next call."""
    rank, static = comm.rank, comm.config.static_shapes
    x_TH = inputs_of(case, rank).x_TH.to(comm.device)
    expected = combined_of(case, rank)

    out, handle, hook = dispatch_case(comm, case, return_recv_hook=True)
    for _ in range(2):
        hook()
    check_output(case, rank, out, static=static)
    rows = rows_for(case, rank, handle)
    result, hook = comm.combine(rows, handle, return_recv_hook=True)
    for _ in range(2):
        hook()
    same_bits(result, expected, "combine in halves")

    _, handle, _ = dispatch_case(comm, case, return_recv_hook=True)
    same_bits(comm.combine(rows, handle), expected, "combine of half a dispatch")

    _, handle, hook = dispatch_case(comm, case, return_recv_hook=True)
    out, cached, again = comm.dispatch(x_TH, None, previous_handle=handle, return_recv_hook=True)
    hook()
    again()
    check_output(case, rank, out, static=static)
    result, _ = comm.combine(rows, cached, return_recv_hook=True)
    cached.wait()
    same_bits(result, expected, "combine that its handle finished")

    first, _ = comm.combine(rows, cached, return_recv_hook=True)
    rows = rows_for(case, rank, cached, round_=1)
    second, hook = comm.combine(rows, cached, return_recv_hook=True)
    hook()
    same_bits(first, expected, "combine that the next combine of its dispatch finished")
    same_bits(second, combined_of(case, rank, round_=1), "another combine in halves")


def in_turns(comm: MoECommunicator, case: Case) -> None:
    """Two micro-batches: while one computes the other communicates."""
    rank, static = comm.rank, comm.config.static_shapes
    first, first_handle, first_hook = dispatch_case(comm, case, return_recv_hook=True)
    second, second_handle, second_hook = dispatch_case(comm, case, return_recv_hook=True)
    first_hook()
    check_output(case, rank, first, static=static)
    rows = [rows_for(case, rank, first_handle, round_=round_) for round_ in range(2)]
    result, first_hook = comm.combine(rows[0], first_handle, return_recv_hook=True)
    second_hook()
    check_output(case, rank, second, static=static)
    other, second_hook = comm.combine(rows[1], second_handle, return_recv_hook=True)
    first_hook()
    second_hook()
    same_bits(result, combined_of(case, rank), "first combine")
    same_bits(other, combined_of(case, rank, round_=1), "second combine")


def forgotten_hooks(comm: MoECommunicator, case: Case) -> None:
    """What nobody has finished, the next call finishes; later hooks do nothing."""
    rank = comm.rank
    first, first_handle, hook = dispatch_case(comm, case, return_recv_hook=True)
    second, handle = dispatch_case(comm, case)
    check_output(case, rank, first, static=counts_stay_on_device(comm))
    check_output(case, rank, second, static=counts_stay_on_device(comm))
    hook()
    rows = rows_for(case, rank, handle)
    result, hook = comm.combine(rows, handle, return_recv_hook=True)
    combine_case(comm, case, first_handle, "the combine after half of one")
    same_bits(result, combined_of(case, rank), "combine that another one finished")
    hook()
    same_bits(result, combined_of(case, rank), "combine that another one finished")


def dropped_results(comm: MoECommunicator, case: Case) -> None:
    """Whatever the caller has let go of, halves that are left write to no other tensor's memory."""
    rank = comm.rank
    dispatch_case(comm, case, return_recv_hook=True)
    guards = guards_like(comm, case)
    _, handle = dispatch_case(comm, case)
    rows = rows_for(case, rank, handle)
    comm.combine(rows, handle, return_recv_hook=True)
    guards += guards_like(comm, case)
    out, handle, _ = dispatch_case(comm, case, return_recv_hook=True)
    result, hook = comm.combine(rows, handle, return_recv_hook=True)
    del out, handle  # the tables, too, are the engine's to keep
    guards += guards_like(comm, case)
    hook()
    same_bits(result, combined_of(case, rank), "combine whose handle is gone")
    assert all((guard == 7).all() for guard in guards)


def guards_like(comm: MoECommunicator, case: Case) -> list[Tensor]:
    """Tensors that are likely to be given memory that a call has let go of."""
    device, own = comm.device, inputs_of(case, comm.rank)
    largest = comm.create_buffers()
    wanted = [value for value in vars(largest.output).values() if isinstance(value, Tensor)]
    sizes = [value.nbytes for value in wanted]
    if isinstance(largest.tables, BufferTables):
        sizes += [largest.tables.block.nbytes]
    engine: Any = comm._engine
    tables = engine._mode._dispatcher.tables
    sizes += [
        4 * tables.words(len(own.x_TH)),
        4 * (tables.ids_end(len(own.x_TH), wide=True) + sum(tables.public)),
        own.x_TH.nbytes,
        own.ids_TK.nbytes,
    ]
    del largest, wanted
    return [
        torch.full((max(size, 1),), 7, dtype=torch.uint8, device=device)
        for size in sizes
        for _ in range(3)
    ]


def three_in_flight(comm: MoECommunicator, case: Case) -> None:
    """The third of them finishes the first, the fourth the second."""
    rank = comm.rank
    calls = [dispatch_case(comm, case, return_recv_hook=True) for _ in range(4)]
    for out, _, _ in calls[:2]:
        check_output(case, rank, out, static=counts_stay_on_device(comm))
    calls[3][2]()  # also what comes before it
    for out, _, _ in calls:
        check_output(case, rank, out, static=counts_stay_on_device(comm))
    calls[2][2]()
    handles = [handle for _, handle, _ in calls]
    rows = [rows_for(case, rank, handles[0], round_=i) for i in range(4)]
    results = [
        comm.combine(own, handle, return_recv_hook=True)
        for own, handle in zip(rows, handles, strict=True)
    ]
    for index, (result, hook) in enumerate(results):
        hook()
        same_bits(result, combined_of(case, rank, round_=index), f"combine {index}")


def many_turns(comm: MoECommunicator, cases: Sequence[Case]) -> None:
    """Two micro-batches that take turns through several layers, as decode overlaps them."""
    rank = comm.rank
    with torch.no_grad():
        waiting: list[Callable[[], None]] = []
        for layer in range(5):
            batches = [cases[(2 * layer + batch) % len(cases)] for batch in range(2)]
            sent = [dispatch_case(comm, case, return_recv_hook=True) for case in batches]
            for finish in waiting:
                finish()
            waiting = []
            for index, (case, (out, handle, hook)) in enumerate(zip(batches, sent, strict=True)):
                hook()
                check_output(case, rank, out, static=counts_stay_on_device(comm))
                rows = rows_for(case, rank, handle, round_=index)
                result, hook = comm.combine(rows, handle, return_recv_hook=True)
                waiting.append(_compared(hook, result, combined_of(case, rank, round_=index)))
        for finish in waiting:
            finish()


def _compared(hook: Callable[[], None], result: Tensor, expected: Tensor) -> Callable[[], None]:
    def finish() -> None:
        hook()
        same_bits(result, expected, "combine of a micro-batch")

    return finish


def halves_and_whole_calls(comm: MoECommunicator, cases: Sequence[Case]) -> None:
    """Any mixture of halves, whole calls, cached ones and gradients of weights."""
    rank = comm.rank
    with torch.no_grad():
        for round_ in range(2 * ROUNDS):
            case, other = cases[round_ % len(cases)], cases[(round_ + 1) % len(cases)]
            out, handle, hook = dispatch_case(comm, case, return_recv_hook=True)
            if round_ % 2:
                hook()
            between, whole = dispatch_case(comm, other)
            check_output(case, rank, out, static=counts_stay_on_device(comm))
            check_output(other, rank, between, static=counts_stay_on_device(comm))
            x_TH = inputs_of(case, rank).x_TH.to(comm.device)
            again, cached, hook = comm.dispatch(
                x_TH, None, previous_handle=handle, return_recv_hook=True
            )
            combine_case(comm, other, whole, "whole combine behind half a dispatch")
            hook()
            check_output(case, rank, again, static=counts_stay_on_device(comm))
            rows = rows_for(case, rank, handle)
            result, hook = comm.combine(rows, handle, return_recv_hook=True)
            if round_ % 3 == 0:
                hook()
            combine_case(comm, case, cached, "combine of the cached dispatch", round_=1)
            same_bits(result, combined_of(case, rank), "combine in halves")


# -- buffers --------------------------------------------------------------------------------------


def buffers(comm: MoECommunicator, case: Case) -> None:
    """All that is returned lies in them; two of them hold two dispatches."""
    rank = comm.rank
    own = inputs_of(case, rank)
    x_TH = own.x_TH.to(comm.device)
    pair = [poisoned(comm.create_buffers()) for _ in range(2)]
    outputs = [dispatch_case(comm, case, output_buffer=one) for one in pair]
    for round_, (one, (out, handle)) in enumerate(zip(pair, outputs, strict=True)):
        check_buffered(comm, case, one, out)
        rows = rows_for(case, rank, handle, round_=round_)
        expected = combined_of(case, rank, round_=round_)
        same_bits(comm.combine(rows, handle), expected, "combine")

    # Cached: into the same buffers, into the others, into none.
    handle, rows = outputs[0][1], rows_for(case, rank, outputs[0][1])
    for one in (pair[0], pair[1], None):
        out, cached = comm.dispatch(x_TH, None, previous_handle=handle, output_buffer=one)
        if one is pair[0]:
            handle = cached  # that of the dispatch before is stale now
        if one is not None:
            check_buffered(comm, case, one, out)
        same_bits(comm.combine(rows, cached), combined_of(case, rank), "combine after a cached one")

    # Again, into what holds an old result, in halves.
    out, handle, hook = dispatch_case(comm, case, output_buffer=pair[1], return_recv_hook=True)
    hook()
    check_buffered(comm, case, pair[1], out)
    same_bits(comm.combine(rows, handle), combined_of(case, rank), "combine, buffers reused")


def poisoned(buffers: DispatchBuffers) -> DispatchBuffers:
    """The same with NaN and -1 in every output."""
    for tensor in tensors_of(buffers.output):
        tensor.copy_(torch.full_like(tensor, -1))
        if tensor.dtype.is_floating_point:
            tensor.copy_(torch.full_like(tensor, float("nan")))
    return buffers


def tensors_of(output: DispatchOutput) -> list[Tensor]:
    scales = None if output.scales is None else output.scales.tensor
    members = [*vars(output).values(), scales]
    return [member for member in members if isinstance(member, Tensor)]


def check_buffered(
    comm: MoECommunicator, case: Case, buffers: DispatchBuffers, out: DispatchOutput
) -> None:
    check_output(case, comm.rank, out, static=comm.config.static_shapes)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(buffers.output)}
    for tensor in tensors_of(out):
        assert tensor.numel() == 0 or tensor.untyped_storage().data_ptr() in storages


def stale_handles(comm: MoECommunicator, case: Case) -> None:
    """Whatever a later dispatch has overwritten cannot be used by mistake."""
    own = inputs_of(case, comm.rank)
    x_TH, ids_TK = own.x_TH.to(comm.device), own.ids_TK.to(comm.device)
    one, other = comm.create_buffers(), comm.create_buffers()
    _, stale = dispatch_case(comm, case, output_buffer=one)
    _, through = comm.dispatch(x_TH, None, previous_handle=stale, output_buffer=other)
    _, fresh = dispatch_case(comm, case, output_buffer=one)
    rows = rows_for(case, comm.rank, fresh)
    uses: list[Callable[[DispatchHandle], object]] = [lambda handle: comm.wire_rows(handle)]
    if case.layout.expanded:
        uses.append(lambda handle: comm.expert_ranges(handle))
    # Each of these is refused before the ranks talk to each other, so all of them may be tried.
    for handle in (stale, through):
        for use in uses:
            with pytest.raises(HandleError, match="is stale: a later dispatch used its"):
                use(handle)
    with pytest.raises(HandleError, match="is stale"):
        comm.combine(rows, stale)
    with pytest.raises(HandleError, match="is stale"):
        comm.dispatch(x_TH, ids_TK, previous_handle=through)
    # A cached dispatch keeps the tables but not the outputs: its handle replaces the one before.
    _, cached = comm.dispatch(x_TH, None, previous_handle=fresh, output_buffer=one)
    with pytest.raises(HandleError, match="is stale"):
        comm.combine(rows, fresh)
    same_bits(comm.combine(rows, cached), combined_of(case, comm.rank), "combine of the fresh one")


def buffers_of_every_call(comm: MoECommunicator, cases: Sequence[Case]) -> None:
    """One of them serves any T, width of ids, and calls with and without weights."""
    rank = comm.rank
    with torch.no_grad():
        one = comm.create_buffers()
        addresses = _addresses(one)
        for round_ in range(2):
            for case in cases:
                out, handle = dispatch_case(comm, case, output_buffer=one)
                check_output(case, rank, out, static=counts_stay_on_device(comm))
                for name, value in vars(out).items():
                    if isinstance(value, Tensor) and value.numel():
                        assert value.data_ptr() == addresses[name], name
                combine_case(comm, case, handle, "combine", round_=round_)
        assert _addresses(one) == addresses
        unweighted = comm.create_buffers(weighted=False)
        plain = [case for case in cases if not case.weighted]
        for case in plain:
            out, handle = dispatch_case(comm, case, output_buffer=unweighted)
            check_output(case, rank, out, static=counts_stay_on_device(comm))
            combine_case(comm, case, handle, "combine")


def _addresses(buffers: DispatchBuffers) -> dict[str, int]:
    members = vars(buffers.output).items()
    return {name: value.data_ptr() for name, value in members if isinstance(value, Tensor)}


# -- counting -------------------------------------------------------------------------------------


def ranges(comm: MoECommunicator, case: Case) -> None:
    """Of a dispatch, and the same of a cached one."""
    own = inputs_of(case, comm.rank)
    _, handle = dispatch_case(comm, case)
    _, cached = comm.dispatch(own.x_TH.to(comm.device), None, previous_handle=handle)
    starts, counts = ranges_of(case, comm.rank)
    for used in (handle, cached):
        starts_ER, counts_ER = comm.expert_ranges(used)
        assert starts_ER.dtype is counts_ER.dtype is torch.int32
        assert starts_ER.shape == counts_ER.shape == (len(counts), case.ranks)
        assert counts_ER.tolist() == counts
        present = [[bool(count) for count in group] for group in counts]
        for row, expected, there in zip(starts_ER.tolist(), starts, present, strict=True):
            found = [start if here else -1 for start, here in zip(row, there, strict=True)]
            assert found == expected
        # Groups are dense: a range ends where the next begins, also where it is empty.
        for start, count in zip(starts_ER.tolist(), counts_ER.tolist(), strict=True):
            assert all(
                a + n == b for a, n, b in zip(start[:-1], count[:-1], start[1:], strict=True)
            )


def rows_between_hosts(case: Case, rank: int, *, single: bool = False) -> list[int]:
    """Rows that a dispatch needs to each other host: one per (token, host), or per choice."""
    host_of = case.domains or (0,) * case.ranks
    owner, rows = case.rank_of_expert(), [0] * len(set(host_of))
    for ids in inputs_of(case, rank).ids_TK.tolist():
        hosts = [host_of[owner[expert]] for expert in ids if expert >= 0]
        for host in hosts if single else set(hosts):
            rows[host] += host != host_of[rank]
    return rows


def statistics(comm: MoECommunicator, case: Case) -> None:
    """Totals of an uncached and a cached dispatch and of two combines.

    The second one brings weights of its own; how they travel does not count. Across hosts bytes are
    compared inside this rank's host only.
    """
    rank, own = comm.rank, inputs_of(case, comm.rank)
    _, handle = dispatch_case(comm, case)  # not counted yet
    totals = comm.enable_statistics()
    assert comm.enable_statistics() is totals
    before = [tensor.data_ptr() for tensor in vars(totals).values()]
    for tensor in vars(totals).values():
        assert tensor.dtype is torch.int64
        assert not tensor.any()
    out, handle = dispatch_case(comm, case)
    comm.dispatch(own.x_TH.to(comm.device), None, previous_handle=handle)
    comm.combine(rows_for(case, rank, handle), handle)
    weights_TK = None
    if case.layout.expanded:
        weights_TK = torch.ones((len(own.x_TH), case.topk), device=comm.device)
    comm.combine(rows_for(case, rank, handle), handle, topk_weights=weights_TK)

    expected = expected_of(case, rank)
    assert totals.tokens_per_expert.tolist() == [2 * count for count in expected.counts]
    received = expected.rows_per_rank
    sent = [expected_of(case, dest).rows_per_rank[rank] for dest in range(case.ranks)]
    back, returned = received, sent
    if case.precision == "exact":  # a row per choice
        back = [sum(c.source == source for c in expected.copies) for source in range(case.ranks)]
        returned = [
            sum(c.source == rank for c in expected_of(case, dest).copies)
            for dest in range(case.ranks)
        ]
    rows_sent = [2 * a + 2 * b for a, b in zip(sent, back, strict=True)]
    rows_received = [2 * a + 2 * b for a, b in zip(received, returned, strict=True)]
    row_bytes = case.hidden * case.dtype.itemsize
    assert totals.rows_sent.tolist() == rows_sent
    assert totals.rows_received.tolist() == rows_received
    for total, rows in (
        (totals.bytes_sent, rows_sent),
        (totals.bytes_received, rows_received),
    ):
        hosts = case.domains or (0,) * case.ranks
        near = [other for other, host in enumerate(hosts) if host == hosts[rank]]
        away = [0 if other == rank else count for other, count in enumerate(rows)]
        assert total[near].tolist() == [away[other] * row_bytes for other in near]
    single = case.precision == "exact"
    there, back = (rows_between_hosts(case, rank, single=kind) for kind in (False, single))
    assert totals.rail_bytes.tolist() == [
        2 * (a + b) * row_bytes for a, b in zip(there, back, strict=True)
    ]
    assert [tensor.data_ptr() for tensor in vars(totals).values()] == before

    for tensor in vars(totals).values():
        tensor.zero_()
    dispatch_case(comm, case)
    assert totals.rows_sent.tolist() == sent
    del out


def rail_statistics(comm: MoECommunicator, case: Case) -> None:
    """What a dispatch, a cached one and a combine need between hosts, and their rows."""
    rank, own, expected = comm.rank, inputs_of(case, comm.rank), expected_of(case, comm.rank)
    totals = comm.enable_statistics()
    rail_bytes = totals.rail_bytes
    before = rail_bytes.clone()
    rows_before, experts_before = totals.rows_sent.clone(), totals.tokens_per_expert.clone()
    between = torch.tensor(rows_between_hosts(case, comm.rank)) * case.hidden * case.dtype.itemsize
    _, handle = dispatch_case(comm, case)
    assert (rail_bytes - before).tolist() == between.tolist()
    comm.dispatch(own.x_TH.to(comm.device), None, previous_handle=handle)
    rows = rows_for(case, comm.rank, handle)
    weights = own.weights_TK if case.layout.expanded else None
    comm.combine(rows, handle, topk_weights=None if weights is None else weights.to(comm.device))
    assert (rail_bytes - before).tolist() == (3 * between).tolist()
    # How weights of a combine travel does not count.
    counts = (totals.tokens_per_expert - experts_before).tolist()
    assert counts == [2 * count for count in expected.counts]
    sent = [expected_of(case, dest).rows_per_rank[rank] for dest in range(case.ranks)]
    rows = [2 * there + back for there, back in zip(sent, expected.rows_per_rank, strict=True)]
    assert (totals.rows_sent - rows_before).tolist() == rows


def statistics_of_packed_rows(comm: MoECommunicator, case: Case) -> None:
    """Bytes are those of rows and scales as they travel, quantized on the way."""
    fmt = comm.config.block_format
    assert fmt is not None
    rank = comm.rank
    totals = comm.enable_statistics()
    out, _ = dispatch_case(comm, case)
    assert out.scales is not None
    scale_bytes = out.scales.tensor.shape[-1] * out.scales.tensor.element_size()
    received = expected_of(case, rank).rows_per_rank
    sent = [expected_of(case, dest).rows_per_rank[rank] for dest in range(case.ranks)]
    assert totals.rows_sent.tolist() == sent
    assert totals.rows_received.tolist() == received
    for total, rows in ((totals.bytes_sent, sent), (totals.bytes_received, received)):
        away = [0 if other == rank else count for other, count in enumerate(rows)]
        assert total.tolist() == [count * (case.hidden + scale_bytes) for count in away]
