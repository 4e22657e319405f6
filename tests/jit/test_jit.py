"""Structs, sources and launches of kernels: what the host writes is what the device reads."""

from __future__ import annotations

import ctypes
import enum
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import expertlink.jit.kernel as kernel_module
from expertlink import EngineUnavailableError
from expertlink.jit.compiler import (
    compile_kernel,
    compile_source,
    constants,
    enum_declaration,
    inline_headers,
)
from expertlink.jit.kernel import CudaError, Field, Kernel, Struct, load_kernel
from support.depth import deep

ARCH = "sm_90a"
TYPES = ("const char*", "int*", "int", "unsigned", "long long", "unsigned long long", "float")
EMPTY = 'extern "C" __global__ void k() {}\n'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTLINK_CACHE_DIR", str(tmp_path / "cache"))


COUNTS = st.one_of(st.none(), st.integers(1, 5))


@settings(max_examples=deep(30))
@given(st.lists(st.tuples(st.sampled_from(TYPES), COUNTS), min_size=1, max_size=12))
def test_the_compiler_lays_a_struct_out_as_the_host_does(
    members: list[tuple[str, int | None]],
) -> None:
    fields = [Field(ctype, f"x{i}", "", count) for i, (ctype, count) in enumerate(members)]
    struct = Struct("A", fields)
    for field in fields:
        assert f"->{field.name}) == {struct.offset(field.name)}" in struct.declaration
    compile_source(struct.declaration + EMPTY, "k", ARCH)


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("int n", "long long n"),
        ("const char* x", "float4 x"),
        ("unsigned seen[3]", "unsigned seen[5]"),
        # Members of one type whose order is another one: only the offsets differ.
        ("float a", "float b"),
    ],
)
def test_another_layout_does_not_compile(written: str, instead: str) -> None:
    struct = Struct(
        "A",
        [
            Field("const char*", "x", "bytes"),
            *(Field("int", n, "rows") for n in "nm"),
            Field("unsigned", "seen", "rows by rank", 3),
            Field("float", "a", "a factor"),
            Field("float", "b", "another factor"),
        ],
    )
    compile_source(struct.declaration + EMPTY, "k", ARCH)
    struct_text, assertions = struct.declaration.split("};\n")
    names = {written: instead, instead: written}  # members that change places, where both exist
    pattern = "|".join(re.escape(name) + r"(?!\w)" for name in names)
    other = re.sub(pattern, lambda match: names[match[0]], struct_text)
    assert other != struct_text
    with pytest.raises(EngineUnavailableError, match="differs from the host"):
        compile_source(other + "};\n" + assertions + EMPTY, "k", ARCH)


def test_arrays_are_members() -> None:
    struct = Struct(
        "A",
        [
            Field("int", "n", "rows"),
            Field("unsigned long long", "times", "by rank", 2),
            Field("unsigned", "masks", "by rank", 3),
        ],
    )
    assert (struct.offset("times"), struct.offset("masks"), struct.size) == (8, 24, 40)
    assert "unsigned masks[3];  // by rank\n" in struct.declaration
    memory = torch.zeros(struct.size, dtype=torch.uint8)
    seen = struct.at(memory.data_ptr())
    seen.n, seen.masks[2] = 5, 7
    seen.times[:] = [1, 2**40]
    assert seen.times[:] == [1, 2**40]
    assert struct.member(memory, "n").tolist() == [5]
    assert struct.member(memory, "masks").tolist() == [0, 0, 7]
    struct.member(memory, "times")[0] = 9
    assert seen.times[0] == 9


