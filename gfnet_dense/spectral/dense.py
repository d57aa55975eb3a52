"""The global filter by products with real Fourier matrices.

For small maps, where four matrix products without a change of layout beat an FFT (their cost per
value grows with H + W instead of log(H * W)), and for compilers and exporters, which have no
complex dtype.

A map is transformed along W from real values to cosine and sine coefficients, then along H. With
V = W // 2 + 1:

    x (B H, W, C)  ->  (B H, 2 V, C) = (B, H 2, V C)  ->  spectrum (B, 2 H, V C)

Spectra hold real and imaginary part apart and are divided by H * W: no frequency is larger than the
largest value of the map.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import multiplicity
from .reference import compute_dtype
from .tracing import is_capturing


class _Matrices(NamedTuple):
    """Fourier matrices, in the order of their use.

    Along W the coefficients are the cosines, then the sines. Along H, real and imaginary part of a
    row lie side by side before the transform, as the first product leaves them, and apart after it.
    """

    along_width: Tensor  # (2 V, W)
    along_height: Tensor  # (2 H, H 2)
    back_along_height: Tensor  # (H 2, 2 H)
    back_along_width: Tensor  # (W, 2 V)


def unsupported_reason(x: Tensor) -> None:
    """Return None: matrix products take every map."""


def filter(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    with _full_precision(x.device):
        return _map(_multiply(_spectrum(x), weight, conjugate), x)


def correlate(g: Tensor, x: Tensor) -> Tensor:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    with _full_precision(x.device):
        return _gradient(_spectrum(g), _spectrum(x), x)


def adjoint(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    with _full_precision(x.device):
        spectrum = _spectrum(g)
        return _map(_multiply(spectrum, weight, True), x), _gradient(spectrum, _spectrum(x), x)


def _spectrum(x: Tensor) -> Tensor:
    """Transform a map `(B, H, W, C)` to a spectrum `(B, 2, H, V C)`."""
    batch, height = x.shape[:2]
    matrices = _matrices(x)
    values, largest = _scale(x.to(compute_dtype(x)), x)
    rows = _product(matrices.along_width, values.flatten(0, 1))
    spectrum = _product(matrices.along_height, rows.view(batch, 2 * height, -1))
    return _unscale(spectrum, largest, x).view(batch, 2, height, -1)


def _map(spectrum: Tensor, like: Tensor) -> Tensor:
    """Transform a spectrum `(B, 2, H, V C)` back to a map `(B, H, W, C)`."""
    batch, height, _, channels = like.shape
    matrices = _matrices(like)
    values, largest = _scale(spectrum, like)
    rows = _product(matrices.back_along_height, values.flatten(1, 2))
    y = _product(matrices.back_along_width, rows.view(batch * height, -1, channels))
    return _unscale(y, largest, like).view(like.shape).to(like.dtype)


def _multiply(spectrum: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    real, imag = weight.flatten(1, 2).unbind(-1)
    imag = torch.stack([imag, -imag] if conjugate else [-imag, imag])
    return spectrum * real + spectrum.flip(1) * imag


def _gradient(g: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """Return the gradient of the weight from the spectra of gradient and map."""
    _, height, width, channels = like.shape
    (g_real, g_imag), (real, imag) = g.unbind(1), x.unbind(1)
    parts = g_real * real + g_imag * imag, g_imag * real - g_real * imag
    correlation = torch.stack([part.sum(0) for part in parts], dim=-1)
    columns = multiplicity(width, x.device).to(x.dtype) * (height * width)
    return correlation.unflatten(1, (-1, channels)) * columns[:, None, None]


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply a matrix with every `(N, C)` of a batch; unlike `matmul`, without a copy."""
    return torch.bmm(matrix.expand(x.shape[0], -1, -1), x)


# Two kinds of maps are scaled before each pair of products, and their results scaled back. Tensor
# cores multiply float16 at many times the rate of float32, so 16-bit maps on a GPU are rounded to
# it, scaled to keep results within its range. And bfloat16 has the range of float32, which sums of
# large values would leave.


def _operand_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the factors of matrix products; sums are in the compute dtype."""
    return torch.float16 if x.is_cuda and x.dtype.itemsize == 2 else compute_dtype(x)


def _scale(values: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale values to `1 / sqrt(H * W)` at most and round them; return the largest of them too."""
    operand_dtype = _operand_dtype(like)
    if operand_dtype == values.dtype and like.dtype != torch.bfloat16:
        return values, None
    largest = values.detach().abs().amax().clamp(min=torch.finfo(values.dtype).tiny)
    return (values / largest / _root(like)).to(operand_dtype), largest


def _unscale(values: Tensor, largest: Tensor | None, like: Tensor) -> Tensor:
    # Not by the product of the two factors, which may overflow.
    return values if largest is None else values.to(compute_dtype(like)) * _root(like) * largest


def _root(x: Tensor) -> float:
    return math.sqrt(x.shape[1] * x.shape[2])


def _matrices(x: Tensor) -> _Matrices:
    # Skip the cache while a graph is captured and for tensor subclasses such as FakeTensor.
    is_cacheable = type(x) in (Tensor, torch.nn.Parameter) and not is_capturing()
    make = _cached_matrices if is_cacheable else _make_matrices
    return make(x.shape[1], x.shape[2], _operand_dtype(x), x.device)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _cached_matrices(
    height: int, width: int, dtype: torch.dtype, device: torch.device
) -> _Matrices:
    # Made on the CPU, since not every device has float64.
    matrices = _make_matrices(height, width, dtype, torch.device('cpu'))
    return _Matrices(*(matrix.to(device) for matrix in matrices))


def _make_matrices(height: int, width: int, dtype: torch.dtype, device: torch.device) -> _Matrices:
    cosine, sine = (wave[: width // 2 + 1] for wave in _waves(width, device))
    columns = multiplicity(width, device)[:, None]
    along_width = torch.cat([cosine, -sine]) / width
    back_along_width = torch.cat([columns * cosine, columns * -sine]).T
    cosine, sine = _waves(height, device)
    real = torch.stack([cosine, sine], dim=2).flatten(1)
    imag = torch.stack([-sine, cosine], dim=2).flatten(1)
    along_height = torch.cat([real, imag])
    matrices = along_width, along_height / height, along_height.T, back_along_width
    return _Matrices(*(matrix.to(dtype).contiguous() for matrix in matrices))


def _waves(period: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of `2 pi u x / period`, for all `u` and `x`, in float64."""
    index = torch.arange(period, device=device)
    # The remainder, exact in integers, keeps angles small.
    angle = torch.outer(index, index).remainder(period).double() * (2 * math.pi / period)
    return angle.cos(), angle.sin()


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Compute matrix products in the precision of their operands, with sums in float32.

    Switches off autocast, TF32 and reduced-precision sums. A graph keeps the caller's settings for
    the last two.
    """
    if device.type != 'meta' and torch.is_autocast_enabled(device.type):  # meta has no autocast
        autocast: AbstractContextManager[Any] = torch.autocast(device.type, enabled=False)
    else:
        autocast = nullcontext()
    # Dynamo of torch 2.6 does not trace context managers that are generators.
    return autocast if is_capturing() or device.type != 'cuda' else _full_sums(autocast)


@contextmanager
def _full_sums(autocast: AbstractContextManager[Any]) -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    names = ('allow_tf32', 'allow_fp16_reduced_precision_reduction')
    before = [getattr(settings, name) for name in names]
    try:
        for name in names:
            setattr(settings, name, False)
        with autocast:
            yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(settings, name, value)
