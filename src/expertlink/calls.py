"""From a caller's arguments to a checked call of the engine."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from expertlink import quantization
from expertlink.autograd import FollowedDispatch, needs_grad
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall, DispatchCall, Dispatched
from expertlink.errors import InputError
from expertlink.fast_path import UsualForm
from expertlink.handles import (
    check_current,
    check_handle,
    check_same_routing,
    check_unconsumed,
)
from expertlink.types import DispatchBuffers, DispatchHandle, QuantScales, RowKind
from expertlink.validation import (
    check_output_buffer,
    check_routing,
    check_rows,
    check_tensor,
    kind_of,
    plain_kind,
)


class CallBuilder:
    """Checks the arguments of one communicator's calls.

    What decode passes (plain rows, a new routing, tensors of the right form, no gradients) is
    recognised by a few comparisons. All else, faulty arguments included, takes the detailed way.

    Args:
        config: the communicator's configuration.
        device: where its tensors live.
        num_ranks: R.
        identity: marks the communicator's own handles and buffers.

    Attributes:
        num_local_experts: E_loc; known once the ranks have met.
        engine_quantizes: `Engine.quantizes`; known then as well.
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
        self.num_local_experts = 0
        self.engine_quantizes = False
        # What every call looks at, without a property in between.
        self._layout, self._expanded = config.layout, config.layout.expanded
        self._dtype, self._weight_dtype = config.dtype, config.weight_dtype
        self._hidden, self._topk = config.hidden_size, config.topk
        self._block_format, self._zero_copy = config.block_format, config.zero_copy
        self._kind = plain_kind(config)
        self._usual = UsualForm(config, device)

    # -- dispatch ---------------------------------------------------------------------------------

    def dispatch(
        self,
        x: Tensor,
        topk_ids: Tensor | None,
        weights: Tensor | None,
        scales: QuantScales | Tensor | None,
        into: Tensor | DispatchBuffers | None,
        previous: DispatchHandle | None,
        num_sms: int | None = None,
        later: bool = False,
        halves: bool = False,
    ) -> DispatchCall:
        """The call for `MoECommunicator.dispatch`; raises what that documents.

        `into` is its `output_buffer`, `later` its `async_finish`, `halves` its `return_recv_hook`.
        """
        if (
            scales is None
            and previous is None
            and (self._block_format is None or self.engine_quantizes)
            and (into is None or self._is_usual_buffer(into))
            and not (later and halves)
            and not self._zero_copy
            and not torch.is_grad_enabled()
            and self._usual.inputs(x, topk_ids, weights)
        ):
            if into is not None:
                into.generation += 1  # type: ignore[union-attr]
            # By position: names double the time that this takes.
            return DispatchCall(
                x,
                None,
                None,
                topk_ids,
                weights,
                None,
                None,
                False,
                num_sms,
                self._block_format,
                into,  # type: ignore[arg-type]
                halves,
            )
        return self._unusual_dispatch(
            x, topk_ids, weights, scales, into, previous, num_sms, later, halves
        )

    def _is_usual_buffer(self, into: Tensor | DispatchBuffers) -> bool:
        # The kind is this builder's own object: made here, for plain rows with weights.
        return into.__class__ is DispatchBuffers and into.kind is self._kind  # type: ignore[union-attr]

    def _unusual_dispatch(
        self,
        x: Tensor,
        topk_ids: Tensor | None,
        weights: Tensor | None,
        scales: QuantScales | Tensor | None,
        into: Tensor | DispatchBuffers | None,
        previous: DispatchHandle | None,
        num_sms: int | None,
        later: bool,
        halves: bool,
    ) -> DispatchCall:
        config, device = self._config, self._device
        rows, quant = check_rows(config, x, scales, device=device)
        if topk_ids is None and previous is None:
            raise InputError(
                "topk_ids is None; only a dispatch with previous_handle may leave it out"
            )
        ids_TK, weights_TK = check_routing(config, topk_ids, weights, rows.shape[0], device=device)
        if previous is not None:
            check_handle(previous, self._identity).wait()
            check_same_routing(previous, topk_ids, ids_TK, rows.shape[0])
        tracked = needs_grad(rows, weights_TK) or self.tracked(
            rows, None if previous is None else previous.topk_weights
        )
        kind, quantize_to = self._kind, None
        if quant is not None:
            kind = kind_of(rows, quant)
        elif self._block_format is not None:
            if needs_grad(rows):
                raise InputError(
                    "input requires grad, but quantized rows carry no gradients: dispatch under "
                    "torch.no_grad(), or configure quantization=None"
                )
            if self.engine_quantizes:
                quantize_to = self._block_format
            else:
                rows, values = quantization.quantize(rows, self._block_format)
                quant = QuantScales(values, self._block_format)
        self._check_halves(halves, later=later, tracked=tracked)
        if self._zero_copy:
            if into is not None:
                raise InputError("output_buffer and zero_copy=True exclude each other")
            if tracked:
                raise InputError(
                    "zero_copy=True cannot be used where gradients are tracked: a later dispatch "
                    "overwrites the rows that backward needs"
                )
        buffer = buffers = None
        if into is not None:
            if tracked:
                raise InputError(
                    "output_buffer cannot be used where gradients are tracked: backward needs the "
                    "rows to stay as they are"
                )
            if isinstance(into, DispatchBuffers):
                buffers = into
                earlier = None if previous is None else previous.topk_weights
                self._check_buffers(buffers, kind, weights is not None or earlier is not None)
                buffers.generation += 1
            else:
                buffer = into
                self._check_buffer(buffer, kind, previous)
        return DispatchCall(
            x_TW=rows,
            scales=None if quant is None else quant.tensor,
            scale_format=None if quant is None else quant.format,
            topk_ids_TK=None if previous is not None else ids_TK,
            weights_TK=weights_TK,
            output_buffer=buffer,
            previous=None if previous is None else previous.state,
            # Gradients of the experts multiply whole padded blocks: garbage there must not be NaN.
            zero_padding=torch.is_grad_enabled(),
            num_sms=num_sms,
            quantize_to=quantize_to,
            buffers=buffers,
            halves=halves,
        )

    def tracked(self, rows: Tensor, weights_TK: Tensor | None) -> bool:
        """Whether autograd follows a dispatch: its rows, or the weights that come out with them.

        `weights_TK` are those of the routing, which a cached dispatch may have kept.
        """
        return needs_grad(rows, None if self._expanded else weights_TK)

    def handle(
        self,
        call: DispatchCall,
        started: Dispatched,
        previous: DispatchHandle | None,
        topk_ids: Tensor | None,
    ) -> DispatchHandle:
        """The handle of a dispatch that was started with the caller's `topk_ids`."""
        ids_TK, weights_TK, buffers = started.topk_ids_TK, call.weights_TK, call.buffers
        leases = () if buffers is None else ((buffers, buffers.generation),)
        if previous is not None:
            ids_TK = previous.topk_ids
            if weights_TK is None:
                weights_TK = previous.topk_weights
            leases += tuple(lease for lease in previous.leases if lease[0] is not buffers)
        elif ids_TK is None:
            assert call.topk_ids_TK is not None
            ids_TK = call.topk_ids_TK.clone()
        seen = None
        if topk_ids is not None and not topk_ids.is_inference():  # those have no version
            seen = (topk_ids, topk_ids._version)
        shape: tuple[int, ...] = started.output.tokens.shape
        if shape[-1] != self._hidden:
            shape = (*shape[:-1], self._hidden)
        handle = DispatchHandle(
            self._identity,
            started.call,
            call.x_TW.shape[0],
            self._layout,
            shape,
            ids_TK,
            weights_TK,
            started.state,
            False,
            seen,
            leases,
        )
        if isinstance(started, FollowedDispatch):
            handle._anchor = started.anchor
        return handle

    def _check_buffer(self, buffer: Tensor, kind: RowKind, previous: DispatchHandle | None) -> None:
        check_output_buffer(
            self._config,
            buffer,
            kind,
            num_ranks=self._num_ranks,
            num_local=self.num_local_experts,
            device=self._device,
        )
        if previous is None or self._layout.padded:
            return
        if len(buffer) < previous.rows_shape[0]:
            raise InputError(
                f"output_buffer has {len(buffer)} rows; the routing of previous_handle needs "
                f"{previous.rows_shape[0]}"
            )

    # -- buffers ----------------------------------------------------------------------------------

    def kind(
        self, rows: Tensor | None, scales: QuantScales | Tensor | None, *, weighted: bool
    ) -> RowKind:
        """The kind of rows that examples stand for; None: rows of the configuration."""
        if self._zero_copy:
            raise InputError("create_buffers and zero_copy=True exclude each other")
        kind = self._kind
        if rows is not None or scales is not None:
            _, quant = check_rows(self._config, rows, scales, device=self._device)
            if quant is not None:
                assert rows is not None
                kind = kind_of(rows, quant)
        return kind if weighted else dataclasses.replace(kind, weighted=False)

    def _check_buffers(self, buffers: DispatchBuffers, kind: RowKind, weighted: bool) -> None:
        if buffers.owner != self._identity:
            raise InputError("output_buffer belongs to another communicator")
        have = buffers.kind
        if weighted and not have.weighted and not self._expanded:
            raise InputError(
                "output_buffer was made with create_buffers(weighted=False); this dispatch has "
                "weights"
            )
        beside = (have.scale_dtype, have.scale_columns) == (kind.scale_dtype, kind.scale_columns)
        if not beside or (have.dtype, have.width) != (kind.dtype, kind.width):
            raise InputError(f"output_buffer was made for {have}; this dispatch has {kind}")

    # -- combine ----------------------------------------------------------------------------------

    def combine(
        self,
        rows: Tensor,
        handle: DispatchHandle,
        out: Tensor | None,
        weight_grads: Tensor | None,
        weights: Tensor | None = None,
        num_sms: int | None = None,
        later: bool = False,
        halves: bool = False,
    ) -> CombineCall:
        """The call for `MoECommunicator.combine`; raises what that documents."""
        if (
            weight_grads is None
            and handle.__class__ is DispatchHandle
            and handle.owner == self._identity
            and not handle.consumed
            and not (later and halves)
            and not torch.is_grad_enabled()
            and self._usual.rows(rows, handle, out, weights)
        ):
            check_current(handle)
            if handle._finish is not None:
                handle.wait()
            weighted = self._expanded and (weights is not None or handle.topk_weights is not None)
            if out is None:
                out = rows.new_empty((handle.num_tokens, self._hidden))
            return CombineCall(rows, handle.state, weighted, out, None, num_sms, weights, halves)
        return self._unusual_combine(
            rows, handle, out, weight_grads, weights, num_sms, later, halves
        )

    def _unusual_combine(
        self,
        rows: Tensor,
        handle: DispatchHandle,
        out: Tensor | None,
        weight_grads: Tensor | None,
        weights: Tensor | None,
        num_sms: int | None,
        later: bool,
        halves: bool,
    ) -> CombineCall:
        device = self._device
        check_handle(handle, self._identity)
        check_unconsumed(handle)
        handle.wait()
        shape = handle.rows_shape
        rows = check_tensor(
            "expert_output", rows, device=device, dtypes=(self._dtype,), shape=shape
        )
        numbers = (self._weight_dtype,)
        if weight_grads is not None:
            leading = shape[:-1] if self._expanded else (*shape[:-1], self._topk)
            weight_grads = check_tensor(
                "weight_grads", weight_grads, device=device, dtypes=numbers, shape=leading
            ).contiguous()
        if weights is not None:
            if not self._expanded:
                raise InputError(
                    f"weights cannot be given for layout {self._layout.value}: its rows have been "
                    "weighted by the experts"
                )
            weights = check_tensor(
                "weights", weights, device=device, dtypes=numbers, shape=shape[:-1]
            ).contiguous()
        tracked = needs_grad(rows, handle.topk_weights, weights, handle._anchor)
        if weights is not None and tracked:
            raise InputError("weights cannot be used where gradients are tracked")
        self._check_halves(halves, later=later, tracked=tracked)
        if handle.leases and tracked:
            raise InputError(
                "a dispatch into DispatchBuffers cannot be combined where gradients are tracked: a "
                "later dispatch overwrites what backward needs"
            )
        result_shape = (handle.num_tokens, self._hidden)
        if out is not None:
            check_tensor(
                "out",
                out,
                device=device,
                dtypes=(self._dtype,),
                shape=result_shape,
                contiguous=True,
            )
            if tracked:
                raise InputError("out cannot be used where gradients are tracked")
        return CombineCall(
            rows=rows.contiguous(),
            state=handle.state,
            weighted=self._expanded and (weights is not None or handle.topk_weights is not None),
            out_TH=rows.new_empty(result_shape) if out is None else out,
            weight_grads=weight_grads,
            num_sms=num_sms,
            slot_weights=weights,
            halves=halves,
        )

    @staticmethod
    def _check_halves(halves: bool, *, later: bool, tracked: bool) -> None:
        if halves and later:
            raise InputError("return_recv_hook and async_finish exclude each other")
        if halves and tracked:
            raise InputError("return_recv_hook cannot be used where gradients are tracked")

    def check_handle(self, handle: object) -> None:
        """Refuses what is not a handle of this communicator, or stale."""
        check_handle(handle, self._identity)