def test_members_of_a_struct() -> None:
    types = [*TYPES, "float*"]
    struct = Struct("A", [Field(ctype, f"x{i}", "") for i, ctype in enumerate(types)])
    values = (2**64 - 1, None, -(2**31), 2**32 - 1, -(2**63), 2**64 - 1, 0.5, 0)
    arguments = struct.new(**{f"x{i}": value for i, value in enumerate(values)})
    for i, value in enumerate(values):
        assert getattr(arguments, f"x{i}") == (value or None)
    arguments.x2 = 7
    assert arguments.x2 == 7
    assert struct.new().x0 is None
    with pytest.raises(AttributeError, match="other"):
        struct.new(other=1)
    with pytest.raises(AttributeError, match="other"):
        arguments.other = 1


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [Field("size_t", "x", "")],
        [Field("int", "x", ""), Field("int", "x", "")],
        [Field("int", "x y", "")],
        [Field("int", "x", "one\ntwo")],
        [Field("int", "parameters", "")],
        [Field("int", "x", "", 0)],
    ],
)
def test_structs_that_cannot_be(fields: list[Field]) -> None:
    with pytest.raises(ValueError, match="struct A"):
        Struct("A", fields)


# ---------------------------------------------------------------------------------------- sources


def test_constants_have_their_value_and_type() -> None:
    values = {"kA": 4, "kB": True, "kC": False, "kD": 2**31, "kE": 1 - 2**31, "kF": -(2**40)}
    same = "template <class A, class B> constexpr bool same = false;\n"
    same += "template <class A> constexpr bool same<A, A> = true;\n"
    types = ("int", "bool", "bool", "long long", "int", "long long")
    checks = "".join(
        f'static_assert({name} == {int(value)} && same<decltype({name}), const {ctype}>, "{name}");'
        for (name, value), ctype in zip(values.items(), types, strict=True)
    )
    compile_source(constants(values) + same + checks + EMPTY, "k", ARCH)
    for wrong in ({"no name": 1}, {"kA": 2**63}):
        with pytest.raises(ValueError, match="cannot be a constant"):
            constants(wrong)


def test_numbers_with_a_point_are_floats() -> None:
    checks = (
        "template <class A> constexpr bool is_float = false;\n"
        "template <> constexpr bool is_float<const float> = true;\n"
        "static_assert(is_float<decltype(kA)> && kA == 448.0f && kB == 1e-4f);\n"
    )
    compile_source(constants({"kA": 448.0, "kB": 1e-4}) + checks + EMPTY, "k", ARCH)
    with pytest.raises(ValueError, match="cannot be a constant"):
        constants({"kA": float("inf")})


class Word(enum.IntEnum):
    FIRST = 0
    ROW_BYTES = 5


class Further(enum.IntEnum):
    POOL = 6


class Bits(enum.IntFlag):
    SEND = 1
    WIDE_IDS = 4


def test_enumerations_are_those_of_the_host() -> None:
    text = enum_declaration(Word, Further, prefix="k") + enum_declaration(Bits, prefix="kBit")
    checks = "static_assert(kFirst == 0 && kRowBytes == 5 && kPool == Word(6));\n"
    checks += "static_assert((kBitSend | kBitWideIds) == 5);\n"
    compile_source(text + checks + EMPTY, "k", ARCH)
    with pytest.raises(EngineUnavailableError, match="kPool"):
        compile_source(enum_declaration(Word, prefix="k") + checks + EMPTY, "k", ARCH)
    with pytest.raises(ValueError, match="two members have one name"):
        enum_declaration(Word, Word, prefix="k")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "kernels"
    (root / "common").mkdir(parents=True)
    (root / "common" / "a.cuh").write_text("#pragma once\nstruct A { int x; };\n")
    (root / "common" / "b.cuh").write_text('#pragma once\n#include "a.cuh"\nstruct B : A {};\n')
    (root / "c.cuh").write_text('#include "common/b.cuh"\n#include "common/a.cuh"\nusing C = B;\n')
    (root / "k.cu").write_text(
        '#include "common/a.cuh"\n#include "c.cuh"\n'
        'extern "C" __global__ void k(C* c) { c->x = SIZE; }\n'
        "template <int N> __global__ void t(A* a) { a->x = N; }\n"
    )
    return root


def test_headers_that_include_headers(sources: Path) -> None:
    text = inline_headers(sources, "k.cu")
    assert text.count("struct A") == 1
    assert compile_source("#define SIZE 3\n" + text, "k", ARCH).lowered_name == "k"
    lowered = compile_source("#define SIZE 3\n" + text, "t<5>", ARCH).lowered_name
    assert lowered.startswith("_Z")


