"""The filter of large maps, by the kernels of `strips.cu`, which hand on coefficients in memory."""

import functools
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from . import driver
from .blocks import STRIP_CHANNELS, address, basis_of, divide, kernel_for

# Of the kernel that correlates, for each multiprocessor. With these, more images for each warp are
# faster than more warps.
_WARPS = 12


class Coefficients(NamedTuple):
    """Coefficients along W of maps, as `strips.cu` describes them.

    They take as much memory as the maps with their channels rounded up to a multiple of 16.
    """

    x: Tensor  # the maps
    memory: Tensor  # that holds the others, of which these are addresses
    values: int
    strip_shifts: int
    slot_shifts: int


def transform(x: Tensor) -> Coefficients:
    """Return the coefficients along W of maps `(B, H, W, C)`."""
    x = driver.readable(x)
    batch, height, width, channels = x.shape
    half_h, half_w = (height + 1) // 2, (width + 1) // 2
    parts = batch * -(-channels // STRIP_CHANNELS)
    # At most as many strips as rows; 2 bytes of each of four coefficients, 4 of a shift.
    sizes = 8 * half_h * half_w * STRIP_CHANNELS, 4 * half_h, 4 * half_w
    memory = x.new_empty(parts * sum(sizes), dtype=torch.uint8)
    parts_of_memory = accumulate((parts * size for size in sizes[:-1]), initial=memory.data_ptr())
    coefficients = Coefficients(x, memory, *parts_of_memory)
    kernel, blocks = kernel_for('transform_strips', x)
    basis = basis_of(width, x.device)
    pointers = x.data_ptr(), coefficients.values, coefficients.strip_shifts, address(basis)
    kernel.launch((blocks, batch), *pointers, height, width, channels)
    return coefficients


def filter(c: Coefficients, weight: Tensor, conjugate: bool) -> Tensor:
    """Return the filtered maps. Their coefficients are filtered in place, which happens once."""
    x, weight = c.x, driver.readable(weight)
    y = torch.empty_like(x)
    basis_h, basis_w = (basis_of(size, x.device) for size in x.shape[1:3])
    pointers = c.values, c.strip_shifts, c.slot_shifts
    kernel, blocks = kernel_for('filter_strips', x)
    others = weight.data_ptr(), address(basis_h), *x.shape[1:], -1 if conjugate else 1
    kernel.launch((blocks, len(x)), *pointers, *others)
    kernel, blocks = kernel_for('restore_strips', x)
    kernel.launch((blocks, len(x)), *pointers, y.data_ptr(), address(basis_w), *x.shape[1:])
    return y


def correlate(g: Coefficients, x: Coefficients) -> Tensor:
    """Return the gradient of the spectrum from coefficients before they are filtered."""
    batch, height, width, channels = x.x.shape
    kernel, blocks = kernel_for('correlate_strips', x.x)
    shares = min(batch, _shares(blocks, height, width, x.x.device.index))
    shape = shares, height, width // 2 + 1, channels, 2
    gradients = x.x.new_empty(shape, dtype=torch.float32)
    basis = basis_of(height, x.x.device)
    pointers = g.values, g.strip_shifts, x.values, x.strip_shifts, gradients.data_ptr()
    kernel.launch((blocks, shares), *pointers, address(basis), height, width, channels, batch)
    return gradients.sum(0) if shares > 1 else gradients[0]


@functools.lru_cache(maxsize=1024)
def _shares(blocks: int, height: int, width: int, device: int) -> int:
    """Return into how many shares to divide the images, which make a gradient each."""
    warps = divide('correlate_strips', height, width, driver.shared_memory(device)).warps
    return max(1, round(_WARPS * driver.multiprocessors(device) / (blocks * warps)))
