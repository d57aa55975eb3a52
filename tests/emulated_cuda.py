"""Runs the CUDA kernels of the package on the CPU, where `spectral/cuda/emulator.h` is the GPU."""

import ctypes
import functools
import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from gfnet_dense.models import cuda as cells
from gfnet_dense.spectral import cuda
from gfnet_dense.spectral.build_cache import load_or_build
from gfnet_dense.spectral.cuda import blocks, driver

FOLDER = Path(__file__).parent / 'spectral' / 'cuda'
SHARED_MEMORY = 227 * 1024  # of a block on a Hopper GPU, in bytes

_KINDS = {'Q': ctypes.c_void_p, 'i': ctypes.c_int, 'f': ctypes.c_float}


class EmulatedKernel:
    """Stands in for :class:`gfnet_dense.spectral.cuda.driver.Kernel`."""

    def __init__(self, source, definitions, name, layout, threads, shared, device) -> None:
        self._layout, self._sizes = layout, (threads, ctypes.c_size_t(shared))
        self._library = library(source, (*definitions.items(), ('NAME', name)))

    def launch(self, grid: tuple[int, int], *arguments: float) -> None:
        self._library.shuffle(_seed)
        values = [_KINDS[kind](value) for kind, value in zip(self._layout, arguments, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self._library.launch(*grid, *self._sizes, pointers)


# Above 0, threads take turns in an order that it decides.
_seed = 0


@contextmanager
def shuffled_threads(seed: int) -> Iterator[None]:
    """Let the threads of a block run in any order that barriers allow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), '_seed', seed)
        yield


@functools.cache
def library(source: Path, definitions: tuple[tuple[str, int | str], ...]) -> ctypes.CDLL:
    compiler = shutil.which('g++')
    if compiler is None:
        raise FileNotFoundError('the emulation of a GPU needs g++')
    headers = driver.HEADERS.glob('*.h')
    files = [FOLDER / 'emulator.cpp', FOLDER / 'emulator.h', *sorted(headers), source]
    command = [compiler, '-std=c++17', '-O1', '-shared', '-fPIC', '-w', str(files[0])]
    # Ends the process at an address that a GPU would refuse.
    command += ['-fsanitize=alignment', '-fsanitize-undefined-trap-on-error']
    # Which would take the jumps between the stacks of threads for faults.
    command += ['-U_FORTIFY_SOURCE']
    command += [f'-D{name}={value}' for name, value in definitions]
    command += [f'-DSOURCE="{source}"', f'-I{driver.HEADERS}']
    parts = repr((command, [file.read_bytes() for file in files]))
    name = f'emulated-{source.stem}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}.so'

    def build(target: Path) -> None:
        subprocess.run([*command, '-o', str(target)], check=True)

    return load_or_build(name, build, lambda path: ctypes.CDLL(str(path)))


_KEPT: list[torch.Tensor] = []


def keep(values: torch.Tensor) -> int:
    _KEPT.append(values)
    return values.data_ptr()


@contextmanager
def emulation() -> Iterator[None]:
    """Let 'fused', and the kernels of blocks, process maps on the CPU."""
    operators = torch.library.Library(cuda.NAMESPACE, 'IMPL')
    operators.impl('filter', cuda._filter, 'CPU')
    operators.impl('correlate', cuda._correlate, 'CPU')
    operators.impl('adjoint', cuda._adjoint, 'CPU')
    caches = blocks._kernel, blocks._compiled_kernel, cells._kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, 'Kernel', EmulatedKernel)
        patch.setattr(driver, 'upload', lambda values, device: keep(values))
        patch.setattr(driver, 'shared_memory', lambda device: SHARED_MEMORY)
        # So few blocks that each has to take turns.
        patch.setattr(driver, 'multiprocessors', lambda device: 1)
        patch.setattr(cells, '_BLOCKS', 2)
        patch.setattr(cuda, '_DEVICE', 'cpu')
        patch.setattr(cells, 'DEVICE', 'cpu')
        for module in (cuda, cells):
            patch.setattr(module, '_device_reason', lambda device: None)
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()
    operators._destroy()


@contextmanager
def kernels() -> Iterator[None]:
    """Run kernels on the GPU, or emulate them where there is none, in outputs of NaN."""
    # Fills what `empty` returns with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with nullcontext() if torch.cuda.is_available() else emulation():
            yield
    finally:
        torch.use_deterministic_algorithms(False)
