"""Compile CUDA C++ on first use and launch it, with NVIDIA's compiler, which comes with torch."""

import ctypes
import functools
import hashlib
import logging
import struct
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..build_cache import load_or_build

_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


def unsupported_reason(device: int) -> str | None:
    """Say why kernels cannot be compiled for a GPU; None if they can."""
    if torch.version.hip:
        return 'it needs an NVIDIA GPU'
    try:
        version('cuda-bindings')
    except PackageNotFoundError:
        return 'it needs the package cuda-bindings, which torch 2.11 and newer bring'
    try:
        from cuda.bindings import nvrtc

        architecture = _architecture(device)
        (known,) = _check(nvrtc.nvrtcGetSupportedArchs())
    except (ImportError, OSError, RuntimeError) as e:
        return f'the GPU or its compiler cannot be asked: {e}'
    if architecture < 80:
        return 'it needs a GPU of compute capability 8.0 or more'
    if architecture not in known:
        return f"torch's CUDA compiler does not know compute capability {architecture / 10}"
    return None


def upload(values: Tensor, device: int) -> int:
    """Copy a contiguous tensor of the CPU to a GPU for good, and return its address.

    Its memory is not torch's, whose allocator ties what is made in a CUDA graph to this graph.
    """
    from cuda.bindings import driver

    _bind(device)
    (address,) = _check(driver.cuMemAlloc(values.nbytes))
    _check(driver.cuMemcpyHtoD(address, values.data_ptr(), values.nbytes))
    _check(driver.cuCtxSynchronize())  # a small copy may return before it has arrived
    return int(address)


def _bind(device: int) -> None:
    """Give the thread the context of a GPU, which torch does not in a new thread."""
    from cuda.bindings import driver

    (handle,) = _check(driver.cuDeviceGet(device))
    (context,) = _check(driver.cuDevicePrimaryCtxRetain(handle))
    _check(driver.cuCtxSetCurrent(context))


class Kernel:
    """A compiled kernel on one GPU.

    Args:
        source: File that holds it.
        definitions: Macros and their values.
        name: Its name.
        layout: Types of its arguments, as :mod:`struct` writes them.
        threads: Threads of a block.
        shared: Bytes of shared memory of a block.
        device: Index of the GPU, which must be the current one.
    """

    def __init__(
        self,
        source: Path,
        definitions: dict[str, int],
        name: str,
        layout: str,
        threads: int,
        shared: int,
        device: int,
    ) -> None:
        from cuda.bindings import driver

        self._layout, self._threads, self._shared, self._device = layout, threads, shared, device
        sizes = [struct.calcsize(kind) for kind in layout]
        self._offsets = [end - size for end, size in zip(accumulate(sizes), sizes, strict=True)]
        _bind(device)
        (module,) = _check(driver.cuModuleLoadData(_compiled(source, definitions, device)))
        (function,) = _check(driver.cuModuleGetFunction(module, name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, attribute, shared))
        self._function = int(function)

    def launch(self, grid: tuple[int, int], *arguments: float) -> None:
        """Launch the kernel on the current stream of its device, which must be the current one."""
        values = ctypes.create_string_buffer(struct.pack('=' + self._layout, *arguments))
        start = ctypes.addressof(values)
        pointers = [start + offset for offset in self._offsets]
        everything = (
            ctypes.c_void_p(self._function),
            *(*grid, 1, self._threads, 1, 1, self._shared),
            # Private, but what TorchInductor and Triton call; torch.cuda.current_stream() makes an
            # object in every call.
            ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self._device)),
            (ctypes.c_void_p * len(pointers))(*pointers),
            None,
        )
        status = _library().cuLaunchKernel(*everything)
        if status == _INVALID_CONTEXT:
            _bind(self._device)
            status = _library().cuLaunchKernel(*everything)
        if status:
            raise RuntimeError(f'a CUDA kernel cannot be launched: error {status} of the driver')


@functools.cache
def _library() -> ctypes.CDLL:
    # A launch takes a third of the time that the bindings take.
    return ctypes.CDLL('libcuda.so.1')


def _architecture(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _compiled(source: Path, definitions: dict[str, int], device: int) -> bytes:
    """Return the machine code of a source, from the user's cache if it was compiled before."""
    from cuda.bindings import nvrtc

    code = source.read_bytes()
    options = ['-std=c++17', f'--gpu-architecture=sm_{_architecture(device)}']
    options += [f'-D{name}={value}' for name, value in definitions.items()]
    parts = repr((options, _check(nvrtc.nvrtcVersion())))
    name = f'{source.stem}-{hashlib.sha256(code + parts.encode()).hexdigest()[:16]}.cubin'

    def build(target: Path) -> None:
        target.write_bytes(compile_source(code, options))

    return load_or_build(name, build, Path.read_bytes)


def compile_source(code: bytes, options: list[str]) -> bytes:
    """Return the machine code that NVIDIA's run-time compiler makes of CUDA C++.

    Raises:
        RuntimeError: If it fails, with its first error.
    """
    from cuda.bindings import nvrtc

    logging.getLogger(__name__).info('Compiling for a GPU: %s', ' '.join(options))
    (program,) = _check(nvrtc.nvrtcCreateProgram(code, b'filter.cu', 0, [], []))
    try:
        encoded = [option.encode() for option in options]
        if nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]:
            log = b' ' * _check(nvrtc.nvrtcGetProgramLogSize(program))[0]
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            lines = log.decode(errors='replace').splitlines()
            error = next((line for line in lines if 'error' in line), lines[0])
            raise RuntimeError(f"torch's CUDA compiler fails: {error}")
        cubin = b' ' * _check(nvrtc.nvrtcGetCUBINSize(program))[0]
        _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return cubin


def _check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a function of CUDA returns beside its status."""
    status, *values = result
    if status:
        raise RuntimeError(f'CUDA reports {status.name}')
    return tuple(values)
