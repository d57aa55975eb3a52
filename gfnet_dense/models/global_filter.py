"""The layer that mixes tokens: a global filter with a learned spectrum."""

import math
from collections.abc import Sequence

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from gfnet_dense.spectral import BACKENDS, RESIZE_METHODS, Grid, global_filter, resize_spectrum

from .resize_cache import ResizeCache


@register_notrace_module  # one node in graphs of torch.fx, because its work depends on the size
class GlobalFilter(ResizeCache):
    """Learned filter in the frequency domain for maps of any size.

    The spectrum lives on the grid it was made for and is resized in forward whenever the map has
    another grid. In evaluation the layer caches the resized spectra of the last grids for as long
    as the parameter holds the values that they were made from.

    Args:
        dim: Number of channels C.
        grid: Size `(h, w)`, in cells, of the maps that the spectrum is made for.
        resize: How the spectrum reaches another grid, see
            :func:`gfnet_dense.spectral.resize_spectrum`.
        backend: How the operator is computed, see :func:`gfnet_dense.spectral.global_filter`.

    Attributes:
        complex_weight: The spectrum, of shape `(h, w // 2 + 1, C, 2)`. Name and initialisation
            (normal, standard deviation 0.02) are the official ones.

    Raises:
        ValueError: If `dim` or `grid` is not positive, or `resize` or `backend` is unknown.
    """

    def __init__(
        self, dim: int, grid: tuple[int, int], resize: str = 'bilinear', backend: str = 'auto'
    ) -> None:
        super().__init__()
        if dim < 1 or min(grid) < 1:
            raise ValueError(f'dim and grid must be positive, but got {dim} and {tuple(grid)}')
        if resize not in RESIZE_METHODS:
            raise ValueError(
                f'unknown filter resize method {resize!r}, choose one of '
                f'{", ".join(RESIZE_METHODS)}'
            )
        if backend not in BACKENDS:
            raise ValueError(f'unknown backend {backend!r}, choose one of {", ".join(BACKENDS)}')
        self.dim = dim
        self.grid = (grid[0], grid[1])
        self.resize = resize
        self.backend = backend
        self.complex_weight = nn.Parameter(torch.randn(grid[0], grid[1] // 2 + 1, dim, 2) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Filter a map of shape `(B, H, W, C)`; shape and dtype stay the same.

        Under autocast on a GPU, or with the backend 'fused', the map is cast to autocast's dtype
        first, as for a matrix product.
        """
        device = x.device.type
        takes_16_bits = device == 'cuda' or self.backend == 'fused'
        if takes_16_bits and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        _, height, width, _ = x.shape
        return global_filter(x, self.spectrum((height, width)), self.backend)

    def spectrum(self, size: tuple[int, int]) -> Tensor:
        """Return the spectrum for maps of `size` `(H, W)`, of shape `(H, W // 2 + 1, C, 2)`."""
        height, width = size
        grid = int(height), int(width)
        weight = self.complex_weight
        if grid == self.grid:
            return weight
        key = grid, self.resize
        return self.resized(weight, key, lambda w: resize_spectrum(w, self.grid, *key))

    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        """Store the spectrum on another grid `(h, w)`, resized as in forward."""
        weight = resize_spectrum(self.complex_weight, self.grid, grid, self.resize)
        self.complex_weight = nn.Parameter(weight, self.complex_weight.requires_grad)
        self.grid = grid
        self.clear_cache()

    def macs(self, shape: Sequence[int]) -> int:
        """Count the multiply-accumulates for a map `(B, H, W, C)` as the authors do.

        A transform of N cells counts `N * C * ceil(log2(N))` (issues 3, 12 and 15 of the official
        repository) and there are two; a complex product counts 4. Backends count alike.
        """
        batch, height, width, channels = shape
        cells = height * width
        transforms = 2 * cells * math.ceil(math.log2(cells))
        products = 4 * height * (width // 2 + 1)
        return batch * channels * (transforms + products)

    def extra_repr(self) -> str:
        """Say what the layer is made for."""
        return f'{self.dim}, grid={self.grid}, resize={self.resize}, backend={self.backend}'
