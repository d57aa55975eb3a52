"""Compile CUDA C++ on first use and launch it, with NVIDIA's compiler, which comes with torch."""

import ctypes
import functools
import hashlib
import logging
import struct
import threading
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..build_cache import load_or_build

# Holds the headers that sources include.
HEADERS = Path(__file__).parent

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


def readable(x: Tensor) -> Tensor:
    """Return a tensor that kernels can read 16 bytes at a time: contiguous, at such an address."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


@functools.cache
def shared_memory(device: int) -> int:
    """Return the bytes of shared memory that a block of threads can use on a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


@functools.cache
def multiprocessors(device: int) -> int:
    """Return how many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


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

        self._device, self._arguments = device, _Arguments(layout)
        _bind(device)
        (module,) = _check(driver.cuModuleLoadData(_compiled(source, definitions, device)))
        (function,) = _check(driver.cuModuleGetFunction(module, name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, attribute, shared))
        self._function, self._block = int(function), (threads, 1, 1, shared)

    def launch(self, grid: tuple[int, int], *arguments: float) -> None:
        """Launch the kernel on the current stream of its device, which must be the current one."""
        everything = (
            *(self._function, *grid, 1, *self._block),
            # Private, but what TorchInductor and Triton call; torch.cuda.current_stream() makes an
            # object in every call.
            torch._C._cuda_getCurrentRawStream(self._device),
            self._arguments.pack(*arguments),
            None,
        )
        status = _launch_kernel()(*everything)
        if status == _INVALID_CONTEXT:
            _bind(self._device)
            status = _launch_kernel()(*everything)
        if status:
            raise RuntimeError(f'a CUDA kernel cannot be launched: error {status} of the driver')


class _Arguments(threading.local):
    """The memory that a thread hands the arguments of a kernel over in; CUDA copies them."""

    def __init__(self, layout: str) -> None:
        self._struct = struct.Struct('=' + layout)
        self._values = ctypes.create_string_buffer(self._struct.size)
        sizes = [struct.calcsize(kind) for kind in layout]
        start = ctypes.addressof(self._values)
        addresses = (start + end - size for end, size in zip(accumulate(sizes), sizes, strict=True))
        self._pointers = (ctypes.c_void_p * len(layout))(*addresses)

    def pack(self, *arguments: float) -> ctypes.Array:
        """Return pointers to the arguments, valid until the next call in this thread."""
        self._struct.pack_into(self._values, 0, *arguments)
        return self._pointers


@functools.cache
def _launch_kernel() -> Any:
    # Takes a third of the time that the bindings take.
    function = ctypes.CDLL('libcuda.so.1').cuLaunchKernel
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
    return function


def _architecture(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _compiled(source: Path, definitions: dict[str, int], device: int) -> bytes:
    """Return the machine code of a source, from the user's cache if it was compiled before."""
    from cuda.bindings import nvrtc

    code, headers = source.read_bytes(), _read_headers()
    options = ['-std=c++17', f'--gpu-architecture=sm_{_architecture(device)}']
    options += [f'-D{name}={value}' for name, value in definitions.items()]
    parts = repr((options, _check(nvrtc.nvrtcVersion())))
    parts += repr((code, headers))
    name = f'{source.stem}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}.cubin'

    def build(target: Path) -> None:
        target.write_bytes(compile_source(source, options))

    return load_or_build(name, build, Path.read_bytes)


def _read_headers() -> dict[bytes, bytes]:
    return {path.name.encode(): path.read_bytes() for path in sorted(HEADERS.glob('*.h'))}


def compile_source(source: Path, options: list[str]) -> bytes:
    """Return the machine code that NVIDIA's run-time compiler makes of CUDA C++.

    Raises:
        RuntimeError: If it fails, with its first error.
    """
    from cuda.bindings import nvrtc

    logging.getLogger(__name__).info('Compiling for a GPU: %s', ' '.join(options))
    headers = _read_headers()
    names, codes = list(headers), list(headers.values())
    (program,) = _check(
        nvrtc.nvrtcCreateProgram(
            source.read_bytes(), source.name.encode(), len(headers), codes, names
        )
    )
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
