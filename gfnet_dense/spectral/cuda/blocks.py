"""The kernels of the filter: how blocks of threads divide maps, and the bases that they read."""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import driver
from .folded import basis

_FOLDER = Path(__file__).parent

# Types of arguments, as `struct` writes them.
KERNELS = {
    'filter_maps': 'QQQQQiiif',
    'correlate_maps': 'QQQQQiii',
    'transform_strips': 'QQQQiii',
    'filter_strips': 'QQQQQiiif',
    'restore_strips': 'QQQQQiii',
    'correlate_strips': 'QQQQQQiiii',
}

# Of a map, in cells. Strips of such maps need less shared memory than any supported GPU has.
LARGEST_SIDE = 512
STRIP_CHANNELS = 16  # of coefficients side by side in memory


class Blocks(NamedTuple):
    """How a kernel divides its work; `tiles.h` says what a tile is."""

    channels: int  # of a tile
    rows: int  # half of them
    slots: int  # half of its columns
    warps: int  # of 32 threads, of a block of threads
    resident: int  # blocks on a multiprocessor at a time, at least, which bounds registers
    shared: int  # bytes of shared memory of a block


def divide(kernel: str, height: int, width: int, limit: int) -> Blocks:
    """Choose blocks for maps of H x W cells, where a block has `limit` bytes of shared memory.

    For the stages of GFNet-H-S at 512 and maps of COCO, these were the fastest settings of each
    kernel tried on an H200, or nearly so.
    """
    half_h, half_w = _half(height), _half(width)
    if kernel in ('filter_maps', 'correlate_maps'):
        channels = whole_channels(height, width, limit)
        tile = _tile(half_h, half_w, channels)
        warps = 4 if tile < 48 * 1024 else 8 if kernel == 'filter_maps' else 16
        groups = half_w * channels // 16
        # As many blocks as have room, if each thread takes 128 registers. One block may take more.
        resident = max(1, min(16 // warps, limit // (tile + 2048)))
        return Blocks(channels, half_h, half_w, warps, resident, tile + 4 * max(warps, groups))
    if kernel in ('transform_strips', 'restore_strips'):
        rows, slots, warps = _strip(width), half_w, 4
        shared = _tile(rows, slots, STRIP_CHANNELS) + 4 * max(warps, slots)
        resident = 4 if kernel == 'transform_strips' else 3 if half_w <= 96 else 2
    else:
        blocks = max(1, half_h // 16)  # of rows, each for a warp
        slots = max(1, (8 if kernel == 'filter_strips' else 4) // blocks)
        rows, warps = half_h, slots * blocks
        tile, scales = _tile(rows, slots, STRIP_CHANNELS), 4 * half_h // _strip(width)
        if kernel == 'filter_strips':  # warps exchange coefficients, and the largest of them
            shared, resident = tile + (2048 + 4) * warps + scales, 3 if half_h <= 64 else 2
        else:  # two maps
            shared, resident = 2 * (tile + scales), max(2, 12 // warps)
        if warps > 8:  # not tried; with more, the compiler keeps few values in registers
            resident = 1
    resident = max(1, min(resident, limit // (shared + 1024)))
    return Blocks(STRIP_CHANNELS, rows, slots, warps, resident, shared)


@functools.lru_cache(maxsize=1024)
def whole_channels(height: int, width: int, limit: int) -> int:
    """Return how many channels of whole maps a block takes: 16 if three such blocks fit, 8 or 0."""
    for channels, blocks in ((16, 3), (8, 1)):
        if blocks * (_tile(_half(height), _half(width), channels) + 2048) <= limit:
            return channels
    return 0


def fits_integers(height: int, width: int, channels: int) -> bool:
    """Tell whether offsets into an image and its spectrum are 32-bit integers."""
    return 2 * height * (width + 2) * channels < 2**31


def _strip(width: int) -> int:
    """Return how many rows of the upper half of a map make a strip."""
    return 4 if _half(width) <= 64 else 2


def _tile(rows: int, slots: int, channels: int) -> int:
    """Return the bytes of a tile; `tiles.h` describes it."""
    return 4 * rows * (2 * slots * channels + 8)


def _half(size: int) -> int:
    """Return half an axis in cells, rounded up to 8 or a multiple of 16."""
    return 8 if size <= 16 else -(-size // 32) * 16


def kernel_for(name: str, x: Tensor) -> tuple[driver.Kernel, int]:
    """Return a kernel for maps like `x`, and how many of its blocks an image takes."""
    return _kernel(name, *x.shape[1:], x.dtype, x.device.index)


@functools.lru_cache(maxsize=1024)
def _kernel(
    name: str, height: int, width: int, channels: int, dtype: torch.dtype, device: int
) -> tuple[driver.Kernel, int]:
    if not fits_integers(height, width, channels):  # vmap makes channels of what it maps over
        raise ValueError(f'maps of {height} x {width} x {channels} values are too large')
    blocks = divide(name, height, width, driver.shared_memory(device))
    macros = definitions(name, height, width, channels, dtype, blocks)
    kernel = _compiled_kernel(name, tuple(macros.items()), blocks, device)
    tiles = -(-((height + 1) // 2) // blocks.rows) * -(-((width + 1) // 2) // blocks.slots)
    return kernel, -(-channels // blocks.channels) * tiles


@functools.cache
def _compiled_kernel(
    name: str, macros: tuple[tuple[str, int], ...], blocks: Blocks, device: int
) -> driver.Kernel:
    threads = 32 * blocks.warps
    return driver.Kernel(
        source_of(name), dict(macros), name, KERNELS[name], threads, blocks.shared, device
    )


def source_of(kernel: str) -> Path:
    """Return the file that holds a kernel."""
    return _FOLDER / ('maps.cu' if kernel.endswith('maps') else 'strips.cu')


def definitions(
    name: str, height: int, width: int, channels: int, dtype: torch.dtype, blocks: Blocks
) -> dict[str, int]:
    """Return the macros of a kernel. Those that it does not read have one value."""
    reads_map = name not in ('filter_strips', 'correlate_strips')
    reads_rows = name not in ('transform_strips', 'restore_strips')
    return {
        name.upper(): 1,
        'HALF_H': _half(height) if reads_rows else 16,
        'HALF_W': _half(width) if reads_map else 16,
        'TILE_H': blocks.rows,
        'TILE_W': blocks.slots,
        'STRIP': _strip(width),
        'CHANNELS': blocks.channels,
        'WARPS': blocks.warps,
        'RESIDENT': blocks.resident,
        'BFLOAT16': int(dtype == torch.bfloat16 and reads_map),
        'VECTOR': 8 if channels % 8 == 0 or not reads_map else 1,
    }


_FRAGMENTS: dict[tuple[int, torch.device], int] = {}


def address(fragments: int | Tensor) -> int:
    """Return the address of a basis, which is valid as long as the basis is kept."""
    return fragments if isinstance(fragments, int) else fragments.data_ptr()


def basis_of(size: int, device: torch.device) -> int | Tensor:
    """Return the basis of an axis as operands of matrix instructions: its address, or itself.

    It stays for good, since CUDA graphs hold its address: 1.5 KB for an axis of up to 16 cells,
    48 KB for one of 128.
    """
    key = size, device
    if key not in _FRAGMENTS:
        with torch.autocast(device.type, enabled=False):  # which takes no float64 on a CPU
            # While a graph is captured nothing can be kept: values appear only at its replay.
            if device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
                return _make_fragments(size, device)
            _FRAGMENTS[key] = driver.upload(_make_fragments(size, 'cpu'), device.index)
    return _FRAGMENTS[key]


@torch.inference_mode(False)
def _make_fragments(size: int, device: torch.device | str) -> Tensor:
    half, slots = _half(size), (size + 1) // 2
    matrices = torch.zeros(2, half, half, dtype=torch.float16, device=device)
    matrices[:, :slots, :slots] = basis(size, device)
    if half < 16:  # both in one matrix
        parts = matrices
        matrices = torch.zeros(1, 16, 16, dtype=torch.float16, device=device)
        matrices[0, :8, :8], matrices[0, 8:, 8:] = parts
    # A fragment is 16 x 16. Lane 4 * i + j holds, of its four 8 x 8 blocks, columns 2 * j and
    # 2 * j + 1 of row i. Blocks follow each other down the columns, in right
    # factors along the rows.
    blocks = matrices.shape[-1] // 16
    parts = matrices.reshape(-1, blocks, 2, 8, blocks, 2, 4, 2)
    transposed = matrices.mT.reshape(parts.shape)
    left, right = (0, 1, 4, 3, 6, 5, 2, 7), (0, 1, 4, 3, 6, 2, 5, 7)
    return torch.stack([parts.permute(left), transposed.permute(left), parts.permute(right)])
