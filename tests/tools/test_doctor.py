"""`expertlink doctor`: its checks, their sentences, and its exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from expertlink import __version__, doctor, network
from expertlink.about import NEEDED
from expertlink.cli import app
from expertlink.doctor import Check, exit_code, run_checks
from expertlink.settings import TIMEOUT, VARIABLES

EXPECTED = {"python", "torch", "distributed", "gpus", "engine", "environment", "round trip cpu"}
EXPECTED |= {"domains", "network"}


@pytest.fixture
def _without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the one slow check."""
    monkeypatch.setattr(doctor, "_round_trips", lambda _: [Check("round trip cpu", "ok", "Fine.")])


def find(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_only_failures_decide_the_exit_code() -> None:
    good, odd, bad = Check("a", "ok", ""), Check("b", "warn", ""), Check("c", "fail", "")
    assert exit_code([]) == 0
    assert exit_code([good, odd]) == 0
    assert exit_code([good, bad, odd]) == 1


def test_this_machine_is_usable_and_json_says_so() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    answer = json.loads(result.stdout)
    assert result.exit_code == 0, answer
    assert answer["usable"] is True
    assert {check["name"] for check in answer["checks"]} >= EXPECTED
    assert all(set(check) == {"name", "status", "sentence"} for check in answer["checks"])
    assert "picks" in next(c["sentence"] for c in answer["checks"] if c["name"] == "engine")


@pytest.mark.usefixtures("_without_ranks")
def test_every_check_is_one_line() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    lines = result.output.splitlines()
    assert result.exit_code == 0
    assert len(lines) == len(run_checks())
    assert all(line.split()[0] in ("ok", "warn", "fail") for line in lines)
    assert all(line.endswith(".") for line in lines)


@pytest.mark.usefixtures("_without_ranks")
def test_variables_are_shown_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    assert "none of" in find(run_checks(), "environment").sentence
    monkeypatch.setenv(TIMEOUT.name, "30")
    assert f"{TIMEOUT.name}=30" in find(run_checks(), "environment").sentence
    monkeypatch.setenv(TIMEOUT.name, "soon")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "soon" in result.output


@pytest.mark.usefixtures("_without_ranks")
def test_the_network_of_nccl_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in network.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for device, state, rate in (
        ("mlx5_0", "4: ACTIVE", "400 Gb/sec (4X NDR)"),
        ("mlx5_1", "1: DOWN", "40"),
    ):
        port = tmp_path / device / "ports" / "1"
        port.mkdir(parents=True)
        for name, text in (("state", state), ("rate", rate), ("link_layer", "InfiniBand")):
            (port / name).write_text(text + "\n")
    monkeypatch.setattr(network.rdma_ports, "__defaults__", (tmp_path,))

    def sentence() -> tuple[str, str]:
        [check] = doctor._network()
        return check.status, check.sentence

    assert sentence() == ("ok", "between hosts NCCL may use mlx5_0:1 (400 Gb/s InfiniBand).")
    monkeypatch.setenv("NCCL_IB_HCA", "^mlx5_0")
    status, text = sentence()
    assert status == "ok"
    assert text.startswith("between hosts NCCL uses TCP over ")
    assert "NCCL_IB_HCA=^mlx5_0" in text
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuch")
    assert sentence()[0] == "warn"
    monkeypatch.setenv("NCCL_NET", "IB")
    assert sentence() == (
        "warn",
        "NCCL is to use RDMA, but no active port was found (NCCL_NET=IB, NCCL_IB_HCA=^mlx5_0, "
        "NCCL_SOCKET_IFNAME=nosuch).",
    )


@pytest.mark.parametrize(
    ("listed", "accepted"),
    [
        ("", {"eth0", "eth1", "eth10", "lo"}),
        ("eth1", {"eth1", "eth10"}),
        ("=eth1", {"eth1"}),
        ("^eth1", {"eth0", "lo"}),
        ("^=eth1,lo", {"eth0", "eth10"}),
        ("eth0,lo", {"eth0", "lo"}),
    ],
)
def test_lists_of_interfaces_are_read_as_nccl_does(listed: str, accepted: set[str]) -> None:
    names = ("eth0", "eth1", "eth10", "lo")
    assert {name for name in names if network.accepts(listed, name)} == accepted
    assert set(network.interfaces({"NCCL_SOCKET_IFNAME": listed}, names)) == accepted - {
        "lo" if not listed else ""
    }


def test_ports_of_devices() -> None:
    assert network.accepts("mlx5_0:1,mlx5_1", "mlx5_0", 1)
    assert not network.accepts("mlx5_0:1,mlx5_1", "mlx5_0", 2)
    assert network.accepts("mlx5_0:1,mlx5_1", "mlx5_1", 2)


def test_a_check_that_breaks_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Check]:
        raise OSError("no such thing\nsecond line")

    monkeypatch.setattr(doctor, "_limits", broken)
    check = find(run_checks(), "limits")
    assert check.status == "fail"
    assert check.sentence == "the check broke: OSError: no such thing."


def test_ranks_that_do_not_start_in_time_are_a_failure() -> None:
    check = find(run_checks(timeout_s=0.001), "round trip cpu")
    assert check.status == "fail"
    assert "2 ranks" in check.sentence


def test_missing_packages_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED", ("rich", "expertlink_no_such_package"))
    [check] = doctor._command_line()
    assert check.status == "warn"
    assert "expertlink_no_such_package" in check.sentence
    assert "rich" not in check.sentence
    assert "pip install 'expertlink[bench]'" in check.sentence


def run_bare(code: str, *, lacking: tuple[str, ...] = NEEDED) -> subprocess.CompletedProcess[str]:
    """Runs code in a process that cannot find these packages."""
    hide = f"""
import sys

class Hider:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {lacking}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hider())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in {lacking} else find_spec(name, *more)
"""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", hide + code],
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.parametrize("arguments", [["doctor", "--json"], ["doctor", "--timeout", "0.001"]])
def test_doctor_runs_where_only_torch_is_installed(arguments: list[str]) -> None:
    done = run_bare(f"sys.argv[1:] = {arguments}; from expertlink.__main__ import main; main()")
    assert "Traceback" not in done.stderr
    if "--json" in arguments:
        assert done.returncode == 0, done.stderr
        checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
        assert checks["round trip cpu"]["status"] == "ok"
        assert checks["command line"]["status"] == "warn"
        for name in (*NEEDED, "pip install 'expertlink[bench]'"):
            assert name in checks["command line"]["sentence"]
    else:
        assert done.returncode == 1, done.stderr
        assert re.search("^warn +command line +", done.stdout, flags=re.MULTILINE)
        assert re.search("^fail +round trip cpu +2 ranks: ", done.stdout, flags=re.MULTILINE)


@pytest.mark.parametrize("lacking", [(), NEEDED], ids=["complete", "bare"])
def test_version(lacking: tuple[str, ...]) -> None:
    code = "sys.argv[1:] = ['--version']; from expertlink.__main__ import main; main()"
    done = run_bare(code, lacking=lacking)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"expertlink {__version__}, torch {torch.__version__}, Python 3.")
    assert done.stdout.count("\n") == 1
