"""Bad arguments: a clear error, nothing lost, and the next call works."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.testing._internal.two_tensor import TwoTensor

from expertlink import (
    BlockFormat,
    CapacityError,
    ClosedError,
    DispatchLayout,
    HandleError,
    InputError,
    QuantScales,
    RoutingChangedError,
)
from expertlink.quantization import quantize
from support.small_calls import E, H, K, T, good, make, works

BAD_DISPATCH = {
    "input not a tensor": ({"input": [[1.0]]}, "input must be a torch.Tensor, not list"),
    "input 1-d": ({"input": torch.randn(H)}, r"input has shape \(8,\); expected \(any, 8\)"),
    "input width": ({"input": torch.randn(T, H + 1)}, r"\(4, 9\); expected \(any, 8\)"),
    "input dtype": ({"input": torch.randn(T, H).half()}, "float16; accepted: torch.float32"),
    "input device": ({"input": torch.empty(T, H, device="meta")}, "on meta; .* works on cpu"),
    "input sparse": ({"input": torch.randn(T, H).to_sparse()}, "dense"),
    "input of two tensors": (
        {"input": TwoTensor(torch.randn(T, H), torch.randn(T, H))},
        "input must be a plain tensor, not TwoTensor",
    ),
    "ids of two tensors": (
        {"topk_ids": TwoTensor(*(torch.zeros(T, K, dtype=torch.int64) for _ in range(2)))},
        "topk_ids must be a plain tensor, not TwoTensor",
    ),
    "buffer of two tensors": (
        {"output_buffer": TwoTensor(torch.empty(9, H), torch.empty(9, H))},
        "output_buffer must be a plain tensor, not TwoTensor",
    ),
    "too many tokens": ({"input": torch.randn(T + 1, H)}, "5 tokens; max_tokens_per_rank=4"),
    "too many tokens, all alike": (
        {
            "input": torch.randn(T + 1, H),
            "topk_ids": torch.arange(2).expand(T + 1, K).contiguous(),
            "weights": torch.rand(T + 1, K),
        },
        "5 tokens; max_tokens_per_rank=4",
    ),
    "ids missing": ({"topk_ids": None}, "topk_ids is None"),
    "ids shape": ({"topk_ids": torch.zeros(T, K + 1, dtype=torch.int64)}, r"expected \(4, 2\)"),
    "ids dtype": ({"topk_ids": torch.zeros(T, K)}, "torch.int64 or torch.int32"),
    "id too large": ({"topk_ids": torch.full((T, K), E)}, r"topk_ids\[0\]=\[6, 6\].*0\.\.5"),
    "id below -1": (
        {"topk_ids": torch.tensor([[0, 1], [0, 1], [0, -2], [0, 1]])},
        r"topk_ids\[2\]=\[0, -2\]",
    ),
    "duplicate expert": (
        {"topk_ids": torch.tensor([[0, 1], [3, 3], [0, 1], [-1, -1]])},
        r"topk_ids\[1\]=\[3, 3\]: an expert is chosen twice",
    ),
    "weights shape": ({"weights": torch.rand(T, 1)}, r"weights has shape"),
    "weights dtype": ({"weights": torch.rand(T, K).double()}, "weights has dtype torch.float64"),
    "scales for wide rows": ({"scales": torch.rand(T, 1)}, "input has dtype torch.float32"),
    "buffer dtype": ({"output_buffer": torch.empty(9, H).half()}, "output_buffer has dtype"),
    "buffer width": ({"output_buffer": torch.empty(9, 1)}, "output_buffer has shape"),
    "buffer strided": ({"output_buffer": torch.empty(9, 2 * H)[:, ::2]}, "must be contiguous"),
    "buffer not a tensor": ({"output_buffer": "here"}, "output_buffer must be a torch.Tensor"),
    "hook and later": (
        {"return_recv_hook": True, "async_finish": True},
        "return_recv_hook and async_finish exclude each other",
    ),
}


@pytest.mark.parametrize("name", BAD_DISPATCH)
def test_dispatch_refuses_and_recovers(name: str) -> None:
    fields, message = BAD_DISPATCH[name]
    with make() as comm:
        with pytest.raises(InputError, match=message):
            comm.dispatch(**{**good(), **fields})
        # Without gradients, good arguments take the fast path.
        with torch.no_grad(), pytest.raises(InputError, match=message):
            comm.dispatch(**{**good(), **fields})
        works(comm)


def test_results_of_functional_collectives_are_waited_for() -> None:
    """They stand for a tensor that may not be there yet."""
    with make() as comm:
        fields = good()
        expected, handle = comm.dispatch(**fields)
        waiting: dict[str, Any] = {
            name: AsyncCollectiveTensor(tensor) for name, tensor in fields.items()
        }
        received, again = comm.dispatch(**waiting)
        assert type(received.tokens) is torch.Tensor
        assert type(again.topk_ids) is torch.Tensor
        assert torch.equal(received.tokens, expected.tokens)
        combined = comm.combine(AsyncCollectiveTensor(expected.tokens), handle)
        assert type(combined) is torch.Tensor
        assert torch.equal(combined, comm.combine(expected.tokens, handle))


def test_output_buffer_too_small_is_a_capacity_error() -> None:
    with make() as comm:
        buffer = torch.full((6, H), 7.0)
        with pytest.raises(CapacityError, match="rank 0 would receive 7 rows.* room for 6") as info:
            comm.dispatch(**good(), output_buffer=buffer)
        assert (info.value.rank, info.value.rows, info.value.capacity) == (0, 7, 6)
        assert (buffer == 7.0).all(), "nothing may be overwritten"
        works(comm)


def test_max_recv_tokens_per_rank() -> None:
    with make(max_recv_tokens_per_rank=6) as comm, pytest.raises(CapacityError, match="7 rows"):
        comm.dispatch(**good())
    with make(max_recv_tokens_per_rank=7) as comm:
        works(comm)


def test_non_contiguous_inputs_are_accepted() -> None:
    fields = good()
    strided = {
        "input": fields["input"].t().contiguous().t(),
        "topk_ids": fields["topk_ids"].t().contiguous().t(),
        "weights": fields["weights"].repeat_interleave(2, dim=1)[:, ::2],
    }
    with make() as comm:
        plain, _ = comm.dispatch(**fields)
        out, handle = comm.dispatch(**strided)
        assert torch.equal(out.tokens, plain.tokens)
        comm.combine(out.tokens.t().contiguous().t(), handle)


def test_gradients_and_given_buffers_exclude_each_other() -> None:
    with make() as comm:
        fields = good()
        fields["input"].requires_grad_()
        with pytest.raises(InputError, match="output_buffer cannot be used where gradients"):
            comm.dispatch(**fields, output_buffer=torch.empty(9, H))
        out, handle = comm.dispatch(**fields)
        with pytest.raises(InputError, match="out cannot be used where gradients"):
            comm.combine(out.tokens, handle, out=torch.empty(T, H))
    with make(quantization="e4m3_float32") as comm, pytest.raises(InputError, match="no gradients"):
        comm.dispatch(**fields)


@pytest.mark.parametrize("tracking", [True, False])
def test_combine_refuses_wrong_rows(tracking: bool) -> None:
    with torch.set_grad_enabled(tracking), make() as comm:
        out, handle = comm.dispatch(**good())
        rows = out.tokens
        for bad, message in [
            (rows[:-1], r"expert_output has shape \(6, 8\); expected \(7, 8\)"),
            (rows.double(), "expert_output has dtype torch.float64"),
            (rows[:, :4], r"expected \(7, 8\)"),
            (None, "not NoneType"),
        ]:
            with pytest.raises(InputError, match=message):
                comm.combine(bad, handle)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"out has shape \(3, 8\); expected \(4, 8\)"):
            comm.combine(rows, handle, out=torch.empty(3, H))
        with pytest.raises(InputError, match=r"weight_grads has shape"):
            comm.combine(rows, handle, weight_grads=torch.empty(3))
        with pytest.raises(InputError, match="return_recv_hook and async_finish exclude"):
            comm.combine(rows, handle, async_finish=True, return_recv_hook=True)
        assert comm.combine(rows, handle).shape == (T, H), "refused calls leave the handle usable"


def test_handles_are_checked() -> None:
    with make() as comm, make(topk=K + 1) as other:
        out, handle = comm.dispatch(**good())
        with pytest.raises(HandleError, match="another communicator, whose topk is 2, not 3"):
            other.combine(out.tokens, handle)
        with pytest.raises(HandleError, match="DispatchHandle is expected, not str"):
            comm.combine(out.tokens, "handle")  # type: ignore[arg-type]
        fields = {**good(), "topk_ids": None, "weights": None}
        with pytest.raises(HandleError, match="another communicator"):
            other.dispatch(**fields, previous_handle=handle)
    with pytest.raises(ClosedError):
        comm.combine(out.tokens, handle)


def test_closed_communicator() -> None:
    comm = make()
    comm.close()
    comm.close()
    for call in (comm.initialize, lambda: comm.dispatch(**good()), lambda: comm.local_experts):
        with pytest.raises(ClosedError, match="closed"):
            call()


def test_closing_lets_go_of_the_group() -> None:
    """Whatever lives on - handles, results with their graph - keeps no process group alive."""

    class Group:
        def rank(self) -> int:
            return 0

        def size(self) -> int:
            return 1

    group = Group()
    alive = weakref.ref(group)
    comm = make(group=group)
    fields = good()
    fields["input"].requires_grad_()
    out, handle = comm.dispatch(**fields)
    result = comm.combine(out.tokens, handle)
    comm.close()
    del group, comm
    gc.collect()
    assert alive() is None
    with pytest.raises(ClosedError, match="closed"):
        result.sum().backward()


def test_changed_routing_is_detected() -> None:
    with make() as comm:
        fields = good()
        _, handle = comm.dispatch(**fields)
        changed = fields["topk_ids"].clone()
        changed[2] = torch.tensor([4, 3])
        with pytest.raises(RoutingChangedError, match=r"topk_ids\[2\]=\[4, 3\]"):
            comm.dispatch(fields["input"], changed, previous_handle=handle)
        with pytest.raises(RoutingChangedError, match="3 tokens"):
            comm.dispatch(fields["input"][:3], None, previous_handle=handle)
        # Also where it is the same tensor, written to since.
        fields["topk_ids"][0, 0] = 5
        with pytest.raises(RoutingChangedError, match=r"topk_ids\[0\]"):
            comm.dispatch(fields["input"], fields["topk_ids"], previous_handle=handle)
        out, _ = comm.dispatch(fields["input"], None, previous_handle=handle)
        assert out.tokens.shape == (7, H)


def test_cached_dispatch_into_a_small_buffer() -> None:
    with make() as comm:
        fields = good()
        _, handle = comm.dispatch(**fields)
        with pytest.raises(InputError, match="6 rows; the routing of previous_handle needs 7"):
            comm.dispatch(
                fields["input"], None, previous_handle=handle, output_buffer=torch.empty(6, H)
            )


def test_scales_are_checked() -> None:
    q, scales = quantize(torch.randn(T, H), BlockFormat.E4M3_FLOAT32)
    ids = good()["topk_ids"]
    with make() as comm:
        for bad, message in [
            (QuantScales(scales[:2]), r"scales has shape \(2, 1\)"),
            (QuantScales(scales, BlockFormat.E4M3_UE8M0), "needs torch.int32"),
            (QuantScales(torch.rand(T, 3), BlockFormat.E4M3_POW2), r"needs torch.float32 \(4, 1\)"),
            (torch.empty(T, 0), "no scale per row"),
            ("scales", "not str"),
        ]:
            with pytest.raises(InputError, match=message):
                comm.dispatch(q, ids, None, bad)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="have hidden_size=8 elements"):
            comm.dispatch(q[:, :4].contiguous(), ids, None, scales)
        out, _ = comm.dispatch(q, ids, None, QuantScales(scales))
        assert out.scales is not None
        assert out.scales.tensor.shape == (7, 1)


def test_settings_are_checked() -> None:
    with make() as comm:
        with pytest.raises(InputError, match="op='send'"):
            comm.create_overlap_config("send")
        with pytest.raises(InputError, match="num_sms=0"):
            comm.create_overlap_config("dispatch", num_sms=0)
        for name in ("timeout_s", "startup_timeout_s"):
            with pytest.raises(InputError, match=f"{name}=-1"):
                comm.set_timeouts(**{name: -1})


def test_unchecked_inputs_stay_memory_safe() -> None:
    """Without checks an id that is out of range counts as no expert; nothing is corrupted."""
    with make(check_inputs=False, output_layout=DispatchLayout.TOKEN_MAJOR) as comm:
        out, handle = comm.dispatch(torch.ones(1, H), torch.tensor([[2, 99]]), torch.ones(1, K))
        assert out.topk_ids is not None
        assert out.topk_ids.tolist() == [[2, -1]]
        assert torch.equal(comm.combine(out.tokens, handle), torch.ones(1, H))


def test_inference_mode() -> None:
    """Serving code runs inside it: tensors made there have no version to compare."""
    with torch.inference_mode(), make() as comm:
        works(comm)
        fields = good()
        _, handle = comm.dispatch(**fields)
        comm.dispatch(fields["input"], fields["topk_ids"], previous_handle=handle)
        with pytest.raises(RoutingChangedError):
            comm.dispatch(fields["input"], fields["topk_ids"].flip(0), previous_handle=handle)


def test_unchecked_double_ids_never_write_out_of_bounds() -> None:
    """EXPERT_MAJOR has room for each token once per expert."""
    twice = torch.zeros((T, K), dtype=torch.int64)
    with make(check_inputs=False, output_layout="expert_major") as comm:
        with pytest.raises(InputError, match="expert 0 was chosen 8 times by at most 4 tokens"):
            comm.dispatch(torch.ones(T, H), twice, torch.ones(T, K))
        works(comm)


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_a_refused_call_keeps_nothing_of_its_callers(operation: str) -> None:
    """No frame of a refused call holds its error, so nothing waits for a garbage collection."""
    comm = make()
    out, handle = comm.dispatch(**good())

    def call() -> None:
        if operation == "dispatch":
            comm.dispatch(torch.ones(2, 2), torch.zeros(2, 1, dtype=torch.int64))
        else:
            comm.combine(out.tokens[:, 1:], handle)

    def refused() -> weakref.ref[torch.Tensor]:
        large = torch.ones(3)
        with pytest.raises(InputError):
            call()
        return weakref.ref(large)

    gc.collect()
    gc.disable()
    try:
        assert refused()() is None
    finally:
        gc.enable()
