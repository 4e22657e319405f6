"""What this machine and installation can do: one sentence per check, for people and for scripts.

Nothing here raises: a check that breaks counts as failed. Nothing here needs more than torch, since
it examines installations that lack something.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from expertlink.about import NEEDED
from expertlink.settings import VARIABLES

if TYPE_CHECKING:
    from expertlink.launch import RankContext

Status = Literal["ok", "warn", "fail"]

_OLDEST_PYTHON = (3, 10)
_OLDEST_TORCH = (2, 11)
_NVLINK_CAPABILITY = (9, 0)
_FEW_FILES = 1024
_LITTLE_SHARED_MEMORY = 1 << 30
_NVLINK_PACKAGES = {"cuda.core": "cuda-core", "cuda.bindings.nvrtc": "cuda-bindings"}
_COLORS = {"ok": 32, "warn": 33, "fail": 31}  # green, yellow, red; of every terminal


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was checked.
        status: "ok"; "warn": something optional is missing or limited; "fail": the library cannot
            work until it is fixed.
        sentence: the finding and, if something is wrong, the remedy.
    """

    name: str
    status: Status
    sentence: str


def run_checks(*, timeout_s: float = 60.0) -> list[Check]:
    """All checks. The last ones start ranks on this machine.

    Args:
        timeout_s: bound of each round trip between ranks, in seconds, start included.
    """
    checks: list[tuple[str, Callable[[], list[Check]]]] = [
        ("python", _python),
        ("torch", _torch),
        ("distributed", _distributed),
        ("gpus", _gpus),
        ("nvrtc", _nvrtc),
        ("symmetric memory", _symmetric_memory),
        ("domains", _domains),
        ("network", _network),
        ("limits", _limits),
        ("environment", _environment),
        ("command line", _command_line),
        ("engine", _engine),
        ("round trip", lambda: _round_trips(timeout_s)),
    ]
    found: list[Check] = []
    for name, check in checks:
        try:
            found += check()
        except Exception as error:  # a check must not end the others
            found.append(Check(name, "fail", f"the check broke: {_first_line(error)}."))
    return found


def exit_code(checks: list[Check]) -> int:
    """0 if the library is usable, 1 if something that it needs failed."""
    return int(any(check.status == "fail" for check in checks))


def run_doctor(*, as_json: bool, timeout_s: float) -> int:
    """`expertlink doctor`: one line per check, or one JSON object. Returns the exit code."""
    checks = run_checks(timeout_s=timeout_s)
    code = exit_code(checks)
    if as_json:
        answer = {"usable": code == 0, "checks": [asdict(check) for check in checks]}
        sys.stdout.write(json.dumps(answer, indent=2) + "\n")
        return code
    colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = max(len(check.name) for check in checks)
    for check in checks:
        status = f"{check.status:<4}"
        if colored:
            status = f"\033[{_COLORS[check.status]}m{status}\033[0m"
        sys.stdout.write(f"{status}  {check.name:<{width}}  {check.sentence}\n")
    return code


def main(arguments: list[str]) -> int:
    """The command without the command line's packages, for installations that lack them.

    Args:
        arguments: those after `expertlink doctor`.
    """
    parser = argparse.ArgumentParser(prog="expertlink doctor", description="What works here.")
    parser.add_argument("--json", action="store_true", help="Answer in JSON.")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="Seconds that each round trip may take."
    )
    options = parser.parse_args(arguments)
    return run_doctor(as_json=options.json, timeout_s=options.timeout)


def _python() -> list[Check]:
    version = platform.python_version()
    if sys.version_info[:2] < _OLDEST_PYTHON:
        sentence = f"{version} is too old; install {_dots(_OLDEST_PYTHON)} or later."
        return [Check("python", "fail", sentence)]
    return [Check("python", "ok", f"{version} on {platform.system()} {platform.machine()}.")]


