"""Text to learn from, and batches of it that do not depend on the number of ranks."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from expertlink.errors import InputError

MAX_CORPUS_BYTES = 4 << 20
_HELD_OUT = 16  # one part in 16, the end of the text, is kept for validation
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "lib2to3"}


@dataclass(frozen=True)
class Corpus:
    """Bytes of a text: a part to train on, and a part held out.

    Attributes:
        name: the text's, for messages.
        train: `[n]` uint8.
        held_out: `[m]` uint8.
    """

    name: str
    train: Tensor
    held_out: Tensor

    @staticmethod
    def from_bytes(data: bytes, *, name: str, sample_bytes: int) -> Corpus:
        """Cuts a text.

        Args:
            data: the text, any bytes.
            name: the text's, for messages.
            sample_bytes: length of a training sample, target of its last byte included.

        Raises:
            InputError: the text is too short to cut a sample from its held-out part.
        """
        least = sample_bytes * _HELD_OUT
        if len(data) < least:
            raise InputError(f"{name} has {len(data)} bytes; accepted: at least {least}")
        text = torch.frombuffer(bytearray(data[:MAX_CORPUS_BYTES]), dtype=torch.uint8)
        cut = len(text) - len(text) // _HELD_OUT
        return Corpus(name, text[:cut].clone(), text[cut:].clone())

    @staticmethod
    def from_file(path: Path, *, sample_bytes: int) -> Corpus:
        """The first `MAX_CORPUS_BYTES` of a file.

        Raises:
            InputError: the file cannot be read or is too short.
        """
        try:
            with path.open("rb") as file:
                data = file.read(MAX_CORPUS_BYTES)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None
        return Corpus.from_bytes(data, name=path.name, sample_bytes=sample_bytes)

    @staticmethod
    def from_standard_library(*, sample_bytes: int) -> Corpus:
        """Sources of the running Python's standard library, by path, tests and tables left out.

        Raises:
            InputError: there are no sources on this machine.
        """
        root = Path(sysconfig.get_paths()["stdlib"])
        data = bytearray()
        for path in sorted(root.rglob("*.py")):
            if _SKIPPED.isdisjoint(path.relative_to(root).parts):
                data += path.read_bytes()
            if len(data) >= MAX_CORPUS_BYTES:
                break
        if not data:
            raise InputError(f"no Python sources in {root}; pass a text with --text")
        return Corpus.from_bytes(
            bytes(data), name="Python standard library", sample_bytes=sample_bytes
        )


@dataclass(frozen=True)
class Batches:
    """Draws samples. Only (seed, step, index in the global batch) decide which.

    Attributes:
        text: `[n]` uint8 to draw from.
        sequence: S, bytes the model reads per sample.
        batch: B, samples of the global batch.
        seed: chooses the samples.
    """

    text: Tensor
    sequence: int
    batch: int
    seed: int

    def draw(self, step: int, *, rank: int = 0, num_ranks: int = 1) -> tuple[Tensor, Tensor]:
        """A rank's share of the global batch of a step.

        Shares are consecutive and differ by at most one sample; together, in rank order, they are
        the batch that a single rank would draw.

        Returns:
            `(inputs, targets)`, each `[share, S]` int64; targets are the inputs one byte later.
        """
        # torch's CPU generator takes 32 bits of seed.
        generator = torch.Generator().manual_seed(crc32(f"{self.seed} {step}".encode()))
        last = len(self.text) - self.sequence - 1
        starts = torch.randint(last + 1, (self.batch,), generator=generator)
        first, end = share(self.batch, rank=rank, num_ranks=num_ranks)
        window = torch.arange(self.sequence + 1)
        samples = self.text[starts[first:end, None] + window].to(torch.int64)
        return samples[:, :-1], samples[:, 1:]


def share(total: int, *, rank: int, num_ranks: int) -> tuple[int, int]:
    """`[first, end)` of a rank's part when `total` things are dealt evenly in rank order."""
    return total * rank // num_ranks, total * (rank + 1) // num_ranks
