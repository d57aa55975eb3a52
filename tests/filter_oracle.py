"""The oracle of every test of the filter: its definition in float64, and direct sums.

The direct sums share no code with the package. tests/spectral/test_reference.py holds the
definition against them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gfnet_dense.spectral.reference import reference_filter

# One cell, one row, one column, non-square, even, odd.
SIZES = [(1, 1), (1, 2), (1, 7), (6, 1), (2, 2), (3, 3), (4, 6), (5, 4), (4, 7), (7, 9)]

# Largest error of result and gradients, in units of the largest value, by dtype of the map.
ERRORS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 5e-3}


class Case(NamedTuple):
    """Random inputs: a map, a spectrum of its grid, and a gradient of the result."""

    x: Tensor
    weight: Tensor
    g: Tensor


def random_case(
    size: tuple[int, int],
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    channels: int = 3,
    device: str = 'cpu',
) -> Case:
    """Draw a case; map and spectrum require gradients."""
    height, width = size
    x, g = torch.randn(2, batch, height, width, channels, dtype=torch.float64, device=device)
    weight = torch.randn(height, width // 2 + 1, channels, 2, dtype=torch.float64, device=device)
    weight = weight.to(torch.promote_types(dtype, torch.float32))
    return Case(x.to(dtype).requires_grad_(), weight.requires_grad_(), g.to(dtype))


def result_and_gradients(
    function: Callable[[Tensor, Tensor], Tensor], *case: Tensor
) -> list[Tensor]:
    """Return what a filter makes of a case: the result, and the gradients of map and spectrum."""
    x, weight, g = case
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), g)]


def expected(*case: Tensor) -> list[Tensor]:
    """Return result and gradients by definition, in float64 on the CPU."""
    x, weight, g = (t.detach().double().cpu() for t in case)
    if not len(x):  # FFT libraries refuse an empty batch
        return [x, x, torch.zeros_like(weight)]
    return result_and_gradients(reference_filter, x, weight, g)


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Compare tensors; the tolerance is in units of the largest expected value of each."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        error = (a.double().cpu() - e.cpu()).abs().max() if e.numel() else torch.zeros(())
        assert error <= tolerance * max(1e-30, e.abs().max() if e.numel() else 0)


def inverse_by_definition(spectrum: np.ndarray, width: int) -> np.ndarray:
    """Sum a half spectrum `(..., H, W // 2 + 1, C)` up to real values `(..., H, W, C)`.

    Along H this is the plain inverse sum. Along W it is a sum of cosines and sines. Frequency zero
    and Nyquist have no sine, so the imaginary parts of these columns drop out.
    """
    height, half = spectrum.shape[-3:-1]
    u, y = np.arange(height), np.arange(height)
    rows = np.exp(2j * np.pi * np.outer(y, u) / height) / height
    z = np.einsum('yu,...uvc->...yvc', rows, spectrum)
    x, v = np.arange(width), np.arange(half)
    pairs = np.where((v == 0) | (2 * v == width), 1, 2) / width
    angle = 2 * np.pi * np.outer(x, v) / width
    cosine, sine = np.cos(angle) * pairs, np.sin(angle) * pairs
    sine[:, (v == 0) | (2 * v == width)] = 0
    return np.einsum('xv,...yvc->...yxc', cosine, z.real) - np.einsum(
        'xv,...yvc->...yxc', sine, z.imag
    )


def convolve_by_definition(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve a float64 map circularly with the kernel of `weight`, one tap at a time."""
    kernel = inverse_by_definition(torch.view_as_complex(weight.detach()).numpy(), x.shape[2])
    result = torch.zeros_like(x)
    for p, q in np.ndindex(kernel.shape[:2]):
        result += torch.from_numpy(kernel[p, q]) * x.roll((p, q), dims=(1, 2))
    return result