def test_errors_name_file_and_line(sources: Path) -> None:
    text = inline_headers(sources, "k.cu")
    with pytest.raises(EngineUnavailableError, match=r'k\.cu\(3\): error: .*"SIZE" is undefined'):
        compile_source(text, "k", ARCH)
    (sources / "common" / "b.cuh").write_text('#include "a.cuh"\n\nstruct B : Nothing {};\n')
    with pytest.raises(EngineUnavailableError, match=r"common/b\.cuh\(3\): error"):
        compile_source(inline_headers(sources, "k.cu"), "k", ARCH)
    (sources / "c.cuh").unlink()
    with pytest.raises(EngineUnavailableError, match=r'k\.cu\(2\).*cannot open.*"c\.cuh"'):
        compile_source(inline_headers(sources, "k.cu"), "k", ARCH)
    with pytest.raises(EngineUnavailableError, match=r"prelude\(2\): error"):
        compile_kernel("collective/ordered_sum", "k", ARCH, prelude="\nnonsense;\n")


def test_headers_outside_the_sources_are_not_read(sources: Path) -> None:
    (sources.parent / "secret.cuh").write_text("struct Secret {};\n")
    (sources / "k.cu").write_text('#include "../secret.cuh"\n')
    assert "Secret" not in inline_headers(sources, "k.cu")


COPY = Struct(
    "Copy",
    [
        Field("int", "n", "added to every number"),
        Field("const float*", "x", "numbers, one per block"),
        Field("float", "factor", "multiplied with every number first"),
        Field("float*", "y", "results"),
    ],
)
COPY_SOURCE = """
extern __shared__ float middle[];
extern "C" __global__ void copy(Copy a) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int i = blockIdx.y * gridDim.x + blockIdx.x;
    middle[SHARED / 4 - 1] = a.x[i];
    a.y[i] = middle[SHARED / 4 - 1] * a.factor + a.n;
}
extern "C" __global__ void two(Copy a, int b) {}
extern "C" __global__ void pointer(float* y) { y[threadIdx.x] = 5; }
"""
POINTER = Struct("Pointer", [Field("float*", "y", "one number per thread")])


class FakeDriver:
    """The records of the real driver module, and launches that are written down."""

    def __init__(self) -> None:
        self.driver = importlib.import_module("cuda.bindings.driver")
        self.result = self.driver.CUresult.CUDA_SUCCESS
        self.launched: list[tuple[tuple[int, ...], int, bytes]] = []
        self.following: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.driver, name)

    def cuFuncGetParamInfo(self, function: object, index: int) -> tuple[Any, ...]:
        if index == 0:
            return self.driver.CUresult.CUDA_SUCCESS, 0, COPY.size
        return self.driver.CUresult.CUDA_ERROR_INVALID_VALUE, None, None

    def launch_by_address(self, address: int, function: int, parameters: int, _: None) -> int:
        config = self.driver.CUlaunchConfig(address)
        names = ("gridDim", "blockDim")
        sizes = [getattr(config, name + axis) for name in names for axis in "XYZ"]
        self._write((*sizes, config.sharedMemBytes), int(config.hStream), parameters)
        self.following = None
        if config.numAttrs == 0:
            return int(self.result)
        # Behind seven sizes and a stream; the bindings read attributes of their own objects only.
        self.following = self.driver.CUlaunchAttribute(
            ctypes.c_void_p.from_address(address + 40).value
        )
        return int(self.result)

    def _write(self, sizes: tuple[int, ...], stream: int, parameters: int) -> None:
        address = ctypes.c_void_p.from_address(parameters).value
        assert address is not None
        self.launched.append((sizes, stream, ctypes.string_at(address, COPY.size)))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(kernel_module, "launch_by_address", lambda: fake.launch_by_address)
    return fake


