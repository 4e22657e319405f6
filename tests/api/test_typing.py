"""What calls return, to a type checker: pyright holds each `assert_type` true in `make lint`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from typing_extensions import assert_type

from expertlink import (
    CombineRequest,
    DispatchBuffers,
    DispatchHandle,
    DispatchOutput,
    DispatchRequest,
    MoECommunicator,
)
from expertlink.requests import Request
from support.small_calls import K, T, good, make

Hook = Callable[[], None]


@pytest.fixture
def comm():
    with make() as comm, torch.no_grad():
        yield comm


def test_dispatch(comm: MoECommunicator) -> None:
    fields = good()
    x, ids = fields["input"], fields["topk_ids"]
    plain = comm.dispatch(x, ids)
    assert_type(plain, tuple[DispatchOutput, DispatchHandle])
    later = comm.dispatch(x, ids, async_finish=True)
    assert_type(later, tuple[DispatchOutput, DispatchHandle])
    hooked = comm.dispatch(x, ids, return_recv_hook=True)
    assert_type(hooked, tuple[DispatchOutput, DispatchHandle, Hook])
    request = comm.dispatch_async(x, ids)
    assert_type(request, DispatchRequest)
    assert_type(request.wait(), tuple[DispatchOutput, DispatchHandle])
    assert [len(plain), len(later), len(hooked)] == [2, 2, 3]


def test_dispatch_where_the_caller_decides_later(comm: MoECommunicator) -> None:
    def either(flag: bool) -> int:
        fields = good()
        result = comm.dispatch(fields["input"], fields["topk_ids"], return_recv_hook=flag)
        assert_type(
            result,
            tuple[DispatchOutput, DispatchHandle] | tuple[DispatchOutput, DispatchHandle, Hook],
        )
        return len(result)

    assert [either(False), either(True)] == [2, 3]


def test_combine(comm: MoECommunicator) -> None:
    def rows() -> tuple[Tensor, DispatchHandle, Tensor]:
        fields = good()
        out, handle = comm.dispatch(fields["input"], fields["topk_ids"], fields["weights"])
        return out.tokens, handle, torch.ones(len(out.tokens))

    tokens, handle, _ = rows()
    sums = comm.combine(tokens, handle)
    assert_type(sums, Tensor)
    tokens, handle, grads = rows()
    pair = comm.combine(tokens, handle, weight_grads=grads)
    assert_type(pair, tuple[Tensor, Tensor])
    tokens, handle, _ = rows()
    hooked = comm.combine(tokens, handle, return_recv_hook=True)
    assert_type(hooked, tuple[Tensor, Hook])
    tokens, handle, grads = rows()
    hooked_pair = comm.combine(tokens, handle, weight_grads=grads, return_recv_hook=True)
    assert_type(hooked_pair, tuple[tuple[Tensor, Tensor], Hook])
    hooked[1]()
    hooked_pair[1]()
    for result in (sums, pair[0], hooked[0], hooked_pair[0][0]):
        assert isinstance(result, Tensor)
    for weight_grads in (pair[1], hooked_pair[0][1]):
        assert weight_grads.shape == (T, K)

    tokens, handle, _ = rows()
    request = comm.combine_async(tokens, handle)
    assert_type(request, Request[Tensor])
    assert_type(request.wait(), Tensor)
    tokens, handle, grads = rows()
    request_of_pair = comm.combine_async(tokens, handle, weight_grads=grads)
    assert_type(request_of_pair, Request[tuple[Tensor, Tensor]])
    assert_type(request_of_pair.wait(), tuple[Tensor, Tensor])
    either: list[CombineRequest] = [request, request_of_pair]
    assert [type(each.wait()) for each in either] == [Tensor, tuple]


def test_combine_where_the_caller_decides_later(comm: MoECommunicator) -> None:
    def either(weight_grads: bool) -> type:
        fields = good()
        out, handle = comm.dispatch(fields["input"], fields["topk_ids"], fields["weights"])
        grads = torch.ones(len(out.tokens)) if weight_grads else None
        result = comm.combine(out.tokens, handle, weight_grads=grads)
        assert_type(result, Tensor | tuple[Tensor, Tensor])
        return type(result)

    assert [either(False), either(True)] == [Tensor, tuple]


def test_the_rest(comm: MoECommunicator) -> None:
    with comm as same:
        assert_type(same, MoECommunicator)
        assert_type(comm.create_buffers(), DispatchBuffers)
        assert_type(comm.local_experts, list[int])
        assert_type(comm.memory_estimate(), dict[str, int])
        assert_type(comm.query_mask(), Tensor)
