"""Runs the CUDA kernels of the package on the CPU, where `spectral/cuda/emulator.h` is the GPU."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gfnet_dense.spectral import cuda

FOLDER = Path(__file__).parent / 'spectral' / 'cuda'
SHARED_MEMORY = 227 * 1024  # of a block on a Hopper GPU, in bytes

_KINDS = {'Q': ctypes.c_void_p, 'i': ctypes.c_int, 'f': ctypes.c_float}


class EmulatedKernel:
    """Stands in for :class:`gfnet_dense.spectral.cuda.driver.Kernel`."""

    def __init__(self, source, definitions, name, layout, threads, shared, device) -> None:
        self._layout, self._sizes = layout, (threads, ctypes.c_size_t(shared))
        self._library = library(source, tuple(definitions.items()))
        self._launch = getattr(self._library, f'launch_{name}')

    def launch(self, grid: tuple[int, int], *arguments: float) -> None:
        self._library.shuffle(_seed)
        values = [_KINDS[kind](value) for kind, value in zip(self._layout, arguments, strict=True)]
        self._launch(*grid, *self._sizes, *values)


# Above 0, threads take turns in an order that it decides.
_seed = 0


@contextmanager
def shuffled_threads(seed: int) -> Iterator[None]:
    """Let the threads of a block run in any order that barriers allow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), '_seed', seed)
        yield


@functools.cache
def library(source: Path, definitions: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    compiler = shutil.which('g++')
    if compiler is None:
        raise FileNotFoundError('the emulation of a GPU needs g++')
    options = [f'-D{name}={value}' for name, value in definitions]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / 'kernels.so'
        command = [compiler, '-std=c++20', '-O1', '-shared', '-fPIC', '-w', *options]
        command += [f'-DSOURCE="{source}"', str(FOLDER / 'emulator.cpp'), '-o', str(target)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(target))


_KEPT: list[torch.Tensor] = []


def keep(values: torch.Tensor) -> int:
    _KEPT.append(values)
    return values.data_ptr()


@contextmanager
def emulation() -> Iterator[None]:
    """Let 'fused' filter maps on the CPU."""
    operators = torch.library.Library(cuda.NAMESPACE, 'IMPL')
    operators.impl('filter', cuda._filter, 'CPU')
    operators.impl('correlate', cuda._correlate, 'CPU')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.driver, 'Kernel', EmulatedKernel)
        patch.setattr(cuda.driver, 'upload', lambda values, device: keep(values))
        patch.setattr(cuda, '_DEVICE', 'cpu')
        patch.setattr(cuda, '_device_reason', lambda device: None)
        patch.setattr(cuda, '_shared_memory', lambda device: SHARED_MEMORY)
        cuda._kernel.cache_clear()
        cuda._compiled_kernel.cache_clear()
        yield
    cuda._kernel.cache_clear()
    cuda._compiled_kernel.cache_clear()
    operators._destroy()
