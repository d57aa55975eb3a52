"""The global filter by products with real Fourier matrices.

For small planes they beat an FFT: a few large matrix products, no change of layout, no complex
dtype. The cost of a value grows with H + W instead of log(HW).
"""

import functools
import math

import torch
from torch import Tensor

from .blockwise import Transform, filter_map, is_capturing, multiplicity

# Rows of a map from which on a CPU folds it: below, two more operators cost what smaller products
# save.
_FOLDED_FROM = 24


def dense_filter(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`gfnet_dense.spectral.global_filter`."""
    # Tensor cores multiply float16 at many times the rate of float32, and add up in float32.
    operands = torch.float16 if x.is_cuda and x.dtype.itemsize == 2 else None
    return filter_map(functools.partial(_Dense, operands=operands), x, weight)


class _Dense(Transform):
    """Two matrix products per direction: along W from real to complex values, along H among them.

    The second is the larger one. On a CPU it is halved: the sum of the two halves of a map along H
    has its even rows of frequencies, the difference the odd ones, as in the first step of an FFT.

    Spectra are `(B, P, 2, H / P, (W // 2 + 1) * C)`, real and imaginary part apart, even and odd
    rows too if P = 2, divided by H * W: no frequency is larger than the largest value of the map,
    so nothing overflows, but that sums of halves leave maps half the range of their dtype.

    Args:
        x: A map to transform; its size, dtype and device count.
        operands: What the factors of matrix products are rounded to; None for no rounding.
    """

    def __init__(self, x: Tensor, operands: torch.dtype | None = None) -> None:
        super().__init__(x)
        self._operands = operands
        # A graph can neither look into a cache nor may it leave its own tensors there, and no more
        # may those that only pretend to have values.
        capturing = is_capturing()
        ordinary = type(x) in (Tensor, torch.nn.Parameter) and not capturing
        foldable = x.is_cpu and operands is None and not capturing
        # Two matrices are copied for every image: not where a row is smaller than one of theirs.
        pays = _FOLDED_FROM <= self.height <= self.width * x.shape[3]
        self._parts = 2 if foldable and pays and self.height % 2 == 0 else 1
        size = self.height, self.width, self._parts
        matrices = _kept_matrices if ordinary else _matrices
        self._matrices = matrices(size, operands or self.dtype, x.device)
        self._scratches: dict[str, Tensor] | None = None if capturing else {}

    def kernel(self, weight: Tensor, conjugate: bool = False) -> Tensor:
        real, imag = weight.to(self.dtype).unbind(-1)
        kernel = torch.stack([real, -imag if conjugate else imag])
        return kernel.view(2, -1, self._parts, kernel[0, 0].numel()).transpose(1, 2)

    def _forward(self, x: Tensor, keep: bool) -> Tensor:
        along_width, along_height, _, _ = self._matrices
        batch, height, _, channels = x.shape
        x, unit = self._round(x if self._parts == 1 else self._fold(x))
        rows = batch * height, along_width.shape[1], channels
        x = _multiply(along_width, x.flatten(0, -3), self._scratch('rows', x, rows))
        columns = batch * self._parts, along_height.shape[1], x.shape[1] // 2 * channels
        out = None if keep else self._scratch('spectrum', x, columns)
        x = _multiply(along_height, x.view(columns), out)
        return self._restore(x, unit).view(batch, self._parts, 2, -1, columns[2])

    def multiply(self, spectrum: Tensor, kernel: Tensor) -> Tensor:
        real, imag = kernel.unbind(0)
        return self._product('product', spectrum, real, imag)

    def _inverse(self, spectrum: Tensor, out: Tensor | None) -> Tensor:
        _, _, along_height, along_width = self._matrices
        x, unit = self._round(spectrum.flatten(2, 3).flatten(0, 1))
        x = _multiply(along_height, x, self._scratch('rows', x, x.shape))
        x = x.view(-1, along_width.shape[2], x.shape[2] // (self.width // 2 + 1))
        rows = x.shape[0], self.width, x.shape[2]
        shape = spectrum.shape[0], self.height, *rows[1:]
        if self._parts == 2:
            x = _multiply(along_width, x, self._scratch('folded', x, rows))
            return self._unfold(x.view(shape), out)
        if out is not None and unit is None:
            _multiply(along_width, x, out.view(rows))
            return out
        x = _multiply(along_width, x, self._scratch('map', x, rows))
        return self._restore(x, unit).view(shape)

    def correlate(self, g: Tensor, x: Tensor) -> Tensor:
        real, imag = x.unbind(2)
        return self._product('correlation', g, real, imag, sign=-1).sum(0)

    def _gradient(self, correlation: Tensor) -> Tensor:
        # The first row of the way back along W: how often each column stands in the spectrum.
        columns = self._matrices[3][0, 0, : self.width // 2 + 1, None, None].to(self.dtype)
        gradient = correlation.unflatten(3, (len(columns), -1)).permute(2, 0, 3, 4, 1)
        return gradient.flatten(0, 1) * (columns * (self.height * self.width))

    def _fold(self, x: Tensor) -> Tensor:
        """Return sums and differences of the halves of `(B, H, W, C)`: `(B, 2, H / 2, W, C)`."""
        halves = x.unflatten(1, (2, -1))
        folded = self._scratch('folded', x, halves.shape)
        torch.add(*halves.unbind(1), out=folded[:, 0])
        torch.sub(*halves.unbind(1), out=folded[:, 1])
        return folded

    def _unfold(self, folded: Tensor, out: Tensor | None) -> Tensor:
        """Return what was folded, twice as large."""
        out = self._scratch('map', folded, folded.shape) if out is None else out
        halves = out.unflatten(1, (2, -1))
        even, odd = folded.view(halves.shape).unbind(1)
        torch.add(even, odd, out=halves[:, 0])
        torch.sub(even, odd, out=halves[:, 1])
        return out

    def _product(self, name: str, x: Tensor, real: Tensor, imag: Tensor, sign: int = 1) -> Tensor:
        """Multiply a spectrum by `real + sign * i * imag`."""
        x_real, x_imag = x.unbind(2)
        product = self._scratch(name, x, x.shape)
        if product is None:
            imag = sign * imag
            parts = x_real * real - x_imag * imag, x_imag * real + x_real * imag
            return torch.stack(parts, dim=2)
        torch.mul(x, real.unsqueeze(-3), out=product)
        product_real, product_imag = product.unbind(2)
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
    """Multiply the `P` matrices `(P, M, N)` in turns with the `(N, C)` of a batch.

    A single one is not copied, as `matmul` would; two are, for every image.
    """
    parts, batch = matrix.shape[0], x.shape[0]
    if parts == 1:
        matrices = matrix.expand(batch, -1, -1)
    else:
        matrices = matrix.expand(batch // parts, -1, -1, -1).flatten(0, 1)
    return torch.bmm(matrices, x, out=out)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _kept_matrices(
    size: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    # On the CPU, since not every device knows float64.
    matrices = _matrices(size, dtype, torch.device('cpu'))
    return tuple(matrix.to(device) for matrix in matrices)


def _matrices(
    size: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Return the Fourier matrices, forward along W and H, inverse along H and W, for `(H, W, P)`.

    Along W it is one that maps `W` real values to `2 * (W // 2 + 1)`, cosines first, and back.
    Along H they are `P` that map `H / P * 2` values, real and imaginary part of a row side by side
    as the first product leaves them, to `2 * H / P`, the parts apart, and back: the first of two
    for the even rows of frequencies, the second for the odd ones.
    """
    height, width, parts = size
    cosine, sine = _waves(width, device)
    cosine, sine = cosine[: width // 2 + 1], sine[: width // 2 + 1]
    forward_width = torch.cat([cosine, -sine]) / width
    columns = multiplicity(width, device)[:, None]
    inverse_width = torch.cat([columns * cosine, columns * -sine]).T
    along_width = forward_width[None], inverse_width[None]

    # Of frequency u = k * P + p, only the first H / P places: the rest repeats them, up to sign.
    cosine, sine = (
        wave[:, : height // parts].unflatten(0, (-1, parts)).transpose(0, 1)
        for wave in _waves(height, device)
    )
    real = torch.stack([cosine, sine], dim=3).flatten(2)
    imag = torch.stack([-sine, cosine], dim=3).flatten(2)
    forward_height = torch.cat([real, imag], dim=1)
    matrices = along_width[0], forward_height / height, forward_height.mT, along_width[1]
    return tuple(matrix.to(dtype).contiguous() for matrix in matrices)


def _waves(period: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of `2 pi u x / period`, for all `u` and `x`, in float64."""
    index = torch.arange(period, device=device)
    # The remainder, exact in integers, keeps angles small.
    angle = torch.outer(index, index).remainder(period).double() * (2 * math.pi / period)
    return angle.cos(), angle.sin()
