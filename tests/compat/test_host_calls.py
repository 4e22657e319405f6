"""What a call of the drop-in asks of torch beyond the library's own call: nothing, in line.

Counts, not times: tensor operations, as each takes the host about as long as a launch, and
functions of torch.cuda, of which some take longer.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from expertlink import MoECommunicator
from expertlink.compat.deep_ep import Buffer, streams
from expertlink.compat.deep_ep import pool as pools
from expertlink.compat.deep_ep.low_latency import LowLatencyCalls
from expertlink.compat.deep_ep.pool import Pool
from expertlink.compat.deep_ep.streams import Streams
from expertlink.domains import Domains
from support.fake_gpu import CPU, FakeGpu
from support.operations import Operations

T, H, K, E = 6, 512, 2, 8
Call = Callable[[], object]


class Group:
    """A process group of this process alone."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


class Alone:
    """`pool.Ranks` of one rank on a GPU that is none."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu

    def hosts(self, device: torch.device, common: Mapping[str, object]) -> Domains:
        return Domains.one(1)

    def largest(self, number: int, device: torch.device) -> int:
        return number

    def communicator(
        self, fields: dict[str, Any], share_with: MoECommunicator | None
    ) -> MoECommunicator:
        return self._gpu.communicator(**fields)

    def refuse(self, error: Exception, device: torch.device) -> Any:
        raise error


def _all_tokens_arrive(name: object, arguments: object, words: Any) -> None:
    words.mail_arrivals = T


class Setting:
    """A buffer whose calls launch nothing, its inputs, and what they have brought."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpu = gpu = FakeGpu(monkeypatch)
        gpu.kernel = _all_tokens_arrive
        monkeypatch.setattr(streams, "raw_stream", lambda _: lambda: 7)
        pool = Pool(Alone(gpu), CPU, Domains.one(1))
        monkeypatch.setattr(pools, "connect", lambda *args, **common: pool)
        self.buffer: Any = Buffer(Group(), low_latency_mode=True)
        # Tensors live on the CPU, calls run as on a GPU.
        own = self.buffer._streams = Streams(torch.device("cuda", 0))
        calls = LowLatencyCalls(self.buffer.runtime, own, num_ranks=1, masks=False)
        calls._on_gpu = True
        self.buffer._low_latency = calls
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(T, H, generator=generator).to(torch.bfloat16)
        self.weights, self.ids = torch.rand(T, E, generator=generator).topk(K)
        per_rank, _, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(self.ids, E)
        self.layout: dict[str, Any] = {
            "num_tokens_per_rank": per_rank,
            "num_tokens_per_expert": per_expert,
            "is_token_in_rank": in_rank,
        }
        self.rows, *_, self.handle, _ = self.dispatch()
        self.comm = next(iter(self.buffer.runtime._members.values()))
        self.own_handle = self.comm.dispatch(self.x, self.ids, self.weights)[1]
        self.slots, _, self.ll_handle, *_ = self.ll_dispatch()
        self.ll_comm = self.ll_handle.known.form.comm
        self.ll_own_handle = self.ll_comm.dispatch(self.x, self.ids)[1]

    def dispatch(self, **options: Any) -> Any:
        topk = {"topk_idx": self.ids, "topk_weights": self.weights}
        return self.buffer.dispatch(self.x, **self.layout, **topk, **options)

    def combine(self, **options: Any) -> Any:
        return self.buffer.combine(self.rows, self.handle, **options)

    def ll_dispatch(self, **options: Any) -> Any:
        return self.buffer.low_latency_dispatch(self.x, self.ids, 8, E, use_fp8=False, **options)

    def ll_combine(self, **options: Any) -> Any:
        return self.buffer.low_latency_combine(
            self.slots, self.ids, self.weights, self.ll_handle, **options
        )

    def pairs(self) -> dict[str, tuple[Call, Call]]:
        """Calls of the drop-in, and those of the library that they make."""
        comm, x, ids = self.comm, self.x, self.ids
        ll_comm, ll_handle = self.ll_comm, self.ll_own_handle

        def received() -> tuple[Tensor | None, Tensor | None]:
            output, _ = comm.dispatch(x, ids, self.weights)
            return output.topk_ids, output.topk_weights

        def own_halves() -> Tensor:
            output, _, hook = ll_comm.dispatch(x, ids, return_recv_hook=True)
            hook()
            return output.num_tokens_per_expert

        def own_ll_combine(**options: Any) -> Any:
            weights = self.weights
            return ll_comm.combine(self.slots, ll_handle, topk_weights=weights, **options)

        return {
            "dispatch": (self.dispatch, received),
            "cached dispatch": (
                lambda: self.buffer.dispatch(x, handle=self.handle),
                lambda: comm.dispatch(x, None, previous_handle=self.own_handle),
            ),
            "combine": (self.combine, lambda: comm.combine(self.rows, self.own_handle)),
            "low-latency dispatch": (
                self.ll_dispatch,
                lambda: ll_comm.dispatch(x, ids)[0].num_tokens_per_expert,
            ),
            "low-latency dispatch in halves": (
                lambda: self.ll_dispatch(return_recv_hook=True)[4](),
                own_halves,
            ),
            "low-latency combine": (self.ll_combine, own_ll_combine),
            "low-latency combine in halves": (
                lambda: self.ll_combine(return_recv_hook=True)[2](),
                lambda: own_ll_combine(return_recv_hook=True)[1](),
            ),
        }

    def count(self, call: Call) -> tuple[list[str], list[str], int]:
        """Tensor operations, functions of torch.cuda and launches of a call made before."""
        call()
        self.gpu.cuda_calls.clear()
        launches = len(self.gpu.launched)
        with Operations() as operations:
            call()
        return operations.names, self.gpu.cuda_calls[:], len(self.gpu.launched) - launches


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    made = Setting(monkeypatch)
    yield made
    made.buffer.runtime.close()


