"""The operator of Global Filter Networks, `y = F^-1(K . F x)`, without parameters.

One function, :func:`global_filter`, and the ways to compute it (backends). Resizing a learned
spectrum or a position embedding from one grid to another lives in :mod:`.resize`.
"""

from collections.abc import Callable

from torch import Tensor

from .blockwise import is_capturing
from .dense import dense_filter
from .fft import fft_filter
from .resize import RESIZE_METHODS, Grid, hermitian_part, resize_position_embedding, resize_spectrum

__all__ = [
    'BACKENDS',
    'RESIZE_METHODS',
    'Grid',
    'global_filter',
    'hermitian_part',
    'resize_position_embedding',
    'resize_spectrum',
]

# Sum of the sides, in cells, up to which 'dense' is the fastest on a device: its cost per value
# grows with that sum. Time of 'fft' in units of 'dense', one core (AVX2, MKL), float32, batch 8:
#
#   H x W x C     forward   forward and backward
#     7x7x768       2.9             2.2
#    14x14x384      1.6             1.5
#    28x28x192      1.3             1.2
#    25x42x192      1.4             1.2
#    56x56x96       0.95            1.0
#    64x64x192      0.9             0.85
#
# 16-bit maps are computed in float32. Gradients do not move the border, so a layer gives the same
# in training as in evaluation.
_DENSE_UP_TO = {'cpu': 72}

_BACKENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'fft': fft_filter,
    'dense': dense_filter,
}
BACKENDS = ('auto', *_BACKENDS)


def global_filter(x: Tensor, weight: Tensor, backend: str = 'auto') -> Tensor:
    """Filter every channel of a map with a learned spectrum.

    This is a depthwise circular convolution whose kernel is as large as the map (section 3 of
    arXiv 2107.00645). Of a spectrum that is not Hermitian, as a learned one never is, only the
    Hermitian part acts (:func:`hermitian_part`), on every device alike.

    The result is computed in float32 (float64 for float64 input), also under autocast; by 'dense'
    on a GPU, 16-bit maps with factors rounded to float16 and sums in float32. It has derivatives
    of any order, forward and backward.

    Args:
        x: Map of shape `(B, H, W, C)`, any floating dtype, any strides.
        weight: Spectrum of shape `(H, W // 2 + 1, C, 2)`: real and imaginary part, rows in FFT
            order (0, 1, ..., -1), columns the non-negative frequencies.
        backend: A name of :data:`BACKENDS`:

            - `'fft'`: `torch.fft`.
            - `'dense'`: products with real Fourier matrices; for small maps, and for compilers
              and exporters, which know no complex dtype.
            - `'auto'`: the one that is faster for this map on this device; in a graph that is
              compiled, exported or traced `'dense'`.

    Returns:
        The filtered map, in the shape, dtype and device of `x`.

    Raises:
        TypeError: If `x` or `weight` is not of a real floating dtype.
        ValueError: If the shapes or devices do not fit, or the backend is unknown.
    """
    if not x.is_floating_point() or not weight.is_floating_point():
        raise TypeError(
            f'x and weight must be real floating tensors, but got {x.dtype} and {weight.dtype}'
        )
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f'x must be a non-empty map of shape (B, H, W, C), but got {tuple(x.shape)}'
        )
    _, height, width, channels = x.shape
    expected = (height, width // 2 + 1, channels, 2)
    if weight.shape != expected:
        raise ValueError(
            f'a map of shape {tuple(x.shape)} needs a weight of shape {expected}, '
            f'but got {tuple(weight.shape)}; resize_spectrum() brings it to this grid'
        )
    if x.device != weight.device:
        raise ValueError(f'x is on {x.device}, but weight is on {weight.device}')
    if backend not in BACKENDS:
        raise ValueError(f'unknown backend {backend!r}, choose one of {", ".join(BACKENDS)}')
    if x.shape[0] == 0:  # FFT libraries refuse an empty batch
        return x + 0 * weight.sum().to(x.dtype)
    return _BACKENDS[_fastest(x) if backend == 'auto' else backend](x, weight)


def _fastest(x: Tensor) -> str:
    if is_capturing():
        return 'dense'
    return 'dense' if sum(x.shape[1:3]) <= _DENSE_UP_TO.get(x.device.type, 0) else 'fft'
