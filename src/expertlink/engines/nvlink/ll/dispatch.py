"""Low-latency dispatch of one rank: outputs, arguments, launches.

Knows addresses and nothing of process groups, so that several ranks can live in one process.
Nothing here waits for the device, so all of it can be captured in CUDA graphs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.base import DispatchCall
from expertlink.engines.nvlink import tuning
from expertlink.engines.nvlink.launch import KernelName, Launch, Run
from expertlink.engines.nvlink.ll.arena import LlArena
from expertlink.engines.nvlink.ll.arguments import DISPATCH, Flag, signature
from expertlink.engines.nvlink.ll.launch import HalvesLauncher, LlLaunch
from expertlink.engines.nvlink.ll.plan import REFUSED, default_sms, shared_words
from expertlink.engines.nvlink.ll.tables import BufferTables, LlRoute, LlTableLayout, said_by
from expertlink.engines.nvlink.shared import ScaleKind
from expertlink.engines.nvlink.tables import ORIGINS
from expertlink.engines.outputs import (
    LazyOutput,
    MemorySource,
    OutputSizes,
    largest_output,
    new_scales,
    without_weights,
)
from expertlink.engines.ranks import capacity, metadata
from expertlink.engines.ranks.header import Operation
from expertlink.jit.kernel import Arguments
from expertlink.quantization import scale_columns
from expertlink.types import (
    BlockFormat,
    DispatchLayout,
    DispatchOutput,
    QuantScales,
    RowKind,
)

_SCALE_KINDS = {
    None: ScaleKind.NOT_QUANTIZED,
    BlockFormat.E4M3_FLOAT32: ScaleKind.FLOAT_SCALES,
    BlockFormat.E4M3_POW2: ScaleKind.POWER_SCALES,
    BlockFormat.E4M3_UE8M0: ScaleKind.PACKED_SCALES,
}

# Plain numbers: the operators of enumerations take microseconds.
_WIDE_IDS, _NEW_WEIGHTS = int(Flag.WIDE_IDS), int(Flag.NEW_WEIGHTS)
_ALONE = int(Flag.ALONE)
_DISPATCH, _CACHED_DISPATCH = Operation.DISPATCH, Operation.CACHED_DISPATCH
_PLAIN, _QUANTIZED = KernelName.DISPATCH, KernelName.DISPATCH_QUANTIZED


class RowForm(NamedTuple):
    """What dispatches of rows of one form share.

    Attributes:
        kind: the rows that arrive.
        shape: of `tokens`, unless the caller has made them.
        said: of the arguments: operation, signature, bytes of a row of the input and on the wire,
            kind and bytes of the scales of a row, bytes of a scale.
    """

    kind: RowKind
    shape: tuple[int, ...]
    said: tuple[int, int, int, int, int, int, int]


@dataclass(frozen=True)
class DispatchPlanner:
    """Plans launches.

    Attributes:
        config: the communicator's.
        num_ranks: R.
        num_local: E_loc.
        num_sms: multiprocessors of the GPU.
        warps: warps of a block.
        num_hosts: N.
    """

    config: MoECommunicatorConfig
    num_ranks: int
    num_local: int
    num_sms: int
    warps: int
    num_hosts: int = 1

    def most_blocks(self, num_sms: int | None) -> int:
        """Blocks of a launch for a caller's number of SMs."""
        default, _ = default_sms(self.config, self.num_ranks // self.num_hosts)
        return min(self.num_sms, num_sms or self.config.num_sms_dispatch or default)

    def __call__(
        self, name: KernelName, num_sms: int | None, sends: bool, receives: bool
    ) -> LlLaunch:
        """The launch of some halves, for a caller's number of SMs."""
        config, warps = self.config, self.warps
        words = shared_words(
            config,
            num_ranks=self.num_ranks,
            num_local=self.num_local,
            sends=sends,
            receives=receives,
            num_hosts=self.num_hosts,
        )
        blocks = self.most_blocks(num_sms)
        senders = warps - tuning.LL_PUBLISHING_WARPS
        if sends and receives:
            copies = max(1.0, self._copies_to_peers())
            wanted = tuning.LL_SENDING_WARPS / copies
            if name is _QUANTIZED:
                work, once = tuning.LL_QUANTIZING_WARPS
                wanted = work / (once + copies)
            senders = min(senders, round(wanted / blocks))
        launch = Launch(grid=blocks, block=32 * warps, shared_bytes=4 * words, follows=True)
        return LlLaunch(launch, max(1, senders))

    def _copies_to_peers(self) -> float:
        """Peers that a token goes to, on average, if its experts are drawn evenly from all."""
        peers = self.num_ranks // self.num_hosts - 1
        return peers * (1.0 - (1.0 - 1.0 / self.num_ranks) ** self.config.topk)


class LlDispatcher:
    """Queues the dispatches of one rank.

    The arguments are structs that are used again: a new one takes longer than the rest of a call.

    Args:
        config: the communicator's.
        common: arguments that all calls share, by name.
        num_ranks: R.
        num_local: E_loc.
        arena: memory shared with the other ranks.
        run: queues a kernel.
        num_sms: multiprocessors of the GPU.
        max_warps: most warps of a block.
        num_hosts: N.

    Attributes:
        arguments: those of dispatches that make tensors of their own.
        tables: where the tables of a routing lie.
        most_blocks: of the planner.
    """

    def __init__(
        self,
        config: MoECommunicatorConfig,
        *,
        common: dict[str, int],
        num_ranks: int,
        num_local: int,
        arena: LlArena,
        run: Run,
        num_sms: int,
        max_warps: int,
        num_hosts: int = 1,
    ) -> None:
        self._config, self._arena, self._in_use = config, arena, arena.in_use
        self._number, self._restarts = common["communicator"], arena.restarts
        self._layout, self._device = config.layout, arena.device
        self._expanded, self._padded = self._layout.expanded, self._layout.padded
        self._topk, self._source_tokens = config.topk, config.source_tokens
        self._num_ranks, self._num_local = num_ranks, num_local
        self._largest = capacity.largest_shape(config, num_ranks=num_ranks, num_local=num_local)
        self.tables = self._table_layout(num_hosts)
        self._counted = sum(self.tables.public)
        is_flat = self._layout is DispatchLayout.FLAT
        self._sizes = OutputSizes(num_local, num_ranks, config.topk, is_flat)
        self._forms: dict[tuple[object, ...], RowForm] = {}
        self._said: RowForm | None = None  # by `arguments`
        warps = max(1, min(max_warps, tuning.LL_DISPATCH_WARPS))
        plan = DispatchPlanner(config, num_ranks, num_local, num_sms, warps, num_hosts)
        self.most_blocks = plan.most_blocks
        self._launch = HalvesLauncher(arena=arena, run=run, plan=plan)
        self.arguments = DISPATCH.new(**common, num_local=num_local)

    def dispatch(
        self, call: DispatchCall, number: int
    ) -> tuple[DispatchOutput, LlRoute, Callable[[], None] | None]:
        """Queues a dispatch: what it returns, its routing, and the half that is left to launch.

        `number` is the host's, 0 in a capture that is known as one.
        """
        previous, ids, weights = call.previous, call.topk_ids_TK, call.weights_TK
        num_tokens, weighted, flags = call.x_TW.shape[0], weights is not None, 0
        weights_from = None if weights is None else weights.data_ptr()
        if previous is None:
            assert ids is not None
            ids_from, wide = ids.data_ptr(), ids.dtype is torch.int64
        else:
            assert isinstance(previous, LlRoute)
            ids_from, wide = previous.ids_address, previous.wide_ids
            if weights is None and previous.weighted:
                weighted, weights_from = True, previous.own_weights_address()
        form = self._form_of(call, weighted)
        if call.buffers is None:
            a = self.arguments
            if self._said is not form:
                self._say(a, form)
                self._said = form
            output, block, ids_at = self._make_output(call, form, num_tokens, wide)
            route = self._new_route(output, num_tokens, block, weighted, ids_at, wide)
        else:
            tables = call.buffers.tables
            assert isinstance(tables, BufferTables)
            a = tables.dispatch
            if tables.said is not form:
                self._say(a, form)
                tables.said = form
            if self._arena.halves.left:  # one of them may read these tables
                self._arena.halves.finish_those_of(tables.block)
            # A cached dispatch may read the number of the dispatch before.
            which = call.buffers.generation % ORIGINS
            known = tables.routes.get((num_tokens, weighted, wide, which))
            if known is None:
                known = self._open(call.buffers.output, tables, num_tokens, weighted, wide, which)
            output, route = known
            if not self._expanded:
                into = output.topk_weights
                a.topk_weights = None if into is None else into.data_ptr()
        route.number, route.epoch = number, self._restarts[0]
        if call.zero_padding and self._padded:
            output.tokens.zero_()
            if output.scales is not None:
                output.scales.tensor.zero_()
        # Calls of several arenas must not hold SMs for their followers.
        if self._in_use[0] > 1:
            flags = _ALONE
        if wide:
            flags |= _WIDE_IDS
        if weights_from is not None:
            flags |= _NEW_WEIGHTS
            a.weights = weights_from
        a.subject = None if previous is None else previous.origin
        if previous is not None or a.communicator != self._number:
            a.communicator = said_by(self._number, of=previous)
        a.origin, a.ids = route.origin, ids_from
        self._name_rows(a, call)
        after = None
        if self._source_tokens:
            assert output.source_tokens is not None
            after = functools.partial(route.write_source_tokens, output.source_tokens)
        needs: tuple[object, ...] = ()
        if call.return_recv_hook:
            needs = (output, route, call.x_TW, call.scales, ids, weights, previous)
        left = self._launch(
            _PLAIN if call.quantize_to is None else _QUANTIZED,
            a,
            flags,
            call.num_sms,
            halves=call.return_recv_hook,
            needs=needs,
            after=after,
            tables=route.block,
        )
        return output, route, left

    def refuse(self) -> None:
        """Lets the peers know that this rank will not make the dispatch that they make."""
        config, a = self._config, self.arguments
        call = DispatchCall(
            x_TW=torch.empty((0, config.hidden_size), dtype=config.dtype, device=self._device),
            topk_ids_TK=torch.empty((0, config.topk), dtype=torch.int64, device=self._device),
        )
        form = self._form_of(call, weighted=False)
        _, block, _ = self._make_output(call, form, 0, wide_ids=True)
        self._say(a, form)
        self._said = None  # the signature will be another one
        self._name_rows(a, call)
        a.signature, a.communicator = REFUSED, self._number
        a.subject, a.origin = None, block.data_ptr() + self.tables.at["origin"]
        flags = _WIDE_IDS | (_ALONE if self._in_use[0] > 1 else 0)
        self._launch(_PLAIN, a, flags, None, halves=False)

    def new_tables(self, output: DispatchOutput, *, combine: Arguments) -> BufferTables:
        """Memory of one routing at its largest; its dispatches go to the tensors of `output`.

        `combine` are arguments that are to name it as well; see `combine.name_tables`.
        """
        config, most = self._config, self._most_table_tokens()
        ids_at = self.tables.ids_at(most)
        block = self._new_words(ids_at // 4 + 2 * config.max_tokens_per_rank * config.topk)
        tables = BufferTables(
            block=block,
            ids_address=block.data_ptr() + ids_at,
            dispatch=self.arguments.copy(),
            combine=combine,
            routes={},
        )
        self._name_buffers(tables, output)
        return tables

    def largest_output(self, kind: RowKind, tokens: Tensor | None = None) -> DispatchOutput:
        """Tensors of the largest shape for such rows, or for `tokens`."""
        return largest_output(
            self._config,
            kind,
            tokens=tokens,
            num_ranks=self._num_ranks,
            num_local=self._num_local,
            device=self._device,
        )

    # -- arguments --------------------------------------------------------------------------------

    def _say(self, a: Arguments, form: RowForm) -> None:
        """What all ranks must say of the rows alike."""
        (
            a.operation,
            a.signature,
            a.input_bytes,
            a.row_bytes,
            a.scale_kind,
            a.scale_bytes,
            a.scale_item,
        ) = form.said

    def _name_rows(self, a: Arguments, call: DispatchCall) -> None:
        """What is sent."""
        x, scales = call.x_TW, call.scales
        a.x, a.num_tokens = x.data_ptr(), x.shape[0]
        a.scales = None if scales is None else scales.data_ptr()

    def _name_tables(self, a: Arguments, base: int, ids: int) -> None:
        """Where the tables of a routing and its ids are."""
        at = self.tables.at
        a.ids_copy, a.weights_copy = ids, base + at["own_weights"]
        a.slots_of_token = base + at["slots"]
        a.rows_from, a.rows_to = base + at["rows_from"], base + at["rows_to"]
        a.first_row, a.first_slot = base + at["first_row"], base + at["first_slot"]
        a.tokens_per_expert = base + at["counts"]
        a.choices_of_row, a.weights_of_row = base + at["choices"], base + at["weights"]
        a.tokens_of_row = base + at["tokens"]

    def _name_counts(self, a: Arguments, address: int) -> None:
        """Where the caller's counts are: one after the other, in every layout."""
        a.counts_out, a.offsets_out = address, address + 4 * self._num_local
        a.rows_from_out = address + 4 * (2 * self._num_local + 1)

    def _name_scales(self, a: Arguments, scales: Tensor | None) -> None:
        """Where scales go."""
        a.scales_out, a.scale_stride = None, 0
        if scales is not None:
            a.scales_out = scales.data_ptr()
            if self._config.scale_order == "column_major":
                a.scale_stride = scales.shape[-2]

    def _name_buffers(self, tables: BufferTables, output: DispatchOutput) -> None:
        """All that is the same in dispatches into buffers."""
        a, tokens, per_rank = tables.dispatch, output.tokens, output.num_tokens_per_rank
        assert per_rank is not None
        self._name_tables(a, tables.block.data_ptr(), tables.ids_address)
        # By the last of them: without local experts the others have no address.
        self._name_counts(a, per_rank.data_ptr() - 4 * (2 * self._num_local + 1))
        a.tokens, a.max_slots = tokens.data_ptr(), math.prod(tokens.shape[:-1])
        a.topk_ids = None if output.topk_ids is None else output.topk_ids.data_ptr()
        self._name_scales(a, None if output.scales is None else output.scales.tensor)

    # -- memory -----------------------------------------------------------------------------------

    def _table_layout(self, num_hosts: int) -> LlTableLayout:
        """Of the tables of a routing."""
        return LlTableLayout(self._config, num_ranks=self._num_ranks, num_local=self._num_local)

    def _most_table_tokens(self) -> int:
        """Most tokens that the tables of a routing are of."""
        return self._config.max_tokens_per_rank

    def _new_words(self, words: int) -> Tensor:
        """Memory of int32 words."""
        return torch.empty(words, dtype=torch.int32, device=self._device)

    def _new_route(
        self,
        output: DispatchOutput,
        num_tokens: int,
        block: Tensor,
        weighted: bool,
        ids_address: int,
        wide_ids: bool,
        which: int = 0,
    ) -> LlRoute:
        """The routing of a dispatch; `which` of the words has the transfer's number."""
        return LlRoute(  # by position: names take twice as long
            output.tokens.shape[:-1],
            num_tokens,
            None,
            self.tables,
            block,
            None,
            weighted,
            None,
            block.data_ptr() + self.tables.at["origin"] + 4 * which,
            None,
            0,
            self._number,
            {},
            ids_address,
            wide_ids,
            self._restarts,
        )

    def _open(
        self,
        output: DispatchOutput,
        tables: BufferTables,
        num_tokens: int,
        weighted: bool,
        wide_ids: bool,
        which: int,
    ) -> tuple[DispatchOutput, LlRoute]:
        """What such dispatches into buffers with this output return, and their routing."""
        if not weighted and output.topk_weights is not None:
            output = without_weights(output)
        route = self._new_route(
            output, num_tokens, tables.block, weighted, tables.ids_address, wide_ids, which
        )
        route.combine = tables.combine
        tables.routes[num_tokens, weighted, wide_ids, which] = output, route
        return output, route

    def _make_output(
        self, call: DispatchCall, form: RowForm, table_tokens: int, wide_ids: bool
    ) -> tuple[DispatchOutput, Tensor, int]:
        """Tensors of the caller's own: the output, the tables, and the address of the ids there.

        One piece of memory has the tables of `table_tokens` tokens, the ids, and the caller's
        counts. Rows, and their scales, ids and weights have their own: callers free what they have
        used, and tables must outlive that.
        """
        a, x, kind, shape, layout = self.arguments, call.x_TW, form.kind, form.shape, self.tables
        ids_at = layout.ids_at(table_tokens)
        counts_at = ids_at // 4 + (x.shape[0] * self._topk << wide_ids)  # T may be another one
        block = self._new_words(counts_at + self._counted)
        base = block.data_ptr()
        tokens = call.output_buffer
        if tokens is None:
            tokens = x.new_empty(shape, dtype=kind.dtype)
        else:
            shape = tokens.shape
        leading = shape[:-1]
        self._name_tables(a, base, base + ids_at)
        self._name_counts(a, base + 4 * counts_at)
        a.tokens, a.max_slots = tokens.data_ptr(), math.prod(leading)
        a.topk_ids = a.topk_weights = None
        ids = weights = sources = scales = tensor = None
        if not self._expanded:
            choices = (*leading, self._topk)
            ids = x.new_empty(choices, dtype=torch.int64)
            a.topk_ids = ids.data_ptr()
            if kind.weighted:
                weights = x.new_empty(choices, dtype=self._config.weight_dtype)
                a.topk_weights = weights.data_ptr()
        if self._source_tokens:
            sources = x.new_empty(leading, dtype=torch.int32)
        if kind.scale_dtype is not None:
            tensor = new_scales(x, leading, kind, order=self._config.scale_order)
            scales = QuantScales(tensor, kind.scale_format)
        self._name_scales(a, tensor)
        source = MemorySource(
            self._sizes, block, counts_at, ids, weights, sources, block, -1, leading
        )
        output = LazyOutput.of(source, self._layout, tokens, scales, None)
        return output, block, base + ids_at

    def _form_of(self, call: DispatchCall, weighted: bool) -> RowForm:
        """The form of a call's rows; `weighted`: weights come with them."""
        x, scales, cached = call.x_TW, call.scales, call.previous is not None
        key = (x.dtype, x.shape[1], call.quantize_to, weighted, cached)
        if scales is not None:
            key = (*key, scales.dtype, scales.shape[1], call.scale_format)
        form = self._forms.get(key)
        if form is None:
            form = self._forms[key] = self._new_form(call, weighted)
        return form

    def _new_form(self, call: DispatchCall, weighted: bool) -> RowForm:
        x, scales, quantized = call.x_TW, call.scales, call.quantize_to
        dtype, width, scale_format = x.dtype, x.shape[1], call.scale_format
        scale_dtype, columns = None, 0
        if scales is not None:
            scale_dtype, columns = scales.dtype, scales.shape[1]
        if quantized is not None:
            dtype, scale_format = torch.float8_e4m3fn, quantized
            packed = quantized is BlockFormat.E4M3_UE8M0
            scale_dtype = torch.int32 if packed else torch.float32
            columns = scale_columns(width, quantized)
        kind = RowKind(dtype, width, scale_dtype, columns, scale_format, weighted)
        scale_kind, input_bytes = _SCALE_KINDS[quantized], metadata.row_bytes(x)
        row_bytes = width * dtype.itemsize
        item = 0 if scale_dtype is None else scale_dtype.itemsize
        operation = _DISPATCH if call.previous is None else _CACHED_DISPATCH
        signed = signature(
            operation,
            row_bytes=row_bytes,
            weights=weighted,
            scale_kind=scale_kind,
            scale_bytes=columns * item,
        )
        said = (operation, signed, input_bytes, row_bytes, scale_kind, columns * item, item)
        return RowForm(kind, (*self._largest, width), tuple(map(int, said)))  # type: ignore[arg-type]
