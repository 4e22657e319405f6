"""From a caller's arguments to a checked call of the engine."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from expertlink import quantization
from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import CombineCall, DispatchCall, Dispatched
from expertlink.errors import InputError
from expertlink.fast_path import FastPath
from expertlink.gradients import TrackedDispatch, anchor_of, needs_grad
from expertlink.handles import (
    check_current,
    check_handle,
    check_same_routing,
)
from expertlink.types import (
    DispatchBuffers,
    DispatchHandle,
    QuantScales,
    RoutingScope,
    RowKind,
)
from expertlink.validation import (
    check_output_buffer,
    check_routing,
    check_rows,
    check_tensor,
    check_transform,
    kind_of,
    plain_kind,
    transform_level,
)


class CallBuilder:
    """Checks the arguments of one communicator's calls and makes the engine's calls of them.

    There are two paths. The fast path recognizes, by a few comparisons, what nearly all calls
    pass: plain rows, or rows with scales of a kind that has been accepted before, a new routing or
    that of an own handle, tensors of the right form. All else, wrong arguments included, takes the
    checked path. Both make the same call. The communicator passes arguments by position: names
    take time that decode notices.

    Args:
        config: the communicator's configuration.
        device: where its tensors live.
        rank: this rank.
        num_ranks: R.
        num_local_experts: E_loc.
        engine_quantizes: `Engine.quantizes`.
        identity: marks the communicator's own handles and buffers.
        scope: which handles of other communicators it can use.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        device: torch.device,
        rank: int,
        num_ranks: int,
        num_local_experts: int,
        engine_quantizes: bool,
        identity: int,
        scope: RoutingScope,
    ) -> None:
        self._config = config
        self._device = device
        self._rank, self._num_ranks, self._num_local_experts = rank, num_ranks, num_local_experts
        self._identity, self._scope = identity, scope
        # What every call reads, without a property in between.
        self._layout, self._expanded = config.layout, config.layout.expanded
        self._dtype, self._weight_dtype = config.dtype, config.weight_dtype
        self._hidden, self._topk = config.hidden_size, config.topk
        self._block_format, self._zero_copy = config.block_format, config.zero_copy
        self._engine_quantizes = engine_quantizes
        self._kind = plain_kind(config)
        # The engine gets plain rows as they are, even if it quantizes them.
        passes_rows = config.block_format is None or engine_quantizes
        self._fast = FastPath(config, device, self._kind if passes_rows else None)
        self._may_track = config.block_format is None and not config.zero_copy

    # -- dispatch ---------------------------------------------------------------------------------

    def dispatch(
        self,
        input: Tensor,
        topk_ids: Tensor | None,
        weights: Tensor | None = None,
        scales: QuantScales | Tensor | None = None,
        output_buffer: Tensor | DispatchBuffers | None = None,
        previous_handle: DispatchHandle | None = None,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        num_sms: int | None = None,
    ) -> DispatchCall:
        """The call for `MoECommunicator.dispatch`; raises what that documents."""
        values, scale_format, quantize_to = scales, self._block_format, None
        if scales is None:
            scale_format, quantize_to = None, scale_format
        elif isinstance(scales, QuantScales):
            values, scale_format = scales.tensor, scales.format
        kind = self._fast.kind_of(input, values, scale_format)  # type: ignore[arg-type]
        if (
            kind is not None
            and (output_buffer is None or self._takes_buffers(output_buffer, kind, previous_handle))
            and not (async_finish and return_recv_hook)
            and (
                not (tracking := torch.is_grad_enabled())
                # What excludes gradients is checked where there may be some.
                or (output_buffer is None and not return_recv_hook and self._may_track)
            )
            and transform_level() is None
            and (
                self._fast.takes_routing(topk_ids, weights, input.shape[0])
                if previous_handle is None
                else self._takes_cached(input.shape[0], topk_ids, weights, previous_handle)
            )
        ):
            if output_buffer is not None:
                output_buffer.generation += 1  # type: ignore[union-attr]
            # By position: keywords would double the 0.2 us that this takes.
            return DispatchCall(
                input,
                values,  # type: ignore[arg-type]
                scale_format,
                topk_ids if previous_handle is None else None,
                weights,
                None,
                None if previous_handle is None else previous_handle.state,
                tracking,  # experts' gradients multiply padding, which must not be NaN
                num_sms,
                quantize_to,
                output_buffer,  # type: ignore[arg-type]
                return_recv_hook,
            )
        return self._dispatch_checked(
            input,
            topk_ids,
            weights,
            scales,
            output_buffer=output_buffer,
            previous_handle=previous_handle,
            async_finish=async_finish,
            return_recv_hook=return_recv_hook,
            num_sms=num_sms,
        )

    def _takes_buffers(
        self,
        buffers: Tensor | DispatchBuffers,
        kind: RowKind,
        previous_handle: DispatchHandle | None,
    ) -> bool:
        """Whether these are the communicator's own, for such rows with weights, with room."""
        return (
            isinstance(buffers, DispatchBuffers)
            and buffers.kind is kind
            and not self._zero_copy
            and (
                previous_handle is None
                or len(buffers.output.tokens) >= previous_handle.rows_shape[0]
            )
        )

    def _takes_cached(
        self,
        num_tokens: int,
        topk_ids: Tensor | None,
        weights: Tensor | None,
        handle: DispatchHandle,
    ) -> bool:
        """Whether rows go the way of an own handle, whose ids are given again, or not."""
        if handle.__class__ is not DispatchHandle or handle.owner != self._identity:
            return False
        if topk_ids is not None:
            seen = handle.ids_seen
            if seen is None or seen[0] is not topk_ids or seen[1] != topk_ids._version:
                return False
        if num_tokens != handle.num_tokens or not self._fast.takes_new_weights(weights, num_tokens):
            return False
        if handle.leases:
            check_current(handle)
        if handle._finish is not None:
            handle.wait()
        return True

    def _dispatch_checked(
        self,
        input: Tensor,
        topk_ids: Tensor | None,
        weights: Tensor | None,
        scales: QuantScales | Tensor | None,
        *,
        output_buffer: Tensor | DispatchBuffers | None,
        previous_handle: DispatchHandle | None,
        async_finish: bool,
        return_recv_hook: bool,
        num_sms: int | None,
    ) -> DispatchCall:
        check_transform()
        config, device = self._config, self._device
        rows, quant = check_rows(config, input, scales, device=device, rank=self._rank)
        if topk_ids is None and previous_handle is None:
            raise InputError(
                "topk_ids is None; only a dispatch with previous_handle may leave it out"
            )
        ids_TK, weights_TK = check_routing(config, topk_ids, weights, rows.shape[0], device=device)
        kept_weights_TK = None
        if previous_handle is not None:
            previous_handle = self.check_handle(previous_handle)
            previous_handle.wait()
            check_same_routing(previous_handle, topk_ids, ids_TK, rows.shape[0])
            kept_weights_TK = previous_handle.topk_weights
        tracked = needs_grad(rows, weights_TK) or self.is_tracked(rows, kept_weights_TK)
        kind, quantize_to = self._kind, None
        if quant is not None:
            kind = self._fast.accept(kind_of(rows, quant))
        elif self._block_format is not None:
            if needs_grad(rows):
                raise InputError(
                    "input requires grad, but quantized rows carry no gradients: dispatch under "
                    "torch.no_grad(), or configure quantization=None"
                )
            if self._engine_quantizes:
                quantize_to = self._block_format
            else:
                rows, values = quantization.quantize(rows, self._block_format)
                quant = QuantScales(values, self._block_format)
        _check_flags(async_finish=async_finish, return_recv_hook=return_recv_hook, tracked=tracked)
        if self._zero_copy:
            if output_buffer is not None:
                raise InputError("output_buffer and zero_copy=True exclude each other")
            if tracked:
                raise InputError(
                    "zero_copy=True cannot be used where gradients are tracked: a later dispatch "
                    "overwrites the rows that backward needs"
                )
        buffer = buffers = None
        if output_buffer is not None:
            if tracked:
                raise InputError(
                    "output_buffer cannot be used where gradients are tracked: backward needs the "
                    "rows to stay as they are"
                )
            if isinstance(output_buffer, DispatchBuffers):
                buffers = output_buffer
                weighted = weights is not None or kept_weights_TK is not None
                self._check_buffers(buffers, kind, weighted=weighted)
                self._check_room(buffers.output.tokens, previous_handle)
                buffers.generation += 1
            else:
                buffer = output_buffer
                self._check_buffer(buffer, kind, previous_handle)
        return DispatchCall(
            x_TW=rows,
            scales=None if quant is None else quant.tensor,
            scale_format=None if quant is None else quant.format,
            topk_ids_TK=None if previous_handle is not None else ids_TK,
            weights_TK=weights_TK,
            output_buffer=buffer,
            previous=None if previous_handle is None else previous_handle.state,
            # Gradients of the experts multiply whole padded blocks: garbage there must not be NaN.
            zero_padding=torch.is_grad_enabled(),
            num_sms=num_sms,
            quantize_to=quantize_to,
            buffers=buffers,
            return_recv_hook=return_recv_hook,
        )

    def is_tracked(self, rows: Tensor, weights_TK: Tensor | None) -> bool:
        """Whether autograd tracks a dispatch: its rows, or the weights that come out with them.

        `weights_TK` are those of the routing, which a cached dispatch may have kept.
        """
        return needs_grad(rows, None if self._expanded else weights_TK)

    def handle(
        self,
        call: DispatchCall,
        started: Dispatched,
        previous_handle: DispatchHandle | None,
        topk_ids: Tensor | None,
    ) -> DispatchHandle:
        """The handle of a dispatch that was started with the caller's `topk_ids`."""
        ids_TK, weights_TK, buffers = started.topk_ids_TK, call.weights_TK, call.buffers
        leases = () if buffers is None else ((buffers, buffers.generation),)
        if previous_handle is not None:
            previous_handle = previous_handle.plain()
            ids_TK = previous_handle._topk_ids
            if weights_TK is None:
                weights_TK = previous_handle.topk_weights
            if previous_handle.leases:
                kept = (lease for lease in previous_handle.leases if lease[0] is not buffers)
                leases = (*leases, *kept)
        elif ids_TK is None:
            assert call.topk_ids_TK is not None
            ids_TK = call.topk_ids_TK.clone()
        seen = None
        if topk_ids is not None and not topk_ids.is_inference():  # those have no version
            seen = (topk_ids, topk_ids._version)
        shape: tuple[int, ...] = started.output.tokens.shape
        if shape[-1] != self._hidden:
            shape = (*shape[:-1], self._hidden)
        # By position: keywords take twice as long.
        handle = DispatchHandle(
            self._identity,
            self._scope,
            started.call,
            call.x_TW.shape[0],
            self._layout,
            shape,
            ids_TK,
            weights_TK,
            started.state,
            seen,
            leases,
        )
        if isinstance(started, TrackedDispatch):
            handle._anchor = started.anchor
        return handle

    def _check_buffer(
        self, buffer: Tensor, kind: RowKind, previous_handle: DispatchHandle | None
    ) -> None:
        check_output_buffer(
            self._config,
            buffer,
            kind,
            num_ranks=self._num_ranks,
            num_local=self._num_local_experts,
            device=self._device,
        )
        self._check_room(buffer, previous_handle)

    def _check_room(self, buffer: Tensor, previous_handle: DispatchHandle | None) -> None:
        """Refuses a buffer with room for fewer rows than an earlier dispatch received."""
        if previous_handle is None or self._layout.padded:
            return
        if len(buffer) < previous_handle.rows_shape[0]:
            raise InputError(
                f"output_buffer has {len(buffer)} rows; the routing of previous_handle needs "
                f"{previous_handle.rows_shape[0]}"
            )

    # -- buffers ----------------------------------------------------------------------------------

    def kind(
        self, rows: Tensor | None, scales: QuantScales | Tensor | None, *, weighted: bool
    ) -> RowKind:
        """The kind of rows of which examples are given; None: rows of the configuration."""
        if self._zero_copy:
            raise InputError("create_buffers and zero_copy=True exclude each other")
        kind = self._kind
        if rows is not None or scales is not None:
            _, quant = check_rows(self._config, rows, scales, device=self._device, rank=self._rank)
            if quant is not None:
                assert rows is not None
                kind = self._fast.accept(kind_of(rows, quant))
        return kind if weighted else dataclasses.replace(kind, weighted=False)

    def _check_buffers(self, buffers: DispatchBuffers, kind: RowKind, *, weighted: bool) -> None:
        if buffers.owner != self._identity:
            raise InputError("output_buffer belongs to another communicator")
        have = buffers.kind
        if weighted and not have.weighted and not self._expanded:
            raise InputError(
                "output_buffer was made with create_buffers(weighted=False); this dispatch has "
                "weights"
            )
        same_rows = (have.dtype, have.width) == (kind.dtype, kind.width)
        same_scales = have.scale_dtype == kind.scale_dtype
        same_scales &= have.scale_columns == kind.scale_columns
        if not (same_rows and same_scales):
            raise InputError(f"output_buffer was made for {have}; this dispatch has {kind}")

    # -- combine ----------------------------------------------------------------------------------

    def combine(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        out: Tensor | None = None,
        weights: Tensor | None = None,
        topk_weights: Tensor | None = None,
        weight_grads: Tensor | None = None,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        num_sms: int | None = None,
    ) -> CombineCall:
        """The call for `MoECommunicator.combine`; raises what that documents."""
        if (
            weight_grads is None
            and handle.__class__ is DispatchHandle
            and handle.owner == self._identity
            and not (async_finish and return_recv_hook)
            and (
                not torch.is_grad_enabled()
                or (out is None and weights is None and not return_recv_hook and not handle.leases)
            )
            and transform_level() is None
            and self._fast.takes_combine(expert_output, handle, out, weights, topk_weights)
        ):
            if handle.leases:
                check_current(handle)
            if handle._finish is not None:
                handle.wait()
            weighted = self._expanded and (
                weights is not None or topk_weights is not None or handle.topk_weights is not None
            )
            if out is None:
                # A tuple for the size would take as long as the rest of it.
                out = expert_output.new_empty(handle.num_tokens, self._hidden)
            # By position: keywords take twice as long.
            return CombineCall(
                expert_output,
                handle.state,
                weighted,
                out,
                None,
                num_sms,
                weights,
                return_recv_hook,
                topk_weights,
            )
        return self._combine_checked(
            expert_output,
            handle,
            out=out,
            weights=weights,
            topk_weights=topk_weights,
            weight_grads=weight_grads,
            async_finish=async_finish,
            return_recv_hook=return_recv_hook,
            num_sms=num_sms,
        )

    def _combine_checked(
        self,
        expert_output: Tensor,
        handle: DispatchHandle,
        *,
        out: Tensor | None,
        weights: Tensor | None,
        topk_weights: Tensor | None,
        weight_grads: Tensor | None,
        async_finish: bool,
        return_recv_hook: bool,
        num_sms: int | None,
    ) -> CombineCall:
        check_transform()
        device = self._device
        handle = self.check_handle(handle)
        handle.wait()
        shape = (*handle.rows_shape[:-1], self._hidden)
        rows = check_tensor(
            "expert_output", expert_output, device=device, dtypes=(self._dtype,), shape=shape
        )
        weight_dtypes = (self._weight_dtype,)
        if weight_grads is not None:
            leading = shape[:-1] if self._expanded else (*shape[:-1], self._topk)
            weight_grads = check_tensor(
                "weight_grads", weight_grads, device=device, dtypes=weight_dtypes, shape=leading
            ).contiguous()
        for name, given in (("weights", weights), ("topk_weights", topk_weights)):
            if given is not None and not self._expanded:
                raise InputError(
                    f"{name} cannot be given for layout {self._layout.value}: its rows have been "
                    "weighted by the experts"
                )
        if weights is not None:
            if topk_weights is not None:
                raise InputError("weights and topk_weights exclude each other")
            weights = check_tensor(
                "weights", weights, device=device, dtypes=weight_dtypes, shape=shape[:-1]
            ).contiguous()
        if topk_weights is not None:
            topk_weights = check_tensor(
                "topk_weights",
                topk_weights,
                device=device,
                dtypes=weight_dtypes,
                shape=(handle.num_tokens, self._topk),
            ).contiguous()
        weights_TK = handle.topk_weights if topk_weights is None else topk_weights
        tracked = needs_grad(rows, weights_TK, weights, anchor_of(handle))
        if weights is not None and tracked:
            raise InputError("weights cannot be used where gradients are tracked")
        _check_flags(async_finish=async_finish, return_recv_hook=return_recv_hook, tracked=tracked)
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
            weighted=self._expanded and (weights is not None or weights_TK is not None),
            out_TH=rows.new_empty(result_shape) if out is None else out,
            weight_grads=weight_grads,
            num_sms=num_sms,
            slot_weights=weights,
            return_recv_hook=return_recv_hook,
            weights_TK=topk_weights,
        )

    def check_handle(self, handle: object) -> DispatchHandle:
        """Refuses what is no handle that this communicator can use, or stale."""
        return check_handle(
            handle,
            identity=self._identity,
            scope=self._scope,
            max_tokens=self._config.max_tokens_per_rank,
        )


def _check_flags(*, async_finish: bool, return_recv_hook: bool, tracked: bool) -> None:
    if return_recv_hook and async_finish:
        raise InputError("return_recv_hook and async_finish exclude each other")
    if return_recv_hook and tracked:
        raise InputError("return_recv_hook cannot be used where gradients are tracked")
