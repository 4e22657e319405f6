"""Bad configurations and placements: the error names field, value and remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expertlink import ConfigurationError, EngineUnavailableError
from support.small_calls import E, make

BAD_CONFIG = {
    "num_experts": (0, "num_experts=0 .* at least 1"),
    "hidden_size": ("8", "hidden_size='8' .* whole number"),
    "topk": (33, "topk=33 .* at most 32"),
    "max_tokens_per_rank": (True, "max_tokens_per_rank=True"),
    "mode": ("fast", "mode='fast' .* ht, ll"),
    "engine": ("mpi", "engine='mpi' .* auto, collective, nvlink, hybrid"),
    "domains": (["a", "b"], r"domains=\['a', 'b'\] .* one whole number per rank"),
    "output_layout": ("rows", "output_layout='rows' .* flat, token_major"),
    "dtype": (torch.int32, "dtype=torch.int32 .* torch.bfloat16"),
    "quantization": ("int4", "quantization='int4' .* e4m3_float32"),
    "expert_alignment": (0, "expert_alignment=0"),
    "timeout_s": (0, "timeout_s=0 .* positive"),
    "check_inputs": ("yes", "check_inputs='yes'"),
    "enable_overlap": (1, "enable_overlap=1"),
    "combine_precision": ("double", "combine_precision='double' .* wire, exact"),
    "scale_order": ("rows", "scale_order='rows' .* row_major, column_major"),
    "mask_lost_peers": (None, "mask_lost_peers=None .* True or False"),
    "device": ("tpu", "device='tpu'"),
    "expert_map": ([0, 0], "2 entries.* num_experts=6"),
    "local_expert_start": (2, "num_local_experts as well"),
    "num_local_experts": (7, "num_local_experts=7 .* at most 6"),
}


@pytest.mark.parametrize("field", BAD_CONFIG)
def test_configuration_names_field_value_and_remedy(field: str) -> None:
    value, message = BAD_CONFIG[field]
    with pytest.raises(ConfigurationError, match=message):
        make(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topk": 5, "num_experts": 4}, "topk=5 .* num_experts=4"),
        ({"expert_map": [0] * E, "num_local_experts": 6}, "expert_map"),
        ({"expert_alignment": 4, "output_layout": "token_major"}, "1 for layout token_major"),
        ({"max_recv_tokens_per_rank": 4, "mode": "ll"}, "None for layout expert_major"),
        ({"quantization": "e4m3_pow2", "dtype": torch.float64}, "dtype"),
        (
            {"combine_precision": "exact", "output_layout": "token_major"},
            "combine_precision='exact' .* 'wire' for layout token_major",
        ),
        ({"mask_lost_peers": True}, "False with mode='ht'; mode='ll' has it"),
    ],
)
def test_fields_that_exclude_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(**fields)


@pytest.mark.parametrize("domains", [[], [0.5], 3])
def test_domains_that_are_no_numbers_of_ranks(domains: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"domains=.* one whole number per rank"):
        make(domains=domains)


def test_domains_of_another_group() -> None:
    with pytest.raises(ConfigurationError, match="domains has 3 entries; .* which has 1"):
        make(domains=[0, 0, 1])


def test_domains_are_numbered_by_their_lowest_rank() -> None:
    with make(domains=torch.tensor([5])) as comm:
        assert comm.config.domains == (0,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_map": [0, 0, 1, 0, 0, 0]}, "expert 2 on rank 1; ranks are 0..0"),
        ({"num_local_experts": 5}, "no rank holds expert 5"),
        ({"num_local_experts": 5, "local_expert_start": 2}, "ends beyond num_experts=6"),
    ],
)
def test_placements_that_do_not_fit_the_group(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(**fields).initialize()


def test_unavailable_engine_and_device() -> None:
    with pytest.raises(EngineUnavailableError, match="tensors live on cpu"):
        make(engine="nvlink")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="CUDA is not available"):
            make(device="cuda")
    comm = make()
    assert comm.engine_name == "collective"
    assert "nvlink engine cannot be used" in comm.engine_reason


def test_a_budget_that_has_no_effect_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    make().initialize()
    assert not caplog.records
    make(num_sms_combine=8).initialize()
    assert "torch.distributed chooses" in caplog.text


def test_environment_sets_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTLINK_TIMEOUT", "7.5")
    assert make().config.timeout_s == 7.5
    assert make(timeout_s=2).config.timeout_s == 2
    monkeypatch.setenv("EXPERTLINK_TIMEOUT", "soon")
    with pytest.raises(ConfigurationError, match="EXPERTLINK_TIMEOUT='soon'"):
        make()
