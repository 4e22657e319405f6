"""Which engine serves a communicator, and the sentence that says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from expertlink import (
    ConfigurationError,
    DispatchLayout,
    EngineUnavailableError,
    MoECommunicator,
    MoECommunicatorConfig,
)
from expertlink.domains import Domains
from expertlink.engines import select
from expertlink.engines.nvlink import build
from expertlink.engines.nvlink.ll.mode import LlMode
from expertlink.engines.ranks.handshake import cannot_move, resolve_device
from expertlink.engines.ranks.wire import Peer, Wire
from expertlink.engines.select import EngineChoice, choose_engine
from expertlink.routing import Placement, even_blocks

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ON_CPU = "tensors live on cpu, it moves rows between GPUs"


def config_with(**fields: Any) -> MoECommunicatorConfig:
    defaults: dict[str, Any] = {
        "num_experts": 8,
        "hidden_size": 64,
        "topk": 2,
        "max_tokens_per_rank": 4,
    }
    return MoECommunicatorConfig(**{**defaults, **fields})


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs look like Hopper GPUs, and the compiler looks installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(build.compiler, "unavailable_reason", lambda: None)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"dtype": torch.float32}, "rows are torch.float32, it adds up"),
        ({"dtype": torch.float64}, "rows are torch.float64, it adds up"),
        ({"hidden_size": 3}, "rows have 6 bytes, it moves multiples of 16"),
        ({"hidden_size": 300}, "rows have 600 bytes, it moves multiples of 16"),
    ],
)
def test_rows_that_cannot_be_moved(hopper: None, fields: dict[str, Any], sentence: str) -> None:
    """engine="auto" takes the other engine, engine="nvlink" refuses, for the same reason."""
    choice = choose_engine(config_with(**fields), device=CUDA)
    assert choice.name == "collective"
    assert f"the nvlink engine cannot be used: {sentence}" in choice.reason
    with pytest.raises(EngineUnavailableError) as info:
        choose_engine(config_with(**fields, engine="nvlink"), device=CUDA)
    assert f"engine='nvlink' cannot be used: {sentence}" in str(info.value)


def test_gpus_that_are_too_old(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert build.unavailable_reason(config_with(), CUDA) == (
        "the GPU has compute capability 8.6, it needs 9.0"
    )


def test_a_missing_compiler(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.compiler, "unavailable_reason", lambda: "cuda.core is not installed")
    assert choose_engine(config_with(), device=CUDA).name == "collective"
    with pytest.raises(EngineUnavailableError, match="cuda.core is not installed"):
        choose_engine(config_with(engine="nvlink"), device=CUDA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["auto", "nvlink"])
def test_gpus_that_can_use_nvlink(hopper: None, engine: str, dtype: torch.dtype) -> None:
    choice = choose_engine(config_with(engine=engine, dtype=dtype), device=CUDA)
    assert choice.name == "nvlink"
    assert choice.reason


def test_exact_sums_need_the_low_latency_kernels(hopper: None) -> None:
    choice = choose_engine(config_with(combine_precision="exact"), device=CUDA)
    assert choice.name == "collective"
    assert "combine_precision='exact' with mode='ll' only" in choice.reason
    with pytest.raises(EngineUnavailableError, match="with mode='ll' only"):
        choose_engine(config_with(combine_precision="exact", engine="nvlink"), device=CUDA)
    assert choose_engine(config_with(combine_precision="exact", mode="ll"), device=CUDA).name == (
        "nvlink"
    )


def test_asking_for_the_collective_engine(hopper: None) -> None:
    choice = choose_engine(config_with(engine="collective"), device=CUDA)
    assert choice.name == "collective"
    assert "asked for" in choice.reason


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"engine": "nvlink"}, "engine='nvlink'"),
        (
            {"zero_copy": True, "output_layout": "token_major"},
            "zero_copy=True, which needs the nvlink engine,",
        ),
        ({"static_shapes": True}, "static_shapes=True, which needs the nvlink engine,"),
        (
            {"mask_lost_peers": True, "mode": "ll"},
            "mask_lost_peers=True, which needs the nvlink engine,",
        ),
    ],
)
def test_what_needs_gpus_is_refused_on_cpus(fields: dict[str, Any], asked: str) -> None:
    """In the constructor, so no rank waits for another."""
    with pytest.raises(EngineUnavailableError) as info:
        MoECommunicator(config_with(device="cpu", **fields))
    assert str(info.value) == f"{asked} cannot be used: {ON_CPU}"
    with pytest.raises(EngineUnavailableError) as info:
        choose_engine(config_with(**fields), device=CPU)
    assert str(info.value) == f"{asked} cannot be used: {ON_CPU}"


def test_the_reason_can_be_read_from_the_communicator() -> None:
    comm = MoECommunicator(config_with(device="cpu"))
    assert comm.engine_name == "collective"
    assert comm.engine_reason == f"the nvlink engine cannot be used: {ON_CPU}"


@pytest.mark.parametrize("layout", [DispatchLayout.FLAT, DispatchLayout.EXPERT_MAJOR])
def test_expanded_layouts_cannot_be_views(layout: DispatchLayout) -> None:
    with pytest.raises(ConfigurationError, match=f"zero_copy=True .* layout {layout.value}"):
        config_with(zero_copy=True, output_layout=layout)
    with pytest.raises(ConfigurationError, match="zero_copy=True .* layout expert_major"):
        config_with(zero_copy=True, mode="ll")


@pytest.mark.parametrize("name", ["zero_copy", "static_shapes"])
def test_switches_are_true_or_false(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}=1 .* True or False"):
        config_with(**{name: 1})


@pytest.mark.parametrize("field", ["zero_copy", "static_shapes", "mask_lost_peers"])
def test_what_the_collective_engine_does_not_have_is_refused(field: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{field}=True .* engine='collective'"):
        MoECommunicatorConfig(
            num_experts=8,
            hidden_size=16,
            topk=2,
            max_tokens_per_rank=4,
            engine="collective",
            mode="ll" if field == "mask_lost_peers" else "ht",
            output_layout="token_major",
            **{field: True},  # pyright: ignore[reportArgumentType]
        )


# -- several hosts -------------------------------------------------------------------------------


class Group:
    """A process group with backends by device type, as torch's own answers."""

    def __init__(self, ranks: int, **backends: str) -> None:
        self._ranks, self._backends = ranks, backends

    def size(self) -> int:
        return self._ranks

    def rank(self) -> int:
        return 0

    def get_group_store(self) -> object:
        return object()

    def name(self) -> str:
        return "undefined"

    def _get_backend(self, device: torch.device) -> SimpleNamespace:
        if device.type not in self._backends:
            raise RuntimeError(f"No backend type associated with device type {device.type}")
        return SimpleNamespace(name=lambda: self._backends[device.type])


