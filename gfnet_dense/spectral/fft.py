"""The global filter by `torch.fft`, with closed-form gradients in real transforms.

Spectra are complex, `(B, C, H, W // 2 + 1)`. FFT libraries need every plane in one piece, so each
direction costs one copy, and products stay in that layout. Conjugates are computed at once: within
an operator that a compiled graph calls, torch 2.12 ignores lazy ones.
"""

import torch
from torch import Tensor

from .reference import compute_dtype
from .resize import hermitian_part
from .tracing import is_capturing


def unsupported_reason(x: Tensor) -> None:
    """Return None: `torch.fft` takes every map."""


def filter(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    return _map(_spectrum(x) * _kernel(weight, x, conjugate), x)


def correlate(g: Tensor, x: Tensor) -> Tensor:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    return _gradient(_spectrum(g), _spectrum(x), x)


def adjoint(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    spectrum = _spectrum(g)
    return _map(spectrum * _kernel(weight, x, True), x), _gradient(spectrum, _spectrum(x), x)


def _unit(x: Tensor) -> int:
    """Return what maps are divided by: bfloat16 has the range of float32, so sums may overflow."""
    return x.shape[1] * x.shape[2] if x.dtype == torch.bfloat16 else 1


def _spectrum(x: Tensor) -> Tensor:
    """Transform a map; the spectrum is divided by the unit of the map."""
    planes = x.permute(0, 3, 1, 2).to(compute_dtype(x)).contiguous()
    return torch.fft.rfft2(planes if _unit(x) == 1 else planes / _unit(x))


def _kernel(weight: Tensor, x: Tensor, conjugate: bool) -> Tensor:
    """Return a spectrum as factor `(C, H, W // 2 + 1)`, divided by H * W."""
    _, height, width, _ = x.shape
    if is_capturing():  # exported graphs cannot differentiate what is written into complex tensors
        weight = hermitian_part(weight, width)
    kernel = torch.complex(*weight.permute(3, 2, 0, 1).unbind())
    kernel = (kernel / (height * width)).contiguous()
    if not is_capturing():  # the Hermitian part in place, in fewer operators
        own = _own_mirrors(kernel, width)
        own.copy_((own + own.flip(1).roll(1, 1).conj_physical()) / 2)
    return kernel.conj_physical() if conjugate else kernel


def _own_mirrors(spectrum: Tensor, width: int) -> Tensor:
    """Return the columns `(C, H, 1 or 2)` that are their own mirror images: zero and Nyquist."""
    return spectrum[..., :: width // 2] if width % 2 == 0 else spectrum[..., :1]


def _map(spectrum: Tensor, like: Tensor) -> Tensor:
    """Transform a spectrum back to a map."""
    planes = torch.fft.irfft2(spectrum, s=like.shape[1:3], norm='forward')
    y = planes if _unit(like) == 1 else planes * _unit(like)
    return y.permute(0, 2, 3, 1).to(like.dtype).contiguous()


def _gradient(g: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """Return the gradient of the weight from the spectra of gradient and map."""
    _, height, width, _ = like.shape
    correlation = (g * x.conj_physical()).sum(0) * (2 * _unit(like) ** 2 / (height * width))
    _own_mirrors(correlation, width).mul_(0.5)
    return torch.view_as_real(correlation.permute(1, 2, 0).contiguous())
