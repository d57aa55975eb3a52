"""The layer that mixes tokens: a global filter with a learned spectrum."""

import math
from collections.abc import Callable, Sequence

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from gfnet_dense.spectral import BACKENDS, RESIZE_METHODS, global_filter, resize_spectrum
from gfnet_dense.spectral.tracing import is_capturing

# Resized spectra kept in evaluation. One of a large grid takes more memory than the parameter, so
# few: they serve runs over images of one or two sizes.
_MAX_KEPT = 2


@register_notrace_module  # one node in graphs of torch.fx: what it does depends on the size
class GlobalFilter(nn.Module):
    """Learned filter in the frequency domain for maps of any size.

    The spectrum lives on the grid it was made for and is resized in forward whenever the map has
    another one. In evaluation resized spectra are kept, a few grids of them, for as long as the
    parameter holds the very values that they were made from.

    Args:
        dim: Number of channels C.
        grid: Size `(h, w)` in cells of the maps that the spectrum is made for.
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
        self,
        dim: int,
        grid: tuple[int, int],
        resize: str = 'bilinear',
        backend: str = 'auto',
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
        self._forget()

    def forward(self, x: Tensor) -> Tensor:
        """Filter a map of shape `(B, H, W, C)`; shape and dtype stay the same.

        But under autocast the backend 'fused' takes and returns maps in autocast's dtype, as matrix
        products do: normalisation in front of it returns float32.
        """
        if self.backend == 'fused' and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return global_filter(x, self.spectrum(x.shape[1:3]), self.backend)

    def spectrum(self, size: tuple[int, int]) -> Tensor:
        """Return the spectrum for maps of `size` `(H, W)`, of shape `(H, W // 2 + 1, C, 2)`."""
        size = (int(size[0]), int(size[1]))
        weight = self.complex_weight
        if size == self.grid:
            return weight
        learning = torch.is_grad_enabled() and weight.requires_grad
        # A graph that is being captured can neither look at values nor hold what is kept here;
        # transforms of torch.func put tensors of their own in place of the parameter.
        ordinary = isinstance(weight, nn.Parameter) and not _is_in_cuda_graph(weight)
        if self.training or learning or is_capturing() or not ordinary:
            return resize_spectrum(weight, self.grid, size, self.resize)
        return self._kept_spectrum(size)

    # What is kept serves later forwards too, so it is an ordinary tensor in inference mode as well.
    @torch.inference_mode(False)
    def _kept_spectrum(self, size: tuple[int, int]) -> Tensor:
        weight = self.complex_weight
        # Values are compared because nothing less is safe: an edit through `.data`, as EMA does,
        # leaves version counter and address as they were. On a CPU that costs less than the
        # resize; on a GPU it waits for the device.
        source, kept = self._kept
        if (
            source is None
            or source.dtype != weight.dtype
            or source.device != weight.device
            or not torch.equal(source, weight)
        ):
            source, kept = self._kept = weight.detach().clone(), {}
        resized = kept.get((size, self.resize))
        if resized is None:
            resized = resize_spectrum(source, self.grid, size, self.resize)
            # Replaced, never changed: other threads may be reading it.
            latest = [*kept.items(), ((size, self.resize), resized)][-_MAX_KEPT:]
            self._kept = source, dict(latest)
        return resized

    def _forget(self) -> None:
        self._kept: tuple[Tensor | None, dict[tuple, Tensor]] = None, {}

    def macs(self, shape: Sequence[int]) -> int:
        """Count the multiply-accumulates of a forward as the authors do, whatever the backend.

        Each of the two transforms of N cells has `N * C * ceil(log2(N))` of them (issues 3, 12 and
        15 of the official repository), each complex product 4.

        Args:
            shape: The shape `(B, H, W, C)` of the map.
        """
        batch, height, width, channels = shape
        cells = height * width
        transforms = 2 * cells * math.ceil(math.log2(cells))
        products = 4 * height * (width // 2 + 1)
        return batch * channels * (transforms + products)

    def train(self, mode: bool = True) -> 'GlobalFilter':
        """Set the mode, as every module does; kept spectra are dropped."""
        self._forget()
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> 'GlobalFilter':
        self._forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        # Copies and pickles carry the parameter, not what can be made from it.
        return {**self.__dict__, '_kept': (None, {})}

    def extra_repr(self) -> str:
        """Say what the layer is made for."""
        return f'{self.dim}, grid={self.grid}, resize={self.resize}, backend={self.backend}'


def _is_in_cuda_graph(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
