"""Inputs of a soak with everything that must come of them, and the ledger of what did not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertlink import BlockFormat
from expertlink.quantization import quantize
from support.jobs import filled_up
from support.oracle import Case, combined_of, expert_rows, inputs_of, received_of


def finish(device: torch.device) -> None:
    """Waits for all work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Ledger:
    """Differences that the GPU has found, by check."""

    def __init__(self, device: torch.device) -> None:
        self._bad = torch.zeros(4096, dtype=torch.bool, device=device)
        self._names: list[str] = []

    def compare(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """Notes whether the bits differ; does not wait."""
        assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
        assert actual.dtype is expected.dtype, f"{what}: {actual.dtype}"
        if actual.numel() == 0:
            return
        if len(self._names) == len(self._bad):
            self.settle()
        same = actual.contiguous().view(torch.uint8) == expected.view(torch.uint8)
        self._bad[len(self._names)] = ~same.all()
        self._names.append(what)

    def settle(self) -> None:
        """Waits and raises the first difference."""
        finish(self._bad.device)
        bad = self._bad[: len(self._names)].tolist()
        wrong = [name for name, flag in zip(self._names, bad, strict=True) if flag]
        assert not wrong, f"{len(wrong)} of {len(bad)} comparisons failed, first: {wrong[0]}"
        self._names.clear()


@dataclass(frozen=True)
class Item:
    """An input of the pool with everything that must come of it on this rank."""

    number: int
    case: Case
    x_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    other_weights_TK: Tensor
    slots: Tensor  # filled slots, flat
    tokens: Tensor  # their rows; bytes where they arrive quantized
    scales: Tensor | None  # scales of those
    choices: tuple[Tensor, Tensor, Tensor] | None  # their ids, weights and other weights
    combined: Tensor
    other_combined: Tensor
    whole_TH: Tensor  # rows and weights of whole numbers, and what comes back of unchanged rows
    whole_weights_TK: Tensor
    whole_result: Tensor
    _rows: Tensor
    _padded: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        number: int,
        case: Case,
        rank: int,
        device: torch.device,
        block_format: BlockFormat | None = None,
    ) -> Item:
        """The item of a case whose rows, with a format, are quantized on the way."""
        # The other weights are those of the same case with another seed for them.
        other = dataclasses.replace(case, weight_seed=case.seed + 100)
        own, changed = inputs_of(case, rank), inputs_of(other, rank)
        assert own.weights_TK is not None
        assert changed.weights_TK is not None
        received, again = received_of(case, rank), received_of(other, rank)
        choices = None
        if received.ids is not None:
            assert received.weights is not None
            assert again.weights is not None
            filled = received.filled
            parts = (received.ids[filled], received.weights[filled], again.weights[filled])
            choices = (parts[0].to(device), parts[1].to(device), parts[2].to(device))
        sources = [inputs_of(case, source).x_TH for source in range(case.ranks)]
        drawn = torch.Generator().manual_seed(case.seed * 1000 + rank)
        whole_TH = torch.randint(-4, 5, own.x_TH.shape, generator=drawn)
        whole_weights_TK = torch.randint(1, 3, own.ids_TK.shape, generator=drawn)
        times = (whole_weights_TK * (own.ids_TK >= 0)).sum(1)
        if not case.layout.expanded:
            owner = case.rank_of_expert()
            ranks = [{owner[e] for e in token if e >= 0} for token in own.ids_TK.tolist()]
            times = torch.tensor([len(hit) for hit in ranks], dtype=torch.int64)
        scales = None
        if block_format is not None:
            packed = [quantize(x_TH, block_format) for x_TH in sources]
            sources = [q.view(torch.uint8) for q, _ in packed]
            scales = received.gather([theirs for _, theirs in packed]).to(device)
        return Item(
            number=number,
            case=case,
            x_TH=own.x_TH.to(device),
            ids_TK=own.ids_TK.to(device),
            weights_TK=own.weights_TK.to(device),
            other_weights_TK=changed.weights_TK.to(device),
            slots=received.filled.reshape(-1).nonzero()[:, 0].to(device),
            tokens=received.gather(sources).to(device),
            scales=scales,
            choices=choices,
            combined=combined_of(case, rank).to(device),
            other_combined=combined_of(other, rank).to(device),
            whole_TH=whole_TH.to(own.x_TH.dtype).to(device),
            whole_weights_TK=whole_weights_TK.float().to(device),
            # Of integers: a token without choices gets no -0.
            whole_result=(whole_TH * times[:, None]).to(own.x_TH.dtype).to(device),
            _rows=expert_rows(case, rank),
        )

    def rows(self, shape: tuple[int, ...]) -> Tensor:
        """Expert outputs in the shape of a handle; made once."""
        if shape not in self._padded:
            self._padded[shape] = filled_up(self._rows, shape[:-1], self.x_TH.device)
        return self._padded[shape]

    def forget(self) -> None:
        """Lets the expert outputs be made again."""
        self._padded.clear()
