"""The global filter by products with real Fourier matrices.

For small planes they beat an FFT: a few large matrix products, no change of layout, no complex
dtype. The cost of a value grows with H + W instead of log(HW).
"""

import functools
import math

import torch
from torch import Tensor

from .blockwise import Transform, filter_map, is_capturing, multiplicity


def dense_filter(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`gfnet_dense.spectral.global_filter`."""
    # Tensor cores multiply float16 at many times the rate of float32, and add up in float32.
    operands = torch.float16 if x.is_cuda and x.dtype.itemsize == 2 else None
    return filter_map(functools.partial(_Dense, operands=operands), x, weight)


class _Dense(Transform):
    """Two matrix products per direction: along W from real to complex values, along H among them.

    Spectra are `(B, 2, H, (W // 2 + 1) * C)`, real and imaginary part apart, divided by H * W: no
    frequency is larger than the largest value of the map, so nothing overflows.

    Args:
        x: A map to transform; its size, dtype and device count.
        operands: What the factors of matrix products are rounded to; None for no rounding.
    """

    def __init__(self, x: Tensor, operands: torch.dtype | None = None) -> None:
        super().__init__(x)
        self._operands = operands
        # A graph can neither look into a cache nor may it leave its own tensors there, and no more
        # may those that only pretend to have values.
        ordinary = type(x) in (Tensor, torch.nn.Parameter) and not is_capturing()
        matrices = _kept_matrices if ordinary else _matrices
        self._matrices = matrices(self.height, self.width, operands or self.dtype, x.device)
        self._scratches: dict[str, Tensor] | None = None if is_capturing() else {}

    def kernel(self, weight: Tensor, conjugate: bool = False) -> Tensor:
        real, imag = weight.to(self.dtype).unbind(-1)
        return torch.stack([real, -imag if conjugate else imag]).flatten(2)

    def _forward(self, x: Tensor) -> Tensor:
        along_width, along_height, _, _ = self._matrices
        batch, height, _, channels = x.shape
        x, unit = self._round(x)
        rows = batch * height, along_width.shape[0], channels
        x = _multiply(along_width, x.flatten(0, 1), self._scratch('rows', x, rows))
        columns = batch, 2 * height, x.shape[1] // 2 * channels
        x = _multiply(along_height, x.view(columns), self._scratch('spectrum', x, columns))
        return self._restore(x, unit).view(batch, 2, height, -1)

    def multiply(self, spectrum: Tensor, kernel: Tensor) -> Tensor:
        real, imag = kernel.unbind(0)
        return self._product('product', spectrum, real, imag)

    def _inverse(self, spectrum: Tensor, out: Tensor | None) -> Tensor:
        _, _, along_height, along_width = self._matrices
        batch, _, height, _ = spectrum.shape
        x, unit = self._round(spectrum.flatten(1, 2))
        x = _multiply(along_height, x, self._scratch('rows', x, x.shape))
        x = x.view(batch * height, along_width.shape[1], -1)
        rows = batch * height, self.width, x.shape[2]
        if out is not None and unit is None:
            _multiply(along_width, x, out.view(rows))
            return out
        x = _multiply(along_width, x, self._scratch('map', x, rows))
        return self._restore(x, unit).view(batch, height, self.width, -1)

    def correlate(self, g: Tensor, x: Tensor) -> Tensor:
        real, imag = x.unbind(1)
        return self._product('correlation', g, real, imag, sign=-1).sum(0)

    def _gradient(self, correlation: Tensor) -> Tensor:
        # The first row of the way back along W: how often each column stands in the spectrum.
        columns = self._matrices[3][0, : self.width // 2 + 1, None, None].to(self.dtype)
        gradient = correlation.view(2, self.height, len(columns), -1).permute(1, 2, 3, 0)
        return gradient * (columns * (self.height * self.width))

    def _product(self, name: str, x: Tensor, real: Tensor, imag: Tensor, sign: int = 1) -> Tensor:
        """Multiply a spectrum by `real + sign * i * imag`."""
        x_real, x_imag = x.unbind(1)
        product = self._scratch(name, x, x.shape)
        if product is None:
            imag = sign * imag
            parts = x_real * real - x_imag * imag, x_imag * real + x_real * imag
            return torch.stack(parts, dim=1)
        torch.mul(x, real.unsqueeze(-3), out=product)
        product_real, product_imag = product.unbind(1)
        product_real.addcmul_(x_imag, imag, value=-sign)
        product_imag.addcmul_(x_real, imag, value=sign)
        return product

    def _scratch(self, name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """Return memory for a result, the same for every block, so cached; None in a graph."""
        if self._scratches is None:
            return None
        scratch = self._scratches.get(name)
        if scratch is None or scratch.shape != shape:
            kept = scratch is not None and scratch.numel() == math.prod(shape)
            scratch = scratch.view(shape) if kept else like.new_empty(shape)
            self._scratches[name] = scratch
        return scratch

    def _round(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Round to the operands' dtype, in units that keep the results within its range too."""
        if self._operands is None:
            return x, None
        unit = x.detach().abs().amax() * math.sqrt(self.height * self.width)
        unit = unit.clamp(min=torch.finfo(self.dtype).tiny)
        return (x / unit).to(self._operands), unit

    def _restore(self, x: Tensor, unit: Tensor | None) -> Tensor:
        return x if unit is None else x.to(self.dtype) * unit


def _multiply(matrix: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    """Multiply `(M, N)` with every `(N, C)` of a batch; `matmul` would copy either of them."""
    return torch.bmm(matrix.expand(x.shape[0], -1, -1), x, out=out)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _kept_matrices(
    height: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    # On the CPU, since not every device knows float64.
    matrices = _matrices(height, width, dtype, torch.device('cpu'))
    return tuple(matrix.to(device) for matrix in matrices)


def _matrices(
    height: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Return the Fourier matrices, forward along W and H, inverse along H and W.

    Along W they map `W` real values to `2 * (W // 2 + 1)`, cosines first, and back. Along H they
    map `H * 2` values, real and imaginary part of a row side by side as the first product leaves
    them, to `2 * H`, the parts apart, and back.
    """
    cosine, sine = _waves(width, device)
    cosine, sine = cosine[: width // 2 + 1], sine[: width // 2 + 1]
    forward_width = torch.cat([cosine, -sine]) / width
    columns = multiplicity(width, device)[:, None]
    inverse_width = torch.cat([columns * cosine, columns * -sine]).T

    cosine, sine = _waves(height, device)
    real = torch.stack([cosine, sine], dim=2).flatten(1)
    imag = torch.stack([-sine, cosine], dim=2).flatten(1)
    forward_height = torch.cat([real, imag])
    inverse_height = forward_height.T
    matrices = forward_width, forward_height / height, inverse_height, inverse_width
    return tuple(matrix.to(dtype).contiguous() for matrix in matrices)


def _waves(period: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of `2 pi u x / period`, for all `u` and `x`, in float64."""
    index = torch.arange(period, device=device)
    # The remainder, exact in integers, keeps angles small.
    angle = torch.outer(index, index).remainder(period).double() * (2 * math.pi / period)
    return angle.cos(), angle.sin()
