"""Jobs about source tokens, beside the contract's own."""

from __future__ import annotations

from typing import Any

import torch

from expertlink import BlockFormat, ConfigurationError, MoECommunicator, quantization
from expertlink.launch import RankContext
from support.faults import small
from support.jobs import (
    check_output,
    config_of,
    counted,
    counts_stay_on_device,
    dispatch_case,
    same_bits,
)
from support.oracle import Case, inputs_of, received_of


def buffers(comm: MoECommunicator, case: Case, *_: Any) -> None:
    """Slots that a larger dispatch has filled before read -1 where no row is."""
    if comm.config.zero_copy:
        return
    own = inputs_of(case, comm.rank)
    memory = comm.create_buffers()
    most = comm.config.max_tokens_per_rank
    full = torch.arange(case.topk).repeat(most, 1).to(comm.device)
    weights = None if own.weights_TK is None else own.weights_TK.new_ones(most, case.topk)
    rows = torch.ones((most, case.hidden), dtype=case.dtype, device=comm.device)
    comm.dispatch(
        rows, full, None if weights is None else weights.to(comm.device), output_buffer=memory
    )
    out, _ = dispatch_case(comm, case, output_buffer=memory)
    assert out.source_tokens is not None
    assert memory.output.source_tokens is not None
    assert out.source_tokens.data_ptr() == memory.output.source_tokens.data_ptr()
    check_output(case, comm.rank, out, static=counts_stay_on_device(comm))


def afterwards(comm: MoECommunicator, case: Case, *_: Any) -> None:
    """They are made when somebody asks, of a dispatch that did not bring them."""
    out, handle = dispatch_case(comm, case)
    assert out.source_tokens is None
    tokens = comm.source_tokens(handle)
    assert tokens.shape == out.tokens.shape[:-1]
    wanted = received_of(case, comm.rank).source_tokens()
    same_bits(counted(case, comm.rank, tokens), wanted, "source tokens")


def beside_scales(ctx: RankContext, case: Case, block_format: BlockFormat | None) -> bool:
    """Quantized rows: scales and source tokens are both what they should be."""
    own, received = inputs_of(case, ctx.rank), received_of(case, ctx.rank)
    config = config_of(case, ctx.device, quantization=block_format, source_tokens=True)
    with torch.no_grad(), MoECommunicator(config) as comm:
        out, handle = dispatch_case(comm, case)
        again, _ = comm.dispatch(own.x_TH.to(ctx.device), None, previous_handle=handle)
        for one in (out, again):
            assert one.source_tokens is not None
            same_bits(one.source_tokens, received.source_tokens(), "source tokens")
            if block_format is None:
                continue
            assert one.scales is not None
            sent = [inputs_of(case, source).x_TH for source in range(case.ranks)]
            scales = [quantization.quantize(x_TH, block_format)[1] for x_TH in sent]
            placed = one.scales.tensor.cpu()[received.filled]
            same_bits(placed, received.gather(scales), "scales")
    return True


def disagree(ctx: RankContext) -> str:
    """Ranks that do not agree on the field."""
    try:
        small(ctx, source_tokens=ctx.rank == 0).initialize()
    except ConfigurationError as error:
        return str(error)
    return ""
