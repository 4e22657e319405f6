"""The sending half in kernels: the same header, order and metadata as in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expertlink.engines.base import DispatchCall
from expertlink.engines.collective.send_order import KernelSender
from expertlink.engines.collective.sending import Sending, TorchSender
from expertlink.engines.ranks import metadata
from expertlink.engines.ranks.header import HeaderFields, Operation
from expertlink.routing import Placement


def results_of(sending: Sending) -> dict[str, Tensor]:
    sending.order()
    count = int(sending.rows_per_rank.sum())
    token_of_row = sending.token_of_row(count)
    packed = sending.metadata(count)
    paths = sending.paths()
    assert packed is not None
    return {
        "header": sending.header,
        "token_of_row": token_of_row,
        "metadata": packed,
        "rows_of_token": paths.rows_of_token,
        "row_of_choice": paths.row_of_choice,
    }


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "ranks", "experts", "topk"),
    [
        (0, 8, 64, 8),
        (1, 1, 1, 1),
        (255, 3, 7, 5),
        (257, 8, 256, 8),
        (3000, 72, 2048, 32),
        (1000, 33, 3000, 9),
        (5000, 800, 1600, 3),
    ],
)
def test_kernels_give_the_bits_of_plain_torch(
    tokens: int, ranks: int, experts: int, topk: int, id_dtype: torch.dtype, weight_dtype
) -> None:
    """Many blocks of tokens, many ranks, more experts than fit into shared memory."""
    gen = torch.Generator().manual_seed(tokens)
    device = torch.device("cuda", 0)
    owner = torch.randint(0, ranks, (experts,), generator=gen).tolist()
    placement = Placement.from_ranks(owner, num_ranks=ranks, device=device)
    ids_TK = torch.rand((tokens, experts), generator=gen).topk(topk).indices
    ids_TK = torch.where(torch.rand(ids_TK.shape, generator=gen) < 0.2, -1, ids_TK)
    weights_TK = None
    if weight_dtype is not None:
        weights_TK = torch.rand(ids_TK.shape, generator=gen, dtype=weight_dtype).to(device)
    scales = torch.randint(0, 255, (tokens, 5), generator=gen).to(torch.uint8).to(device)
    for given in (None, scales):
        call = DispatchCall(
            x_TW=torch.zeros((tokens, 4), device=device),
            scales=given,
            topk_ids_TK=ids_TK.to(id_dtype).to(device),
            weights_TK=weights_TK,
        )
        fields = HeaderFields(
            operation=Operation.DISPATCH,
            communicator=7,
            call=3,
            capacity=11,
            row_bytes=16,
            metadata_bytes=metadata.width(call),
        )
        expected = results_of(TorchSender(placement)(call, fields, True))
        actual = results_of(KernelSender(device, placement)(call, fields, True))
        for name, value in expected.items():
            assert torch.equal(actual[name].long(), value.long()), name


@pytest.mark.gpu
@pytest.mark.parametrize("fault", [(5, 5), (9, 1), (-2, 1)])
def test_faulty_ids_raise_the_status(fault: tuple[int, int]) -> None:
    device = torch.device("cuda", 0)
    placement = Placement.from_ranks([0, 1] * 4, num_ranks=2, device=device)
    ids_TK = torch.tensor([[0, 1]]).repeat(600, 1)
    ids_TK[577] = torch.tensor(fault)
    call = DispatchCall(x_TW=torch.zeros((600, 4), device=device), topk_ids_TK=ids_TK.to(device))
    fields = HeaderFields(operation=Operation.DISPATCH, communicator=0, call=1)
    sender = KernelSender(device, placement)
    assert sender(call, fields, True).header[3] == 1
    assert sender(call, fields, False).header[3] == 0