def _torch() -> list[Check]:
    import torch

    version = torch.__version__
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    numbers = version.split("+")[0].split(".")
    if tuple(int(number) for number in numbers[:2]) < _OLDEST_TORCH:
        sentence = f"{version} is too old; install {_dots(_OLDEST_TORCH)} or later."
        return [Check("torch", "fail", sentence)]
    return [Check("torch", "ok", f"{version}, built with {built}.")]


def _distributed() -> list[Check]:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        sentence = "torch lacks torch.distributed, which all engines need; install one that has it."
        return [Check("distributed", "fail", sentence)]
    if not dist.is_gloo_available():
        sentence = "torch lacks gloo, which ranks on CPUs need; install one that has it."
        return [Check("distributed", "fail", sentence)]
    if dist.is_nccl_available():
        return [Check("distributed", "ok", "gloo and nccl.")]
    if torch.cuda.device_count():
        sentence = "gloo, but no nccl, which ranks on GPUs need; install a torch that has it."
        return [Check("distributed", "warn", sentence)]
    return [Check("distributed", "ok", "gloo; no nccl, but only GPUs need it.")]


def _gpus() -> list[Check]:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        if shutil.which("nvidia-smi") is not None:
            sentence = (
                "an NVIDIA driver is installed, but torch sees no GPU; check "
                "CUDA_VISIBLE_DEVICES, and that torch was built with CUDA."
            )
            return [Check("gpus", "warn", sentence)]
        return [Check("gpus", "ok", "none; tensors live on the CPU.")]
    capabilities = {torch.cuda.get_device_capability(gpu) for gpu in range(count)}
    names = sorted({torch.cuda.get_device_name(gpu) for gpu in range(count)})
    kinds = ", ".join(f"sm_{major}{minor}" for major, minor in sorted(capabilities))
    sentence = f"{count} x {' / '.join(names)}, {kinds}."
    found = [Check("gpus", "ok", sentence)]
    if min(capabilities) < _NVLINK_CAPABILITY:
        sentence = f"{kinds}: the nvlink engine needs sm_90 or later; collective works."
        found.append(Check("gpus", "warn", sentence))
    if count > 1:
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
        if apart:
            a, b = apart[0]
            sentence = f"{len(apart)} of {len(pairs)} pairs lack peer access, first GPU {a} to {b}."
            found.append(Check("peer access", "warn", sentence))
        else:
            found.append(Check("peer access", "ok", f"all {len(pairs)} pairs of GPUs."))
    return found


def _nvrtc() -> list[Check]:
    unusable = _unusable(_NVLINK_PACKAGES)
    if not unusable:
        versions = [f"{name} {_version(name)}" for name in _NVLINK_PACKAGES.values()]
        return [
            Check("nvrtc", "ok", f"kernels can be compiled at run time: {', '.join(versions)}.")
        ]
    if not _has_gpu():
        return [Check("nvrtc", "ok", "not installed, but only GPUs need it.")]
    sentence = f"{unusable}: pip install 'expertlink[cuda]'."
    return [Check("nvrtc", "warn", sentence)]


def _symmetric_memory() -> list[Check]:
    name = "symmetric memory"
    if importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        sentence = "torch lacks it, so GPUs cannot share memory; install a later one."
        return [Check(name, "warn", sentence)]
    where = "" if _has_gpu() else ", but only GPUs need it"
    return [Check(name, "ok", f"torch has it{where}.")]


