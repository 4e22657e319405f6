"""Plug-ins inside their frameworks: jobs for ranks, with the framework or its signatures.

Where a framework is not installed, or cannot be imported, the folder `published` stands for it: the
classes and signatures that its plug-ins see, in words of our own.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from expertlink import ClosedError, HandleError
from expertlink.integrations import versions
from expertlink.launch import RankContext

_PUBLISHED = Path(__file__).parent / "published"
VERSIONS = {"torchtitan": "0.3.0", "flashinfer-python": "0.7.2.post1"}
EXPERTS, TOPK, HIDDEN = 8, 3, 128


def installed(module: str) -> bool:
    """Whether a framework is there and can be imported."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def importable(framework: str, module: str) -> Iterator[Any]:
    """The integration of that name, freshly imported; `module` of the framework can be imported."""
    ours = f"expertlink.integrations.{framework}"
    with contextlib.ExitStack() as stack:
        if not installed(module):
            stack.callback(_forget, framework)
            _forget(framework)
            stack.enter_context(mock.patch.object(sys, "path", [str(_PUBLISHED), *sys.path]))
            stack.enter_context(versions_are(VERSIONS))
            stack.callback(sys.modules.pop, ours, None)
        yield importlib.import_module(ours)


@contextlib.contextmanager
def versions_are(found: dict[str, str]) -> Iterator[None]:
    """These distributions are installed, and no others."""

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    with mock.patch.object(versions.metadata, "version", version):
        yield


def _forget(framework: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == framework]:
        del sys.modules[name]
    importlib.invalidate_caches()


# -- a layer ---------------------------------------------------------------------------------------


@dataclass
class Layer:
    """Tokens, their routing, and experts that multiply with a matrix each; alike on all ranks."""

    x_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    experts_EHH: Tensor

    @classmethod
    def drawn(
        cls,
        seed: int,
        tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Layer:
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(tokens, EXPERTS, generator=generator)
        weights_TK, ids_TK = scores.topk(TOPK)
        x_TH = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
        fixed = torch.Generator().manual_seed(0)
        experts = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=fixed) / HIDDEN**0.5
        leaves = (x_TH, weights_TK, experts.to(dtype))
        x_TH, weights_TK, experts = (leaf.to(device).requires_grad_() for leaf in leaves)
        return cls(x_TH, ids_TK.to(device), weights_TK, experts)

    def expected(self) -> Tensor:
        """The sums, without any exchange."""
        rows = torch.einsum("th,tkhg->tkg", self.x_TH, self.experts_EHH[self.ids_TK])
        return (rows * self.weights_TK[..., None].to(rows.dtype)).sum(1)

    def counts(self) -> Tensor:
        return torch.bincount(self.ids_TK.flatten(), minlength=EXPERTS)

    def grouped(self, rows: Tensor, counts: list[int], first: int) -> Tensor:
        """Outputs of rows that are grouped by expert."""
        parts = rows.split(counts)
        return torch.cat([part @ self.experts_EHH[first + e] for e, part in enumerate(parts)])


def leaves_of(layer: Layer) -> tuple[Tensor, ...]:
    return layer.x_TH, layer.weights_TK, layer.experts_EHH


# -- torchtitan ------------------------------------------------------------------------------------


def titan_layer(ctx: RankContext, pad: int | None, mesh: bool, steps: list[int]) -> list[str]:
    """The override in a tree of configurations; its dispatcher against a dense layer."""
    with importable("torchtitan", "torchtitan.models.common.token_dispatcher") as integration:
        from torchtitan.config import Configurable, OverrideConfig, apply_overrides
        from torchtitan.models.common import token_dispatcher as titan

        class Block(Configurable):
            @dataclass(kw_only=True, slots=True)
            class Config(Configurable.Config):
                token_dispatcher: Any

        fields: dict[str, Any] = {"num_experts": EXPERTS, "top_k": TOPK}
        source = titan.AllToAllTokenDispatcher.Config(**fields)
        if pad is not None:
            source = titan.TorchAOTokenDispatcher.Config(**fields, pad_multiple=pad)
        tree = Block.Config(token_dispatcher=source)
        name = f"{integration.__name__}.expertlink_dispatch"
        done = apply_overrides(OverrideConfig(imports=[name]), tree)
        assert type(tree.token_dispatcher) is not type(source)
        dispatcher = tree.token_dispatcher.build()
        assert isinstance(dispatcher, titan.BaseEPTokenDispatcher)
        ep_mesh = dist.init_device_mesh("cpu", (ctx.num_ranks,)) if mesh else None
        dispatcher.wire_meshes(ep_mesh=ep_mesh)
        ranks = range(ctx.num_ranks) if mesh else range(ctx.rank, ctx.rank + 1)
        for step, tokens in enumerate(steps):
            _titan_step(dispatcher, ctx.rank, ranks, step, tokens, pad)
        _titan_wrong(integration, dispatcher, ctx, mesh)
        return done


