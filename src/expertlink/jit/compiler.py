"""From a kernel's source in `expertlink.kernels` to machine code, through NVRTC.

Compiling needs no GPU; `cuda-core` and NVRTC come with the extra `cuda`.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch

from expertlink.errors import EngineUnavailableError


@dataclass(frozen=True)
class CompiledKernel:
    """One instance of one kernel.

    Attributes:
        code: cuda.core object code.
        instance: name under which `code` knows the kernel, template arguments included.
        report: what the assembler says of registers, shared memory and spills.
    """

    code: Any
    instance: str
    report: str


def obstacle() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    for module in ("cuda.core", "cuda.bindings"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{module} is not installed (pip install 'expertlink[cuda]')"
    return None


def cuda_core() -> Any:
    """The module `cuda.core`, imported when a kernel is first needed."""
    return importlib.import_module("cuda.core")


@cache
def compile_kernel(name: str, instance: str, arch: str) -> CompiledKernel:
    """Compiles one instance of `kernels/<name>.cu`.

    Args:
        name: source file without its ending.
        instance: the kernel with its template arguments, such as `ordered_sum<float, 4, true>`.
        arch: target, such as `sm_90a`.

    Raises:
        EngineUnavailableError: the compiler is not installed.
    """
    reason = obstacle()
    if reason is not None:
        raise EngineUnavailableError(f"kernels cannot be compiled: {reason}")
    core = cuda_core()
    kernels = resources.files("expertlink.kernels")
    source = (kernels / f"{name}.cu").read_text()
    headers = [item for item in (kernels / "common").iterdir() if item.name.endswith(".cuh")]
    options = core.ProgramOptions(
        arch=arch,
        std="c++17",
        fma=False,  # the contract rounds products and sums one by one
        ptxas_options=["-v"],
    )
    # Headers are put in front of the source: nothing depends on where the package is unpacked.
    for header in sorted(headers, key=lambda item: item.name):
        source = source.replace(f'#include "common/{header.name}"', header.read_text())
    log = io.StringIO()
    program = core.Program(source, "c++", options)
    code = program.compile("cubin", name_expressions=(instance,), logs=log)
    return CompiledKernel(code=code, instance=instance, report=log.getvalue())


class Launcher:
    """Loads and launches kernels on one device, keeping what every launch needs again.

    Raises:
        EngineUnavailableError: kernels cannot be compiled here.
    """

    def __init__(self, device: torch.device) -> None:
        reason = obstacle()
        if reason is not None:
            raise EngineUnavailableError(f"kernels cannot be compiled: {reason}")
        assert device.index is not None
        self._core = cuda_core()
        self._core.Device(device.index).set_current()
        self._device = device
        self._config = cache(self._core.LaunchConfig)
        self._stream = cache(self._core.Stream.from_handle)
        properties = torch.cuda.get_device_properties(device)
        self.num_sms: int = properties.multi_processor_count
        self._arch = f"sm_{properties.major}{properties.minor}"

    def load(self, name: str, instance: str) -> Any:
        """The instance of a kernel, compiled for this device and ready to launch."""
        compiled = compile_kernel(name, instance, self._arch)
        return compiled.code.get_kernel(compiled.instance)

    def launch(
        self, kernel: Any, *arguments: int, grid: int, block: int, shared_bytes: int = 0
    ) -> None:
        """Queues a kernel on torch's current stream. Arguments are addresses and 64-bit numbers."""
        stream = self._stream(torch.cuda.current_stream(self._device).cuda_stream)
        config = self._config(grid=grid, block=block, shmem_size=shared_bytes)
        self._core.launch(stream, config, kernel, *arguments)
