"""Resize learned spectra and position embeddings from one grid to another.

A grid is the spatial size `(h, w)`, in cells, of the maps that a parameter was made for. A spectrum
of that grid is stored as real numbers `(h, w // 2 + 1, C, 2)`: rows in FFT order, columns for the
non-negative frequencies, then real and imaginary part.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def hermitian_part(weight: Tensor, width: int) -> Tensor:
    """Return the part of a half spectrum that acts on real maps, in the shape of `weight`.

    The columns of frequency zero and, for even widths, of the Nyquist frequency hold both entries
    of each conjugate pair. An inverse real FFT uses only their Hermitian part. FFT libraries differ
    in how they drop the rest, so this function drops it before they see it.

    Args:
        weight: Spectrum of shape `(h, width // 2 + 1, C, 2)`.
        width: Width of the map in cells. The half spectrum alone does not determine it.
    """
    first, rest = _symmetric(weight[:, :1]), weight[:, 1:]
    if width % 2:
        return torch.cat([first, rest], dim=1)
    return torch.cat([first, rest[:, :-1], _symmetric(rest[:, -1:])], dim=1)


def resize_spectrum(weight: Tensor, grid: Grid, size: Grid, method: str = 'bilinear') -> Tensor:
    """Resize a learned spectrum to the grid of another map.

    Differentiable in `weight`. A spectrum that already has the right grid is returned unchanged.

    Args:
        weight: Spectrum of shape `(h, w // 2 + 1, C, 2)`.
        grid: The grid `(h, w)` of `weight`.
        size: The grid `(H, W)` to resize to.
        method: A name of :data:`RESIZE_METHODS`:

            - `'bilinear'`: resizes real and imaginary part as images, corners aligned. The
              authors use it for dense prediction (issues 4 and 16 of the official repository).
            - `'bicubic'`: the same with a bicubic kernel. The authors use it to finetune at 384.
            - `'centered'`: interpolates linearly between neighbouring frequencies. It keeps the
              response of the filter at every normalised frequency (cycles per cell).
            - `'spatial'`: keeps the spatial kernel. Its taps, in cells around the origin, are
              padded with zeros or cropped.

            The first two interpolate rows in FFT order. So they blend the highest positive with
            the highest negative frequency and shift low negative ones. Official weights were
            evaluated this way.

    Returns:
        Spectrum of shape `(H, W // 2 + 1, C, 2)`.

    Raises:
        ValueError: If `weight` is not of `grid`, or `size` or `method` is not valid.
    """
    if weight.ndim != 4 or weight.shape[-1] != 2 or weight.shape[:2] != _half(grid):
        raise ValueError(
            f'a spectrum of grid {tuple(grid)} has shape {(*_half(grid), "C", 2)}, '
            f'but got {tuple(weight.shape)}'
        )
    if min(size) < 1:
        raise ValueError(f'a grid has at least one cell a side, but got {tuple(size)}')
    if method not in RESIZE_METHODS:
        raise ValueError(
            f'unknown filter resize method {method!r}, choose one of {", ".join(RESIZE_METHODS)}'
        )
    if tuple(grid) == tuple(size):
        return weight
    return _METHODS[method](weight, grid, size)


def resize_position_embedding(pos_embed: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Resize a position embedding bicubically, as the official finetuning at 384 does.

    Args:
        pos_embed: Embedding of shape `(1, h * w, C)`.
        grid: The grid `(h, w)` of `pos_embed`.
        size: The grid `(H, W)` to resize to.

    Returns:
        Embedding of shape `(1, H * W, C)`.
    """
    if tuple(grid) == tuple(size):
        return pos_embed
    image = pos_embed.unflatten(1, grid).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=size, mode='bicubic', align_corners=False)
    return image.flatten(2).transpose(1, 2)


def _interpolate(weight: Tensor, grid: Grid, size: Grid, mode: str) -> Tensor:
    channels = weight.shape[2]
    # Add the batch dimension before the channels move to the front. Then torch sees that channels
    # are last in memory, keeps them there, and is several times as fast on a CPU.
    image = weight.flatten(2).unsqueeze(0).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=_half(size), mode=mode, align_corners=True)
    return image.permute(0, 2, 3, 1).squeeze(0).unflatten(2, (channels, 2))


def _centered(weight: Tensor, grid: Grid, size: Grid) -> Tensor:
    (h, w), (height, width) = grid, size
    weight = hermitian_part(weight, w)
    # Odd widths need one column past the half. The spectrum is periodic, so that column is the
    # mirror image of column (w - 1) // 2.
    beyond = _conjugate_mirror(weight[:, (w - 1) // 2 : (w - 1) // 2 + 1])
    weight = torch.cat([weight, beyond], dim=1)
    rows = torch.arange(height, device=weight.device)
    columns = torch.arange(width // 2 + 1, device=weight.device)
    weight = _lerp(weight, rows, h, height, dim=0)
    return _lerp(weight, columns, w, width, dim=1)


def _lerp(weight: Tensor, frequency: Tensor, old: int, new: int, dim: int) -> Tensor:
    """Sample `dim`, of a period of `old` cells, at `frequency` cycles per `new` cells."""
    count = weight.shape[dim]
    # Integer arithmetic hits a frequency that both grids have exactly.
    lower = torch.div(frequency * old, new, rounding_mode='floor')
    fraction = (frequency * old - lower * new).to(weight.dtype) / new
    fraction = fraction.view([-1 if d == dim else 1 for d in range(weight.ndim)])
    below, above = (weight.index_select(dim, i.remainder(count)) for i in (lower, lower + 1))
    return torch.lerp(below, above, fraction.expand_as(below))


def _spatial(weight: Tensor, grid: Grid, size: Grid) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    spectrum = torch.view_as_complex(hermitian_part(weight.to(dtype), grid[1]).contiguous())
    kernel = torch.fft.irfft2(spectrum, s=grid, dim=(0, 1))
    for dim, (old, new) in enumerate(zip(grid, size, strict=True)):
        kernel = _pad_or_crop(kernel, old, new, dim)
    spectrum = torch.fft.rfft2(kernel, dim=(0, 1))
    return torch.view_as_real(spectrum).to(weight.dtype)


def _pad_or_crop(kernel: Tensor, old: int, new: int, dim: int) -> Tensor:
    """Keep the taps nearest to the origin, which is index 0 of a circular axis."""
    kept = min(old, new)
    after = kernel.narrow(dim, 0, (kept + 1) // 2)
    before = kernel.narrow(dim, old - kept // 2, kept // 2)
    gap = list(kernel.shape)
    gap[dim] = new - kept
    return torch.cat([after, kernel.new_zeros(gap), before], dim=dim)


_METHODS: dict[str, Callable[[Tensor, Grid, Grid], Tensor]] = {
    'bilinear': partial(_interpolate, mode='bilinear'),
    'bicubic': partial(_interpolate, mode='bicubic'),
    'centered': _centered,
    'spatial': _spatial,
}
RESIZE_METHODS = tuple(_METHODS)


def _half(grid: Grid) -> Grid:
    return grid[0], grid[1] // 2 + 1


def _symmetric(columns: Tensor) -> Tensor:
    """Return the Hermitian part of columns that are their own mirror image."""
    return (columns + _conjugate_mirror(columns)) / 2


def _conjugate_mirror(columns: Tensor) -> Tensor:
    """Return columns of the negative frequencies: row u is the conjugate of row -u."""
    mirrored = columns.flip(0).roll(1, 0)
    return torch.stack([mirrored[..., 0], -mirrored[..., 1]], dim=-1)
