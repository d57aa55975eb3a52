"""The definition of the global filter. Read this first.

A global filter is a depthwise circular convolution whose kernel is as large as the map. It
multiplies the spectrum of every channel by a learned one (section 3 of arXiv 2107.00645):

    x (B, H, W, C)  -- F -->  spectrum (B, H, W // 2 + 1, C)  -- . K, F^-1 -->  y (B, H, W, C)

Tests use this function in float64 as their oracle. Benchmarks use it as their baseline.
"""

import torch
from torch import Tensor


def reference_filter(x: Tensor, weight: Tensor) -> Tensor:
    """Filter a map with a learned spectrum, by definition; autograd finds the gradients.

    The two transforms are an orthonormal pair (factor `1 / sqrt(H * W)` each), so `weight` is the
    frequency response itself: a spectrum of ones returns the map.

    Columns 0 and, for even W, W // 2 of `weight` hold both entries of each conjugate pair. Only
    their Hermitian part acts (:func:`gfnet_dense.spectral.hermitian_part`), because the inverse
    real transform ignores the rest.

    Args:
        x: Map of shape `(B, H, W, C)`, B > 0. It is computed in float32, or in float64 if it is
            float64, and returned in its own shape and dtype.
        weight: Spectrum of shape `(H, W // 2 + 1, C, 2)`, real and imaginary part; float32 or
            float64.
    """
    spectrum = torch.fft.rfft2(x.to(compute_dtype(x)), dim=(1, 2), norm='ortho')
    spectrum = spectrum * torch.view_as_complex(weight.contiguous())
    y = torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2), norm='ortho')
    return y.to(x.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a map is computed in: float64 for float64, float32 for any other.

    Half-precision FFTs overflow and need powers of two. The official layer runs in float32 too.
    """
    return torch.promote_types(x.dtype, torch.float32)
