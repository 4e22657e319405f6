"""Communicators of NCCL, through its C interface.

A process group of torch has a watchdog of its own. Once that sees that a peer is gone, it sleeps
for a minute, keeps the group's destructor waiting for so long, and signals the watchdog of the
default group, which may end the process. Here the monitor (monitor.py) is what watches.

Sources: nccl.h of NCCL 2.17 to 2.28, whose structures later versions accept.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

ID_BYTES = 128
_UNDEFINED = -(1 << 31)
_MAGIC = 0xCAFEBEEF
_VERSION = 21700  # whose fields `_Config` has
_UINT8 = 1
_IN_CALL_S = 0.2  # until a call that another thread makes is taken to hang


class NcclError(RuntimeError):
    """NCCL is not there, or one of its calls failed."""


class _Id(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * ID_BYTES),)


class _Config(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
    )

    @classmethod
    def of(cls, max_ctas: int | None) -> _Config:
        """Defaults but for the number of thread blocks. Calls return when work is queued."""
        return cls(
            size=ctypes.sizeof(cls),
            magic=_MAGIC,
            version=_VERSION,
            blocking=1,
            cga_cluster_size=_UNDEFINED,
            min_ctas=_UNDEFINED,
            max_ctas=_UNDEFINED if max_ctas is None else max_ctas,
            net_name=None,
        )


@functools.cache
def library() -> Any:
    """The NCCL that torch has loaded, or else the one that the system finds.

    Raises:
        NcclError: there is none.
    """
    try:
        found: Any = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise NcclError(f"NCCL's library cannot be loaded: {error}") from error
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for name, arguments in {
        "ncclGetUniqueId": (ctypes.POINTER(_Id),),
        "ncclCommInitRankConfig": (
            *(ctypes.POINTER(pointer), number, _Id, number),
            ctypes.POINTER(_Config),
        ),
        "ncclCommDestroy": (pointer,),
        "ncclCommAbort": (pointer,),
        "ncclGroupStart": (),
        "ncclGroupEnd": (),
        "ncclSend": (pointer, size, number, number, pointer, pointer),
        "ncclRecv": (pointer, size, number, number, pointer, pointer),
        "ncclAllGather": (pointer, pointer, size, number, pointer, pointer),
    }.items():
        function = getattr(found, name)
        function.argtypes, function.restype = list(arguments), number
    found.ncclGetErrorString.argtypes = [number]
    found.ncclGetLastError.argtypes = [pointer]
    found.ncclGetErrorString.restype = found.ncclGetLastError.restype = ctypes.c_char_p
    return found


def new_id() -> bytes:
    """Names a communicator that is to be made, with the address where its ranks meet.

    Raises:
        NcclError: see `library`; or no network interface can be used.
    """
    found, made = library(), _Id()
    _check(found, found.ncclGetUniqueId(ctypes.byref(made)))
    return ctypes.string_at(ctypes.byref(made), ID_BYTES)


class Communicator:
    """One rank of a communicator of NCCL, whose calls are queued on CUDA streams.

    Calls are collective over its ranks, in one order. Making one waits for all ranks, for ever.

    Args:
        identity: of `new_id`, the same on all ranks.
        rank: of this one, whose GPU is the current device.
        size: number of ranks.
        max_ctas: most thread blocks of a kernel; None: NCCL decides.

    Raises:
        NcclError: it cannot be made.
    """

    def __init__(self, identity: bytes, *, rank: int, size: int, max_ctas: int | None) -> None:
        self._library, self.rank, self.size = library(), rank, size
        self._calling = threading.Lock()  # an abort frees what a call uses
        handle, config = ctypes.c_void_p(), _Config.of(max_ctas)
        made = self._library.ncclCommInitRankConfig(
            ctypes.byref(handle), size, _Id.from_buffer_copy(identity), rank, ctypes.byref(config)
        )
        _check(self._library, made)
        self._handle: int | None = handle.value

    def gather(self, row: int, rows: int, size: int, stream: int) -> None:
        """The `size` bytes at address `row` of every rank, to address `rows`, ranks ascending.

        Raises:
            NcclError: the call failed, or the communicator has ended.
        """
        with self._call() as handle:
            self._check(self._library.ncclAllGather(row, rows, size, _UINT8, handle, stream))

    def exchange(
        self, send: int, receive: int, sizes: Sequence[tuple[int, int]], stream: int
    ) -> None:
        """Sends bytes to every rank, and receives theirs.

        Args:
            send: address of what goes, one receiver after the other.
            receive: address for what comes, one sender after the other.
            sizes: `[size]` bytes to, and from, each rank; may be 0.
            stream: a CUDA stream.

        Raises:
            NcclError: the call failed, or the communicator has ended.
        """
        found = self._library
        with self._call() as handle:
            self._check(found.ncclGroupStart())
            code = 0
            for rank, (to, of) in enumerate(sizes):
                if to:
                    code = code or found.ncclSend(send, to, _UINT8, rank, handle, stream)
                if of:
                    code = code or found.ncclRecv(receive, of, _UINT8, rank, handle, stream)
                send, receive = send + to, receive + of
            ended = found.ncclGroupEnd()  # in any case
            self._check(code or ended)

    def abort(self) -> None:
        """Ends what is under way, on the device too. Waits for CUDA graphs with calls of it."""
        self._end(self._library.ncclCommAbort)

    def destroy(self) -> None:
        """Releases it, once what is under way has ended. Waits for graphs as `abort` does."""
        self._end(self._library.ncclCommDestroy)

    def _end(self, end: Any) -> None:
        free = self._calling.acquire(timeout=_IN_CALL_S)  # else an abort makes the call return
        try:
            handle, self._handle = self._handle, None
        finally:
            if free:
                self._calling.release()
        if handle is not None:
            end(handle)

    @contextlib.contextmanager
    def _call(self) -> Iterator[int]:
        with self._calling:
            if self._handle is None:
                raise NcclError("the communicator has ended")
            yield self._handle

    def _check(self, code: int) -> None:
        _check(self._library, code, self._handle)


def _check(found: Any, code: int, handle: int | None = None) -> None:
    if code:
        said, more = found.ncclGetErrorString(code), found.ncclGetLastError(handle)
        text = " ".join(part.decode(errors="replace") for part in (said, more) if part)
        raise NcclError(f"NCCL: {' '.join(text.split())}")
