"""Kernels that take one struct: its definition, its memory on the host, and lean launches of it.

One `Struct` gives the C++ declaration for the compiler and the layout for the host:

    ARGUMENTS = Struct("Arguments", [Field("const char*", "rows", "[T, H] rows to send")])
    compiled = compile_kernel("send", "send", "sm_90a", prelude=ARGUMENTS.declaration)
    kernel = load_kernel(device, compiled)
    arguments = ARGUMENTS.new(rows=x_TH.data_ptr())
    kernel.launch(arguments, grid=132, block=256, shared_bytes=0, stream=stream.cuda_stream)
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from expertlink.errors import ExpertlinkError
from expertlink.jit.compiler import CompiledKernel

_TYPES: dict[str, type[Any]] = {
    "int": ctypes.c_int32,
    "unsigned": ctypes.c_uint32,
    "long long": ctypes.c_int64,
    "unsigned long long": ctypes.c_uint64,
    "float": ctypes.c_float,
}
_TENSOR_TYPES = {
    "int": torch.int32,
    "unsigned": torch.int32,
    "long long": torch.int64,
    "unsigned long long": torch.int64,
    "float": torch.float32,
}
_CONFIGURATIONS = 256  # launch configurations kept per kernel


class CudaError(ExpertlinkError, RuntimeError):
    """A call of the CUDA driver failed; the message has its name and the name of the error."""


@dataclass(frozen=True)
class Field:
    """One member of a struct.

    Attributes:
        ctype: a pointer such as `const char*`, or one of int, unsigned, long long,
            unsigned long long, float.
        name: a C++ identifier.
        meaning: one line, with shape and unit.
        count: elements of an array; None: not an array.
    """

    ctype: str
    name: str
    meaning: str
    count: int | None = None


class Arguments(ctypes.Structure):
    """Memory of one struct, with its members as attributes; `Struct.new` makes them.

    Pointers take addresses, and None or 0 for null. Numbers wrap as in C. Arrays are read and
    written by index or slice. A launch copies the struct, so it may be changed as soon as the
    launch has returned; what its pointers point to has to live until the kernel is done.

    Attributes:
        parameters: address of the array of one pointer, to the struct, that a launch takes.
    """

    __slots__ = ("_pointer", "parameters")

    if TYPE_CHECKING:  # the members of a struct are known when it is defined

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: object) -> None: ...

    def __init__(self, **values: object) -> None:
        super().__init__(**values)
        self._pointer = ctypes.c_void_p(ctypes.addressof(self))
        self.parameters = ctypes.addressof(self._pointer)

    def copy(self) -> Arguments:
        """Another struct with the same members."""
        other = type(self)()
        ctypes.memmove(ctypes.addressof(other), ctypes.addressof(self), ctypes.sizeof(self))
        return other


class Struct:
    """The one definition of a struct that host and kernels share.

    A struct whose arrays depend on a number, such as R, is made by a function of that number.

    Attributes:
        name: its C++ name.
        fields: its members.
        size: bytes, with the padding at its end.
        declaration: C++ text; it does not compile where the compiler's layout is another one.

    Raises:
        ValueError: a type is not supported, a name is no identifier or taken, a meaning has more
            than one line, an array has no elements, or there are no members.
    """

    def __init__(self, name: str, fields: Sequence[Field]) -> None:
        names = [name, *(field.name for field in fields)]
        for taken in (*dir(Arguments), "_fields_"):
            if taken in names:
                raise ValueError(f"struct {name}: a member cannot be called {taken}")
        if not fields or len(set(names)) < len(names):
            raise ValueError(f"struct {name} needs members, each with a name of its own")
        for field in fields:
            if not field.name.isidentifier() or len(field.meaning.splitlines()) > 1:
                raise ValueError(f"struct {name}: {field} has no proper name or meaning")
        members = [(field.name, _ctypes_type(name, field)) for field in fields]
        self.name, self.fields = name, tuple(fields)
        self._fields = {field.name: field for field in fields}
        self._type: type[Arguments] = type(
            name, (Arguments,), {"__slots__": (), "_fields_": members}
        )
        self.size = ctypes.sizeof(self._type)
        lines = "".join(f"    {_member(field)};  // {field.meaning}\n" for field in fields)
        alignment = ctypes.alignment(self._type)
        asserts = [f"sizeof({name}) == {self.size}", f"alignof({name}) == {alignment}"]
        # __INTADDR__ is the compiler's own `offsetof`, which needs a header.
        asserts += [
            f"__INTADDR__(&(({name}*)0)->{field.name}) == {self.offset(field.name)}"
            for field in fields
        ]
        message = f"{name} differs from the host's"
        self.declaration = f"struct {name} {{\n{lines}}};\n" + "".join(
            f'static_assert({condition}, "{message}");\n' for condition in asserts
        )

    def new(self, **values: int | float | None) -> Arguments:
        """A struct with these members; others are zero.

        Raises:
            AttributeError: there is no member of that name. Setting one later raises it too.
        """
        return self._type(**values)

    def at(self, address: int) -> Arguments:
        """The struct that lies at an address. Its memory is the caller's to keep."""
        return self._type.from_address(address)

    def offset(self, name: str) -> int:
        """Bytes before a member."""
        return getattr(self._type, name).offset

    def member(self, memory: Tensor, name: str) -> Tensor:
        """A member that is a number or an array of them, as a view `[count]`.

        Args:
            memory: `[size]` uint8, a struct of this kind.
            name: the member's. Unsigned integers are seen as signed ones.
        """
        field, start = self._fields[name], self.offset(name)
        dtype = _TENSOR_TYPES[field.ctype]
        return memory[start : start + (field.count or 1) * dtype.itemsize].view(dtype)


