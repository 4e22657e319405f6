"""What an engine is asked to do: the same on the fast and on the checked path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch

from expertlink import (
    BlockFormat,
    DispatchBuffers,
    HandleError,
    InputError,
    MoECommunicatorConfig,
    QuantScales,
    RoutingChangedError,
)
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


def both_paths(
    builder: CallBuilder, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the call that the fast path makes, and of that of the checked one."""

    def not_here(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("this is not recognized")

    with monkeypatch.context() as patch:
        for name in ("_dispatch_checked", "_combine_checked"):
            patch.setattr(builder, name, not_here)
        fast = vars(make())
    with monkeypatch.context() as patch:
        for name in ("kind_of", "takes_combine"):
            patch.setattr(builder._fast, name, lambda *_: None)
        checked = vars(make())
    assert fast.keys() == checked.keys()
    return fast, checked


def handle_of(builder: CallBuilder, rows_shape: tuple[int, ...], **fields: Any) -> DispatchHandle:
    usual: dict[str, Any] = {"_topk_ids": torch.tensor([[0, 1]] * T), "topk_weights": None}
    return DispatchHandle(
        owner=1,
        scope=SCOPE,
        call=1,
        num_tokens=T,
        layout=builder._layout,
        rows_shape=rows_shape,
        state=object(),
        **{**usual, **fields},
    )


@pytest.mark.parametrize("tracking", [False, True])
@pytest.mark.parametrize("cached", ["", "the same ids", "no ids"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_paths_make_the_same_dispatch(
    weighted: bool,
    hook: bool,
    given: bool,
    cached: str,
    tracking: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tracking and (hook or given):
        return  # the checked path looks for gradients
    builder, config = builder_of()
    x, ids, weights = arguments()
    buffers = buffers_of(builder, config) if given else None
    previous = None
    if cached:
        seen = (ids, ids._version)
        previous = handle_of(builder, (2, 6, H), topk_weights=weights, ids_seen=seen)

    def make() -> Any:
        return builder.dispatch(
            x.requires_grad_(tracking),
            None if cached == "no ids" else ids,
            weights if weighted else None,
            output_buffer=buffers,
            previous_handle=previous,
            return_recv_hook=hook,
            num_sms=5,
        )

    with torch.set_grad_enabled(tracking):
        fast, checked = both_paths(builder, monkeypatch, make)
    assert buffers is None or buffers.generation == 2
    assert all(fast[name] is checked[name] for name in fast)
    assert fast["zero_padding"] is tracking
    assert fast["previous"] is (None if previous is None else previous.state)
    assert (fast["topk_ids_TK"] is None) == bool(cached)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("block_format", [None, BlockFormat.E4M3_FLOAT32])
@torch.no_grad()
def test_both_paths_make_the_same_dispatch_of_rows_with_scales(
    block_format: BlockFormat | None, given: bool, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder, config = builder_of()
    _, ids, weights = arguments()
    rows, values = torch.zeros(T, H, dtype=torch.float8_e4m3fn), torch.ones(T, 1)
    scales = values if block_format is None else QuantScales(values, block_format)
    buffers = None
    if given:
        kind = builder.kind(rows, scales, weighted=True)
        output = largest_output(config, kind, num_ranks=RANKS, num_local=E // RANKS, device=CPU)
        buffers = DispatchBuffers(output=output, tables=None, kind=kind, owner=1)
    previous = handle_of(builder, (2, 6, H), topk_weights=weights) if cached else None

    def make() -> Any:
        return builder.dispatch(
            rows,
            None if cached else ids,
            weights,
            scales,
            output_buffer=buffers,
            previous_handle=previous,
        )

    make()  # such rows are accepted now
    fast, checked = both_paths(builder, monkeypatch, make)
    assert all(fast[name] is checked[name] for name in fast)
    assert fast["scales"] is values
    assert fast["scale_format"] is block_format


@torch.no_grad()
def test_rows_with_scales_that_do_not_fit_are_refused_after_some_that_do() -> None:
    builder, _ = builder_of()
    _, ids, weights = arguments()
    rows, scales = torch.zeros(T, H, dtype=torch.float8_e4m3fn), torch.ones(T, 1)
    e4m3 = BlockFormat.E4M3_FLOAT32
    builder.dispatch(rows, ids, weights, QuantScales(scales, e4m3))
    wrong: list[tuple[Any, Any, str]] = [
        (rows, scales.double(), "needs torch.float32"),
        (rows, torch.ones(T, 2), "needs torch.float32"),
        (rows, scales[:2], "scales has shape"),
        (rows[:, :8].contiguous(), scales, "hidden_size"),
        (rows.view(torch.uint8), scales, "rows are e4m3"),
        (rows, None, "scales must be a torch.Tensor"),
    ]
    for x, values, message in wrong:
        with pytest.raises(InputError, match=message):
            builder.dispatch(x, ids, weights, QuantScales(values, e4m3))
    strided = torch.ones(T, 4)[:, ::4]
    assert builder.dispatch(rows, ids, weights, QuantScales(strided, e4m3)).scales is not strided


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("weighted", ["by the routing", "by slot", "by token", "not"])
def test_both_paths_make_the_same_combine(
    weighted: str, hook: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder, _ = builder_of()
    x, _, weights = arguments()
    rows = torch.randn(E // RANKS, RANKS * T, H).bfloat16()
    kept = weights if weighted == "by the routing" else None
    handle = handle_of(builder, tuple(rows.shape), topk_weights=kept)
    options: dict[str, Any] = {
        "weights": torch.rand(rows.shape[:-1]) if weighted == "by slot" else None,
        "topk_weights": weights if weighted == "by token" else None,
    }

    def make() -> Any:
        return builder.combine(rows, handle, out=x, return_recv_hook=hook, num_sms=5, **options)

    with torch.no_grad():
        fast, checked = both_paths(builder, monkeypatch, make)
    assert all(fast[name] is checked[name] for name in fast)
    assert fast["weighted"] == (weighted != "not")
    assert (fast["slot_weights"], fast["weights_TK"]) == tuple(options.values())
    if hook or weighted == "by slot":
        return
    options["out"] = None
    with torch.enable_grad():
        tracked = both_paths(
            builder, monkeypatch, lambda: builder.combine(rows.requires_grad_(), handle, **options)
        )
    outs = [call.pop("out_TH") for call in tracked]
    assert [(out.shape, out.dtype) for out in outs] == [(x.shape, x.dtype)] * 2
    assert all(tracked[0][name] is tracked[1][name] for name in tracked[0])


def test_a_cached_dispatch_with_other_ids_is_compared() -> None:
    """Ids that are another tensor, or have been written to, are looked at."""
    builder, _ = builder_of()
    x, ids, weights = arguments()
    handle = handle_of(builder, (2, 6, H), ids_seen=(ids, ids._version), _topk_ids=ids.clone())
    with torch.no_grad():
        assert builder.dispatch(x, ids.clone(), weights, previous_handle=handle).previous
        ids[0] = 3
        for other in (ids, ids.clone()):
            with pytest.raises(RoutingChangedError, match=r"topk_ids\[0\]=\[3, 3\] differs"):
                builder.dispatch(x, other, weights, previous_handle=handle)
        with pytest.raises(RoutingChangedError, match="input has 2 tokens"):
            builder.dispatch(x[:2], None, previous_handle=handle)
        buffers = DispatchBuffers(
            DispatchOutput(x, ids, builder._layout), None, builder._kind, 1, generation=2
        )
        handle.leases = ((buffers, 1),)
        with pytest.raises(HandleError, match="is stale"):
            builder.dispatch(x, None, previous_handle=handle)


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
