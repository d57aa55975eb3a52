"""The global filter by `torch.fft`: the reference that other backends are held against."""

import torch
from torch import Tensor

from .resize import hermitian_part


def fft_filter(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`gfnet_dense.spectral.global_filter`."""
    height, width = x.shape[1:3]
    # Half-precision FFTs need powers of two and overflow; the official layer runs in float32 too.
    dtype = torch.promote_types(x.dtype, torch.float32)
    kernel = torch.view_as_complex(hermitian_part(weight.to(dtype), width).contiguous())
    # Any normalisation cancels between the two transforms; the default has one pass less
    # than the official 'ortho'.
    spectrum = torch.fft.rfft2(x.to(dtype), dim=(1, 2))
    y = torch.fft.irfft2(spectrum * kernel, s=(height, width), dim=(1, 2))
    return y.to(x.dtype)
