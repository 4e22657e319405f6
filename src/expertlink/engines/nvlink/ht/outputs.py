"""What a dispatch of the nvlink engine returns, while it is being made."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from expertlink.engines.base import DispatchCall
from expertlink.types import DispatchLayout, DispatchOutput, QuantScales


@dataclass
class Outputs:
    """Tensors of one leading shape.

    Attributes:
        shape: leading dimensions.
        tokens: rows.
        scales: scales of quantized rows.
        ids: `[..., K]` int64, deduplicated layouts.
        weights: `[..., K]` float32, deduplicated layouts.
    """

    shape: tuple[int, ...] = ()
    tokens: Tensor | None = None
    scales: Tensor | None = None
    ids: Tensor | None = None
    weights: Tensor | None = None

    def cut(self, rows: int) -> None:
        """Leaves the first rows of what was made larger."""
        self.shape = (rows,)
        for name in ("tokens", "scales", "ids", "weights"):
            tensor: Tensor | None = getattr(self, name)
            if tensor is not None and tensor.shape[0] != rows:
                setattr(self, name, tensor[:rows])

    def finish(
        self,
        call: DispatchCall,
        layout: DispatchLayout,
        public: tuple[Tensor, Tensor, Tensor],
        counts: list[int] | None,
    ) -> DispatchOutput:
        """The output; `public` are the caller's counts, offsets and rows from each rank."""
        assert self.tokens is not None
        scales = None if self.scales is None else QuantScales(self.scales, call.scale_format)
        return DispatchOutput(
            tokens=self.tokens,
            num_tokens_per_expert=public[0],
            layout=layout,
            scales=scales,
            num_tokens_per_expert_list=None if counts is None else list(counts),
            expert_offsets=public[1] if layout is DispatchLayout.FLAT else None,
            topk_ids=self.ids,
            topk_weights=self.weights,
            num_tokens_per_rank=public[2],
        )
