"""Entry of `expertlink` and `python -m expertlink`, and what is said when it cannot run."""

from __future__ import annotations

import importlib.util
import sys

from expertlink.errors import ExpertlinkError

_NEEDED = ("matplotlib", "numpy", "rich", "typer")


def main() -> None:
    """Runs the command line. Mistakes of the caller end in one sentence, not in a traceback."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"The command line needs {', '.join(missing)}: pip install 'expertlink[bench]'")
    from expertlink.cli import app

    try:
        app()
    except ExpertlinkError as error:
        sys.stderr.write(f"expertlink: {error}\n")
        sys.exit(2 if isinstance(error, ValueError) else 1)  # 2: the command line is at fault
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
