"""The version of the package, and what its command line needs. Imports nothing of it."""

from __future__ import annotations

__version__ = "0.1.0"

NEEDED = ("matplotlib", "numpy", "rich", "typer")
"""What the command line imports beyond torch; `doctor` and `--version` need none of it."""


def version() -> str:
    """One line for `--version` and for reports of defects."""
    import platform

    import torch

    python = platform.python_version()
    return f"expertlink {__version__}, torch {torch.__version__}, Python {python}"
