"""Kernels of the nvlink and hybrid engines on CPUs: their CUDA text compiled as C++.

`emulate(monkeypatch)` puts CPUs under `support.hosted` and `support.hosted_hosts`: jobs of hosted
ranks then need no GPU. Host code and device code are the library's own. The text of a kernel is
changed in three places only: PTX becomes calls of `emulator.h`, shared variables become references
into a block's memory, and `__INTADDR__` becomes `offsetof`.

Modelled: warps, shuffles and votes, barriers of blocks and of some warps, mbarriers with the bytes
they expect, alignment and bounds of bulk copies, dynamic and static shared memory (full of garbage
before), all blocks of all ranks as resident together, the clock, roundings of all number formats.

Not modelled:

- memory order: stores are seen at once and in order; fences do nothing;
- copies that run beside the thread that asked for them: they are done when they are asked for;
- streams and programmatic dependent launch: a launch is over before the host goes on;
- captures, and several processes;
- speed, registers, and the L1 cache.

One CPU thread runs a launch, so it can be repeated: its number is the seed of the schedule. It ends
when its threads do, when none of them can go on, or after `LIMIT_S`; a loop without barriers and
polls is left to the time limit of the test.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import threading
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from expertlink.engines.nvlink import launch as nvlink_launch
from expertlink.jit.compiler import inline_headers
from expertlink.jit.kernel import Arguments
from support import hosted
from support.emulator.translate import translate
from support.fake_gpu import CPU, FakeGpu

_LAUNCHING = threading.Lock()  # a library runs one launch at a time, as its variables are static
LIMIT_S = 50.0  # of a launch: kernels give up earlier, other ranks wait somewhat longer

_HEADER = Path(__file__).with_name("emulator.h")
_OPTIONS = [
    "-std=c++17",
    "-O1",
    "-w",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",  # the contract rounds products and sums one by one
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",  # it refuses jumps between stacks
]


def compiler() -> str | None:
    """Path of a C++ compiler, or None."""
    return shutil.which("g++") or shutil.which("clang++")


def needs_compiler() -> pytest.MarkDecorator:
    """Skips tests where nothing can be compiled."""
    return pytest.mark.skipif(compiler() is None, reason="needs g++ or clang++")


# -- launches -------------------------------------------------------------------------------------

_ENTRY = """
static const void* emulator_table;
template <typename Argument>
static void emulator_call(void (*kernel)(const Argument*)) {{
    kernel(static_cast<const Argument*>(emulator_table));
}}
static void emulator_thread() {{ emulator_call({instance}); }}
extern "C" const char* emulator_launch(const void* table, unsigned grid, unsigned ranks,
                                       int threads, int shared_bytes, double limit_s,
                                       unsigned long long seed) {{
    emulator_table = table;
    return emulator::launch(emulator_thread, {{grid, ranks, 1}}, threads, shared_bytes, limit_s,
                            seed);
}}
"""


class EmulatedKernel:
    """One instance of a kernel for hosted ranks; compiled when it is first launched.

    Args:
        text: CUDA; nothing is left to include.
        instance: the kernel with its template arguments. It takes the address of a struct per rank.
    """

    def __init__(self, text: str, instance: str) -> None:
        self._text = '#include "emulator.h"\n' + translate(text) + _ENTRY.format(instance=instance)
        self._function: Any = None
        self._launches = 0

    def launch(
        self,
        arguments: Arguments | SimpleNamespace,
        *,
        grid: tuple[int, int],
        block: int,
        shared_bytes: int,
        **_: object,
    ) -> None:
        """As `Kernel.launch`; returns when the kernel is over.

        Raises:
            RuntimeError: the kernel cannot end, or does what no GPU does.
        """
        with _LAUNCHING:
            if self._function is None:
                self._function = _built(self._text).emulator_launch
                self._function.restype = ctypes.c_char_p
            self._launches += 1
            reason = self._function(
                ctypes.c_void_p(arguments.table),
                *grid,
                block,
                shared_bytes,
                ctypes.c_double(LIMIT_S),
                ctypes.c_ulonglong(self._launches),
            )
        if reason is not None:
            raise RuntimeError(f"emulated kernel: {reason.decode()}")


def _built(text: str) -> ctypes.CDLL:
    """The library of this text, in the private folder that the session's kernels are cached in."""
    found = compiler()
    assert found is not None
    folder = Path(os.environ["EXPERTLINK_CACHE_DIR"]) / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [found, *_OPTIONS, _HEADER.read_text(), text]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    library = folder / f"{key}.so"
    if not library.exists():
        own = folder / f"{key}.{os.getpid()}.{threading.get_ident()}"
        source, made = own.with_suffix(".cpp"), own.with_suffix(".so")
        source.write_text(text)
        command = [found, *_OPTIONS, f"-I{_HEADER.parent}", str(source), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        finally:
            source.unlink()
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[:8000]}")
        made.replace(library)
    return ctypes.CDLL(str(library))


def _compile_kernel(name: str, instance: str, arch: str, *, prelude: str = "") -> EmulatedKernel:
    source = inline_headers(resources.files("expertlink.kernels"), f"{name}.cu")
    return EmulatedKernel(f'#line 1 "prelude"\n{prelude}\n{source}', instance)


# -- hosts ----------------------------------------------------------------------------------------


class _Stream:
    cuda_stream = 7
    priority = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def _nothing(self, *_: object) -> None:
        pass

    wait_stream = wait_event = record_event = synchronize = record = wait = _nothing

    def query(self) -> bool:
        return True


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosted ranks run on CPUs until the patch is undone.

    Gradients of routing weights still need a GPU.
    """
    FakeGpu(monkeypatch)
    patch = monkeypatch.setattr
    stream = _Stream()
    patch(torch.cuda, "Stream", _Stream)
    patch(torch.cuda, "Event", _Stream)
    patch(torch.cuda, "current_stream", lambda *_: stream)
    patch(torch.cuda, "init", lambda: None)
    patch(torch.cuda, "set_device", lambda *_: None)
    patch(torch.Tensor, "pin_memory", lambda tensor: tensor)
    patch(torch.Tensor, "record_stream", lambda *_: None)
    patch(hosted, "DEVICE", CPU)
    patch(hosted, "architecture", lambda _: "emulated")
    patch(hosted, "load_kernel", lambda _, kernel, **__: kernel)
    patch(hosted, "WeightedBackward", lambda *_, **__: None)
    patch(nvlink_launch, "compile_kernel", _compile_kernel)
