"""Ranks on hosts that are network namespaces, with NICs on a switch that can fail.

A host has two: one for the rail, and one for the store, so that rows do not hold up its answers.

Rank processes and the switch are forked from the server of forked.py. Each holds a
namespace without a name, so namespaces, NICs and queues are gone with the processes, which end
with the server, and with the pipe to the test. Nothing is done in the namespace of the test.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from expertlink.domains import Domains
from expertlink.engines.hybrid import monitor as monitors
from expertlink.engines.ranks.wire import Peer
from support.rails import CPU, Rank, make_rank

_NEW_NET = 0x40000000  # CLONE_NEWNET of sched.h
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of sys/prctl.h
_PORT = 29500
_PATIENCE_S = 30.0
_NICS = ("rail", "store")
_WAITS = ("_BEAT_S", "_FIRST_BEAT_S", "_EXPIRED_GRACE_S", "_LOST_GRACE_S", "_FOLLOW_S")


def reason_against() -> str | None:
    """Why hosts cannot be namespaces here; None: they can."""
    for tool in ("ip", "tc", "unshare"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    probe = (
        "ip link add probe0 type veth peer name probe1 && ip link add probe2 type bridge && "
        "tc qdisc add dev probe0 root tbf rate 1mbit burst 4kb latency 1s"
    )
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", probe],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    if done.returncode:
        return f"needs rights to make network namespaces, veth and tbf: {done.stderr.strip()}"
    return None


# -- in the processes -----------------------------------------------------------------------------


def _isolate() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if libc.unshare(_NEW_NET):
        raise OSError(ctypes.get_errno(), "unshare")


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=10, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")


def _limit(nic: str, rate: str | None) -> None:
    """What a NIC sends; None: as fast as it can."""
    what = f"replace dev {nic} root tbf rate {rate} burst 4kb latency 50ms"
    _run(f"tc qdisc {what}" if rate else f"tc qdisc del dev {nic} root")


def _address(nic: str, host: int) -> str:
    return f"10.231.{_NICS.index(nic)}.{host + 1}"


def _serve(pipe: Connection, server: Callable[[], Any]) -> None:
    """Makes an object, and calls its methods as the test says, until that hangs up."""
    _isolate()
    made = server()
    pipe.send(None)
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            os._exit(0)  # threads may be in a wait that no peer ends
        try:
            pipe.send((getattr(made, name)(*args), None))
        except Exception as error:
            pipe.send((None, f"{type(error).__name__}: {error}"))


class _Switch:
    """A bridge for each kind of NIC, with a port for each host."""

    def __init__(self) -> None:
        for nic in _NICS:
            _run(f"ip link add {nic} type bridge")
            _run(f"ip link set {nic} up")

    def plug(self, host: int, process: int) -> None:
        for nic in _NICS:
            _run(f"ip link add {nic}{host} type veth peer name {nic} netns {process}")
            _run(f"ip link set {nic}{host} master {nic} up")

    def limit(self, host: int, rate: str | None) -> None:
        _limit(f"rail{host}", rate)

    def switch(self, host: int, nics: Sequence[str], to: str) -> None:
        for nic in nics:
            _run(f"ip link set {nic}{host} {to}")


class _Host:
    """One rank on a host of its own; rank 0 hosts the store.

    Args:
        host: which one.
        timeout_s: of the rank.
    """

    def __init__(self, host: int, timeout_s: float) -> None:
        self._host, self._timeout_s = host, timeout_s
        os.environ["GLOO_SOCKET_IFNAME"] = "rail"
        torch.set_num_threads(1)
        for name in _WAITS:  # as in test_monitor.py
            setattr(monitors, name, getattr(monitors, name) / 3)
        self._rank: Rank | None = None
        self._kept: list[Any] = []

    def configure(self) -> None:
        for nic in _NICS:
            _run(f"ip addr add {_address(nic, self._host)}/24 dev {nic}")
            _run(f"ip link set {nic} up")
        _run("ip link set lo up")
        if self._host == 0:
            self._kept.append(self._store(is_master=True))

    def limit(self, rate: str | None) -> None:
        _limit("rail", rate)

    def _store(self, *, is_master: bool = False) -> dist.TCPStore:
        where = _address("store", 0)
        return dist.TCPStore(where, _PORT, is_master=is_master, wait_for_workers=False)

    def connect(self, name: str, hosts: Sequence[int]) -> list[int]:
        """Makes rails of these hosts, in place of those before; who is on the rail."""
        store = self._store()
        self._kept.append(store)  # a query of an earlier rail may wait in its destructor
        if self._rank is not None:
            self._rank.rail.close()
        domains = Domains(tuple(range(len(hosts))))
        self._rank = make_rank(
            dist.PrefixStore(name, store),
            hosts.index(self._host),
            domains,
            timeout_s=self._timeout_s,
            peers=[Peer(f"node-{host}", 100 + host) for host in hosts],
        )
        return self._rank.step()

    def step(self, phase: str, num_bytes: int) -> tuple[str, tuple[int, ...] | None, str, float]:
        """A gather or an exchange of so many bytes for each host; class, `missing` and text of what
        was raised, and after how many seconds."""
        rank = self._rank
        assert rank is not None
        size, began = rank.rail.size, time.monotonic()
        error: Exception | None = None
        try:
            if phase == "gather":
                rows = torch.empty((size, num_bytes), dtype=torch.uint8, device=CPU)
                mine = torch.full((num_bytes,), rank.number, dtype=torch.uint8, device=CPU)
                rank.rail.gather(mine, rows)
                assert rows.amin(1).tolist() == rows.amax(1).tolist() == list(range(size))
            else:
                splits = [int(index != rank.rail.index) for index in range(size)]
                send = torch.full((size - 1, num_bytes), rank.number, dtype=torch.uint8, device=CPU)
                receive = torch.empty_like(send)
                rank.rail.exchange(send, receive, splits, splits)
                others = [other for other in range(size) if other != rank.number]
                assert receive.amin(1).tolist() == receive.amax(1).tolist() == others
        except Exception as raised:  # the test looks at it
            error = raised
        waited = time.monotonic() - began
        missing = getattr(error, "missing", None)
        return type(error).__name__, missing and tuple(missing), str(error), waited


# -- in the test ----------------------------------------------------------------------------------


class _Remote:
    """A process with an object, from outside."""

    def __init__(self, kind: Callable[..., Any], *args: Any) -> None:
        self.pipe, other = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("forkserver").Process(
            target=_remote, args=(dict(os.environ), other, kind, args), daemon=True
        )
        self.process.start()
        other.close()

    def start(self, name: str, *args: Any) -> None:
        self.pipe.send((name, args))

    def result(self) -> Any:
        if not self.pipe.poll(_PATIENCE_S):
            raise TimeoutError("a process does not answer")
        value, error = self.pipe.recv()
        if error is not None:
            raise RuntimeError(error)
        return value

    def call(self, name: str, *args: Any) -> Any:
        self.start(name, *args)
        return self.result()

    def await_start(self) -> None:
        if not self.pipe.poll(_PATIENCE_S):
            raise TimeoutError("a process does not start")
        self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(_PATIENCE_S)


def _remote(
    environment: dict[str, str], pipe: Connection, kind: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    _serve(pipe, lambda: kind(*args))


class Network:
    """Hosts with one rank each, and the switch between them. A context manager.

    Args:
        num_hosts: N.
        timeout_s: of every rank.
    """

    def __init__(self, num_hosts: int, *, timeout_s: float) -> None:
        self._all: list[_Remote] = []
        self._switch: _Remote
        self.hosts: list[_Remote] = []
        self._num_hosts, self._timeout_s = num_hosts, timeout_s
        self._rails = 0

    def __enter__(self) -> Network:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for remote in self._all:
            remote.kill()

    def _build(self) -> None:
        self._all.append(_Remote(_Switch))
        for host in range(self._num_hosts):
            self._all.append(_Remote(_Host, host, self._timeout_s))
        self._switch, *self.hosts = self._all
        for remote in self._all:
            remote.await_start()
        for host, remote in enumerate(self.hosts):
            self._switch.call("plug", host, remote.process.pid)
        for remote in self.hosts:
            remote.call("configure")

    @property
    def processes(self) -> list[int]:
        """Of all hosts and the switch."""
        return [remote.process.pid or 0 for remote in self._all]

    def connect(self, hosts: Sequence[int]) -> None:
        """These hosts make rails, and use them once."""
        self._rails += 1
        for host in hosts:
            self.hosts[host].start("connect", f"rails {self._rails}", hosts)
        for index, host in enumerate(hosts):
            others = [other for other in range(len(hosts)) if other != index]
            assert self.hosts[host].result() == others

    def start(self, hosts: Sequence[int], phase: str, num_bytes: int) -> None:
        """These hosts begin a step of their rails."""
        for host in hosts:
            self.hosts[host].start("step", phase, num_bytes)

    def results(self, hosts: Sequence[int]) -> list[Any]:
        """What `_Host.step` returned."""
        return [self.hosts[host].result() for host in hosts]

    def limit(self, host: int, rate: str | None) -> None:
        """Rows reach and leave this host no faster; None: as fast as they can."""
        self._switch.call("limit", host, rate)
        self.hosts[host].call("limit", rate)

    def cut(self, host: int, nics: Sequence[str] = _NICS) -> None:
        """Nothing reaches these NICs of the host any more, and nothing that they send arrives."""
        self._switch.call("switch", host, nics, "down")

    def mend(self, host: int) -> None:
        """Ends `cut`."""
        self._switch.call("switch", host, _NICS, "up")

    def kill(self, host: int) -> None:
        """Ends the rank of this host at once; its NIC goes too."""
        self.hosts[host].kill()


def are_gone(processes: Sequence[int]) -> bool:
    """Whether none of these processes is left, and so none of their namespaces."""
    return not any(os.path.exists(f"/proc/{process}") for process in processes)
