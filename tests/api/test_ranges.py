"""EXPERTLINK_NVTX puts ranges around dispatch and combine, and nothing where it is not set."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from expertlink import ConfigurationError, MoECommunicator, MoECommunicatorConfig
from expertlink.settings import NVTX

CONFIG = MoECommunicatorConfig(
    num_experts=4, hidden_size=8, topk=2, max_tokens_per_rank=4, device="cpu", dtype=torch.float32
)
CALLS = ("expertlink.dispatch", "expertlink.combine")


def ranges_of_a_step() -> Counter[str]:
    """Ranges of a dispatch, a combine and their backward passes."""
    x_TH, ids_TK = torch.ones(4, 8, requires_grad=True), torch.tensor([[0, 1]] * 4)
    with MoECommunicator(CONFIG) as comm, profile(activities=[ProfilerActivity.CPU]) as profiled:
        received, handle = comm.dispatch(x_TH, ids_TK)
        comm.combine(received.tokens, handle).sum().backward()
    assert x_TH.grad is not None
    assert torch.equal(x_TH.grad, torch.full((4, 8), 2.0))
    names = [event.name for event in profiled.events() or ()]
    return Counter(name for name in names if name.startswith("expertlink."))


def test_every_call_has_its_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NVTX.name, "1")
    # Backward of a dispatch is a combine, and that of a combine a dispatch.
    expected = {name + part: 2 for name in CALLS for part in ("", ".finish")}
    assert ranges_of_a_step() == expected


@pytest.mark.parametrize("value", [None, "", "0"])
def test_calls_of_engines_are_left_alone(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(NVTX.name, raising=False)
    if value is not None:
        monkeypatch.setenv(NVTX.name, value)
    assert ranges_of_a_step() == {}
    with MoECommunicator(CONFIG) as comm:
        assert not {"dispatch", "combine"} & vars(comm._engine).keys()


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NVTX.name, "yes")
    with pytest.raises(ConfigurationError, match="EXPERTLINK_NVTX='yes': 0 or 1 is expected"):
        MoECommunicator(CONFIG)


@pytest.mark.gpu
def test_ranges_of_halves_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NVTX.name, "1")
    opened: list[str] = []
    push = torch.cuda.nvtx.range_push

    def note(name: str) -> int:
        opened.append(name)
        return push(name)

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", note)
    config = MoECommunicatorConfig(
        num_experts=4, hidden_size=128, topk=2, max_tokens_per_rank=4, mode="ll", device="cuda"
    )
    ids_TK = torch.tensor([[0, 1]] * 4, device="cuda")
    x_TH = torch.ones(4, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), MoECommunicator(config) as comm:
        received, handle, hook = comm.dispatch(x_TH, ids_TK, return_recv_hook=True)
        assert opened == ["expertlink.dispatch"]
        hook()
        assert opened == ["expertlink.dispatch", "expertlink.dispatch.finish"]
        comm.combine(received.tokens, handle)
        torch.cuda.synchronize()
    assert opened[2] == "expertlink.combine"
