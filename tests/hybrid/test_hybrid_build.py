"""The hybrid engine is had by all ranks or by none."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from expertlink import EngineUnavailableError, MoECommunicatorConfig
from expertlink.domains import Domains
from expertlink.engines.hybrid import build
from expertlink.routing import Placement, even_blocks


class Parts:
    """Stands for what an engine is made of; one part of them fails, with an error that says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: str, error: Exception) -> None:
        self.said: list[str] = []
        self.left: list[int] = []
        self.detached: list[object] = []
        self.closed = 0
        self._failing, self._error = failing, error
        part = types.SimpleNamespace
        arena = part(leave=self.left.append)
        memory = part(arena=arena, watchdog=part(detach=self.detached.append))
        rail = part(close=self._close)
        mode: Any = self._maker("mode", part())
        mode.plan_of = mode.program_of = lambda *_: None
        monkeypatch.setattr(build, "mode_of", lambda *_: mode)
        monkeypatch.setattr(build, "DeviceRunner", self._maker("runner", part()))
        monkeypatch.setattr(build, "WeightedBackward", self._maker("backward", part()))
        monkeypatch.setattr(build, "HybridEngine", self._maker("engine", part()))
        monkeypatch.setattr(build, "new_memory", lambda *_, **__: memory)
        connection = part(rail=rail, leave=lambda _: self._close())
        monkeypatch.setattr(build, "_connect", lambda *_, **__: connection)
        properties = part(multi_processor_count=8)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)

    def _close(self) -> None:
        self.closed += 1

    def _maker(self, name: str, part: object) -> Any:
        def make(*_: object, **__: object) -> object:
            if name == self._failing:
                raise self._error
            return part

        return make

    def gather_text(self, text: str) -> list[str]:
        self.said.append(text)
        return ["", text]


@pytest.mark.parametrize("text", ["no room for it", ""])
@pytest.mark.parametrize("part", ["runner", "backward", "mode", "engine"])
def test_a_rank_that_lacks_a_part_tells_the_others(
    monkeypatch: pytest.MonkeyPatch, part: str, text: str
) -> None:
    """They would wait for its calls. An error may have no text."""
    parts = Parts(monkeypatch, part, torch.OutOfMemoryError(text))
    config = MoECommunicatorConfig(num_experts=8, hidden_size=64, topk=2, max_tokens_per_rank=8)
    wire: Any = types.SimpleNamespace(gather_text=parts.gather_text, rank=1, number=7)
    wire.publish_abort = print
    wire.device = torch.device("cpu")
    placement = Placement.from_ranks(even_blocks(8, 2), num_ranks=2, device=wire.device)
    with pytest.raises(EngineUnavailableError, match=f"rank 1: .*{text}"):
        build.build(
            config, wire=wire, placement=placement, domains=Domains((0, 1)), check_inputs=False
        )
    assert parts.said[-1] == (text or "OutOfMemoryError('')")
    connected = part in ("mode", "engine")
    assert bool(parts.closed) == connected
    assert parts.left == ([7] if connected else [])
    assert parts.detached == ([print] if connected else [])