CALLS = [
    "dispatch",
    "cached dispatch",
    "combine",
    "low-latency dispatch",
    "low-latency dispatch in halves",
    "low-latency combine",
    "low-latency combine in halves",
]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("tracking", [False, True])
def test_calls_in_line_add_nothing(setting: Setting, name: str, tracking: bool) -> None:
    """Callers may have gradients on: calls are outside of autograd anyway."""
    drop_in, library = setting.pairs()[name]
    with torch.no_grad():
        expected = setting.count(library)
    with torch.set_grad_enabled(tracking):
        operations, cuda_calls, launches = setting.count(drop_in)
        assert torch.is_grad_enabled() is tracking
    assert cuda_calls == []
    assert (operations, launches) == (expected[0], expected[2])
    assert len(operations) <= 6


def test_a_refused_call_leaves_grad_mode_as_it_was(setting: Setting) -> None:
    for tracking in (False, True):
        with torch.set_grad_enabled(tracking):
            with pytest.raises(AssertionError, match="combine takes bfloat16"):
                setting.buffer.combine(setting.rows.float(), setting.handle)
            assert torch.is_grad_enabled() is tracking


def test_asynchronous_calls_change_streams_without_contexts(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "EventHandle", lambda: None)
    for name in ("dispatch", "combine"):
        in_line = setting.count(getattr(setting, name))
        beside = setting.count(lambda name=name: getattr(setting, name)(async_finish=True))
        assert beside[0] == in_line[0], "not one tensor more"
        expected = {"current_device": 1, "set_stream": 2, "is_current_stream_capturing": 1}
        assert collections.Counter(beside[1]) == expected


def test_handles_own_no_memory_of_what_callers_receive(setting: Setting) -> None:
    """Callers free rows, ids and weights once they have used them, and combine later."""
    rows, ids, weights, _, handle, _ = setting.dispatch()
    assert ids.shape == weights.shape == (T, K)
    received = [tensor.untyped_storage().data_ptr() for tensor in (rows, ids, weights)]
    assert len(set(received)) == 3
    route = handle.known.handle.state
    kept = (route.block, handle[0], handle[3], handle.known.handle.topk_ids, *handle.kept)
    assert not {tensor.untyped_storage().data_ptr() for tensor in kept} & set(received)
    assert handle[3].shape == (T,)


def test_source_tokens_are_made_for_those_who_look(setting: Setting) -> None:
    before = len(setting.gpu.launched)
    with Operations() as operations:
        handle = setting.dispatch()[4]
    made = len(operations.names)
    with operations:
        assert handle[3] is handle[3]
    assert len(operations.names) > made
    assert len(setting.gpu.launched) == before + 1
