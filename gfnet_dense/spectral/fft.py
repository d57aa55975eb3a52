"""The global filter by `torch.fft`: the reference that other backends are held against."""

import torch
from torch import Tensor

from .blockwise import Transform, filter_map, multiplicity
from .resize import hermitian_part


def fft_filter(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`gfnet_dense.spectral.global_filter`."""
    return filter_map(_Fft, x, weight)


class _Fft(Transform):
    """`torch.fft`; spectra are complex, `(B, C, H, W // 2 + 1)`, without any normalisation.

    FFT libraries want planes that lie in one piece. One copy per direction is what this costs;
    multiplying in that layout, too, saves walking two layouts at once.
    """

    def kernel(self, weight: Tensor, conjugate: bool = False) -> Tensor:
        weight = hermitian_part(weight.to(self.dtype), self.width) / (self.height * self.width)
        kernel = torch.view_as_complex(weight.contiguous()).permute(2, 0, 1).contiguous()
        return kernel.conj_physical() if conjugate else kernel

    def _forward(self, x: Tensor, keep: bool) -> Tensor:
        return torch.fft.rfft2(x.permute(0, 3, 1, 2))

    def multiply(self, spectrum: Tensor, kernel: Tensor) -> Tensor:
        return spectrum * kernel

    def _inverse(self, spectrum: Tensor, out: Tensor | None) -> Tensor:
        x = torch.fft.irfft2(spectrum, s=(self.height, self.width), norm='forward')
        return x.permute(0, 2, 3, 1)

    def correlate(self, g: Tensor, x: Tensor) -> Tensor:
        return (g * x.conj()).sum(0)

    def _gradient(self, correlation: Tensor) -> Tensor:
        columns = multiplicity(self.width, correlation.device).to(self.dtype)
        correlation = correlation * (columns / (self.height * self.width))
        return torch.view_as_real(correlation.permute(1, 2, 0))