NCCL = Group(4, cpu="gloo", cuda="nccl")
TWO_HOSTS = [0, 0, 1, 1]
NO_NVLINK = "domains has 2 hosts, it moves rows inside one"


class Texts(Wire):
    """A wire to ranks of which each says what this one says, or what is put in their mouths."""

    def __init__(self, *, hosts: Sequence[str], others: Sequence[str] = ()) -> None:
        super().__init__(None, device=CPU, timeout_s=1.0)
        self.device, self.group, self.num_ranks = CUDA, NCCL, len(hosts)
        self.peers = [Peer(host, pid) for pid, host in enumerate(hosts)]
        self.others = others

    def gather_text(self, text: str) -> list[str]:
        return [text, *self.others]


def build_with(
    config: MoECommunicatorConfig, wire: Wire, choice: EngineChoice | None = None
) -> tuple[EngineChoice, Any]:
    """`build_engine` after `choose_engine`."""
    if choice is None:
        choice = choose_engine(config, device=CUDA, group=NCCL)
    placement = Placement.from_ranks(even_blocks(8, 4), num_ranks=4, device=CPU)
    return select.build_engine(choice, config, wire=wire, placement=placement, check_inputs=False)


@pytest.fixture
def hybrid(hopper: None, monkeypatch: pytest.MonkeyPatch) -> list[Domains]:
    """There is a hybrid engine; the hosts of all that are built. Others are built as names."""
    built: list[Domains] = []

    def build_hybrid(config: object, *, domains: Domains, **_: object) -> Any:
        built.append(domains)
        return "hybrid"

    def no_nvlink(*_: object, **__: object) -> None:
        raise EngineUnavailableError("the ranks are on several hosts")

    monkeypatch.setattr(select, "build_hybrid", build_hybrid)
    monkeypatch.setattr(select, "AUTO_TAKES_HYBRID", True)
    monkeypatch.setattr(select, "discover", lambda wire: Domains.of([p.host for p in wire.peers]))
    monkeypatch.setattr(select.build, "build", no_nvlink)
    monkeypatch.setattr(select, "CollectiveEngine", lambda *_, **__: "collective")
    return built