def _domains() -> list[Check]:
    """Which ranks of a group would count as one host, and on which rails they would be."""
    import torch

    from expertlink.engines.hybrid.discovery import HOST_ID, fabric_clique

    gpus = torch.cuda.device_count()
    if gpus == 0:
        return [Check("domains", "ok", "no GPUs, so ranks are on one unless config.domains says.")]
    pretended = os.environ.get(HOST_ID)
    cliques = {fabric_clique(torch.device("cuda", gpu)) for gpu in range(gpus)}
    if pretended:
        name = f"{HOST_ID}={pretended} names this host's"
    elif cliques != {None}:
        cliques.discard(None)
        name = f"fabric clique {', '.join(sorted(map(str, cliques)))}, with GPUs of other machines"
    else:
        name = f"machine {platform.node()}"
    sentence = (
        f"{name}; {gpus} GPUs, so up to {gpus} rails to other hosts with as many, rail g between "
        "their g-th ranks."
    )
    found = [Check("domains", "ok", sentence)]
    ranks, local = (os.environ.get(name, "") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if ranks.isdecimal() and local.isdecimal() and int(local) and int(ranks) % int(local):
        sentence = (
            f"{ranks} ranks, {local} of them here: hosts have unequal numbers, so auto picks "
            "collective."
        )
        found.append(Check("domains", "warn", sentence))
    return found


def _network() -> list[Check]:
    """What NCCL would use between hosts."""
    from expertlink import network

    here = os.environ
    given = [f"{name}={here[name]}" for name in network.VARIABLES if here.get(name)]
    note = f" ({', '.join(given)})" if given else ""
    ports, names = network.rdma_ports(here), network.interfaces(here)
    if here.get("NCCL_NET", "").strip() and here["NCCL_NET"] not in ("IB", "Socket"):
        return [Check("network", "ok", f"between hosts NCCL uses {here['NCCL_NET']}{note}.")]
    if ports and here.get("NCCL_NET") != "Socket":
        sentence = f"between hosts NCCL may use {', '.join(map(str, ports))}{note}."
        return [Check("network", "ok", sentence)]
    if here.get("NCCL_NET") == "IB":
        sentence = f"NCCL is to use RDMA, but no active port was found{note}."
        return [Check("network", "warn", sentence)]
    if not names:
        sentence = f"NCCL finds no interface to other hosts{note}; check NCCL_SOCKET_IFNAME."
        return [Check("network", "warn", sentence)]
    over = f"{', '.join(names)}, if they have an address{note}"
    sentence = f"between hosts NCCL uses TCP over {over}; no RDMA port was found."
    return [Check("network", "ok", sentence)]


def _limits() -> list[Check]:
    found: list[Check] = []
    try:
        import resource

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except (ImportError, OSError):
        files = None
    if files is not None and 0 <= files < _FEW_FILES:
        sentence = f"{files} open files are allowed; every peer needs some: ulimit -n 65536."
        found.append(Check("open files", "warn", sentence))
    elif files is not None:
        allowed = "any number is" if files < 0 else f"{files} are"
        found.append(Check("open files", "ok", f"{allowed} allowed."))
    if os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        status: Status = "ok"
        hint = ""
        if _has_gpu() and free < _LITTLE_SHARED_MEMORY:
            status, hint = "warn", ", and nccl may need more; in a container, raise --shm-size"
        found.append(Check("shared memory", status, f"{free / 2**30:.1f} GiB are free{hint}."))
    return found


def _environment() -> list[Check]:
    found: list[Check] = []
    for variable in VARIABLES:
        text = os.environ.get(variable.name)
        if not text:
            continue
        try:
            variable.read()
        except ValueError as error:
            found.append(Check("environment", "fail", f"{error}."))
        else:
            sentence = f"{variable.name}={text}: {variable.meaning}."
            found.append(Check("environment", "ok", sentence))
    names = ", ".join(variable.name for variable in VARIABLES)
    return found or [Check("environment", "ok", f"none of {names} is set.")]


def _command_line() -> list[Check]:
    unusable = _unusable({name: name for name in NEEDED})
    if unusable:
        sentence = f"only doctor and --version work, {unusable}: pip install 'expertlink[bench]'."
        return [Check("command line", "warn", sentence)]
    return [Check("command line", "ok", f"{', '.join(NEEDED)} are installed.")]


def _engine() -> list[Check]:
    import torch

    from expertlink.config import MoECommunicatorConfig
    from expertlink.engines.select import choose_engine

    device = torch.device("cuda" if _has_gpu() else "cpu")
    typical = MoECommunicatorConfig(
        num_experts=8, hidden_size=1024, topk=2, max_tokens_per_rank=128
    )
    choice = choose_engine(typical, device=device)
    return [Check("engine", "ok", f"auto picks {choice.name}: {choice.reason}.")]


def _round_trips(timeout_s: float) -> list[Check]:
    import torch

    found = [_round_trip("cpu", timeout_s)]
    if torch.cuda.device_count() > 1:
        found.append(_round_trip("cuda", timeout_s))
    return found


def _round_trip(device: Literal["cpu", "cuda"], timeout_s: float) -> Check:
    from expertlink.launch import RankPool

    name = f"round trip {device}"
    start = time.monotonic()
    try:
        with RankPool(num_ranks=2, device=device, startup_timeout_s=timeout_s) as pool:
            left = max(1.0, timeout_s - (time.monotonic() - start))
            problems = pool.run(_exchange, left, timeout_s=left)
    except Exception as error:  # a rank may fail in any way
        return Check(name, "fail", f"2 ranks: {_first_line(error)}.")
    problem = next((problem for problem in problems if problem is not None), None)
    if problem is not None:
        return Check(name, "fail", f"2 ranks: {problem}.")
    took = time.monotonic() - start
    sentence = f"2 ranks dispatched and combined in every layout; {took:.1f} s with their start."
    return Check(name, "ok", sentence)


def _exchange(context: RankContext, timeout_s: float) -> str | None:
    """Runs on a rank: dispatches and combines a few tokens; returns what is wrong, if anything."""
    import torch

    from expertlink.communicator import MoECommunicator
    from expertlink.config import MoECommunicatorConfig
    from expertlink.types import DispatchLayout
    from expertlink.workloads.check import expected_sum, mismatch, scaling_experts
    from expertlink.workloads.routings import RoutingSpec, draw_routing

    tokens, hidden, topk, experts = 16, 128, 2, 2 * context.num_ranks
    routing = draw_routing(
        RoutingSpec.parse("masked"),
        tokens_per_rank=[tokens] * context.num_ranks,
        experts=experts,
        topk=topk,
        seed=0,
    )[context.rank]
    ids_TK = routing.topk_ids_TK.to(context.device)
    weights_TK = routing.topk_weights_TK.to(context.device)
    generator = torch.Generator("cpu").manual_seed(context.rank)
    x_TH = torch.randn((tokens, hidden), generator=generator, dtype=torch.float32, device="cpu").to(
        context.device, torch.bfloat16
    )
    expected_TH = expected_sum(x_TH, ids_TK, weights_TK, num_experts=experts)
    for layout in DispatchLayout:
        config = MoECommunicatorConfig(
            device=context.device,
            num_experts=experts,
            hidden_size=hidden,
            topk=topk,
            max_tokens_per_rank=tokens,
            output_layout=layout,
            timeout_s=timeout_s,
            startup_timeout_s=timeout_s,
        )
        with MoECommunicator(config) as comm:
            out, handle = comm.dispatch(x_TH, ids_TK, weights_TK)
            rows = scaling_experts(out, comm.local_experts, dtype=x_TH.dtype)
            problem = mismatch(comm.combine(rows, handle), expected_TH, wire_dtype=x_TH.dtype)
        if problem is not None:
            return f"{layout.value}: {problem}"
    return None


def _unusable(packages: dict[str, str]) -> str:
    """Packages whose modules cannot be imported, and why; empty if all can."""
    reasons = []
    for module, package in packages.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken package counts as missing
            reasons.append(f"{package} ({_first_line(error)})")
    return f"cannot import {' and '.join(reasons)}" if reasons else ""


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"


def _dots(numbers: Any) -> str:
    return ".".join(map(str, numbers))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
