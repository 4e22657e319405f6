"""What the machine and the installation are, as far as a benchmark's reader needs to know."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch

from expertlink.bench.records import Environment

_COMMAND_TIMEOUT_S = 10.0


def describe_environment(device: torch.device) -> Environment:
    """Environment of a measurement on a device."""
    on_gpu = device.type == "cuda"
    return Environment(
        gpu=torch.cuda.get_device_name(device) if on_gpu else None,
        driver=_driver() if on_gpu else None,
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        commit=_commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cpu=_cpu_name(),
        cores=usable_cores(),
        backend="nccl" if on_gpu else "gloo",
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


@cache
def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine() or "unknown"


@cache
def _driver() -> str | None:
    output = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return output.splitlines()[0].strip() if output else None


@cache
def _commit() -> str | None:
    """Commit of the checkout that this file belongs to; None for an installed package."""
    here = Path(__file__).resolve()
    git = ("git", "-C", str(here.parent))
    # An installation inside another project's checkout is not that project.
    if _output(*git, "ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = _output(*git, "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return commit.strip() + ("-dirty" if changes else "")


def _output(*command: str) -> str | None:
    """What a command prints; None where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
