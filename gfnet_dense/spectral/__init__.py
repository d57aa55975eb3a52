"""The operator of Global Filter Networks, `y = F^-1(K . F x)`, without parameters.

:func:`global_filter` computes it with one of several backends. :mod:`.reference` holds the
definition. :mod:`.resize` brings a learned spectrum or a position embedding to another grid.
"""

import functools
import logging
import math

from torch import Tensor

from . import cuda, dense, fft, native
from .autograd import Backend, differentiable_filter, register_derivatives
from .resize import RESIZE_METHODS, Grid, hermitian_part, resize_position_embedding, resize_spectrum
from .tracing import is_capturing

__all__ = [
    'BACKENDS',
    'RESIZE_METHODS',
    'Grid',
    'global_filter',
    'hermitian_part',
    'resize_position_embedding',
    'resize_spectrum',
    'select_backend',
    'unsupported_reason',
]

_BACKENDS: dict[str, Backend] = {'native': native, 'fft': fft, 'dense': dense, 'fused': cuda}
BACKENDS = ('auto', *_BACKENDS)

register_derivatives(native, f'{native.NAMESPACE}::filter', f'{native.NAMESPACE}::correlate')
register_derivatives(cuda, f'{cuda.NAMESPACE}::filter', f'{cuda.NAMESPACE}::correlate')

# Per value, matrix products multiply H + W times and FFTs about as often as the prime factors of H
# and W add up to, but a multiplication of a matrix product is about this many times as fast on a
# CPU (docs/performance.md). So small sides and sides with a large prime factor are for 'dense'.
_DENSE_SPEED = 5


def global_filter(x: Tensor, weight: Tensor, backend: str = 'auto') -> Tensor:
    """Filter every channel of a map with a learned spectrum.

    This is a depthwise circular convolution whose kernel is as large as the map (section 3 of
    arXiv 2107.00645). Learned spectra are not Hermitian; only their Hermitian part acts
    (:func:`hermitian_part`), on every device alike.

    The result is computed in float32 (float64 for float64 input), also under autocast. For 16-bit
    maps 'dense' on a GPU and 'fused' round factors to float16 and sum in float32.

    Reverse-mode derivatives of any order; forward mode once, because PyTorch returns zero for
    nested forward mode through a `Function`.

    Args:
        x: Map of shape `(B, H, W, C)`, any floating dtype, any strides.
        weight: Spectrum of shape `(H, W // 2 + 1, C, 2)`: real and imaginary part, rows in FFT
            order (0, 1, ..., -1), columns the non-negative frequencies.
        backend: A name of :data:`BACKENDS`:

            - `'native'`: C++ for CPUs, compiled on first use.
            - `'fft'`: `torch.fft`.
            - `'dense'`: products with real Fourier matrices; for small maps, and for compilers
              and exporters, which have no complex dtype.
            - `'fused'`: CUDA C++ for 16-bit maps of up to 512 cells a side on NVIDIA GPUs,
              compiled on first use.
            - `'auto'`: `'native'` on a CPU with a C++ compiler and `'fused'` on a GPU where they
              support the map, compiled graphs included; else `'dense'` in graphs that are
              compiled, exported or traced, and on a CPU for maps with small sides or sides with a
              large prime factor; `'fft'` for all others.

            Where a backend does not support a map, `'auto'` filters it, and the log warns of it
            once.

    Returns:
        The filtered map, in the shape, dtype and device of `x`.

    Raises:
        TypeError: If `x` or `weight` is not of a real floating dtype.
        ValueError: If the shapes or devices do not fit, or the backend is unknown.
    """
    if not x.is_floating_point() or not weight.is_floating_point():
        raise TypeError(f'x and weight must be real floats, not {x.dtype} and {weight.dtype}')
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f'x must be a non-empty map (B, H, W, C), but got {tuple(x.shape)}')
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
    return differentiable_filter(select_backend(x, backend), x, weight)


def select_backend(x: Tensor, backend: str = 'auto') -> Backend:
    """Return the backend of a name; for maps that it does not support the one of 'auto'."""
    if reason := unsupported_reason(x, backend):
        if not is_capturing():  # a graph cannot hold logging
            _log_once(logging.WARNING, f"'auto' replaces {backend!r}: {reason}")
        backend = 'auto'
    return _BACKENDS[_fastest(x) if backend == 'auto' else backend]


def unsupported_reason(x: Tensor, backend: str) -> str | None:
    """Say why a backend cannot filter a map like `x`; None if it can."""
    return None if backend == 'auto' else _BACKENDS[backend].unsupported_reason(x)


@functools.cache
def _log_once(level: int, message: str) -> None:
    logging.getLogger(__name__).log(level, message)


def _fastest(x: Tensor) -> str:
    """Choose a backend; the same in training and evaluation."""
    name = 'native' if x.is_cpu else 'fused'
    reason = unsupported_reason(x, name)
    if reason is None:
        return name
    if is_capturing():
        return 'dense'
    if x.is_cpu:
        _log_once(logging.WARNING, f'filters take several times as long without C++: {reason}')
    sides = x.shape[1:3]
    is_dense_faster = x.is_cpu and sum(sides) <= _DENSE_SPEED * sum(map(_sum_of_factors, sides))
    return 'dense' if is_dense_faster else 'fft'


@functools.cache
def _sum_of_factors(side: int) -> int:
    """Return the sum of the prime factors of a side; 1 for a single cell."""
    for factor in range(2, math.isqrt(side) + 1):
        if side % factor == 0:
            return factor + _sum_of_factors(side // factor)
    return side
