"""From a caller's arguments to a checked call of the engine."""

from __future__ import annotations

import torch
from torch import Tensor

from expertlink import quantization
from expertlink.autograd import needs_grad
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall, DispatchCall, Dispatched
from expertlink.errors import HandleError, InputError, RoutingChangedError
from expertlink.types import DispatchHandle, QuantScales
from expertlink.validation import check_routing, check_rows, check_tensor


class CallBuilder:
    """Checks the arguments of one communicator's calls.

    Args:
        config: the communicator's configuration.
        device: where its tensors live.
        num_ranks: R.
        identity: marks the communicator's own handles.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        device: torch.device,
        num_ranks: int,
        identity: int,
    ) -> None:
        self._config = config
        self._device = device
        self._num_ranks = num_ranks
        self._identity = identity
        self.num_local_experts = 0  # known once the ranks have met

    def dispatch(
        self,
        x: Tensor,
        topk_ids: Tensor | None,
        weights: Tensor | None,
        scales: QuantScales | Tensor | None,
        output_buffer: Tensor | None,
        previous: DispatchHandle | None,
        num_sms: int | None = None,
    ) -> DispatchCall:
        """The call for `MoECommunicator.dispatch`; raises what that documents."""
        config, device = self._config, self._device
        rows, quant = check_rows(config, x, scales, device=device)
        if topk_ids is None and previous is None:
            raise InputError(
                "topk_ids is None; only a dispatch with previous_handle may leave it out"
            )
        ids_TK, weights_TK = check_routing(config, topk_ids, weights, rows.shape[0], device=device)
        if previous is not None:
            self._check_previous(previous, topk_ids, ids_TK, rows.shape[0])
        block_format = config.block_format
        if quant is None and block_format is not None:
            if rows.requires_grad and torch.is_grad_enabled():
                raise InputError(
                    "input requires grad, but quantized rows carry no gradients: dispatch under "
                    "torch.no_grad(), or configure quantization=None"
                )
            rows, scale_values = quantization.quantize(rows, block_format)
            quant = QuantScales(scale_values, block_format)
        if config.zero_copy:
            if output_buffer is not None:
                raise InputError("output_buffer and zero_copy=True exclude each other")
            if needs_grad(rows, weights_TK):
                raise InputError(
                    "zero_copy=True cannot be used where gradients are tracked: a later dispatch "
                    "overwrites the rows that backward needs"
                )
        if output_buffer is not None:
            if needs_grad(rows, weights_TK):
                raise InputError(
                    "output_buffer cannot be used where gradients are tracked: backward needs the "
                    "rows to stay as they are"
                )
            self._check_buffer(output_buffer, rows, previous)
        return DispatchCall(
            x_TW=rows,
            scales=None if quant is None else quant.tensor,
            scale_format=None if quant is None else quant.format,
            topk_ids_TK=None if previous is not None else ids_TK,
            weights_TK=weights_TK,
            output_buffer=output_buffer,
            previous=None if previous is None else previous.state,
            # Gradients of the experts multiply whole padded blocks: garbage there must not be NaN.
            zero_padding=torch.is_grad_enabled(),
            num_sms=num_sms,
        )

    def tracked(self, call: DispatchCall) -> bool:
        """Whether autograd follows a dispatch: its rows, or the weights that come out with them."""
        weights_TK = None if self._config.layout.expanded else call.weights_TK
        return needs_grad(call.x_TW, weights_TK)

    def handle(
        self,
        call: DispatchCall,
        started: Dispatched,
        previous: DispatchHandle | None,
        topk_ids: Tensor | None,
    ) -> DispatchHandle:
        """The handle of a dispatch that was started with the caller's `topk_ids`."""
        if previous is None:
            assert call.topk_ids_TK is not None
            ids_TK = started.topk_ids_TK
            if ids_TK is None:
                ids_TK = call.topk_ids_TK.clone()
        else:
            ids_TK = previous.topk_ids
        weights_TK = call.weights_TK
        if previous is not None and weights_TK is None:
            weights_TK = previous.topk_weights
        seen = None
        if topk_ids is not None and not topk_ids.is_inference():  # those have no version
            seen = (topk_ids, topk_ids._version)
        return DispatchHandle(
            owner=self._identity,
            call=started.call,
            num_tokens=call.x_TW.shape[0],
            layout=self._config.layout,
            rows_shape=(*started.output.tokens.shape[:-1], self._config.hidden_size),
            topk_ids=ids_TK,
            topk_weights=weights_TK,
            state=started.state,
            ids_seen=seen,
        )

    def _check_previous(
        self,
        previous: DispatchHandle,
        topk_ids: Tensor | None,
        ids_TK: Tensor | None,
        num_tokens: int,
    ) -> None:
        self.check_owner(previous)
        previous.wait()
        if num_tokens != previous.num_tokens:
            raise RoutingChangedError(
                f"input has {num_tokens} tokens, previous_handle's dispatch had "
                f"{previous.num_tokens}: dispatch without previous_handle when the routing changes"
            )
        if topk_ids is None or ids_TK is None:
            return
        if previous.ids_seen is not None:
            seen, version = previous.ids_seen
            if seen is topk_ids and version == topk_ids._version:
                return
        same = ids_TK.to(torch.int64) == previous.topk_ids.to(torch.int64)
        if not bool(same.all()):
            token = int((~same).any(dim=1).nonzero()[0])
            raise RoutingChangedError(
                f"topk_ids[{token}]={ids_TK[token].tolist()} differs from the routing of "
                f"previous_handle, {previous.topk_ids[token].tolist()}: dispatch without "
                "previous_handle when the routing changes"
            )

    def _check_buffer(self, buffer: Tensor, rows: Tensor, previous: DispatchHandle | None) -> None:
        """Shape of `output_buffer`; how many rows arrive is only known, and checked, later."""
        layout, ranks = self._config.layout, self._num_ranks
        shape: list[int | None] = [None, rows.shape[1]]
        if layout.padded:
            per_rank = self._config.max_tokens_per_rank
            shape = [ranks, per_rank, rows.shape[1]]
            if layout.expanded:
                shape = [self.num_local_experts, ranks * per_rank, rows.shape[1]]
        check_tensor(
            "output_buffer",
            buffer,
            device=self._device,
            dtypes=(rows.dtype,),
            shape=tuple(shape),
            contiguous=True,
        )
        if previous is not None and not layout.padded and len(buffer) < previous.rows_shape[0]:
            raise InputError(
                f"output_buffer has {len(buffer)} rows; the routing of previous_handle needs "
                f"{previous.rows_shape[0]}"
            )

    def combine(
        self,
        rows: Tensor,
        handle: DispatchHandle,
        out: Tensor | None,
        weight_grads: Tensor | None,
        num_sms: int | None = None,
    ) -> CombineCall:
        """The call for `MoECommunicator.combine`; raises what that documents."""
        config = self._config
        self.check_owner(handle)
        if handle.consumed:
            raise HandleError(
                f"the handle of dispatch #{handle.call} was already combined; every combine needs "
                "a dispatch of its own (previous_handle= makes that cheap)"
            )
        handle.wait()
        shape = handle.rows_shape
        rows = check_tensor(
            "expert_output", rows, device=self._device, dtypes=(config.dtype,), shape=shape
        )
        if weight_grads is not None:
            leading = shape[:-1] if config.layout.expanded else (*shape[:-1], config.topk)
            weight_grads = check_tensor(
                "weight_grads",
                weight_grads,
                device=self._device,
                dtypes=(config.weight_dtype,),
                shape=leading,
            ).contiguous()
        result_shape = (handle.num_tokens, config.hidden_size)
        if out is not None:
            check_tensor(
                "out",
                out,
                device=self._device,
                dtypes=(config.dtype,),
                shape=result_shape,
                contiguous=True,
            )
            if needs_grad(rows, handle.topk_weights):
                raise InputError("out cannot be used where gradients are tracked")
        return CombineCall(
            rows=rows.contiguous(),
            state=handle.state,
            weighted=config.layout.expanded and handle.topk_weights is not None,
            out_TH=rows.new_empty(result_shape) if out is None else out,
            weight_grads=weight_grads,
            num_sms=num_sms,
        )

    def check_owner(self, handle: object) -> None:
        """Refuses what is not a handle of this communicator."""
        if not isinstance(handle, DispatchHandle):
            raise HandleError(f"a DispatchHandle is expected, not {type(handle).__name__}")
        if handle.owner != self._identity:
            raise HandleError("the handle belongs to another communicator")
