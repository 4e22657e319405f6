"""From a kernel's source in `expertlink.kernels` to machine code, through NVRTC.

Compiling needs no GPU and no driver; `cuda-core` and NVRTC come with the extra `cuda`.
"""

from __future__ import annotations

import enum
import hashlib
import importlib
import importlib.util
import io
import json
import posixpath
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from expertlink import about
from expertlink.errors import EngineUnavailableError
from expertlink.jit.cache import fetch

if TYPE_CHECKING:
    from importlib.abc import Traversable

_OPTIONS = {
    "std": "c++17",
    "fma": False,  # the contract rounds products and sums one by one
    "ptxas_options": ["-v"],
}
_INCLUDE = re.compile(r'\s*#\s*include\s*"([^"]+)"')
_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")


@dataclass(frozen=True)
class CompiledKernel:
    """One instance of one kernel.

    Attributes:
        cubin: machine code for one architecture.
        lowered_name: the instance's symbol in `cubin`.
        instance: the kernel with its template arguments, as it was asked for.
        report: what the assembler says of registers, shared memory and spills.
    """

    cubin: bytes
    lowered_name: str
    instance: str
    report: str

    def pack(self) -> bytes:
        """One JSON line of the texts, then the machine code; `unpack` reads it."""
        texts = [self.lowered_name, self.instance, self.report]
        return json.dumps(texts).encode() + b"\n" + self.cubin

    @classmethod
    def unpack(cls, packed: bytes) -> CompiledKernel:
        """The kernel that `pack` packed."""
        texts, _, cubin = packed.partition(b"\n")
        return cls(cubin, *json.loads(texts))


def unavailable_reason() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    for module in ("cuda.core", "cuda.bindings"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{module} is not installed (pip install 'expertlink[cuda]')"
    return None


_importing = threading.Lock()


def cuda_core() -> Any:
    """The module `cuda.core`, imported when a kernel is first needed."""
    with _importing:  # it is there before it is complete
        return importlib.import_module("cuda.core")


def constants(values: Mapping[str, bool | int | float]) -> str:
    """C++ text that defines each name as a `constexpr` of type bool, int, long long or float.

    Raises:
        ValueError: a name is no identifier, or a number is not finite or has more than 64 bits.
    """
    lines: list[str] = []
    for name, value in values.items():
        if not name.isidentifier() or not -(2**63) < value < 2**63:
            raise ValueError(f"{name} = {value} cannot be a constant of a kernel")
        if isinstance(value, bool):
            lines.append(f"constexpr bool {name} = {str(value).lower()};\n")
        elif isinstance(value, float):
            lines.append(f"constexpr float {name} = {value!r}f;\n")
        elif -(2**31) < value < 2**31:
            lines.append(f"constexpr int {name} = {value};\n")
        else:
            lines.append(f"constexpr long long {name} = {value}LL;\n")
    return "".join(lines)


def enum_declaration(*enums: type[enum.IntEnum] | type[enum.IntFlag], prefix: str) -> str:
    """C++ text of an enumeration with the members of Python ones.

    Args:
        enums: the first one names the enumeration; members of the others follow.
        prefix: in front of every member's name: with "k", ROW_BYTES is kRowBytes.

    Raises:
        ValueError: two members have one name.
    """
    members = [(prefix + _camel_case(str(m.name)), int(m)) for kind in enums for m in kind]
    if len({name for name, _ in members}) < len(members):
        raise ValueError(f"enumeration {enums[0].__name__}: two members have one name")
    lines = "".join(f"    {name} = {value},\n" for name, value in members)
    return f"enum {enums[0].__name__} {{\n{lines}}};\n"


def _camel_case(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def inline_headers(root: Traversable, name: str) -> str:
    """Text of the source `name` with its quoted headers in place of their `#include` lines.

    A header is looked up beside the file that names it, then in `root`; it appears once, where it
    is first named, whatever `#if` stands around it. `#line` directives keep the compiler's messages
    about the files as they are; a header that is missing is left for the compiler to report.

    Args:
        root: directory of the sources.
        name: path of a source in it, with forward slashes.
    """
    seen: set[str] = set()

    def find(header: str, beside: str) -> str | None:
        for path in (posixpath.join(posixpath.dirname(beside), header), header):
            path = posixpath.normpath(path)
            if not path.startswith("..") and root.joinpath(path).is_file():
                return path
        return None

    def expand(path: str) -> list[str]:
        seen.add(path)
        lines = [f'#line 1 "{path}"']
        for number, line in enumerate(root.joinpath(path).read_text().splitlines(), start=1):
            include = _INCLUDE.match(line)
            header = find(include[1], path) if include else None
            if header is not None:
                if header not in seen:
                    lines += expand(header)
                lines.append(f'#line {number + 1} "{path}"')
            else:
                # The pragma would be a warning in a text that is compiled as one file.
                lines.append("" if _ONCE.match(line) else line)
        return lines

    return "\n".join(expand(name)) + "\n"


@cache
def compile_kernel(name: str, instance: str, arch: str, *, prelude: str = "") -> CompiledKernel:
    """Compiles one instance of `kernels/<name>.cu`, or loads it from the disk cache.

    Args:
        name: source file without its ending.
        instance: the kernel with its namespace and template arguments, such as
            `ll::dispatch<true>`.
        arch: target, such as `sm_90a`.
        prelude: text in front of the source: `Struct.declaration`, `constants(...)`.

    Raises:
        EngineUnavailableError: the compiler is not installed, or refuses the source; the message
            then holds its log.
    """
    source = inline_headers(resources.files("expertlink.kernels"), f"{name}.cu")
    return compile_source(f'#line 1 "prelude"\n{prelude}\n{source}', instance, arch)


def compile_source(source: str, instance: str, arch: str) -> CompiledKernel:
    """`compile_kernel` for a text that includes nothing."""
    reason = unavailable_reason()
    if reason is not None:
        raise EngineUnavailableError(f"kernels cannot be compiled: {reason}")
    key = _key(source, instance, arch)
    return CompiledKernel.unpack(fetch(key, lambda: _translate(source, instance, arch).pack()))


def _key(source: str, instance: str, arch: str) -> str:
    """Digest of everything that the machine code depends on."""
    try:
        status, *nvrtc = importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except RuntimeError as error:
        raise EngineUnavailableError(
            f"kernels cannot be compiled: NVRTC cannot be loaded ({error})"
        ) from error
    assert status == 0, status
    versions = [about.__version__, nvrtc, cuda_core().__version__]
    parts = json.dumps([source, instance, arch, _OPTIONS, versions])
    return hashlib.sha256(parts.encode()).hexdigest()


def _translate(source: str, instance: str, arch: str) -> CompiledKernel:
    core = cuda_core()
    log = io.StringIO()
    try:
        program = core.Program(source, "c++", core.ProgramOptions(arch=arch, **_OPTIONS))
        code = program.compile("cubin", name_expressions=(instance,), logs=log)
    except Exception as error:  # cuda.core's own classes are private; their text holds the log
        raise EngineUnavailableError(
            f"the kernel {instance} does not compile for {arch}: {error}"
        ) from error
    lowered = code.symbol_mapping[instance]
    return CompiledKernel(
        cubin=bytes(code.code),
        lowered_name=lowered.decode() if isinstance(lowered, bytes) else lowered,
        instance=instance,
        report=log.getvalue(),
    )
