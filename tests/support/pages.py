"""Blocks of code in pages."""

from __future__ import annotations

import re
from pathlib import Path

_BLOCK = re.compile(r"^(?:<!-- (\w+) -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def marked_blocks(page: Path) -> list[tuple[str, str]]:
    """Python blocks of a page with the marks that stand before them, such as GPU; "" for none."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))
