"""`share_with`: communicators that take turns in one memory, or are told why they cannot."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from expertlink import ClosedError, ConfigurationError, MoECommunicator, MoECommunicatorConfig
from expertlink.engines.nvlink import build
from support.fake_gpu import T_MAX, E, FakeGpu, H, K, inputs
from support.small_calls import make, works

HT: dict[str, Any] = {"output_layout": "token_major", "static_shapes": True}
LL: dict[str, Any] = {"mode": "ll", "output_layout": "expert_major"}
BOTH = pytest.mark.parametrize("fields", [HT, LL], ids=["ht", "ll"])


class Launches:
    """Stands for the GPU's queue: notes the kernels, and runs none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []

        def run(name: Any, arguments: object, launch: object) -> None:
            self.names.append(str(name))

        monkeypatch.setattr(build, "DeviceRunner", lambda *_, **__: run)
        monkeypatch.setattr(build, "_unreachable", lambda wire: None)
        monkeypatch.setattr(build, "WeightedBackward", lambda *_, **__: None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


def sharing(other: MoECommunicator, **fields: Any) -> MoECommunicator:
    """A communicator built as users do."""
    usual: dict[str, Any] = {
        "num_experts": E,
        "hidden_size": H,
        "topk": K,
        "max_tokens_per_rank": T_MAX,
        "device": "cpu",
        "check_inputs": False,
    }
    return MoECommunicator(MoECommunicatorConfig(**{**usual, **fields}), share_with=other)


def call(comm: MoECommunicator) -> None:
    x, ids, weights = inputs()
    out, handle = comm.dispatch(x, ids % comm.config.num_experts, weights)
    comm.combine(out.tokens, handle)


@BOTH
@torch.no_grad()
def test_two_layers_take_turns(gpu: FakeGpu, launches: Launches, fields: dict[str, Any]) -> None:
    first = gpu.communicator(**fields)
    second = sharing(first, **fields)
    second.initialize()
    engines: list[Any] = [first._engine, second._engine]
    assert engines[0].arena is engines[1].arena
    assert first.memory_estimate() == second.memory_estimate()
    for _ in range(2):
        call(first)
        call(second)
    assert len(gpu.launched) == len(launches.names) == 4
    first.close()
    call(second)
    assert len(launches.names) == 6, "the memory lives as long as one of them"
    second.close()


@torch.no_grad()
def test_a_layer_with_fewer_experts_fits(gpu: FakeGpu, launches: Launches) -> None:
    first = gpu.communicator(**HT)
    with sharing(first, num_experts=E // 2, **HT) as second:
        call(second)
        call(first)
        assert second.memory_estimate() == first.memory_estimate()


@BOTH
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_experts": 64 * E}, "the communicator with most experts comes first"),
        ({"hidden_size": 2 * H}, "equal max_tokens_per_rank, hidden_size, dtype and topk"),
        ({"max_tokens_per_rank": 2 * T_MAX}, "equal max_tokens_per_rank"),
    ],
    ids=["experts", "hidden_size", "tokens"],
)
@torch.no_grad()
def test_memory_that_is_too_small(
    gpu: FakeGpu, launches: Launches, fields: dict[str, Any], change: dict[str, Any], text: str
) -> None:
    first = gpu.communicator(**fields)
    second = sharing(first, **{**fields, **change})
    with pytest.raises(ConfigurationError, match=f"share_with: .*{text}") as caught:
        second.initialize()
    assert ", needed " in str(caught.value), "it names what there is and what is needed"
    call(first)
    assert launches.names == []


@pytest.mark.parametrize(("mine", "theirs"), [(HT, LL), (LL, HT)], ids=["ht", "ll"])
@torch.no_grad()
def test_memory_of_the_other_mode(
    gpu: FakeGpu, launches: Launches, mine: dict[str, Any], theirs: dict[str, Any]
) -> None:
    first = gpu.communicator(**theirs)
    with pytest.raises(ConfigurationError, match="share_with: .* memory of their own each"):
        sharing(first, **mine).initialize()
    call(first)


def test_another_engine(monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    with make() as first:
        with pytest.MonkeyPatch.context() as patch:
            FakeGpu(patch)
            with pytest.raises(ConfigurationError, match="does not use the nvlink engine"):
                sharing(first, **HT).initialize()
        works(first)


def test_another_group() -> None:
    """Known before any rank waits for another."""
    other: Any = types.SimpleNamespace(config=types.SimpleNamespace(group=object()))
    with pytest.raises(ConfigurationError, match="share_with: .* belongs to another group"):
        sharing(other)


def test_a_closed_communicator_has_nothing_to_share(gpu: FakeGpu, launches: Launches) -> None:
    first = gpu.communicator(**HT)
    first.close()
    with pytest.raises(ClosedError, match="this communicator is closed"):
        sharing(first, **HT).initialize()
