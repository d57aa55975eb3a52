"""Layer norm and scaled residual of maps, in CUDA C++ for NVIDIA GPUs, compiled on first use.

Under autocast torch casts 16-bit maps to float32, normalises them and casts the result back, and
the same in the backward pass. Here one kernel reads and writes maps in the types that they have;
the arithmetic is float32 all the same.

Maps are `(B, H, W, C)`; parameters are `(C,)` and float32. Strides do not matter. None of the
functions is differentiable.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

from gfnet_dense.spectral.cuda import driver

_SOURCE = Path(__file__).with_name('cells.cu')

DEVICE = 'cuda'

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WARPS = 4  # of a thread block
# Thread blocks for each multiprocessor, of kernels without sums: more than fit at once, so that the
# last ones fill gaps.
_BLOCKS = 32
_LARGEST_CELL = 1024  # channels; threads hold whole cells in registers

_SUMS = 2  # of all cells, for each channel, that a backward kernel computes

# Types of arguments, as `struct` writes them.
_KERNELS = {
    'normalize': 'QQQQQif',
    'normalize_backward': 'QQQQQQQii',
    'add_scaled': 'QQQQQii',
    'add_scaled_backward': 'QQQQQQiii',
}


def unsupported_reason(x: Tensor) -> str | None:
    """Say why the kernels cannot process maps like `x`; None if they can."""
    if x.device.type != DEVICE:
        return 'it needs an NVIDIA GPU'
    if x.dtype not in _TYPES:
        return f'it supports float32, bfloat16 and float16, not {x.dtype}'
    channels = x.shape[-1]
    if channels % 4 or not 0 < channels <= _LARGEST_CELL:
        return f'it supports 4, 8, ... {_LARGEST_CELL} channels, not {channels}'
    if not 0 < x.numel() < 2**31 * channels:
        return 'it supports maps of 1 to 2**31 - 1 cells'
    return _device_reason(x.device.index)


_device_reason = functools.cache(driver.unsupported_reason)


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Normalise the channels of each cell.

    Returns:
        The result in a dtype; means and `1 / sqrt(variance + eps)`, of shape `(2, B H W)`.
    """
    read = [_readable(t) for t in (x, weight, bias)]
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    statistics = x.new_empty((2, _cells(x)), dtype=torch.float32)
    _launch('normalize', x, dtype, (*read, y, statistics), eps)
    return y, statistics


def normalize_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    statistics: Tensor,
    residual: Tensor | None,
    sums: Tensor,
    row: int,
) -> Tensor:
    """Return the gradient of `x`, to which `residual` in float32 is added.

    Rows `row` and `row + 1` of `sums` (:func:`new_sums`) become those of weight and bias.
    """
    read = [_readable(t) for t in (g, x, weight, statistics, residual)]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch('normalize_backward', x, g.dtype, (*read, grad_x), sums=(sums, row))
    return grad_x


def add_scaled(x: Tensor, scale: Tensor | None, factors: Tensor | None, y: Tensor) -> Tensor:
    """Return `x + scale * factors * y` in float32: scales of channels, factors of images."""
    read = [_readable(t) for t in (x, scale, factors, y)]
    out = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    _launch('add_scaled', x, y.dtype, (*read, out), _cells_of_image(x))
    return out


def add_scaled_backward(
    g: Tensor, scale: Tensor | None, factors: Tensor | None, y: Tensor, sums: Tensor, row: int
) -> Tensor:
    """Return the gradient of `y`.

    Row `row` of `sums` (:func:`new_sums`) becomes the gradient of the scale, `row + 1` that of a
    bias which was added to `y`.
    """
    read = [_readable(t) for t in (g, scale, factors, y)]
    grad_y = torch.empty_like(y, memory_format=torch.contiguous_format)
    _launch(
        'add_scaled_backward', g, y.dtype, (*read, grad_y), _cells_of_image(g), sums=(sums, row)
    )
    return grad_y


def new_sums(x: Tensor, rows: int) -> Tensor:
    """Return memory, `(thread blocks, rows, C)`, for sums over the cells of `x`.

    Backward kernels fill it; `sums.sum(0)` are the sums.
    """
    channels = x.shape[-1]
    blocks = _thread_blocks(x, _resident(channels))
    return x.new_empty((blocks, rows, channels), dtype=torch.float32)


def _thread_blocks(x: Tensor, limit_per_multiprocessor: int) -> int:
    """Return how many thread blocks share the cells of a map."""
    at_once = 32 * _WARPS // _lanes(x.shape[-1])  # cells of a thread block
    limit = limit_per_multiprocessor * driver.multiprocessors(x.device.index)
    return min(-(-_cells(x) // at_once), limit)


def _readable(t: Tensor | None) -> Tensor | None:
    return None if t is None else driver.readable(t)


def _cells(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _cells_of_image(x: Tensor) -> int:
    return x.shape[1] * x.shape[2]


def _launch(
    name: str,
    like: Tensor,
    result: torch.dtype,
    tensors: tuple[Tensor | None, ...],
    *others: float,
    sums: tuple[Tensor, int] | None = None,
) -> None:
    """Launch a kernel for maps like one, and results of a dtype."""
    channels, cells = like.shape[-1], _cells(like)
    arguments: list[float] = [0 if t is None else t.data_ptr() for t in tensors]
    if sums is None:
        arguments += (cells, *others)
        blocks = _thread_blocks(like, _BLOCKS)
    else:
        memory, row = sums
        blocks, rows, _ = memory.shape
        arguments += (memory.data_ptr() + 4 * row * channels, cells, *others, rows * channels)
    with torch.cuda.device_of(like):
        kernel = _kernel(name, channels, like.dtype, result, like.device.index)
        kernel.launch((blocks, 1), *arguments)


def _resident(channels: int) -> int:
    """Return how many thread blocks must fit on a multiprocessor. It bounds their registers."""
    return 4 if channels <= 512 else 2


@functools.cache
def _lanes(channels: int) -> int:
    """Return how many threads share a cell: a power of two that leaves each 8 channels or more."""
    return min(32, 1 << (max(1, channels // 8).bit_length() - 1))


@functools.cache
def _kernel(
    name: str, channels: int, map_: torch.dtype, result: torch.dtype, device: int
) -> driver.Kernel:
    definitions = _definitions(channels, map_, result)
    shared = _shared(channels) if name.endswith('backward') else 0
    return driver.Kernel(_SOURCE, definitions, name, _KERNELS[name], 32 * _WARPS, shared, device)


def _definitions(channels: int, map_: torch.dtype, result: torch.dtype) -> dict[str, int]:
    """Return the macros of `cells.cu`."""
    return dict(
        CHANNELS=channels,
        LANES=_lanes(channels),
        MAP=_TYPES[map_],
        RESULT=_TYPES[result],
        WARPS=_WARPS,
        RESIDENT=_resident(channels),
    )


def _shared(channels: int) -> int:
    """Return the bytes of shared memory that a thread block adds its sums up in."""
    return 4 * _WARPS * _SUMS * channels