def _member(field: Field) -> str:
    array = "" if field.count is None else f"[{field.count}]"
    return f"{field.ctype} {field.name}{array}"


def _ctypes_type(struct: str, field: Field) -> type[Any]:
    if field.count is not None and field.count < 1:
        raise ValueError(f"struct {struct}: the array {field.name} has {field.count} elements")
    if field.ctype.endswith("*"):
        element: Any = ctypes.c_void_p
    elif field.ctype in _TYPES:
        element = _TYPES[field.ctype]
    else:
        known = ", ".join(_TYPES)
        raise ValueError(f"struct {struct}: {field.ctype!r} is no pointer and none of {known}")
    return element if field.count is None else element * field.count


class Configuration(NamedTuple):
    """A launch as the driver reads it.

    Attributes:
        config: owns the memory.
        address: of that memory.
        text: for messages.
    """

    config: Any
    address: int
    text: str


class Kernel:
    """A loaded kernel whose only parameter is a struct, or a pointer: a struct that holds one.

    `load_kernel` makes them. Launches may come from several threads; on each of them the kernel's
    device has to be torch's current one (`torch.cuda.set_device`, or any work on it before).
    """

    def __init__(
        self, driver: Any, function: Any, name: str, device: torch.device | None = None
    ) -> None:
        self._driver = driver
        self._name, self._device = name, device
        self._handle = int(function)
        self._launch = launch_by_address()
        self._configurations = lru_cache(_CONFIGURATIONS)(self.configuration)
        self._accepted: type[Arguments] | None = None
        info = driver.cuFuncGetParamInfo(function, 0)
        _, self._parameter_bytes = _checked("cuFuncGetParamInfo", info)
        if not driver.cuFuncGetParamInfo(function, 1)[0]:
            raise CudaError(f"{name} has several parameters; only one struct can be passed")

    def launch(
        self,
        arguments: Arguments,
        *,
        grid: int | tuple[int, int],
        block: int,
        shared_bytes: int,
        stream: int,
        follows: bool = False,
    ) -> None:
        """Queues the kernel; does not wait for it.

        Args:
            arguments: what `Struct.new` gave; copied before this returns.
            grid: blocks along x, or along x and y.
            block: threads per block.
            shared_bytes: dynamic shared memory of a block; above 48 KB the kernel has to be loaded
                with `max_shared_bytes` at least as large.
            stream: handle of a stream of the kernel's device, `torch.cuda.Stream.cuda_stream`.
            follows: programmatic dependent launch. The kernel may start before its predecessor on
                the stream is done, and has to wait for it itself (`griddepcontrol.wait`).

        Raises:
            CudaError: the driver refuses the launch, or reports an earlier kernel's failure.
        """
        configuration = self._configurations(grid, block, shared_bytes, stream, follows)
        self.launch_as(arguments, configuration)

    def launch_as(self, arguments: Arguments, configuration: Configuration) -> None:
        """`launch` with a configuration of this kernel's."""
        if type(arguments) is not self._accepted:
            self._accept(arguments)
        status = self._launch(configuration.address, self._handle, arguments.parameters, None)
        if status:
            raise CudaError(self._failure(status, configuration))

    def _failure(self, status: int, configuration: Configuration) -> str:
        name = self._driver.CUresult(status).name
        text = f"launch of {self._name} failed: {name} ({configuration.text})"
        if self._device is None or torch.cuda.current_device() == self._device.index:
            return text
        return (
            f"{text}. It is a kernel of {self._device}, and the current device of this thread is "
            f"cuda:{torch.cuda.current_device()}: call torch.cuda.set_device({self._device.index})"
        )

    def configuration(
        self,
        grid: int | tuple[int, int],
        block: int,
        shared_bytes: int,
        stream: int,
        follows: bool,
    ) -> Configuration:
        """What `launch` takes beside the arguments, as the driver reads it; see there.

        Never changed once made, so that threads can share it.
        """
        driver = self._driver
        x, y = (grid, 1) if isinstance(grid, int) else grid
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = x, y, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = driver.CUstream(stream)
        if follows:
            attribute = driver.CUlaunchAttribute()
            attribute.id = (
                driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            )
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        text = f"grid {x} x {y}, block {block}, {shared_bytes} bytes of shared memory"
        return Configuration(config, config.getPtr(), text)

    def _accept(self, arguments: Arguments) -> None:
        # Once per type: a struct of another size would be read beyond its end.
        size = ctypes.sizeof(arguments)
        if size != self._parameter_bytes:
            raise CudaError(
                f"{self._name} takes {self._parameter_bytes} bytes of arguments, "
                f"{type(arguments).__name__} has {size}"
            )
        self._accepted = type(arguments)