def test_several_hosts_get_the_hybrid_engine(hybrid: list[Domains]) -> None:
    choice, engine = build_with(config_with(domains=TWO_HOSTS), Texts(hosts="xxxx"))
    assert (choice.name, engine) == ("hybrid", "hybrid")
    assert choice.reason == "the GPUs are in several NVLink domains"
    asked = config_with(domains=[3, 1, 3, 1], engine="hybrid")
    choice, engine = build_with(asked, Texts(hosts="xxxx"))
    assert (choice.name, engine) == ("hybrid", "hybrid")
    assert choice.reason == "engine='hybrid' was asked for"
    assert hybrid == [Domains((0, 0, 1, 1)), Domains((0, 1, 0, 1))]


@pytest.mark.parametrize("engine", ["auto", "hybrid"])
def test_hosts_are_found_where_none_are_configured(hybrid: list[Domains], engine: str) -> None:
    choice, built = build_with(config_with(engine=engine), Texts(hosts=["b", "a", "b", "a"]))
    assert (choice.name, built) == ("hybrid", "hybrid")
    assert hybrid == [Domains((0, 1, 0, 1))]


def test_one_host_needs_no_hybrid_engine(hybrid: list[Domains]) -> None:
    one = [0, 0, 0, 0]
    assert choose_engine(config_with(domains=one), device=CUDA, group=NCCL).name == "nvlink"
    choice, built = build_with(config_with(), Texts(hosts="xxxx"))
    assert (choice.name, built) == ("collective", "collective")
    assert choice.reason == "the nvlink engine cannot be used: the ranks are on several hosts"
    asked = config_with(engine="hybrid")
    with pytest.raises(EngineUnavailableError, match="all ranks are on one host, it connects"):
        choose_engine(config_with(engine="hybrid", domains=one), device=CUDA, group=NCCL)
    with pytest.raises(EngineUnavailableError, match="all ranks are on one host, it connects"):
        build_with(asked, Texts(hosts="xxxx"))
    assert not hybrid


def test_what_hinders_one_rank_hinders_all_hosts(hybrid: list[Domains]) -> None:
    wire = Texts(hosts="aabb", others=["a test"])
    choice, built = build_with(config_with(domains=TWO_HOSTS), wire)
    assert (choice.name, choice.reason, built) == ("collective", "a test", "collective")
    with pytest.raises(EngineUnavailableError, match="engine='hybrid' cannot be used: a test"):
        build_with(config_with(domains=TWO_HOSTS, engine="hybrid"), wire)
    assert not hybrid


@pytest.mark.parametrize(
    ("fields", "group", "sentence"),
    [
        ({"dtype": torch.float32}, NCCL, "rows are torch.float32, it adds up"),
        ({"combine_precision": "exact"}, NCCL, "it has combine_precision='wire' only"),
        (
            {"zero_copy": True, "output_layout": "token_major"},
            NCCL,
            "it does not have zero_copy",
        ),
        ({"mask_lost_peers": True, "mode": "ll"}, NCCL, "it does not have mask_lost_peers"),
        ({"domains": [0, 1, 1, 1]}, NCCL, "the hosts have 1, 3 ranks, it needs equally many"),
        ({}, Group(4, cpu="gloo", cuda="ucc"), "backend for cuda tensors is ucc, it needs"),
        ({}, Group(4, cpu="gloo"), "backend for cuda tensors is none, it needs nccl"),
    ],
)
def test_what_the_hybrid_engine_cannot_serve(
    hybrid: list[Domains], fields: dict[str, Any], group: Group, sentence: str
) -> None:
    asked = config_with(**{"domains": TWO_HOSTS, **fields, "engine": "hybrid"})
    with pytest.raises(EngineUnavailableError, match=f"'hybrid' cannot be used: .*{sentence}"):
        choose_engine(asked, device=CUDA, group=group)
    auto = dataclasses.replace(asked, engine="auto")
    if asked.zero_copy or asked.mask_lost_peers or cannot_move(group, CUDA):
        with pytest.raises(EngineUnavailableError) as info:
            choose_engine(auto, device=CUDA, group=group)
        reason = str(info.value)
    else:
        choice = choose_engine(auto, device=CUDA, group=group)
        assert choice.name == "collective"
        reason = choice.reason
    assert f"the nvlink engine cannot be used: {NO_NVLINK}; the hybrid engine" in reason
    assert sentence in reason


def test_nvlink_stays_inside_a_host(hopper: None) -> None:
    with pytest.raises(EngineUnavailableError, match=f"'nvlink' cannot be used: {NO_NVLINK}"):
        choose_engine(config_with(engine="nvlink", domains=TWO_HOSTS), device=CUDA, group=NCCL)


