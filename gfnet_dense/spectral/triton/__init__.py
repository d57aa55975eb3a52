"""The global filter in Triton kernels, for 16-bit maps on NVIDIA GPUs: the backend 'fused'.

A map of up to 64 cells a side is read once and written once: both transforms and the product happen
on the chip, as matrix products on tensor cores. A larger map takes three kernels, which transform
its rows, filter its columns and restore its rows, and pass float16 through memory in between.
The backward pass keeps the map and the spectrum, and nothing else.

:mod:`.folded` explains the algebra in plain torch. :mod:`.kernels` holds the kernels and is
imported when the first one runs.
"""

import functools
import math
import os
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from ..tracing import operator_unsupported_reason
from .folded import basis

# The largest side, in cells, of maps that fit on the chip, and of maps that are supported at all.
_PLANE = 64
_LARGEST = 512

# Channels and rows of a larger map that one program takes: 64 contiguous bytes, and the 64 rows of
# a matrix that the tensor cores of a Hopper GPU multiply at once.
_CHANNELS = 32
_ROWS = 2

# Bytes of larger maps that are filtered at a time, so that what lies between the kernels stays in
# the L2 cache: 40 MB on an A100, 50 MB on an H100.
_CHUNK = 2**24

# Programs that share the gradient of a spectrum: two for each multiprocessor of an H100. The number
# and the order of the sum over images are the same on every device.
_PROGRAMS = 264


def _has_triton() -> bool:
    try:
        major, minor, *_ = version('triton').split('.')
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (3, 4)


_HAS_TRITON = _has_triton()

# Triton's own switch: kernels run on the CPU, for tests.
_IS_INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def unsupported_reason(x: Tensor) -> str | None:
    """Say why the kernels cannot filter a map `(B, H, W, C)`; None if they can."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f'it supports float16 and bfloat16, not {x.dtype}'
    if max(x.shape[1:3]) > _LARGEST:
        return f'it supports up to {_LARGEST} cells a side'
    if math.prod(x.shape[1:]) >= 2**30:
        return 'it supports fewer than 2**30 values an image'
    if not _HAS_TRITON:
        return 'it needs Triton 3.4 or newer'
    if reason := operator_unsupported_reason():
        return reason
    if _IS_INTERPRETED:
        return None
    if not x.is_cuda or torch.version.hip:
        return 'it needs an NVIDIA GPU'
    if torch.cuda.get_device_properties(x.device).major < 8:
        return 'it needs a GPU of compute capability 8.0 or more'
    return None


@torch.library.custom_op('gfnet_dense::fused_filter', mutates_args=())
def filter(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    run = _filter_planes if max(x.shape[1:3]) <= _PLANE else _filter_larger
    with torch.cuda.device_of(x):
        run(x, weight, y, -1.0 if conjugate else 1.0)
    return y


@filter.register_fake
def _(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op('gfnet_dense::fused_correlate', mutates_args=())
def correlate(g: Tensor, x: Tensor) -> Tensor:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    g, x = g.contiguous(), x.contiguous()
    run = _correlate_planes if max(x.shape[1:3]) <= _PLANE else _correlate_larger
    with torch.cuda.device_of(x):
        return run(g, x)


@correlate.register_fake
def _(g: Tensor, x: Tensor) -> Tensor:
    _, height, width, channels = x.shape
    return x.new_empty((height, width // 2 + 1, channels, 2), dtype=torch.float32)


def adjoint(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    return filter(g, weight, True), correlate(g, x)


def _filter_planes(x: Tensor, weight: Tensor, y: Tensor, sign: float) -> None:
    from .kernels import filter_planes

    batch, height, width, channels = x.shape
    half_h, half_w = _half(height), _half(width)
    tiles = dict(HALF_H=half_h, HALF_W=half_w, SLOTS_H=min(half_h, 16), SLOTS_W=min(half_w, 16))
    bases = _basis(height, x.device), _basis(width, x.device)
    filter_planes[lambda meta: (_ceil(channels, meta['CHANNELS']), batch)](
        x, weight, y, *bases, height, width, channels, sign, **tiles
    )


def _correlate_planes(g: Tensor, x: Tensor) -> Tensor:
    from .kernels import correlate_planes

    _, height, width, channels = x.shape
    half_h, half_w = _half(height), _half(width)
    area, slots = half_h * half_w, min(half_w, 16)
    # Two maps of 64 x 64 cells and 8 channels take 102 KB.
    block = 16 if area < 256 else 8 if area < 1024 or _shared_memory(x.device) >= 2**17 else 4
    grid = _ceil(channels, block), _ceil(_ceil(width, 2), slots)
    sums = _allocate_sums(x, grid)
    tiles = dict(HALF_H=half_h, HALF_W=half_w, SLOTS_H=half_h, SLOTS_W=slots, CHANNELS=block)
    bases = _basis(height, x.device), _basis(width, x.device)
    correlate_planes[(*grid, len(sums))](
        g, x, sums, *bases, *x.shape, **tiles, num_warps=8, num_stages=1
    )
    return sums.sum(0)


def _shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program can use; the interpreter has no limit."""
    if device.type == 'cpu':
        return 2**20
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


