"""Places of results, tried before the work whose results they are to hold."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_TRIED_BYTES = 1 << 20  # more than most results have


def try_folder(folder: Path) -> None:
    """Writes something to a folder, of which nothing remains.

    Raises:
        OSError: the folder is not there, cannot be written to, or has no room.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(_TRIED_BYTES))
        file.flush()
        os.fsync(file.fileno())  # some file systems only find out here


def reason(error: OSError) -> str:
    """What went wrong, without number and path."""
    return error.strerror or str(error)