@pytest.mark.parametrize("follows", [False, True])
def test_a_launch_passes_on_what_it_is_given(driver: FakeDriver, follows: bool) -> None:
    kernel = Kernel(driver, driver.CUfunction(1), "copy")
    arguments = COPY.new(n=3, x=1 << 40, y=None)
    sizes: Any = {"block": 64, "shared_bytes": 1 << 16, "stream": 1 << 44}
    kernel.launch(arguments, grid=5, follows=follows, **sizes)
    before = bytes(arguments)
    arguments.n = 4
    kernel.launch(arguments, grid=(7, 2), follows=follows, **sizes)
    assert driver.launched == [
        ((5, 1, 1, 64, 1, 1, 1 << 16), 1 << 44, before),
        ((7, 2, 1, 64, 1, 1, 1 << 16), 1 << 44, bytes(arguments)),
    ]
    assert (driver.following is not None) is follows
    if follows:
        which = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        assert driver.following.id == which
        assert driver.following.value.programmaticStreamSerializationAllowed == 1


def test_launches_that_cannot_be(driver: FakeDriver) -> None:
    kernel = Kernel(driver, driver.CUfunction(1), "copy")
    sizes: Any = {"grid": 1, "block": 2048, "shared_bytes": 0, "stream": 0}
    with pytest.raises(CudaError, match="copy takes 32 bytes of arguments, Pointer has 8"):
        kernel.launch(POINTER.new(), **sizes)
    assert not driver.launched
    driver.result = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    for follows in (False, True):
        with pytest.raises(CudaError, match="copy.*CUDA_ERROR_INVALID_VALUE.*block 2048"):
            kernel.launch(COPY.new(), follows=follows, **sizes)


def test_a_launch_on_another_device_says_so(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new thread begins with device 0, whatever that of the others is."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    driver.result = driver.CUresult.CUDA_ERROR_INVALID_HANDLE
    sizes: Any = {"grid": 1, "block": 32, "shared_bytes": 0, "stream": 0}
    says = {0: r"memory\)$", 1: r"kernel of cuda:1, .* cuda:0: call torch.cuda.set_device\(1\)"}
    for index, text in says.items():
        kernel = Kernel(driver, driver.CUfunction(1), "copy", torch.device("cuda", index))
        with pytest.raises(CudaError, match=text):
            kernel.launch(COPY.new(), **sizes)


@pytest.mark.gpu
def test_launches_on_a_gpu() -> None:
    device = torch.device("cuda", 0)
    major, minor = torch.cuda.get_device_capability(device)
    shared = 100 << 10
    source = COPY.declaration + f"constexpr int SHARED = {shared};\n" + COPY_SOURCE

    def load(instance: str, max_shared_bytes: int = 0) -> Kernel:
        compiled = compile_source(source, instance, f"sm_{major}{minor}")
        return load_kernel(device, compiled, max_shared_bytes)

    copy = load("copy", shared)
    x = torch.arange(6, dtype=torch.float32, device=device)
    y = torch.zeros((3, 6), device=device)
    sizes: Any = {"grid": (3, 2), "block": 1, "shared_bytes": shared}
    for stream in (torch.cuda.current_stream(device), torch.cuda.Stream(device)):
        y.zero_()
        stream.wait_stream(torch.cuda.current_stream(device))
        # The second launch reads what the first one wrote, the third what the second wrote.
        arguments = COPY.new(n=1, x=x.data_ptr(), factor=2.0)
        for row in range(3):
            arguments.y = y[row].data_ptr()
            copy.launch(arguments, stream=stream.cuda_stream, follows=row > 0, **sizes)
            arguments.x = arguments.y
        stream.synchronize()
        assert torch.equal(y, torch.stack([2 * x + 1, 4 * x + 3, 8 * x + 7]))

    load("pointer").launch(
        POINTER.new(y=y.data_ptr()), grid=1, block=18, shared_bytes=0, stream=stream.cuda_stream
    )
    stream.synchronize()
    assert bool((y == 5).all())
    with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_VALUE"):
        load("copy").launch(arguments, stream=stream.cuda_stream, **sizes)
    with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_VALUE"):
        load("copy", 1 << 20)
    with pytest.raises(CudaError, match="several parameters"):
        load("two")
    with pytest.raises(CudaError, match="copy takes 32 bytes"):
        copy.launch(POINTER.new(), stream=stream.cuda_stream, **sizes)
