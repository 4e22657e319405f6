"""Entry of `expertlink` and `python -m expertlink`, and what is said when it cannot run."""

from __future__ import annotations

import importlib.util
import sys

from expertlink.about import NEEDED, version
from expertlink.errors import ExpertlinkError


def main() -> None:
    """Runs the command line. Mistakes of the caller end in one sentence, not in a traceback."""
    try:
        if missing():
            _run_bare(sys.argv[1:])
        else:
            from expertlink.cli import app

            app()
    except ExpertlinkError as error:
        sys.stderr.write(f"expertlink: {error}\n")
        sys.exit(2 if isinstance(error, ValueError) else 1)  # 2: the command line is at fault
    except KeyboardInterrupt:
        sys.exit(130)


def missing() -> list[str]:
    """Names in `NEEDED` that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def _run_bare(arguments: list[str]) -> None:
    """What the standard library is enough for."""
    if arguments == ["--version"]:
        sys.stdout.write(f"{version()}\n")
    elif arguments[:1] == ["doctor"]:
        from expertlink import doctor

        sys.exit(doctor.main(arguments[1:]))
    else:
        needs = f"needs {', '.join(missing())}: pip install 'expertlink[bench]'"
        sys.exit(f"The command line {needs} (doctor and --version need nothing)")


if __name__ == "__main__":
    main()
