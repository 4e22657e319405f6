"""Connects the ranks of a rail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from expertlink.engines.hybrid import nccl
from expertlink.engines.hybrid.gloo_rail import GlooRail
from expertlink.engines.hybrid.nccl_rail import NcclRail
from expertlink.engines.hybrid.rail import Rail, RailError

_ID = "nccl id"
_POLL_S = 0.005


def connect(
    store: Any,
    *,
    index: int,
    size: int,
    device: torch.device,
    max_ctas: int | None,
    timeout_s: float,
) -> Rail:
    """Meets the other ranks of the rail and moves a row to each. Collective over the rail.

    Args:
        store: key-value store of the rail's ranks, that nobody else uses.
        index: this rank's place on the rail.
        size: N.
        device: where the tensors live: NCCL joins GPUs, gloo CPUs.
        max_ctas: most thread blocks, and so SMs, of NCCL's kernels; None: NCCL decides.
        timeout_s: bound of the meeting.

    Raises:
        RailError: it failed, or took longer.
    """

    def meet() -> Rail:
        rail: Rail
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
            communicator = _communicator(store, index, size, max_ctas, timeout_s)
            rail = NcclRail(communicator, device=device)
        else:
            rail = GlooRail(store, index=index, size=size, timeout_s=timeout_s)
        _warm_up(rail, device)
        return rail

    return _within(timeout_s, meet)


def _communicator(
    store: Any, index: int, size: int, max_ctas: int | None, timeout_s: float
) -> nccl.Communicator:
    if index == 0:
        identity = nccl.new_id()
        store.set(_ID, identity)
    else:
        deadline = time.monotonic() + timeout_s
        while not store.check([_ID]):  # `get` would keep other threads from the store
            if time.monotonic() > deadline:
                raise RailError(f"rank 0 of the rail did not come within {timeout_s:g} s")
            time.sleep(_POLL_S)
        identity = store.get(_ID)
    return nccl.Communicator(identity, rank=index, size=size, max_ctas=max_ctas)


def _warm_up(rail: Rail, device: torch.device) -> None:
    """Moves a row to each rank: NCCL connects them at the first use, which cannot be captured."""
    mine = torch.full((16,), rail.index, dtype=torch.uint8, device=device)
    rows = torch.empty((rail.size, 16), dtype=torch.uint8, device=device)
    rail.gather(mine, rows)
    splits = [int(index != rail.index) for index in range(rail.size)]
    received = torch.empty((rail.size - 1, 16), dtype=torch.uint8, device=device)
    rail.exchange(mine.expand(rail.size - 1, -1).contiguous(), received, splits, splits)
    others = [index for index in range(rail.size) if index != rail.index]
    if rows[:, 0].tolist() != list(range(rail.size)) or received[:, 0].tolist() != others:
        raise RailError("rows of the first exchange arrived where they do not belong")


def _within(timeout_s: float, meet: Callable[[], Rail]) -> Rail:
    """What `meet` returns; in a thread of its own, since it may never end.

    Raises:
        RailError: it failed, or took longer.
    """
    rails: list[Rail] = []
    errors: list[BaseException] = []
    lock = threading.Lock()
    given_up = False

    def run() -> None:
        try:
            rail = meet()
        except BaseException as error:  # raised where it is waited for
            errors.append(error)
            return
        with lock:
            if not given_up:
                rails.append(rail)
                return
        rail.close()

    thread = threading.Thread(target=run, daemon=True, name="expertlink-rail")
    started = time.monotonic()
    thread.start()
    waited = False
    try:
        while thread.is_alive() and time.monotonic() - started < timeout_s:
            thread.join(0.05)  # signals are served in between
        waited = True
    finally:  # one of them may end the wait: nobody will have the rail
        with lock:
            given_up = True
        if rails and not waited:
            rails[0].close()
    if rails:
        return rails[0]
    if errors:
        raise RailError(_first_line(errors[0])) from errors[0]
    raise RailError(f"no connection within {timeout_s:g} s")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
