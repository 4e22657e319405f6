"""What an engine is asked to do: the same on the fast and on the checked path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expertlink import BlockFormat, DispatchBuffers, InputError, MoECommunicatorConfig
from expertlink.calls import CallBuilder
from expertlink.engines.base import Dispatched
from expertlink.engines.outputs import largest_output
from expertlink.handles import scope_of
from expertlink.types import DispatchHandle, DispatchOutput

T, H, K, E, RANKS = 3, 16, 2, 4, 2
CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "num_experts": E,
    "hidden_size": H,
    "topk": K,
    "max_tokens_per_rank": T,
    "mode": "ll",
    "device": "cpu",
}
SCOPE = scope_of(
    MoECommunicatorConfig(**CONFIG),
    ranks=(),
    engine="a test",
    numbers_by_max_tokens=False,
    experts_of_rank=((0, 1), (2, 3)),
    identity=1,
)


def builder_of(
    *, engine_quantizes: bool = False, **fields: Any
) -> tuple[CallBuilder, MoECommunicatorConfig]:
    config = MoECommunicatorConfig(**{**CONFIG, **fields})
    builder = CallBuilder(
        config,
        device=CPU,
        rank=0,
        num_ranks=RANKS,
        num_local_experts=E // RANKS,
        engine_quantizes=engine_quantizes,
        identity=1,
        scope=SCOPE,
    )
    return builder, config


def buffers_of(builder: CallBuilder, config: MoECommunicatorConfig) -> DispatchBuffers:
    kind = builder.kind(None, None, weighted=True)
    output = largest_output(config, kind, num_ranks=RANKS, num_local=E // RANKS, device=CPU)
    return DispatchBuffers(output=output, tables=None, kind=kind, owner=1)


def arguments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(T, H).bfloat16(), torch.tensor([[0, 1]] * T), torch.rand(T, K)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_paths_make_the_same_dispatch(weighted: bool, hook: bool, given: bool) -> None:
    builder, config = builder_of()
    x, ids, weights = arguments()
    buffers = buffers_of(builder, config) if given else None
    calls = []
    for tracking in (False, True):
        with torch.set_grad_enabled(tracking):
            call = builder.dispatch(
                x,
                ids,
                weights if weighted else None,
                output_buffer=buffers,
                return_recv_hook=hook,
                num_sms=5,
            )
        calls.append(vars(call))
        assert buffers is None or buffers.generation == len(calls)
    fast, checked = calls
    assert not fast.pop("zero_padding")
    assert checked.pop("zero_padding")
    assert fast.keys() == checked.keys()
    assert all(fast[name] is checked[name] for name in fast)


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("weighted", ["by the routing", "by slot", "by token", "not"])
def test_both_paths_make_the_same_combine(weighted: str, hook: bool) -> None:
    builder, _ = builder_of()
    x, ids, weights = arguments()
    rows = torch.randn(E // RANKS, RANKS * T, H).bfloat16()
    handle = DispatchHandle(
        owner=1,
        scope=SCOPE,
        call=1,
        num_tokens=T,
        layout=builder._layout,
        rows_shape=tuple(rows.shape),
        _topk_ids=ids,
        topk_weights=weights if weighted == "by the routing" else None,
        state=object(),
    )
    options: dict[str, Any] = {
        "weights": torch.rand(rows.shape[:-1]) if weighted == "by slot" else None,
        "topk_weights": weights if weighted == "by token" else None,
    }
    calls = []
    for tracking in (False, True):
        with torch.set_grad_enabled(tracking):
            call = builder.combine(rows, handle, out=x, return_recv_hook=hook, num_sms=5, **options)
        calls.append(vars(call))
    fast, checked = calls
    assert fast.keys() == checked.keys()
    assert all(fast[name] is checked[name] for name in fast)
    assert fast["weighted"] == (weighted != "not")
    assert (fast["slot_weights"], fast["weights_TK"]) == tuple(options.values())


@pytest.mark.parametrize("tracking", [False, True])
def test_engines_that_quantize_get_rows_as_they_are(tracking: bool) -> None:
    library, _ = builder_of(quantization="e4m3_ue8m0")
    builder, config = builder_of(quantization="e4m3_ue8m0", engine_quantizes=True)
    x, ids, weights = arguments()
    with torch.set_grad_enabled(tracking):
        before = library.dispatch(x, ids, weights)
        assert before.quantize_to is None
        assert before.x_TW.dtype is torch.float8_e4m3fn
        call = builder.dispatch(x, ids, weights, output_buffer=buffers_of(builder, config))
        assert call.x_TW is x
        assert call.scales is None
        assert call.quantize_to is BlockFormat.E4M3_UE8M0
        # Rows that the caller has quantized stay as they are.
        call = builder.dispatch(before.x_TW, ids, weights, before.scales)
        assert call.quantize_to is None
        assert call.x_TW is before.x_TW
        # A given tensor takes the rows as they arrive.
        shape = (E // RANKS, RANKS * T, H)
        arrived = torch.empty(shape, dtype=torch.float8_e4m3fn)
        assert builder.dispatch(x, ids, output_buffer=arrived).output_buffer is arrived
        with pytest.raises(InputError, match="output_buffer has dtype torch.bfloat16"):
            builder.dispatch(x, ids, output_buffer=torch.empty(shape).bfloat16())


def test_rows_of_the_pool_need_no_buffers() -> None:
    builder, config = builder_of(output_layout="token_major", zero_copy=True)
    x, ids, weights = arguments()
    with pytest.raises(InputError, match="create_buffers and zero_copy=True exclude each other"):
        builder.kind(None, None, weighted=True)
    plain, _ = builder_of(output_layout="token_major")
    with torch.no_grad(), pytest.raises(InputError, match="output_buffer and zero_copy=True"):
        builder.dispatch(x, ids, weights, output_buffer=buffers_of(plain, config))


def test_handles_keep_what_the_engine_copied() -> None:
    """Else a copy of their own: the caller may write to the ids after the call."""
    builder, _ = builder_of()
    x, ids, weights = arguments()
    kept = torch.zeros_like(ids)
    output = DispatchOutput(
        torch.empty(2, 6, H), torch.zeros(2, dtype=torch.int32), layout=builder._layout
    )
    call = builder.dispatch(x, ids, weights)
    for own in (kept, None):
        started = Dispatched(output, object(), lambda: None, 7, own)
        handle = builder.handle(call, started, previous_handle=None, topk_ids=ids)
        assert handle.topk_ids is kept if own is kept else handle.topk_ids is not ids
        assert (handle.call, handle.num_tokens, handle.rows_shape) == (7, T, (2, 6, H))
        assert handle.topk_weights is weights