def _filter_larger(x: Tensor, weight: Tensor, y: Tensor, sign: float) -> None:
    for some_x, some_y in zip(_chunks(x), _chunks(y), strict=True):
        z, exponents = _transform_rows(some_x)
        exponents = _filter_columns(z, exponents, weight, x.shape[2], sign)
        _restore_rows(z, exponents, some_y)


def _correlate_larger(g: Tensor, x: Tensor) -> Tensor:
    from .kernels import correlate_columns

    _, height, width, channels = x.shape
    half, columns = _half(height), _columns(height)
    slots = min(half, 32 if half <= 64 else 16)
    total = x.new_zeros((height, width // 2 + 1, channels, 2), dtype=torch.float32)
    for some_g, some_x in zip(_chunks(g), _chunks(x), strict=True):
        g_z, g_exponents = _transform_rows(some_g)
        x_z, x_exponents = _transform_rows(some_x)
        blocks = _ceil(_ceil(height, 2), slots) * _ceil(x_z.shape[2], columns)
        grid = x_exponents.shape[2], blocks
        sums = _allocate_sums(some_x, grid)
        tensors = g_z, g_exponents, x_z, x_exponents, sums, _basis(height, x.device)
        tiles = dict(HALF_H=half, SLOTS_H=slots, SLOTS_W=columns, **_block())
        correlate_columns[(*grid, len(sums))](*tensors, *some_x.shape, **tiles, num_warps=8)
        total += sums.sum(0)
    return total


def _transform_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coefficients of all rows along W, and the exponents of their blocks."""
    from .kernels import transform_rows

    images, height, width, channels = x.shape
    z = x.new_empty((images, 2, (width + 1) // 2, height, channels), dtype=torch.float16)
    rows, blocks = _ceil(height, _ROWS), _ceil(channels, _CHANNELS)
    exponents = x.new_empty((images, rows, blocks), dtype=torch.int32)
    tensors = x, z, exponents, _basis(width, x.device)
    transform_rows[(blocks, images, rows)](*tensors, height, width, channels, **_row_tiles(width))
    return z, exponents


def _filter_columns(
    z: Tensor, exponents: Tensor, weight: Tensor, width: int, sign: float
) -> Tensor:
    """Filter columns in place, and return the exponents of their blocks."""
    from .kernels import filter_columns

    images, _, slots, height, channels = z.shape
    half, columns, blocks = _half(height), _columns(height), exponents.shape[2]
    y_exponents = exponents.new_empty(images, _ceil(slots, columns), blocks)
    tensors = z, exponents, weight, y_exponents, _basis(height, z.device)
    slots_h = min(half, 32 if half <= 128 else 16)
    tiles = dict(HALF_H=half, SLOTS_H=slots_h, SLOTS_W=columns, **_block())
    filter_columns[(blocks, images, y_exponents.shape[1])](
        *tensors, height, width, channels, sign, **tiles, num_warps=8
    )
    return y_exponents


def _restore_rows(z: Tensor, exponents: Tensor, y: Tensor) -> None:
    """Transform filtered columns back along W, into the map `y`."""
    from .kernels import restore_rows

    images, height, width, channels = y.shape
    tensors = z, exponents, y, _basis(width, y.device)
    restore_rows[(exponents.shape[2], images, _ceil(height, _ROWS))](
        *tensors, height, width, channels, COLUMNS=_columns(height), **_row_tiles(width)
    )


def _block() -> dict[str, int]:
    """Return the block of a program of larger maps; software pipelining is off."""
    return dict(ROWS=_ROWS, CHANNELS=_CHANNELS, num_stages=1)


def _row_tiles(width: int) -> dict[str, int]:
    half = _half(width)
    warps = 4 if half <= 64 else 8
    return dict(HALF_W=half, SLOTS_W=min(half, 32), num_warps=warps, **_block())


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, _CHUNK // (2 * math.prod(x.shape[1:]))))


def _columns(height: int) -> int:
    """Return how many slots along W a program filters, which the registers limit."""
    return 2 if _half(height) <= 64 else 1


def _allocate_sums(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Allocate gradients of the spectrum, one for each share of the images."""
    batch, height, width, channels = x.shape
    shares = min(batch, _ceil(_PROGRAMS, math.prod(grid)))
    return x.new_empty((shares, height, width // 2 + 1, channels, 2), dtype=torch.float32)


def _ceil(size: int, block: int) -> int:
    return -(-size // block)


def _half(size: int) -> int:
    """Return the size of tiles that hold half an axis: a power of two."""
    return max(8, 1 << (_ceil(size, 2) - 1).bit_length())


def _basis(size: int, device: torch.device) -> Tensor:
    """Return the basis of an axis as float16, padded with zeros to the size of a tile."""
    # While a CUDA graph is captured nothing may be cached: values appear only at its replay.
    is_capturing = device.type == 'cuda' and torch.cuda.is_current_stream_capturing()
    return (_make_basis if is_capturing else _cached_basis)(size, device)


def _make_basis(size: int, device: torch.device) -> Tensor:
    padding = _half(size) - _ceil(size, 2)
    return torch.nn.functional.pad(basis(size, device), (0, padding, 0, padding)).half()


_cached_basis = functools.lru_cache(maxsize=64)(torch.inference_mode(False)(_make_basis))
