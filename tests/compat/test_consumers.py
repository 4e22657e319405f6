"""What frameworks call of `deep_ep`, in their order and with their arguments, over the drop-in."""

from __future__ import annotations

import pytest

from support.drop_in import serving, training
from support.drop_in.inputs import Shapes
from support.drop_in.place import EVERYWHERE, Job, run

WHERE = pytest.mark.parametrize("where", EVERYWHERE)
SHAPES = Shapes(tokens=12, hidden=512, experts=8, topk=3, fewer=1, masked=0.1)
PROCESS_WIDE = (training.megatron, training.slime)


@WHERE
@pytest.mark.parametrize(
    "job",
    [
        training.megatron,
        training.automodel,
        training.slime,
        training.torchtitan,
        training.deepspeed,
        serving.vllm_high_throughput,
        serving.vllm_low_latency,
        serving.vllm_v2,
        serving.sglang,
        serving.sglang_v2,
        serving.lmdeploy,
    ],
    ids=lambda job: job.__name__,
)
def test_calls_of(rank_pools, where: str, job: Job) -> None:
    if where == "hosted" and job in PROCESS_WIDE:
        pytest.skip("these callers keep a buffer for the whole process, which is all ranks here")
    assert all(run(rank_pools, where, 2, job, SHAPES))


@pytest.mark.parametrize("job", [training.megatron, serving.sglang], ids=lambda job: job.__name__)
def test_calls_on_four_ranks(rank_pools, job: Job) -> None:
    assert all(run(rank_pools, "cpu", 4, job, SHAPES))
