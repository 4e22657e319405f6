"""Configuration of a communicator: fixed once, and checked when it is built."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch

from expertlink.domains import Domains
from expertlink.errors import ConfigurationError, NotPicklableError
from expertlink.settings import STARTUP_TIMEOUT, TIMEOUT, positive_seconds
from expertlink.types import BlockFormat, DispatchLayout

if TYPE_CHECKING:
    import torch.distributed
    from torch.distributed.device_mesh import DeviceMesh

MAX_TOPK = 32
ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MODES = ("ht", "ll")
COMBINE_PRECISIONS = ("wire", "exact")
SCALE_ORDERS = ("row_major", "column_major")
ENGINES = ("auto", "collective", "nvlink", "hybrid")
NOT_COLLECTIVE = ("zero_copy", "static_shapes", "mask_lost_peers")  # the collective engine has none


@dataclass(frozen=True, kw_only=True)
class MoECommunicatorConfig:
    """Everything that a `MoECommunicator` fixes for its lifetime.

    All ranks of the group pass equal values, except for `device`, `num_local_experts`,
    `local_expert_start`, the two time-outs and the SM budgets.

    A configuration never changes, so a copy of it, deep or shallow, is the object itself. One that
    holds a process group cannot be pickled: a group belongs to its process.

    Raises:
        ConfigurationError: a field has a value that cannot work. The message names the field, its
            value, and what is accepted.
    """

    num_experts: int
    """E, the experts of the model, over all ranks."""
    hidden_size: int
    """H, elements of a token's row."""
    topk: int
    """K, experts chosen per token; at most 32."""
    max_tokens_per_rank: int
    """Most tokens that any rank dispatches in one call. It sizes the padded layouts and the
    memory of the nvlink engine, so set it to your largest batch and no higher."""

    group: torch.distributed.ProcessGroup | DeviceMesh | None = None
    """The expert-parallel group, or a device mesh of one dimension, which stands for its group.
    None: the default group, or a single rank where torch.distributed is not initialised. Set it
    where experts are spread over some of the ranks only."""
    device: torch.device | str | None = None
    """Where tensors live. None: CUDA's current device if the group can use it, else the CPU. Set it
    to run on the CPU of a machine with GPUs, or on a GPU with a gloo group, which suffices for the
    nvlink engine."""

    mode: Literal["ht", "ll"] = "ht"
    """"ht" (high throughput) for training and prefill, "ll" (low latency) for decode. It sets the
    default of `output_layout` and, on the nvlink engine, the kernels."""
    engine: Literal["auto", "collective", "nvlink", "hybrid"] = "auto"
    """"auto" picks the fastest engine that can run and logs why. Set "nvlink" (GPUs of one host) or
    "hybrid" (hosts of equally many GPUs) to get an error where it cannot run, instead of a slower
    engine. Set "collective" to compare with torch.distributed. Results are the same bits with any,
    if `domains` are."""
    domains: Sequence[int] | None = None
    """`[R]` the host, or other NVLink domain, of every rank of the group: ranks with equal numbers
    share one. Combine rounds the sums of each host (`combine_precision="wire"`), so domains decide
    the last bits of results. None: one domain, except where "hybrid" finds several. Set it to say
    which GPUs share NVLink, or to get the bits of other hosts."""
    output_layout: (
        DispatchLayout | Literal["flat", "token_major", "rank_major", "expert_major"] | None
    ) = None
    """How received rows are arranged. None: FLAT in "ht" mode, EXPERT_MAJOR in "ll" mode. Set it to
    what your expert kernels read. TOKEN_MAJOR and RANK_MAJOR hold a token once per rank, whatever
    number of its experts live there, and leave the weights to the experts."""

    dtype: torch.dtype = torch.bfloat16
    """Element type of unquantized rows, of expert outputs and of combine's result."""
    quantization: BlockFormat | Literal["e4m3_float32", "e4m3_pow2", "e4m3_ue8m0"] | None = None
    """Set it to let dispatch quantize rows of `dtype` to that format, which halves the bytes that
    travel. None: rows travel as given; rows that the caller has quantized are accepted with
    `scales`."""

    combine_precision: Literal["wire", "exact"] = "wire"
    """FLAT and EXPERT_MAJOR only. "wire": each rank adds up its rows of a token and sends one sum,
    rounded to `dtype`. "exact": every row travels back, and the token's rank adds them up in
    float32 (float64 for float64 rows), in top-k order. Set "exact" where results must not depend
    on the placement of the experts, bit for bit; it sends more rows."""
    scale_order: Literal["row_major", "column_major"] = "row_major"
    """Memory order of received scales. Set "column_major" where your grouped GEMM reads scales
    transposed: their last two dimensions are swapped in memory, shape and values stay the same."""

    source_tokens: bool = False
    """True: `DispatchOutput.source_tokens` says which token of its rank every received row is. Set
    it where something beside the experts asks for that; four more bytes travel with each row."""

    num_local_experts: int | None = None
    """Experts on this rank, a contiguous block. None: as even as possible over the ranks. Set it,
    on all ranks, where they hold different numbers of experts."""
    local_expert_start: int | None = None
    """First expert of this rank's block. None: blocks follow the order of the ranks. Set it, with
    `num_local_experts`, where they do not."""
    expert_map: Sequence[int] | torch.Tensor | None = None
    """`[E]` the rank of every expert, for any placement; excludes the two fields above. Local
    experts are numbered in ascending global order. Set it where a rank's experts are not one
    block, as after load balancing."""

    expert_alignment: int = 1
    """FLAT only: every expert's group of rows is padded with zero rows to a multiple of this. Set
    it to the tile size that your grouped GEMM asks for."""
    max_recv_tokens_per_rank: int | None = None
    """FLAT and TOKEN_MAJOR only: most rows (first dimension of `tokens`) that a rank accepts; more
    raise CapacityError on every rank. None: as many as can arrive. Set it to bound the memory of a
    dispatch."""

    zero_copy: bool = False
    """TOKEN_MAJOR and RANK_MAJOR on the nvlink engine: `tokens` is a view of the memory that peers
    write to, valid until the dispatch after the next one is issued. Set it to save the copy, where
    experts are done with `tokens` by then. False: the caller owns `tokens`."""
    static_shapes: bool = False
    """nvlink engine: `tokens` has room for all rows that can arrive, counts stay on the device, and
    no call waits on the host. Set it to capture calls in CUDA graphs."""
    mask_lost_peers: bool = False
    """mode="ll" on the nvlink engine: a peer that does not arrive in time is masked, and the call
    does not fail. Later calls neither wait for it nor send to it; see `query_mask`. With
    combine_precision="exact" there is memory for R * K * `max_tokens_per_rank` rows then, in three
    sets. Set it where serving must outlive a lost rank."""

    num_sms_dispatch: int | None = None
    """SMs that a dispatch may occupy. None: the engine's choice. Set it to leave SMs to kernels
    that run at the same time. The collective engine ignores it."""
    num_sms_combine: int | None = None
    """SMs that a combine may occupy; as above."""
    enable_overlap: bool = True
    """True: `dispatch_async` and `combine_async` run on a stream of their own. Set it to False to
    run them on the caller's stream, as when you look for a race."""

    timeout_s: float | None = None
    """Seconds that a call waits for its peers. None: EXPERTLINK_TIMEOUT, else 100. Raise it where
    ranks may be further apart than that; lower it where a lost rank must be noticed soon."""
    startup_timeout_s: float | None = None
    """Seconds that `initialize()` waits for its peers. None: EXPERTLINK_STARTUP_TIMEOUT, else 300.
    Raise it where ranks load weights, or compile kernels, for longer than that."""
    check_inputs: bool | None = None
    """True: check values that only the data shows (range of ids, experts chosen twice), and let
    ranks agree before every combine and cached dispatch, so that an error on one rank is raised on
    all. None: True on CPU, False on CUDA, where agreement costs a host wait per call. Set it to
    True while you look for an error."""

    def __post_init__(self) -> None:
        _whole(self, "num_experts", 1)
        _whole(self, "hidden_size", 1)
        _whole(self, "topk", 1, MAX_TOPK)
        _whole(self, "max_tokens_per_rank", 1)
        _whole(self, "expert_alignment", 1)
        for name in ("max_recv_tokens_per_rank", "num_sms_dispatch", "num_sms_combine"):
            _whole(self, name, 1, optional=True)
        _whole(self, "num_local_experts", 0, self.num_experts, optional=True)
        _whole(self, "local_expert_start", 0, self.num_experts, optional=True)
        if self.topk > self.num_experts:
            _refuse("topk", self.topk, f"at most num_experts={self.num_experts}")
        for name, accepted in (
            ("mode", MODES),
            ("engine", ENGINES),
            ("combine_precision", COMBINE_PRECISIONS),
            ("scale_order", SCALE_ORDERS),
        ):
            if getattr(self, name) not in accepted:
                _refuse(name, getattr(self, name), f"one of {', '.join(accepted)}")
        if self.dtype not in ROW_DTYPES:
            _refuse("dtype", self.dtype, f"one of {', '.join(map(str, ROW_DTYPES))}")
        for name in (
            "enable_overlap",
            "zero_copy",
            "static_shapes",
            "mask_lost_peers",
            "source_tokens",
        ):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "True or False")
        _put(self, "group", _group_of(self.group))
        if self.check_inputs not in (None, True, False):
            _refuse("check_inputs", self.check_inputs, "True, False or None")
        self._normalise()

    def _normalise(self) -> None:
        """Replaces defaults and alternative spellings by the one form the library uses."""
        layout = self.output_layout
        if layout is None:
            layout = DispatchLayout.FLAT if self.mode == "ht" else DispatchLayout.EXPERT_MAJOR
        _put(self, "output_layout", _member(DispatchLayout, "output_layout", layout))
        if self.quantization is not None:
            _put(self, "quantization", _member(BlockFormat, "quantization", self.quantization))
            if self.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                _refuse("dtype", self.dtype, "bfloat16, float16 or float32 with quantization")
        if self.expert_alignment > 1 and self.layout is not DispatchLayout.FLAT:
            _refuse("expert_alignment", self.expert_alignment, f"1 for layout {self.layout.value}")
        if self.combine_precision == "exact" and not self.layout.expanded:
            _refuse(
                "combine_precision",
                "exact",
                f"'wire' for layout {self.layout.value}, whose rows the experts have added up",
            )
        if self.mask_lost_peers and self.mode != "ll":
            _refuse(
                "mask_lost_peers",
                True,
                f"False with mode={self.mode!r}; mode='ll' has it",
            )
        for name in NOT_COLLECTIVE:
            if getattr(self, name) and self.engine == "collective":
                _refuse(name, True, "False with engine='collective'; only the nvlink engine has it")
        if self.zero_copy and self.layout.expanded:
            _refuse(
                "zero_copy",
                True,
                f"False for layout {self.layout.value}, which copies rows",
            )
        if self.max_recv_tokens_per_rank is not None and self.layout.padded:
            _refuse(
                "max_recv_tokens_per_rank",
                self.max_recv_tokens_per_rank,
                f"None for layout {self.layout.value}, whose shape is fixed",
            )
        for name, variable in (("timeout_s", TIMEOUT), ("startup_timeout_s", STARTUP_TIMEOUT)):
            value = getattr(self, name)
            if value is None:
                _put(self, name, variable.read())
                continue
            try:
                positive_seconds(value)
            except ValueError as error:
                _refuse(name, value, f"{error}, or None")
        if self.device is not None:
            try:
                device = torch.device(self.device)
            except (RuntimeError, TypeError):
                _refuse("device", self.device, 'a torch device such as "cpu" or "cuda:0"')
            if device.type not in ("cpu", "cuda"):
                _refuse("device", self.device, "a cpu or cuda device")
            _put(self, "device", device)
        self._normalise_domains()
        self._normalise_placement()

    def _normalise_domains(self) -> None:
        if self.domains is None:
            return
        try:
            labels = tuple(operator.index(label) for label in self.domains)
            _put(self, "domains", Domains.of(labels).host_of)
        except (TypeError, ValueError):
            _refuse("domains", self.domains, "one whole number per rank of the group, or None")

    def _normalise_placement(self) -> None:
        if self.expert_map is None:
            if self.local_expert_start is not None and self.num_local_experts is None:
                _refuse("local_expert_start", self.local_expert_start, "num_local_experts as well")
            return
        if self.num_local_experts is not None or self.local_expert_start is not None:
            raise ConfigurationError(
                "expert_map excludes num_local_experts and local_expert_start: pass either"
            )
        try:
            ranks = tuple(int(rank) for rank in self.expert_map)
        except (TypeError, ValueError):
            _refuse("expert_map", self.expert_map, "one rank number per expert")
        if len(ranks) != self.num_experts:
            raise ConfigurationError(
                f"expert_map has {len(ranks)} entries; accepted: one rank per expert, "
                f"num_experts={self.num_experts}"
            )
        if min(ranks) < 0:
            raise ConfigurationError(
                f"expert_map has rank {min(ranks)} for expert {ranks.index(min(ranks))}; accepted: "
                "ranks from 0 to the group's size - 1"
            )
        _put(self, "expert_map", ranks)

    def __copy__(self) -> MoECommunicatorConfig:
        return self

    def __deepcopy__(self, memo: object) -> MoECommunicatorConfig:
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise NotPicklableError(
                "a MoECommunicatorConfig with a process group cannot be pickled: the group belongs "
                "to this process; pickle dataclasses.replace(config, group=None) and set the group "
                "after loading"
            )
        return dict(vars(self))

    @property
    def layout(self) -> DispatchLayout:
        """`output_layout` with its default resolved."""
        return DispatchLayout(self.output_layout)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Element type of routing weights: float32; float64 for float64 rows."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    @property
    def block_format(self) -> BlockFormat | None:
        """`quantization` as an enum member."""
        return None if self.quantization is None else BlockFormat(self.quantization)