def _titan_step(
    dispatcher: Any, rank: int, ranks: range, step: int, tokens: int, pad: int | None
) -> None:
    layers = [Layer.drawn(100 * step + r, tokens) for r in ranks]
    own = layers[rank - ranks.start]
    args = (own.x_TH, own.weights_TK, own.ids_TK, own.counts())
    rows, counts, state = dispatcher.dispatch(*args)
    per_rank = EXPERTS // len(ranks)
    first = (rank - ranks.start) * per_rank
    assert counts.shape == (per_rank,)
    assert not counts.is_floating_point()
    arrived = torch.stack([layer.counts() for layer in layers]).sum(0)[first : first + per_rank]
    size = pad or 1
    assert counts.tolist() == [-(-n // size) * size for n in arrived.tolist()]
    outputs = own.grouped(rows, counts.tolist(), first)
    result = dispatcher.combine(outputs, state, own.x_TH)
    torch.testing.assert_close(result, own.expected(), rtol=0, atol=1e-5)
    found = list(torch.autograd.grad(result.square().sum(), leaves_of(own)))
    everywhere = sum(layer.expected().square().sum() for layer in layers)
    assert isinstance(everywhere, Tensor)
    wanted = torch.autograd.grad(own.expected().square().sum(), leaves_of(own)[:2])
    experts = torch.autograd.grad(everywhere, [layer.experts_EHH for layer in layers])
    if len(ranks) > 1:
        dist.all_reduce(found[2])
    for name, a, b in zip(("x", "scores", "experts"), found, (*wanted, sum(experts)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


def _titan_wrong(integration: Any, dispatcher: Any, ctx: RankContext, mesh: bool) -> None:
    config = dispatcher_config(integration, num_experts=EXPERTS + 1)
    three = SimpleNamespace(size=lambda: 2)
    _raises(ValueError, "9 experts do not divide", config.build().wire_meshes, ep_mesh=three)
    if mesh:
        _raises(HandleError, "was given a str", dispatcher.combine, torch.ones(1), "", None)


def dispatcher_config(integration: Any, **fields: Any) -> Any:
    """A configuration of the plug-in's dispatcher."""
    return integration.dispatcher_class().Config(**{"top_k": TOPK, **fields})


def _raises(kind: type[BaseException], said: str, call: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(kind, match=said):
        call(*args, **options)


# -- flashinfer ------------------------------------------------------------------------------------


def flashinfer_calls(ctx: RankContext, mode: str, steps: list[int]) -> str:
    """A registered communication, made as flashinfer's layer makes it, against a dense layer."""
    module = "flashinfer.moe_ep.core.comm.communication"
    with importable("flashinfer", module) as integration, torch.no_grad():
        from flashinfer.moe_ep.config import BootstrapConfig
        from flashinfer.moe_ep.core.comm import communication as flash

        assert integration.register() is integration.register()
        on_gpu = ctx.device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32  # the nvlink engine takes no float32
        bootstrap = BootstrapConfig(
            ctx.num_ranks, ctx.rank, process_group=dist.group.WORLD, device=ctx.device.index
        )
        params = flash.MoEEpCommParams(EXPERTS, TOPK, 8, HIDDEN, dtype, None, EXPERTS)
        config = integration.ExpertlinkCommConfig(mode=mode)
        comm = flash.create_communication(bootstrap, params, config)
        assert isinstance(comm, flash.MoEEpCommunication)
        assert comm.supports_cuda_graph is (on_gpu and mode == "ll")
        assert comm.is_workload_feasible(8)
        assert not comm.is_workload_feasible(9)
        for step, tokens in enumerate(steps):
            layers = [
                Layer.drawn(100 * step + r, tokens + r, dtype, ctx.device)
                for r in range(ctx.num_ranks)
            ]
            _flashinfer_step(comm, layers, ctx.rank)
            _flashinfer_bytes(comm, layers, ctx.rank)
        own = Layer.drawn(0, 2, dtype, ctx.device)
        _raises(HandleError, "without a dispatch", comm.combine, own.x_TH)
        comm.dispatch(own.x_TH, own.ids_TK, own.weights_TK)
        _raises(HandleError, "called twice", comm.dispatch, own.x_TH, own.ids_TK)
        wrong = BootstrapConfig(ctx.num_ranks, (ctx.rank + 1) % ctx.num_ranks)
        _raises(
            ValueError, "bootstrap says", flash.create_communication, wrong, params, "expertlink"
        )
        for _ in range(2):
            comm.destroy()
        _raises(ClosedError, "destroyed", comm.dispatch, own.x_TH, own.ids_TK)
        return comm.backend_name


def _flashinfer_step(comm: Any, layers: list[Layer], rank: int) -> None:
    own = layers[rank]
    result = comm.dispatch(own.x_TH, own.ids_TK.int(), own.weights_TK)
    rows = comm.ep_size * result.tokens_per_rank
    assert result.hidden_states.shape == (rows, HIDDEN)
    assert result.topk_ids.shape == (rows, TOPK)
    assert result.topk_ids.dtype == torch.int32
    first, last = rank * comm.num_local_experts, (rank + 1) * comm.num_local_experts
    outputs = torch.zeros_like(result.hidden_states)
    seen = []
    for n in range(rows):
        for k in range(TOPK):
            e = int(result.topk_ids[n, k])
            if e != EXPERTS:  # the id that stands for none
                assert first <= e < last
                row = result.hidden_states[n] @ own.experts_EHH[e]
                outputs[n] += result.topk_weights[n, k] * row
                seen.append(e)
    arrived = torch.cat([layer.ids_TK.flatten() for layer in layers])
    assert sorted(seen) == sorted(e for e in arrived.tolist() if first <= e < last)
    combined = comm.combine(outputs)
    close = 1e-5 if combined.dtype is torch.float32 else 0.1
    torch.testing.assert_close(combined, own.expected(), rtol=0, atol=close)


def _flashinfer_bytes(comm: Any, layers: list[Layer], rank: int) -> None:
    """Rows of another type, narrower ones, with and without scales, come as they are."""
    own = layers[rank]
    for kind, width in ((torch.float8_e4m3fn, HIDDEN), (torch.uint8, HIDDEN // 2)):
        sent = [(layer.x_TH[:, :width] * 40).to(kind) for layer in layers]
        scales = [layer.x_TH[:, :2].contiguous() for layer in layers]
        for with_scales in (True, False):
            options = {"hidden_states_scale": scales[rank]} if with_scales else {}
            result = comm.dispatch(sent[rank], own.ids_TK, **options)
            assert result.topk_weights is None
            assert result.hidden_states.dtype is kind
            given = result.hidden_states_scale
            assert (given is not None) is with_scales
            rows = comm.ep_size * result.tokens_per_rank
            outputs = own.x_TH.new_zeros(rows, HIDDEN)
            for r, layer in enumerate(layers):
                mine = (layer.ids_TK // comm.num_local_experts == rank).any(1)
                begin = r * result.tokens_per_rank
                slots = slice(begin, begin + int(mine.sum()))
                bytes_there = result.hidden_states.view(torch.uint8)[slots]
                assert torch.equal(bytes_there, sent[r].view(torch.uint8)[mine])
                if given is not None:
                    assert torch.equal(given[slots], scales[r][mine])
                outputs[slots] = 1
            output = torch.empty_like(own.x_TH)
            assert comm.combine(outputs, output=output) is output
            copies = (own.ids_TK // comm.num_local_experts).sort(1).values
            ranks = 1 + (copies.diff(dim=1) != 0).sum(1, keepdim=True)
            assert torch.equal(output, ranks.expand_as(output).to(output.dtype))