@cache
def load_kernel(
    device: torch.device, compiled: CompiledKernel, max_shared_bytes: int = 0
) -> Kernel:
    """Loads a kernel into the primary context of a device, the one that torch uses.

    The machine code is on the device when this returns, and stays there until the process ends.

    Args:
        device: a CUDA device with its index.
        compiled: what `compile_kernel` gave for this device's architecture.
        max_shared_bytes: most dynamic shared memory that a launch will ask for.

    Raises:
        CudaError: the driver refuses.
    """
    assert device.type == "cuda"
    assert device.index is not None
    driver = _driver()
    with _primary_context(driver, device.index):
        module = _checked("cuModuleLoadData", driver.cuModuleLoadData(compiled.cubin))
        function = _checked(
            "cuModuleGetFunction",
            driver.cuModuleGetFunction(module, compiled.lowered_name.encode()),
        )
        if max_shared_bytes > 0:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(
                f"cuFuncSetAttribute({max_shared_bytes} bytes of shared memory)",
                driver.cuFuncSetAttribute(function, attribute, max_shared_bytes),
            )
        # Otherwise the first launch would load it, which waits for kernels that may wait for us.
        _checked("cuFuncLoad", driver.cuFuncLoad(function))
        return Kernel(driver, function, compiled.instance, device)


def architecture(device: torch.device) -> str:
    """Compiler target of a GPU; from compute capability 9.0 on with what only that GPU has."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


@cache
def launch_by_address() -> Callable[..., int]:
    """`cuLaunchKernelEx` as the driver has it: the bindings look at every argument again."""
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    launch.argtypes = [ctypes.c_void_p] * 4
    launch.restype = ctypes.c_int
    return launch


def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


@contextmanager
def _primary_context(driver: Any, index: int) -> Iterator[None]:
    """Makes a device's primary context the current one of this thread, for a while."""
    _checked("cuInit", driver.cuInit(0))
    number = _checked("cuDeviceGet", driver.cuDeviceGet(index))
    # Never released: what is loaded into it stays.
    context = _checked("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(number))
    _checked("cuCtxPushCurrent", driver.cuCtxPushCurrent(context))
    try:
        yield
    finally:
        _checked("cuCtxPopCurrent", driver.cuCtxPopCurrent())


def _checked(call: str, result: tuple[Any, ...]) -> Any:
    """What a driver call returned beside its status: nothing, one value or a tuple."""
    status, *values = result
    if status:
        raise CudaError(f"{call} failed: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