def _refuse(field: str, value: object, accepted: str) -> NoReturn:
    raise ConfigurationError(f"{field}={value!r} is not possible; accepted: {accepted}")


def _group_of(group: Any) -> Any:
    """The process group that was passed, or that a mesh stands for."""
    if group is None:
        return None
    meshes = sys.modules.get("torch.distributed.device_mesh")  # not loaded: no mesh exists
    if meshes is not None and isinstance(group, meshes.DeviceMesh):
        if group.ndim != 1:
            _refuse("group", group, 'a mesh of one dimension, such as mesh["ep"]')
        if group.get_coordinate() is None:
            _refuse("group", group, "a mesh that this rank is in")
        return group.get_group()
    if isinstance(group, int):  # what new_group returns to ranks outside of the group
        _refuse(
            "group",
            group,
            "a group that this rank is in; ranks outside build no communicator",
        )
    if not all(callable(getattr(group, name, None)) for name in ("rank", "size")):
        _refuse("group", group, "a torch.distributed.ProcessGroup, a 1-D DeviceMesh, or None")
    return group


def _put(config: MoECommunicatorConfig, field: str, value: object) -> None:
    object.__setattr__(config, field, value)  # the dataclass is frozen for everyone else


def _member(kind: Any, field: str, value: object) -> Any:
    try:
        return kind(value)
    except ValueError:
        _refuse(field, value, f"one of {', '.join(member.value for member in kind)}")


def _whole(
    config: MoECommunicatorConfig,
    field: str,
    least: int,
    most: int | None = None,
    optional: bool = False,
) -> None:
    value = getattr(config, field)
    if value is None and optional:
        return
    bounds = f"a whole number of at least {least}" + (f" and at most {most}" if most else "")
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(field, value, bounds)
    if value < least or (most is not None and value > most):
        _refuse(field, value, bounds)