def test_the_hybrid_engine_is_asked_for(hopper: None) -> None:
    """Several hosts are served without, and those who need more are told."""
    asked = "it serves where engine='hybrid' asks for it"
    assert choose_engine(config_with(engine="hybrid"), device=CUDA, group=NCCL).name == "hybrid"
    choice = choose_engine(config_with(domains=TWO_HOSTS), device=CUDA, group=NCCL)
    assert choice.name == "collective"
    assert choice.reason == (
        f"the nvlink engine cannot be used: {NO_NVLINK}; the hybrid engine cannot be used: {asked}"
    )
    static = config_with(domains=TWO_HOSTS, static_shapes=True)
    with pytest.raises(EngineUnavailableError, match=f"static_shapes=True.*{NO_NVLINK}.*{asked}"):
        choose_engine(static, device=CUDA, group=NCCL)


def test_several_hosts_of_cpus() -> None:
    choice = choose_engine(config_with(domains=TWO_HOSTS), device=CPU, group=Group(4, cpu="gloo"))
    assert choice.name == "collective"
    assert f"{NO_NVLINK}; the hybrid engine cannot be used: {ON_CPU}" in choice.reason


# -- kernels of mode="ll" -------------------------------------------------------------------------

LATENCY = {"mode": "ll", "engine": "nvlink"}


@pytest.mark.parametrize(
    ("fields", "served"),
    [
        ({}, True),  # expert_major
        ({"output_layout": "rank_major"}, True),
        ({"output_layout": "flat"}, False),
        ({"output_layout": "flat", "static_shapes": True}, True),
        ({"output_layout": "token_major", "static_shapes": True}, True),
        ({"output_layout": "rank_major", "zero_copy": True}, False),
        ({"mode": "ht", "static_shapes": True}, False),
    ],
)
def test_what_low_latency_kernels_serve(fields: dict[str, Any], served: bool) -> None:
    """Calls whose shapes the host knows; the others have the kernels of mode="ht"."""
    config = config_with(**{**LATENCY, **fields})
    placement = Placement.from_ranks(even_blocks(8, 2), num_ranks=2, device=CPU)
    assert (build.mode_of(config, placement) is LlMode) is served


def test_masks_need_low_latency_kernels() -> None:
    config = config_with(**LATENCY, mask_lost_peers=True, output_layout="flat")
    placement = Placement.from_ranks(even_blocks(8, 2), num_ranks=2, device=CPU)
    with pytest.raises(EngineUnavailableError, match="mask_lost_peers needs low-latency kernels"):
        build.mode_of(config, placement)


# -- process groups -------------------------------------------------------------------------------


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.parametrize(
    ("backends", "reason"),
    [
        ({"cpu": "gloo", "cuda": "gloo"}, "backend for cuda tensors is gloo"),
        ({"cpu": "gloo"}, "no backend for cuda tensors"),
    ],
)
def test_groups_that_cannot_move_rows(
    one_gpu: None, monkeypatch: pytest.MonkeyPatch, backends: dict[str, str], reason: str
) -> None:
    """They carry words of the nvlink engine, which moves rows itself, and no other engine."""
    group = Group(2, **backends)
    assert resolve_device("cuda", group) == CUDA
    with pytest.raises(ConfigurationError, match=f"device='cuda:0' .*{reason}"):
        choose_engine(config_with(engine="collective"), device=CUDA, group=group)
    monkeypatch.setattr(build, "unavailable_reason", lambda *_: None)
    assert choose_engine(config_with(), device=CUDA, group=group).name == "nvlink"
    monkeypatch.setattr(build, "unavailable_reason", lambda *_: "a test")
    with pytest.raises(EngineUnavailableError, match=f"a test; the collective engine .*{reason}"):
        choose_engine(config_with(), device=CUDA, group=group)


def test_groups_without_a_backend_for_the_host(one_gpu: None) -> None:
    with pytest.raises(ConfigurationError, match="device='cpu' .*no backend for cpu tensors"):
        resolve_device("cpu", Group(2, cuda="nccl"))


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_groups_that_can(one_gpu: None, device: torch.device) -> None:
    group = Group(2, cpu="gloo", cuda="nccl")
    assert resolve_device(device, group) == device
    assert choose_engine(config_with(engine="collective"), device=device, group=group)


@pytest.mark.parametrize(
    ("device", "backends", "words"),
    [
        (CUDA, {"cpu": "gloo"}, CPU),
        (CUDA, {"cpu": "gloo", "cuda": "nccl"}, CPU),
        (CUDA, {"cuda": "nccl"}, CUDA),
        (CPU, {"cpu": "gloo"}, CPU),
    ],
)
def test_where_words_are_exchanged(
    device: torch.device, backends: dict[str, str], words: torch.device
) -> None:
    wire = Wire(Group(2, **backends), device=device, timeout_s=1.0)
    assert wire.words_device == words
