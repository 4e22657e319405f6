"""The host side of the nvlink engine without a GPU: launches are noted and do nothing."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from expertlink import MoECommunicator, MoECommunicatorConfig, connection
from expertlink.engines.nvlink import arena, engine
from expertlink.engines.nvlink.build import assemble, make_memory, mode_of
from expertlink.engines.nvlink.launch import KernelName, Launch
from expertlink.engines.nvlink.ll import arena as ll_arena
from expertlink.engines.nvlink.ll import mode as ll_mode
from expertlink.engines.ranks.wire import Wire
from expertlink.engines.select import EngineChoice
from expertlink.jit.kernel import Arguments
from expertlink.routing import Placement, even_blocks

CPU = torch.device("cpu")
E, H, K, T_MAX = 8, 64, 2, 16
SMS = 132  # of the GPU


class _Stream:
    cuda_stream = 7

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass

    def query(self) -> bool:
        return True


class _Memory:
    """A rank's arena, alone."""

    def __init__(self, local: Tensor) -> None:
        self.local, self.addresses = local, [local.data_ptr()]

    def word(self, rank: int, offset: int) -> Tensor:
        assert rank == 0
        return self.local[offset : offset + 4].view(torch.int32)


class FakeGpu:
    """What launches and captures look like to the host.

    Attributes:
        capture: number of the capture that every call is in, 0 for none.
        launched: name and some of the arguments of every launch, oldest first.
        kernel: what every launch does, with its arguments and the words that the host reads.
        cuda_calls: names of the functions of torch.cuda that have been called, oldest first.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capture = 0
        self.launched: list[dict[str, Any]] = []
        self.mails = True
        self.kernel: Callable[[KernelName, Arguments, Any], None] = lambda *_: None
        self.cuda_calls: list[str] = []
        stream = _Stream()
        patch = monkeypatch.setattr

        def note(name: str, result: Any = None) -> None:
            def called(*_: object) -> Any:
                self.cuda_calls.append(name)
                return result

            patch(torch.cuda, name, called)

        note("stream", contextlib.nullcontext())
        note("device", contextlib.nullcontext())
        note("current_stream", stream)
        note("current_device", 0)
        note("set_stream")
        note("is_current_stream_capturing", False)
        patch(torch.cuda, "Stream", _Stream)
        patch(torch.cuda, "synchronize", lambda *_: None)
        properties = types.SimpleNamespace(multi_processor_count=SMS)
        patch(torch.cuda, "get_device_properties", lambda _: properties)
        for name in ("zeros", "ones"):
            patch(torch, name, _unpinned(getattr(torch, name)))
        patch(arena, "raw_stream", lambda _: lambda: stream.cuda_stream)
        for module in (ll_arena, engine, ll_mode):
            patch(module, "is_capturing", lambda: self.capture != 0)
        for module in (ll_arena, arena):
            patch(module, "capture_of", lambda _: self.capture)
        choice = EngineChoice("nvlink", "a test")
        patch(connection, "choose_engine", lambda *_, **__: choice)

    def communicator(self, **fields: Any) -> MoECommunicator:
        """A communicator of one rank."""
        usual: dict[str, Any] = {
            "num_experts": E,
            "hidden_size": H,
            "topk": K,
            "max_tokens_per_rank": T_MAX,
            "device": "cpu",
            "check_inputs": False,
        }
        config = MoECommunicatorConfig(**{**usual, **fields})
        comm = MoECommunicator(config)
        placement = Placement.from_ranks(even_blocks(E, 1), num_ranks=1, device=CPU)
        mode = mode_of(config, placement)
        plan = mode.plan(config, 1)
        local = torch.zeros(plan.total, dtype=torch.uint8, device=CPU)
        memory = make_memory(
            config, mode, plan, rank=0, buffer=_Memory(local), device=CPU, timeout_s=5.0
        )

        def run(name: KernelName, arguments: Arguments, launch: Launch) -> None:
            fields = ("operation", "communicator", "subject", "maker", "flags", "origin")
            fields += ("slots_of_token", "status", "capacity", "signature")
            noted = {field: getattr(arguments, field, None) for field in fields}
            self.launched.append({"name": name, "grid": launch.grid, **noted})
            self.kernel(name, arguments, memory.watchdog._words)
            if self.mails and config.mode == "ht" and not config.static_shapes:
                memory.watchdog._words.mail_number += 1

        engine = assemble(
            config,
            mode,
            wire=Wire(None, device=CPU, timeout_s=5.0),
            placement=placement,
            memory=memory,
            run=run,
            check_inputs=bool(config.check_inputs),
        )
        comm._use(engine, placement)
        return comm


def _unpinned(make: Any) -> Any:
    def made(*sizes: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return make(*sizes, **options)

    return made


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights_TK, ids_TK = torch.rand(5, E, generator=generator).topk(K)
    return torch.randn(5, H, generator=generator).to(torch.bfloat16), ids_TK, weights_TK
