"""The model of the folded transform against the definition, and its parts against direct sums."""

import hypothesis.strategies as st
import pytest
import torch
from filter_oracle import assert_near, random_case
from hypothesis import given, settings

from gfnet_dense.spectral.cuda.folded import folded_filter, restore, transform
from gfnet_dense.spectral.reference import reference_filter

sides = st.integers(1, 20)


@settings(max_examples=60)
@given(height=sides, width=sides, seed=st.integers(0, 2**31))
def test_filters_by_definition(height, width, seed):
    torch.manual_seed(seed)
    x, weight, _ = (t.detach() for t in random_case((height, width)))
    assert_near([folded_filter(x, weight)], [reference_filter(x, weight)], 1e-12)


@pytest.mark.parametrize('size', [1, 2, 5, 6])
def test_coefficients_are_the_spectrum_with_the_origin_at_the_centre(size):
    x = torch.randn(3, size, dtype=torch.float64)
    cosine, sine = transform(x)
    slot, cell = torch.arange((size + 1) // 2), torch.arange(size).double()
    place = 2 * torch.pi * (cell - (size - 1) / 2) / size
    assert_near([cosine], [x @ torch.outer(place, slot.double()).cos()], 1e-12)
    assert_near([sine[:, 1:]], [x @ torch.outer(place, slot[1:].double()).sin()], 1e-12)
    nyquist = torch.fft.fft(x)[:, size // 2].abs() if size % 2 == 0 else torch.zeros(3)
    torch.testing.assert_close(sine[:, 0].abs(), nyquist.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize('size', [1, 2, 5, 6])
def test_the_way_back_is_the_transpose(size):
    x = torch.randn(3, size, dtype=torch.float64)
    cosine, sine = transform(x)
    other_cosine, other_sine = torch.randn(2, *cosine.shape, dtype=torch.float64)
    product = (cosine * other_cosine + sine * other_sine).sum()
    torch.testing.assert_close(product, (x * restore(other_cosine, other_sine, size)).sum())
