"""Kernels of the nvlink engine on CPUs: their CUDA text is compiled as C++, and hosted ranks run it.

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
import itertools
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from expertlink.engines.nvlink import launch as nvlink_launch
from expertlink.jit.compiler import inline_headers
from expertlink.jit.kernel import Arguments
from support import hosted
from support.fake_gpu import CPU, FakeGpu

LIMIT_S = 120.0  # of a launch: kernels give up earlier by themselves

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

_NOTHING = "(void)0"
_PTX = {
    "": _NOTHING,
    # mbarriers and bulk copies
    "mbarrier.init.shared::cta.b64 [%0], 1;": "emulator::mbarrier_init(%0)",
    "fence.mbarrier_init.release.cluster;": _NOTHING,
    "mbarrier.inval.shared::cta.b64 [%0];": _NOTHING,
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;": "emulator::mbarrier_expect(%0, %1)",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];": (
        "emulator::bulk_load(%0, %1, %2, %3)"
    ),
    "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }": (
        "%0 = emulator::mbarrier_test(%1, %2)"
    ),
    "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;": (
        "emulator::copy_from_shared(%0, %1, %2)"
    ),
    "cp.async.bulk.commit_group;": _NOTHING,
    "cp.async.bulk.wait_group.read 0;": _NOTHING,
    "cp.async.bulk.wait_group 0;": _NOTHING,
    "fence.proxy.async.shared::cta;": _NOTHING,
    "fence.proxy.async.global;": _NOTHING,
    # copies of 16 bytes
    "cp.async.cg.shared.global [%0], [%1], 16;": "emulator::copy_to_shared(%0, %1, 16)",
    "ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];": "emulator::load_shared_words(%4, %0, %1, %2, %3)",
    "cp.async.commit_group;": _NOTHING,
    "cp.async.wait_group %0;": _NOTHING,
    # words
    "ld.acquire.sys.global.u32 %0, [%1];": "%0 = emulator::load(%1)",
    "ld.acquire.gpu.global.u32 %0, [%1];": "%0 = emulator::load(%1)",
    "ld.relaxed.sys.global.u32 %0, [%1];": "%0 = emulator::load(%1)",
    "ld.relaxed.sys.global.s32 %0, [%1];": "%0 = emulator::load(%1)",
    "ld.relaxed.sys.global.u64 %0, [%1];": "%0 = emulator::load(%1)",
    "ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];": "emulator::load_pair(%2, %0, %1)",
    "ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];": (
        "emulator::load_words(%4, %0, %1, %2, %3)"
    ),
    "ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];": "emulator::load_words(%4, %0, %1, %2, %3)",
    "ld.acquire.cta.shared::cta.u32 %0, [%1];": (
        "%0 = emulator::load(reinterpret_cast<const unsigned*>(emulator::at_shared(%1)))"
    ),
    "st.release.sys.global.u32 [%0], %1;": "emulator::store(%0, %1)",
    "st.release.gpu.global.u32 [%0], %1;": "emulator::store(%0, %1)",
    "st.relaxed.sys.global.u32 [%0], %1;": "emulator::store(%0, %1)",
    "st.relaxed.sys.global.u64 [%0], %1;": "emulator::store(%0, %1)",
    "st.relaxed.sys.global.v2.u64 [%0], {%1, %2};": (
        "emulator::store(%0, %1), emulator::store(%0 + 1, %2)"
    ),
    "st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};": (
        "*reinterpret_cast<uint4*>(emulator::checked_global(%0, 16)) = make_uint4(%1, %2, %3, %4)"
    ),
    "st.release.cta.shared::cta.u32 [%0], %1;": (
        "emulator::store(reinterpret_cast<unsigned*>(emulator::at_shared(%0)), %1)"
    ),
    "red.release.cta.shared::cta.add.u32 [%0], 1;": (
        "emulator::add(reinterpret_cast<unsigned*>(emulator::at_shared(%0)), 1u)"
    ),
    "atom.shared.add.u32 %0, [%1], 1;": (
        "%0 = emulator::add(reinterpret_cast<unsigned*>(emulator::at_shared(%1)), 1u)"
    ),
    "atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;": "%0 = emulator::add(%1, 1u)",
    "atom.relaxed.gpu.global.add.u32 %0, [%1], 1;": "%0 = emulator::add(%1, 1u)",
    "fence.acq_rel.sys;": _NOTHING,
    # barriers, time, launches
    "bar.sync %0, %1;": "emulator::arrive(%0, %1, true)",
    "bar.arrive %0, %1;": "emulator::arrive(%0, %1, false)",
    "mov.u64 %0, %globaltimer;": "%0 = emulator::nanoseconds()",
    "griddepcontrol.launch_dependents;": _NOTHING,
    "griddepcontrol.wait;": _NOTHING,
    # numbers
    "cvt.f32.f16 %0, %1;": "%0 = emulator::widen_half(%1)",
    "cvt.rn.f16.f32 %0, %1;": "%0 = emulator::narrow_half(%1)",
    "{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }": (
        "%0 = emulator::widen_half(%2 & 0xffffu), %1 = emulator::widen_half(%2 >> 16)"
    ),
    "cvt.rn.bf16x2.f32 %0, %1, %2;": (
        "%0 = emulator::narrow_bfloat16(%2) | emulator::narrow_bfloat16(%1) << 16"
    ),
    "cvt.rn.f16x2.f32 %0, %1, %2;": (
        "%0 = emulator::narrow_half(%2) | emulator::narrow_half(%1) << 16"
    ),
    "cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;": (
        "%0 = emulator::narrow_e4m3(%2) | emulator::narrow_e4m3(%1) << 8"
    ),
    "max.u16x2 %0, %0, %1;": "%0 = emulator::larger_halves(%0, %1)",
    "rcp.approx.ftz.f32 %0, %1;": "%0 = 1.0f / %1",
}
"""PTX that kernels may contain, and the C++ that stands for it."""

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|.', re.DOTALL)
_ASM = re.compile(r"\basm(?: volatile)?\s*\(")
_DYNAMIC = re.compile(r"extern __shared__ __align__\(128\) (\w+) (\w+)\[\];")
_STATIC = re.compile(r"__shared__ (\w+) ([^;]*);")
_OFFSET = re.compile(r"__INTADDR__\(&\(\((\w+)\*\)0\)->(\w+)\)")
_VARIABLE = re.compile(r"(\w+)((?:\[.*\])?)")


def compiler() -> str | None:
    """Path of a C++ compiler, or None."""
    return shutil.which("g++") or shutil.which("clang++")


def needs_compiler() -> pytest.MarkDecorator:
    """Skips tests where nothing can be compiled."""
    return pytest.mark.skipif(compiler() is None, reason="needs g++ or clang++")


# -- the text of a kernel -------------------------------------------------------------------------


def translate(text: str) -> str:
    """C++ for the text of a kernel.

    Raises:
        ValueError: it has PTX that is not modelled.
    """
    text = _OFFSET.sub(r"__builtin_offsetof(\1, \2)", text)
    text = _DYNAMIC.sub(r"\1* const \2 = emulator::dynamic_shared<\1>();", text)
    numbers = itertools.count()

    def references(found: re.Match[str]) -> str:
        lines: list[str] = []
        for variable in found[2].split(","):
            parts = _VARIABLE.fullmatch(variable.strip())
            assert parts is not None, found[0]
            number = next(numbers)
            lines.append(f"using Shared{number} = {found[1]}{parts[2]};")
            lines.append(f"auto& {parts[1]} = emulator::shared<Shared{number}>({number});")
        return " ".join(lines)

    text = _STATIC.sub(references, text)
    done, at = "", 0
    for found in _ASM.finditer(text):
        tokens = list(_inside(text, found.end()))
        end = found.end() + sum(map(len, tokens))
        done += text[at : found.start()] + "(" + _without_ptx(tokens[:-1])
        done += ")" + "\n" * text.count("\n", found.start(), end)
        at = end
    return done + text[at:]


def _inside(text: str, at: int) -> Iterator[str]:
    """Tokens from here to the parenthesis that closes the one before, which is the last one."""
    depth = 1
    while depth:
        found = _TOKEN.match(text, at)
        assert found is not None
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        at = found.end()
        yield found[0]


def _split(tokens: list[str], separator: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += {"(": 1, ")": -1}.get(token, 0)
        if token == separator and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _without_ptx(tokens: list[str]) -> str:
    """The expression for what stands between the parentheses of an asm statement."""
    code, *sections = _split(tokens, ":")
    ptx = " ".join("".join(token[1:-1] for token in code if token.startswith('"')).split())
    if ptx not in _PTX:
        raise ValueError(f"tests/support/emulator does not know the PTX {ptx!r}")
    operands = [
        "".join(token for token in operand if not token.startswith('"')).strip()
        for section in sections[:2]
        for operand in _split(section, ",")
        if "".join(operand).strip()
    ]
    return re.sub(r"%(\d)", lambda found: operands[int(found[1])], _PTX[ptx])


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
    """One instance of a kernel for hosted ranks; compiled when it is first launched."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._lock = threading.Lock()  # a library runs one launch at a time
        self._function: Any = None
        self._launches = 0

    def launch(
        self,
        arguments: Arguments,
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
        with self._lock:
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


@cache
def _compile_kernel(name: str, instance: str, arch: str, *, prelude: str = "") -> EmulatedKernel:
    source = inline_headers(resources.files("expertlink.kernels"), f"{name}.cu")
    text = translate(f'#include "emulator.h"\n#line 1 "prelude"\n{prelude}\n{source}')
    return EmulatedKernel(text + _ENTRY.format(instance=instance))


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
    """Hosted ranks run on CPUs until the patch is undone. Gradients of routing weights need a GPU."""
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
