"""Rows on the wire: how many bytes they have, and what metadata travels with each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from expertlink.config import MoECommunicatorConfig
from expertlink.engines.ranks.metadata import row_bytes
from expertlink.errors import InputError
from expertlink.layouts import align

_SCALE_SHARE = 8  # scales may take an eighth of a row's elements in bytes: 4 bytes per 32


@dataclass(frozen=True)
class RowShape:
    """Bytes of a row and of its metadata.

    Metadata are K expert locations, K places, K weights (four bytes each), the index of the row's
    token at its source where configured, then the scales.

    Attributes:
        row: largest row, a multiple of 16.
        places_at: where the places start in the metadata.
        weights_at: where the weights start.
        source_at: where the index of the token is, if it travels.
        scales_at: where the scales start, a multiple of 16.
        metadata: room for all of that, a multiple of 16.
    """

    row: int
    places_at: int
    weights_at: int
    source_at: int
    scales_at: int
    metadata: int

    def check(self, x_TW: Tensor, scales: Tensor | None) -> None:
        """Refuses rows that bulk copies cannot move or that there is no room for."""
        row = row_bytes(x_TW)
        if row % 16 or row > self.row:
            raise InputError(
                f"input has rows of {row} bytes; the nvlink engine moves multiples of 16 "
                f"bytes up to {self.row} (hidden_size elements of the configured dtype); "
                "engine='collective' moves any"
            )
        if scales is not None and row_bytes(scales) > self.scales:
            raise InputError(
                f"scales have {row_bytes(scales)} bytes per row; the nvlink "
                f"engine has room for {self.scales} at this hidden_size"
            )

    @property
    def scales(self) -> int:
        """Room for the scales of a row, in bytes."""
        return self.metadata - self.scales_at

    @property
    def staged(self) -> int:
        """Bytes from one staged row, with its metadata, to the next."""
        return align(self.row + self.metadata, 128)

    @staticmethod
    def of(config: MoECommunicatorConfig) -> RowShape:
        """The shape that a configuration needs."""
        words = 4 * config.topk  # bytes of a number for each choice
        scales_at = align(3 * words + (4 if config.source_tokens else 0), 16)
        scales = align(max(16, config.hidden_size // _SCALE_SHARE), 16)
        return RowShape(
            row=config.hidden_size * config.dtype.itemsize,
            places_at=words,
            weights_at=2 * words,
            source_at=3 * words,
            scales_at=scales_at,
            metadata=scales_at + scales,
        )
