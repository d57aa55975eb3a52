"""The global filter in CUDA C++, for 16-bit maps on NVIDIA GPUs: the backend 'fused'.

A map is read once and written once. Both transforms and the product happen on the chip, as matrix
products on tensor cores; `filter.cu` says how, and :mod:`.folded` explains the algebra in plain
torch. :mod:`.driver` compiles it on first use. The backward pass keeps the map and the spectrum.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..tracing import is_plain, operator_unsupported_reason
from . import driver
from .folded import basis

_SOURCE = Path(__file__).with_name('filter.cu')

_DEVICE = 'cuda'

# Half an axis in cells, rounded up: each size makes kernels of its own, so there are few.
_HALVES = (8, 16, 32, 48, 64, 96, 112, 128, 192, 256)

# Bytes of gradients, one for each image, that are made before they are added up.
_GRADIENTS = 2**27


def unsupported_reason(x: Tensor) -> str | None:
    """Say why maps like `x` cannot be filtered here; None if they can."""
    if reason := operator_unsupported_reason():
        return reason
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f'it supports float16 and bfloat16, not {x.dtype}'
    if x.device.type != _DEVICE:
        return 'it needs an NVIDIA GPU'
    if reason := _device_reason(x.device.index):
        return reason
    batch, height, width, channels = x.shape
    if batch >= 2**16 or not _fits_integers(height, width, channels):
        return 'it supports up to 65535 images of 2**30 values'
    if _fit(height, width, _shared_memory(x.device.index)) is None:
        return f'a map of {height} x {width} cells does not fit on the chip'
    return None


_cached_reason = functools.cache(driver.unsupported_reason)


@torch.compiler.assume_constant_result
def _device_reason(device: int) -> str | None:
    return _cached_reason(device)


@torch.compiler.assume_constant_result
def _shared_memory(device: int) -> int:
    """Return the bytes of shared memory that a block of threads can use."""
    return _properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


_properties = functools.cache(torch.cuda.get_device_properties)


NAMESPACE = __name__.replace('.', '_')
_LIBRARY = torch.library.Library(NAMESPACE, 'DEF')
for _schema in (
    'filter(Tensor x, Tensor weight, bool conjugate) -> Tensor',
    'correlate(Tensor g, Tensor x) -> Tensor',
):
    _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
_OPERATORS = getattr(torch.ops, NAMESPACE)


def filter(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    run = _filter if is_plain(x, weight) else _OPERATORS.filter.default
    return run(x, weight, conjugate)


def correlate(g: Tensor, x: Tensor) -> Tensor:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    run = _correlate if is_plain(g, x) else _OPERATORS.correlate.default
    return run(g, x)


def adjoint(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    return filter(g, weight, True), correlate(g, x)


def _filter(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    x, weight = driver.readable(x), driver.readable(weight)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        kernel, blocks = _kernel('filter', *x.shape[1:], x.dtype, x.device.index)
        bases = [_fragments(side, x.device) for side in x.shape[1:3]]
        pointers = x.data_ptr(), weight.data_ptr(), y.data_ptr(), *map(_address, bases)
        kernel.launch((blocks, len(x)), *pointers, *x.shape[1:], -1 if conjugate else 1)
    return y


def _correlate(g: Tensor, x: Tensor) -> Tensor:
    g, x = driver.readable(g), driver.readable(x)
    shape = _spectrum_shape(x)
    chunk = max(1, _GRADIENTS // (4 * math.prod(shape)))
    total: Tensor | None = None
    with torch.cuda.device_of(x):
        kernel, blocks = _kernel('correlate', *x.shape[1:], x.dtype, x.device.index)
        bases = [_fragments(side, x.device) for side in x.shape[1:3]]
        for start in range(0, len(x), chunk):
            images = min(chunk, len(x) - start)
            gradients = x.new_empty((images, *shape), dtype=torch.float32)
            offset = start * x[0].nbytes if start else 0
            pointers = g.data_ptr() + offset, x.data_ptr() + offset, gradients.data_ptr()
            kernel.launch((blocks, images), *pointers, *map(_address, bases), *x.shape[1:])
            some = gradients.sum(0) if images > 1 else gradients[0]
            total = some if total is None else total.add_(some)
    assert total is not None  # a backend is given one image at least
    return total


def _fits_integers(height: int, width: int, channels: int) -> bool:
    """Tell whether offsets into an image and its spectrum are 32-bit integers."""
    return 2 * height * (width + 2) * channels < 2**31


def _spectrum_shape(x: Tensor) -> tuple[int, int, int, int]:
    _, height, width, channels = x.shape
    return height, width // 2 + 1, channels, 2


_LIBRARY.impl('filter', _filter, 'CUDA')
_LIBRARY.impl('correlate', _correlate, 'CUDA')


@torch.library.register_fake(f'{NAMESPACE}::filter', lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake(f'{NAMESPACE}::correlate', lib=_LIBRARY)
def _(g: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(_spectrum_shape(x), dtype=torch.float32)


class Blocks(NamedTuple):
    """How a kernel divides its work."""

    channels: int  # that a block of threads takes
    warps: int  # of 32 threads, of a block
    resident: int  # blocks on a multiprocessor at a time, at least
    shared: int  # bytes of shared memory of a block


def divide(kernel: str, height: int, width: int, limit: int) -> Blocks:
    """Choose blocks for maps of H x W cells, where a block has `limit` bytes of shared memory.

    Of what was tried on an H200 this was the fastest for the stages of GFNet-H-S at 512.
    """
    channels = _fit(height, width, limit)
    assert channels is not None
    tile = _tile(height, width, channels)
    warps = 4 if tile < 48 * 1024 else 8 if kernel == 'filter' else 16
    groups = _half(width) * channels // 16
    # As many blocks as have room, if each thread takes 128 registers. One block may take more.
    resident = max(1, min(16 // warps, limit // (tile + 2048)))
    return Blocks(channels, warps, resident, tile + 4 * max(warps, groups))


def _fit(height: int, width: int, limit: int) -> int | None:
    """Return the channels of a block: 16 if three blocks fit, else as many as fit, up to 8."""
    for channels in (16, 8, 4, 2):
        blocks = 3 if channels == 16 else 1
        if blocks * (_tile(height, width, channels) + 2048) <= limit:
            return channels
    return None


def _tile(height: int, width: int, channels: int) -> int:
    """Return the bytes of a tile; `filter.cu` describes it."""
    if max(height, width) > 2 * _HALVES[-1]:
        return 2**31
    return 4 * _half(height) * (2 * _half(width) * channels + 8)


def _half(size: int) -> int:
    return next(half for half in _HALVES if 2 * half >= size)


@functools.lru_cache(maxsize=1024)
def _kernel(
    name: str, height: int, width: int, channels: int, dtype: torch.dtype, device: int
) -> tuple[driver.Kernel, int]:
    """Return a kernel for maps of a size, and how many of its blocks take all channels."""
    if not _fits_integers(height, width, channels):  # vmap makes channels of what it maps over
        raise ValueError(f'maps of {height} x {width} x {channels} values are too large')
    blocks = divide(name, height, width, _shared_memory(device))
    vector = min(blocks.channels, 8)
    definitions = _definitions(name, height, width, dtype, blocks, channels % vector == 0)
    kernel = _compiled_kernel(name, tuple(definitions.items()), blocks, device)
    return kernel, -(-channels // blocks.channels)


@functools.cache
def _compiled_kernel(
    name: str, definitions: tuple[tuple[str, int], ...], blocks: Blocks, device: int
) -> driver.Kernel:
    layout = 'QQQQQiii' + 'f' * (name == 'filter')
    threads = 32 * blocks.warps
    return driver.Kernel(
        _SOURCE, dict(definitions), f'{name}_maps', layout, threads, blocks.shared, device
    )


def _definitions(
    name: str, height: int, width: int, dtype: torch.dtype, blocks: Blocks, is_aligned: bool
) -> dict[str, int]:
    """Return the macros of `filter.cu`."""
    return dict(
        CORRELATE=int(name == 'correlate'),
        HALF_H=_half(height),
        HALF_W=_half(width),
        CHANNELS=blocks.channels,
        WARPS=blocks.warps,
        RESIDENT=blocks.resident,
        BFLOAT16=int(dtype == torch.bfloat16),
        VECTOR=min(blocks.channels, 8) if is_aligned else 1,
    )


_FRAGMENTS: dict[tuple[int, torch.device], int] = {}


def _fragments(size: int, device: torch.device) -> int | Tensor:
    """Return the basis of an axis as the operands of matrix instructions: its address, or itself.

    It stays for good, since CUDA graphs hold its address: 1 KB for an axis of up to 16 cells, 32 KB
    for one of 128.
    """
    key = size, device
    if key not in _FRAGMENTS:
        with torch.autocast(device.type, enabled=False):  # which takes no float64 on a CPU
            # While a graph is captured nothing can be kept: values appear only at its replay.
            if device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
                return _make_fragments(size, device)
            _FRAGMENTS[key] = driver.upload(_make_fragments(size, 'cpu'), device.index)
    return _FRAGMENTS[key]


def _address(fragments: int | Tensor) -> int:
    return fragments if isinstance(fragments, int) else fragments.data_ptr()


@torch.inference_mode(False)
def _make_fragments(size: int, device: torch.device | str) -> Tensor:
    half, slots = _half(size), (size + 1) // 2
    matrices = torch.zeros(2, half, half, dtype=torch.float16, device=device)
    matrices[:, :slots, :slots] = basis(size, device)
    if half < 16:  # both in one matrix
        parts = matrices
        matrices = torch.zeros(1, 16, 16, dtype=torch.float16, device=device)
        matrices[0, :8, :8], matrices[0, 8:, 8:] = parts
    both = torch.stack([matrices, matrices.mT])
    # A fragment is 16 x 16. Lane 4 * i + j holds, of its four 8 x 8 blocks, columns 2 * j and
    # 2 * j + 1 of row i; blocks follow each other down the columns.
    blocks = matrices.shape[-1] // 16
    parts = both.reshape(2, -1, blocks, 2, 8, blocks, 2, 4, 2)
    return parts.permute(0, 1, 2, 5, 4, 7, 6, 3, 8).contiguous()
