"""The operator of Global Filter Networks, `y = F^-1(K . F x)`, without parameters.

One function, :func:`global_filter`, and the ways to compute it (backends). Resizing a learned
spectrum or a position embedding from one grid to another lives in :mod:`.resize`.
"""

import functools
import logging
from collections.abc import Callable

from torch import Tensor

from .blockwise import is_capturing
from .dense import dense_filter
from .fft import fft_filter
from .fused import fused_filter, obstacle
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

# Sum of the sides, in cells, up to which 'dense' is the fastest on a device, since its cost per
# value grows with that sum: where FFTs are at their best, and where a side has a prime factor
# beyond their own. Time of 'fft' in units of 'dense', on two threads (AVX2, MKL), float32, batch 8,
# 96 channels but in the first three, from the tables of docs/performance.md:
#
#   H x W   forward  with backward       H x W   forward  with backward
#    7x7      3.6        3.0              37x37     5.5        3.4
#   14x14     1.8        1.8              41x41     6.0        5.1
#   28x28     1.3        1.4              62x62     2.4        2.4
#   32x32     1.4        1.3              67x67     2.8        3.2
#   48x48     1.2        1.5              97x97     2.2        2.2
#   56x56     1.1        1.2             134x134    1.7        1.5
#   64x64     1.0        1.3             151x151    1.6        1.6
#   88x88     0.9        1.0             199x199    1.1        1.0
#  104x104    0.8        0.9             200x200    0.6        0.6
#
# 16-bit maps are computed in float32 there. The border is one for all: a layer gives the same in
# training as in evaluation. No GPU has been measured yet, so 'fused' is not among the choices.
_DENSE_UP_TO = {'cpu': (128, 400)}
_PRIMES_OF_FFT = (2, 3, 5, 7, 11, 13)

_BACKENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'fft': fft_filter,
    'dense': dense_filter,
    'fused': fused_filter,
}
BACKENDS = ('auto', *_BACKENDS)


def global_filter(x: Tensor, weight: Tensor, backend: str = 'auto') -> Tensor:
    """Filter every channel of a map with a learned spectrum.

    This is a depthwise circular convolution whose kernel is as large as the map (section 3 of
    arXiv 2107.00645). Of a spectrum that is not Hermitian, as a learned one never is, only the
    Hermitian part acts (:func:`hermitian_part`), on every device alike.

    The result is computed in float32 (float64 for float64 input), also under autocast; by 'dense'
    on a GPU and by 'fused', 16-bit maps with factors rounded to float16 and sums in float32. It
    has derivatives of any order, one of which may be forward: torch takes a forward derivative of
    a forward derivative of a `Function` for zero.

    Args:
        x: Map of shape `(B, H, W, C)`, any floating dtype, any strides.
        weight: Spectrum of shape `(H, W // 2 + 1, C, 2)`: real and imaginary part, rows in FFT
            order (0, 1, ..., -1), columns the non-negative frequencies.
        backend: A name of :data:`BACKENDS`:

            - `'fft'`: `torch.fft`.
            - `'dense'`: products with real Fourier matrices; for small maps, and for compilers
              and exporters, which know no complex dtype.
            - `'fused'`: Triton kernels that move less memory, for maps of 16 bits and up to 512
              cells a side on NVIDIA GPUs. Their speed has not been measured yet. Any other map is
              left to `'auto'`, and the logger of this package says why, once, at debug level.
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
    if backend == 'fused' and (reason := obstacle(x)):
        if not is_capturing():  # a graph holds no logging
            _report(reason)
        backend = 'auto'
    return _BACKENDS[_fastest(x) if backend == 'auto' else backend](x, weight)


@functools.cache
def _report(reason: str) -> None:
    logging.getLogger(__name__).debug("'auto' takes over from 'fused': %s", reason)


def _fastest(x: Tensor) -> str:
    if is_capturing():
        return 'dense'
    best, rough = _DENSE_UP_TO.get(x.device.type, (0, 0))
    sides = x.shape[1:3]
    return 'dense' if sum(sides) <= (best if all(map(_suits_fft, sides)) else rough) else 'fft'


def _suits_fft(side: int) -> bool:
    for prime in _PRIMES_OF_FFT:
        while side % prime == 0:
            side //= prime
    return side == 1
