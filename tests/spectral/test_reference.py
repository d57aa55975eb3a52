"""The definition against direct sums."""

import numpy as np
import pytest
import torch
from filter_oracle import (
    SIZES,
    assert_near,
    convolve_by_definition,
    inverse_by_definition,
    random_case,
)
from torch.autograd import gradcheck

from gfnet_dense.spectral.reference import reference_filter

sizes = pytest.mark.parametrize('size', SIZES, ids=str)


@sizes
def test_is_a_circular_convolution(size):
    x, weight, _ = (t.detach() for t in random_case(size))
    assert_near([reference_filter(x, weight)], [convolve_by_definition(x, weight)], 1e-12)


@sizes
def test_a_spectrum_that_is_not_hermitian(size):
    """Inverse along H, drop the imaginary parts of the zero and Nyquist columns, then along W."""
    x, weight, _ = (t.detach() for t in random_case(size))
    spectrum = np.fft.rfft2(x.numpy(), axes=(1, 2)) * torch.view_as_complex(weight).numpy()
    y = torch.from_numpy(inverse_by_definition(spectrum, size[1]))
    assert_near([reference_filter(x, weight)], [y], 1e-12)


@pytest.mark.parametrize('size', [(1, 1), (3, 2), (2, 3), (4, 4)], ids=str)
def test_gradients(size):
    x, weight, _ = random_case(size, channels=1)
    assert gradcheck(reference_filter, (x, weight))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_is_computed_in_float32_and_returned_in_the_dtype_of_the_map(dtype):
    x, weight, _ = (t.detach() for t in random_case((14, 9), dtype))
    y = reference_filter(x, weight)
    assert y.dtype == dtype
    exact = convolve_by_definition(x.double(), weight.double())
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * exact.abs().max()
    assert ((y.double() - exact).abs() <= rounding).all()
