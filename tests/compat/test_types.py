"""`Config`, events, hints and handles of the drop-in, without other ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expertlink.compat.deep_ep import Buffer, Config, EventHandle, EventOverlap
from expertlink.compat.deep_ep.handles import TensorTuple, known_of
from expertlink.compat.deep_ep.streams import record_on


def test_hints_are_those_of_deep_ep() -> None:
    for ranks, wanted in ((2, 83_927_552), (4, 167_854_976), (8, 335_709_824)):
        for config in (Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks)):
            assert config.get_nvl_buffer_size_hint(14336, ranks) == wanted
            assert config.get_rdma_buffer_size_hint(14336, ranks) == 0
    hint = Buffer.get_low_latency_rdma_size_hint
    assert hint(128, 7168, 8, 288) == 2_146_961_792
    assert hint(128, 7168, 4, 256) == 1_908_410_496
    assert (
        hint(num_max_dispatch_tokens_per_rank=16, hidden=5120, num_ranks=8, num_experts=256)
        == 170_395_776
    )


def test_default_configurations() -> None:
    for ranks, dispatch, combine in ((2, 24, 10), (4, 6, 9), (8, 6, 4)):
        assert Buffer.get_dispatch_config(ranks) == Config(Buffer.num_sms, dispatch, 256, 6, 128)
        assert Buffer.get_combine_config(ranks) == Config(Buffer.num_sms, combine, 256, 6, 128)


@pytest.mark.parametrize(
    "arguments", [(-1,), (20, 0), (20, 8, 8), (20, 6, 256, 6, 6), (20, 6, 256, 0)]
)
def test_bad_configurations(arguments: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        Config(*arguments)


def test_received_rdma_chunks_are_rounded_up() -> None:
    config = Config(num_max_rdma_chunked_send_tokens=6, num_max_rdma_chunked_recv_tokens=127)
    assert config.num_max_rdma_chunked_recv_tokens == 132


def test_hints_for_several_hosts() -> None:
    """Numbers that callers compare with one another: they grow with rows, chunks and hosts."""
    config = Config()
    hints = [config.get_rdma_buffer_size_hint(14336, ranks) for ranks in (8, 16, 24, 160)]
    assert hints[0] == 0
    assert hints == sorted(set(hints))
    wider = config.get_rdma_buffer_size_hint(28672, 16)
    more = Config(num_max_rdma_chunked_recv_tokens=512).get_rdma_buffer_size_hint(14336, 16)
    assert min(wider, more) > hints[1]
    assert all(hint % 128 == 0 for hint in (*hints, wider, more))
    for ranks in (16, 48, 160):
        for table in (Buffer.get_dispatch_config, Buffer.get_combine_config):
            assert table(ranks).num_sms == Buffer.num_sms
            assert table(ranks).get_nvl_buffer_size_hint(14336, ranks) > 0
    with pytest.raises(AssertionError, match="a multiple of 8"):
        config.get_rdma_buffer_size_hint(14336, 12)


def test_num_sms_belongs_to_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Buffer, "num_sms", 20)
    Buffer.set_num_sms(24)
    assert Buffer.num_sms == Buffer.get_dispatch_config(4).num_sms == 24
    with pytest.raises(AssertionError, match="must be even"):
        Buffer.set_num_sms(7)


def test_events() -> None:
    nothing = EventOverlap()
    assert nothing.event is None
    with pytest.raises(AssertionError, match="no event"):
        nothing.current_stream_wait()
    with nothing as same:
        assert same is nothing
    event = EventOverlap(EventHandle(), extra_tensors=(1, 2))
    calls: list[int] = []
    event.register_hook_after_wait(lambda: calls.append(1))
    with pytest.raises(AssertionError, match="there is a hook already"):
        event.register_hook_after_wait(lambda: None)
    with event:
        assert calls == []
    assert calls == [1]
    assert event() is event
    assert calls == [1], "a hook runs once"
    assert event.extra_tensors == (1, 2)
    event.current_stream_wait(release_handle=True)
    assert event.event is None
    assert event.extra_tensors is None
    assert isinstance(Buffer.capture().event, EventHandle)


class _Handle(TensorTuple):
    KEY = 1

    made: list[int]

    def _make(self, position: int) -> torch.Tensor:
        self.made.append(position)
        return torch.full((2,), position)


def handle_with(known: object, count: int) -> tuple[_Handle, list[int]]:
    handle = _Handle((None,) * count)
    handle.known = known
    handle.kept = ()
    handle._made, handle.made = {}, []
    return handle, handle.made


def test_tensors_of_a_handle_are_made_once_and_when_asked_for() -> None:
    handle, made = handle_with(object(), 4)
    assert isinstance(handle, tuple)
    assert len(handle) == 4
    assert made == []
    assert int(handle[-1][0]) == 3
    assert handle[-1] is handle[3]
    assert made == [3]
    first, *_ = handle
    assert first is handle[0]
    assert made == [3, 0, 1, 2]
    assert len(handle[1:]) == 3
    with pytest.raises(IndexError):
        handle[4]
    assert handle == handle
    assert handle in {handle}


def test_plain_copies_of_handles_are_known_as_long_as_they_live() -> None:
    class Known:
        pass

    known = Known()
    handle, _ = handle_with(known, 3)
    copy = tuple(handle)
    assert known_of(Known, handle, key=1, length=3) is known
    del handle
    assert known_of(Known, copy, key=1, length=3) is known
    for wrong in (copy[:2], (1, 2, 3), list(copy), None, (torch.zeros(2),) * 3):
        with pytest.raises(AssertionError, match="a handle is expected"):
            known_of(Known, wrong, key=1, length=3)
    with pytest.raises(AssertionError):
        known_of(int, copy, key=1, length=3)


def test_streams_are_told_of_the_tensors_that_exist() -> None:
    """Handles make the others when somebody looks, and no sooner."""
    handle, made = handle_with(object(), 3)
    held, weights = torch.zeros(3), torch.zeros(2)
    recorded: list[torch.Tensor] = []

    class Noted(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

        def record_stream(self, s: Any) -> None:  # type: ignore[override]
            recorded.append(self)

    handle.kept = (held.as_subclass(Noted),)
    record_on(None, [(handle, None), weights.as_subclass(Noted)])  # type: ignore[arg-type]
    assert [tensor.shape for tensor in recorded] == [(3,), (2,)]
    assert made == []
