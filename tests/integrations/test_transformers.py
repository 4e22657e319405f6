"""The plug-in for transformers: tiny models spread over ranks equal the whole ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from expertlink.integrations import transformers as integration
from expertlink.integrations.versions import FrameworkVersionError, UnsupportedModelError
from support import frameworks, moe_models
from support.depth import deep
from support.moe_models import FAMILIES, Outcome, needs_registry, needs_transformers, preloads


def check(outcomes: list[Outcome]) -> None:
    """Logits and all gradients within 1e-5, none of which is small throughout."""
    for outcome in outcomes:
        assert outcome.logits <= 1e-5
        assert max(outcome.gradients.values()) <= 1e-5, outcome.gradients
        assert min(outcome.largest) > 0.1


@needs_transformers
@preloads
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [2, 4])
def test_parallelize(rank_pools, family: str, size: int) -> None:
    check(rank_pools(4).run(moe_models.cut_by_hand, family, size, timeout_s=100))


@needs_registry
@preloads
@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained(rank_pools, family: str, tmp_path: Path) -> None:
    """EP over all ranks, over half of them, and with ranks that share tokens: each in a family."""
    pool = rank_pools(4)
    pool.run(moe_models.written, family, tmp_path, timeout_s=100)
    cases = [
        {"fsdp_size": 4, "ep_size": 4},
        {"fsdp_size": 4, "ep_size": 2},
        {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
        {"fsdp_size": 2, "tp_size": 2, "ep_size": 2},
    ]
    number = FAMILIES.index(family) % len(cases)
    for sizes in cases[number : number + 1] if deep(1) == 1 else cases:
        check(pool.run(moe_models.loaded, family, tmp_path, sizes, timeout_s=100))


@needs_transformers
@pytest.mark.gpu(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_parallelize_on_gpus(rank_pools, family: str) -> None:
    """float32 over NCCL; then bfloat16, where both engines give the same bits."""
    pool = rank_pools(4, "cuda")
    for size in (2, 4):
        check(pool.run(moe_models.cut_by_hand, family, size, timeout_s=100))
    names = pool.run(moe_models.engines_alike, family, timeout_s=200)
    assert names == [["nvlink"]] * 4


@needs_transformers
@preloads
def test_forwards_of_more_tokens_than_before(rank_pools) -> None:
    """Communicators grow, those that are outgrown serve backward, and layers share them."""
    results = rank_pools(2).run(moe_models.longer_and_longer, timeout_s=100)
    assert results == [[4, 10]] * 2


@needs_transformers
@preloads
def test_models_one_after_the_other(rank_pools) -> None:
    """What ranks have does not depend on when their garbage is collected."""
    assert all(rank_pools(2).run(moe_models.one_after_the_other, timeout_s=60))


@needs_registry
@preloads
def test_training_steps_of_the_example(rank_pools, tmp_path: Path) -> None:
    """The same losses with transformers' own expert parallelism as with ours."""
    results = rank_pools(2).run(moe_models.steps_of_the_example, tmp_path, timeout_s=100)
    for (theirs, ours), calls, printed in results:
        assert calls == 2 * len(ours) == 6  # of each layer in each step
        assert ours == pytest.approx(theirs, abs=1e-5)
        assert ours[0] != ours[-1]
        assert [line.split()[0] for line in printed.splitlines()[1:]] == [
            "all_to_all",
            "expertlink",
        ]


@needs_registry
@preloads
def test_what_transformers_is_told_wrong(rank_pools, tmp_path: Path) -> None:
    pool = rank_pools(4)
    pool.run(moe_models.written, "mixtral", tmp_path, timeout_s=100)
    for said in pool.run(moe_models.refusals, tmp_path, timeout_s=100):
        assert "must divide" in said["size"]
        assert "names no registered implementation" in said["name"]
        assert said["plan"].startswith("UnsupportedModelError: MixtralExperts: ")
        assert 'no "grouped_gemm" rule' in said["plan"]


# -- without the framework -------------------------------------------------------------------------


class MixtralExperts(nn.Module):
    """An experts block by its name and parameters."""

    def __init__(self, num_experts: int = 4, parameters: int = 4) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.down_proj = nn.Parameter(torch.zeros(parameters, 2, 2))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return x


class ThreeRanks:
    """A process group that nobody calls."""

    def rank(self) -> int:
        return 2

    def size(self) -> int:
        return 3


@pytest.fixture
def some_version() -> Iterator[None]:
    with frameworks.versions_are({"transformers": "5.20.1"}):
        yield


@pytest.mark.usefixtures("some_version")
def test_models_that_cannot_be_cut() -> None:
    cases: list[tuple[nn.Module, str]] = [
        (nn.Linear(2, 2), "Linear has no expert blocks of a known family: DeepseekV3Experts, "),
        (nn.Sequential(MixtralExperts()), "0: 4 experts do not divide evenly among 3 ranks"),
        (
            nn.Sequential(MixtralExperts(6, 6), MixtralExperts(6, 5)),
            "1.down_proj has shape .5, 2, 2.; 6 experts along the first dimension",
        ),
    ]
    for model, said in cases:
        before = [parameter.shape for parameter in model.parameters()]
        with pytest.raises(UnsupportedModelError, match=said):
            integration.parallelize(model, ThreeRanks())
        assert [parameter.shape for parameter in model.parameters()] == before


@pytest.mark.usefixtures("some_version")
def test_a_model_is_cut_once() -> None:
    model = nn.Sequential(MixtralExperts(6, 6))
    model[0].down_proj.requires_grad_(False)
    cut = integration.parallelize(model, ThreeRanks())
    assert cut is model
    assert model[0].down_proj.shape == (2, 2, 2)
    assert not model[0].down_proj.requires_grad
    assert model[0].num_experts == 2
    with pytest.raises(UnsupportedModelError, match="0: its forward was replaced already"):
        integration.parallelize(model, ThreeRanks())


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "transformers is not installed; expertlink was tested with transformers >=5.17,<5.24"),
        ({"transformers": "4.57.6"}, "transformers 4.57.6 is installed"),
        ({"transformers": "5.24.0.dev0"}, "transformers 5.24.0.dev0 is installed"),
    ],
)
def test_other_versions(found: dict[str, str], said: str) -> None:
    with frameworks.versions_are(found):
        with pytest.raises(FrameworkVersionError, match=said):
            integration.parallelize(MixtralExperts())
        with pytest.raises(FrameworkVersionError, match="use parallelize"):
            integration.register()


@pytest.mark.usefixtures("some_version")
def test_versions_without_the_registry() -> None:
    with pytest.raises(FrameworkVersionError, match=">=5.23,<5.24; before 5.23 use parallelize"):
        integration.register()
