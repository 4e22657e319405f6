"""Runs a program in which `import deep_ep` imports the drop-in.

python -m expertlink.compat.deep_ep COMMAND ARGS        # a script, by path or by name on PATH
python -m expertlink.compat.deep_ep -m MODULE ARGS      # a module
torchrun ... -m expertlink.compat.deep_ep COMMAND ARGS  # in every rank
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys

from expertlink.compat.deep_ep.installing import install


def main(arguments: list[str]) -> None:
    """Installs the drop-in and becomes the program.

    Raises:
        SystemExit: there is no program, or it ends so.
    """
    by_module = arguments[:1] == ["-m"]
    program = arguments[1:] if by_module else arguments
    if not program:
        sys.exit(f"usage: {(__doc__ or '').partition(chr(10) * 2)[2]}")
    install()
    if by_module:
        sys.argv = program
        sys.path[:0] = [os.getcwd()]
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
        return
    found = program[0] if os.path.exists(program[0]) else shutil.which(program[0])
    if found is None:
        sys.exit(f"{program[0]}: no such file, and no such command on PATH")
    sys.argv = [found, *program[1:]]
    sys.path[:0] = [os.path.dirname(os.path.abspath(found))]
    runpy.run_path(found, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
