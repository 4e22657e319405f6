"""A communication for flashinfer's expert-parallel MoE layers.

    register()
    layer = MoEEpLayer(..., backend=SplitConfig(comm=ExpertlinkCommConfig()))

or `create_communication(bootstrap, params, "expertlink")`. Tested with flashinfer-python
0.7.2.post1, its communication interface alone.

Rows arrive in layout RANK_MAJOR: row `r * max_tokens_per_rank + i` is the i-th that rank r sent.
In mode "ll", the default, calls of the nvlink engine never wait on the host and take part in CUDA
graphs. For hundreds of tokens per rank and more choose mode "ht".
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from expertlink.communicator import MoECommunicator
from expertlink.config import MoECommunicatorConfig
from expertlink.errors import ClosedError, ConfigurationError, HandleError, InputError
from expertlink.integrations.growing import group_of
from expertlink.integrations.versions import require
from expertlink.types import DispatchHandle

NAME = "expertlink"
SINCE, BEFORE = "0.7.2", "0.8"


@dataclass(frozen=True, kw_only=True)
class ExpertlinkCommConfig:
    """Selects this communication, and what flashinfer does not say about it.

    Attributes:
        mode: as in `MoECommunicatorConfig`.
        engine: as in `MoECommunicatorConfig`.
        timeout_s: seconds that a call waits for other ranks; None: EXPERTLINK_TIMEOUT, else 100.
    """

    mode: Literal["ht", "ll"] = "ll"
    engine: Literal["auto", "collective", "nvlink"] = "auto"
    timeout_s: float | None = None
    backend_name: str = NAME


@functools.cache
def register() -> type:
    """Registers the communication with flashinfer. Local; safe to repeat.

    Returns:
        The class that was registered, a subclass of flashinfer's `MoEEpCommunication`.

    Raises:
        FrameworkVersionError: flashinfer is missing, or of a version that was not tested.
    """
    require("flashinfer-python", since=SINCE, before=BEFORE)
    from flashinfer.moe_ep.core.comm import communication as flash

    class ExpertlinkCommunication(flash.MoEEpCommunication):
        """Making one is collective. Calls are in turns: dispatch, combine, dispatch, and so on."""

        supports_cuda_graph = False  # of an object: whether its engine and mode do

        def __init__(self, bootstrap: Any, params: Any, config: Any = None) -> None:
            super().__init__(bootstrap, params)
            self._config: ExpertlinkCommConfig = config or ExpertlinkCommConfig()
            self._handle: DispatchHandle | None = None
            self._comm: MoECommunicator | None = _communicator(bootstrap, params, self._config)
            captures = self._comm.engine_name == "nvlink" and self._config.mode == "ll"
            vars(self)["supports_cuda_graph"] = captures

        @classmethod
        def is_platform_supported(cls) -> bool:
            """True: some engine runs wherever torch.distributed does."""
            return torch.distributed.is_available()

        def dispatch(
            self,
            hidden_states: Tensor,
            topk_ids: Tensor,
            topk_weights: Tensor | None = None,
            *,
            hidden_states_scale: Tensor | None = None,
            max_tokens_per_rank: int | None = None,
            eplb_local_stats: Tensor | None = None,
        ) -> Any:
            """Collective. `max_tokens_per_rank` and `eplb_local_stats` change nothing.

            Rows of another dtype than the configured one, such as quantized ones, travel as bytes.
            """
            comm = self._open()
            if self._handle is not None:
                raise HandleError("dispatch was called twice without a combine in between")
            plain = hidden_states.dtype is comm.config.dtype
            if plain and hidden_states_scale is not None:
                raise InputError(f"hidden_states_scale was given beside {hidden_states.dtype} rows")
            rows, scales = hidden_states, hidden_states_scale
            if not plain:
                rows = hidden_states.contiguous().view(torch.uint8)
                if scales is None:  # one that nobody reads
                    scales = torch.zeros(rows.shape[0], 1, device=rows.device)
            received, self._handle = comm.dispatch(rows, topk_ids, topk_weights, scales)
            assert received.topk_ids is not None
            ids = received.topk_ids.flatten(0, 1)
            first, invalid = self.ep_rank * self.num_local_experts, self.params.invalid_expert_id
            weights, given = received.topk_weights, received.scales
            return flash.MoEEpDispatchResult(
                hidden_states=received.tokens.flatten(0, 1).view(hidden_states.dtype),
                topk_ids=torch.where(ids < 0, invalid, ids + first).to(topk_ids.dtype),
                topk_weights=None if weights is None else weights.flatten(0, 1),
                tokens_per_rank=comm.config.max_tokens_per_rank,
                hidden_states_scale=None
                if given is None or hidden_states_scale is None
                else given.tensor.flatten(0, 1),
            )

        def combine(self, expert_output: Tensor, *, output: Tensor | None = None) -> Tensor:
            """Collective. Sums over ranks of the experts' rows, `[T, H]`."""
            comm, handle = self._open(), self._handle
            if handle is None:
                raise HandleError("combine was called without a dispatch before it")
            combined = comm.combine(expert_output.view(handle.rows_shape), handle, out=output)
            self._handle = None
            return combined

        def destroy(self) -> None:
            """Releases everything. Safe to repeat."""
            if self._comm is not None:
                self._comm.close()
            self._comm = self._handle = None

        def _open(self) -> MoECommunicator:
            if self._comm is None:
                raise ClosedError("this communication was destroyed")
            return self._comm

    return flash.register_communication(NAME)(ExpertlinkCommunication)


def _communicator(bootstrap: Any, params: Any, config: ExpertlinkCommConfig) -> MoECommunicator:
    """A communicator for flashinfer's parameters. Collective."""
    group = group_of(bootstrap.process_group)
    ranks = (0, 1) if group is None else (group.rank(), group.size())
    if ranks != (bootstrap.rank, bootstrap.world_size):
        raise ConfigurationError(
            f"bootstrap says rank {bootstrap.rank} of {bootstrap.world_size}; its process group "
            f"says rank {ranks[0]} of {ranks[1]}"
        )
    device = None if bootstrap.device is None else torch.device("cuda", bootstrap.device)
    comm = MoECommunicator(
        MoECommunicatorConfig(
            num_experts=params.num_experts,
            hidden_size=params.hidden_size,
            topk=params.top_k,
            max_tokens_per_rank=params.max_tokens_per_rank,
            group=group,
            device=device,
            mode=config.mode,
            engine=config.engine,
            output_layout="rank_major",
            dtype=params.token_dtype,
            timeout_s=config.timeout_s,
        )
    )
    comm.initialize()
    return comm
