"""Resized spectra and position embeddings against plain transcriptions of what each one keeps."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from gfnet_dense.spectral import (
    RESIZE_METHODS,
    global_filter,
    hermitian_part,
    resize_position_embedding,
    resize_spectrum,
)

# From, to: larger, smaller, mixed, odd, non-square, one cell a side.
RESIZES = [
    ((4, 4), (8, 8)),
    ((8, 6), (5, 10)),
    ((5, 7), (9, 6)),
    ((6, 5), (3, 11)),
    ((9, 9), (4, 4)),
    ((7, 8), (7, 9)),
    ((8, 9), (12, 9)),
    ((1, 1), (3, 4)),
    ((2, 3), (1, 1)),
    ((1, 6), (5, 1)),
    ((14, 14), (25, 42)),
]
resizes = pytest.mark.parametrize(('grid', 'size'), RESIZES, ids=str)
methods = pytest.mark.parametrize('method', RESIZE_METHODS)


def random_spectrum(grid: tuple[int, int], channels: int = 2) -> Tensor:
    return torch.randn(grid[0], grid[1] // 2 + 1, channels, 2, dtype=torch.float64)


def kernel_of(weight: Tensor, width: int) -> np.ndarray:
    """Return the kernel `(h, w, C)` that a spectrum stands for."""
    # numpy's inverse drops the imaginary parts that have no meaning, as the operator defines it.
    rows = np.fft.ifft(torch.view_as_complex(weight.contiguous()).numpy(), axis=0)
    return np.fft.irfft(rows, n=width, axis=1)


def response_of(weight: Tensor, width: int) -> np.ndarray:
    """Return the frequency response `(h, w, C)` of a spectrum, all frequencies of it."""
    return np.fft.fft2(kernel_of(weight, width), axes=(0, 1))


def signed(index: int, period: int) -> int:
    """Return the place of an entry of a circular axis beside the origin, -n/2 to (n-1)/2."""
    return index if index <= (period - 1) // 2 else index - period


def hat(t: np.ndarray) -> np.ndarray:
    return np.maximum(0, 1 - np.abs(t))


def cubic(t: np.ndarray, a: float = -0.75) -> np.ndarray:
    t = np.abs(t)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


def sampling_matrix(old: int, new: int, kernel, corners: bool) -> np.ndarray:
    """Return the matrix `(new, old)` of an image resize along one axis, edges replicated."""
    i = np.arange(new)
    if corners:
        place = i * (old - 1) / (new - 1) if new > 1 else np.zeros(1)
    else:
        place = (i + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for tap in range(-3, old + 3):
        matrix[:, min(max(tap, 0), old - 1)] += kernel(place - tap)
    return matrix


@resizes
@pytest.mark.parametrize(('method', 'kernel'), [('bilinear', hat), ('bicubic', cubic)])
def test_official_methods_resize_real_and_imaginary_part_as_images(grid, size, method, kernel):
    weight = random_spectrum(grid)
    rows = sampling_matrix(grid[0], size[0], kernel, corners=True)
    columns = sampling_matrix(grid[1] // 2 + 1, size[1] // 2 + 1, kernel, corners=True)
    expected = np.einsum('Uu,Vv,uvcr->UVcr', rows, columns, weight.numpy())
    resized = resize_spectrum(weight, grid, size, method)
    np.testing.assert_allclose(resized.numpy(), expected, rtol=0, atol=1e-12)


def test_bilinear_is_the_default():
    weight = random_spectrum((4, 4))
    default = resize_spectrum(weight, (4, 4), (6, 6))
    assert torch.equal(default, resize_spectrum(weight, (4, 4), (6, 6), 'bilinear'))


@methods
@pytest.mark.parametrize('grid', [(1, 1), (4, 4), (5, 7), (3, 8)], ids=str)
def test_the_same_grid_changes_nothing(grid, method):
    weight = random_spectrum(grid)
    assert torch.equal(resize_spectrum(weight, grid, grid, method), weight)


@resizes
def test_centered_interpolates_the_frequency_response(grid, size):
    weight = hermitian_part(random_spectrum(grid), grid[1])
    expected = response_of(weight, grid[1])
    for axis, (old, new) in enumerate(zip(grid, size, strict=True)):
        place = np.array([Fraction(signed(i, new) * old, new) for i in range(new)])
        below = np.array([p.__floor__() for p in place])
        above = np.take(expected, (below + 1) % old, axis)
        part = (place - below).astype(float).reshape([-1 if a == axis else 1 for a in range(3)])
        expected = (1 - part) * np.take(expected, below % old, axis) + part * above
    resized = resize_spectrum(weight, grid, size, 'centered')
    np.testing.assert_allclose(response_of(resized, size[1]), expected, rtol=0, atol=1e-12)


@resizes
def test_centered_is_exact_at_every_shared_frequency(grid, size):
    weight = random_spectrum(grid)
    before = response_of(weight, grid[1])
    after = response_of(resize_spectrum(weight, grid, size, 'centered'), size[1])
    old, new = (
        {
            (Fraction(u, g[0]) % 1, Fraction(v, g[1]) % 1): (u, v)
            for u in range(g[0])
            for v in range(g[1])
        }
        for g in (grid, size)
    )
    shared = old.keys() & new.keys()
    assert (0, 0) in shared
    for frequency in shared:
        np.testing.assert_allclose(after[new[frequency]], before[old[frequency]], atol=1e-12)


@resizes
def test_spatial_pads_or_crops_the_kernel(grid, size):
    weight = random_spectrum(grid)
    kernel = kernel_of(weight, grid[1])
    expected = np.zeros((*size, 2))
    for i, j in np.ndindex(*size):
        p, q = signed(i, size[0]), signed(j, size[1])
        inside = [-(n // 2) <= tap <= (n - 1) // 2 for tap, n in zip((p, q), grid, strict=True)]
        if all(inside):
            expected[i, j] = kernel[p, q]
    resized = resize_spectrum(weight, grid, size, 'spatial')
    np.testing.assert_allclose(kernel_of(resized, size[1]), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ('grid', 'size'), [((4, 4), (8, 8)), ((5, 6), (8, 7)), ((3, 3), (3, 4))], ids=str
)
def test_spatial_growing_and_coming_back_is_the_same_operator(grid, size):
    weight = random_spectrum(grid)
    grown = resize_spectrum(weight, grid, size, 'spatial')
    back = resize_spectrum(grown, size, grid, 'spatial')
    torch.testing.assert_close(back, hermitian_part(weight, grid[1]), rtol=0, atol=1e-13)


@pytest.mark.parametrize('size', [(20, 31), (13, 13), (12, 25)], ids=str)
def test_spatial_sees_the_same_scene_on_a_larger_map(size):
    """Where nothing comes near a border, the size of the map does not show."""
    grid = (12, 13)
    kernel = np.zeros((*grid, 2))
    for p, q in np.ndindex(5, 5):
        kernel[p - 2, q - 2] = np.random.default_rng(5 * p + q).normal(size=2)
    weight = torch.view_as_real(torch.from_numpy(np.fft.rfft2(kernel, axes=(0, 1))))
    x = torch.zeros(1, *grid, 2, dtype=torch.float64)
    x[:, 3:9, 3:9] = torch.randn(1, 6, 6, 2)
    larger = torch.zeros(1, *size, 2, dtype=torch.float64)
    larger[:, : grid[0], : grid[1]] = x
    y = global_filter(larger, resize_spectrum(weight, grid, size, 'spatial'))
    expected = torch.zeros_like(larger)
    expected[:, : grid[0], : grid[1]] = global_filter(x, weight)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)


@resizes
@pytest.mark.parametrize('method', ['centered', 'spatial'])
def test_the_resized_operator_depends_on_the_operator_alone(grid, size, method):
    """Entries that never acted on a map, as a learned spectrum has them, must not start to."""
    weight = random_spectrum(grid)
    first = resize_spectrum(weight, grid, size, method)
    second = resize_spectrum(hermitian_part(weight, grid[1]), grid, size, method)
    np.testing.assert_allclose(
        kernel_of(first, size[1]), kernel_of(second, size[1]), rtol=0, atol=1e-12
    )


@methods
@pytest.mark.parametrize('size', [(4, 5), (2, 2), (3, 4)], ids=str)
def test_derivatives(method, size):
    weight = random_spectrum((3, 4), channels=1).requires_grad_()
    assert gradcheck(lambda w: resize_spectrum(w, (3, 4), size, method), (weight,))


@methods
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_stays(method, dtype):
    weight = random_spectrum((4, 6))
    resized = resize_spectrum(weight.to(dtype), (4, 6), (7, 5), method)
    assert resized.dtype == dtype
    expected = resize_spectrum(weight, (4, 6), (7, 5), method)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(resized.double(), expected, rtol=tolerance, atol=3 * tolerance)


@methods
def test_the_learned_spectrum_is_left_alone(method):
    weight = random_spectrum((4, 6))
    before = weight.clone()
    resize_spectrum(weight, (4, 6), (7, 5), method).mul_(2)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ('weight', 'arguments', 'message'),
    [
        (torch.zeros(4, 3, 2, 2), ((5, 4), (8, 8)), r"\(5, 3, 'C', 2\), but got \(4, 3, 2, 2\)"),
        (torch.zeros(4, 3, 2, 2), ((4, 6), (8, 8)), r"\(4, 4, 'C', 2\), but got \(4, 3, 2, 2\)"),
        (torch.zeros(4, 3, 2), ((4, 4), (8, 8)), r'but got \(4, 3, 2\)'),
        (torch.zeros(4, 3, 2, 3), ((4, 4), (8, 8)), r'but got \(4, 3, 2, 3\)'),
        (torch.zeros(4, 3, 2, 2), ((4, 4), (0, 8)), r'at least one cell a side.*\(0, 8\)'),
        (torch.zeros(4, 3, 2, 2), ((4, 4), (8, -1)), r'\(8, -1\)'),
        (torch.zeros(4, 3, 2, 2), ((4, 4), (8, 8), 'nearest'), "'nearest'.*bilinear.*spatial"),
        (torch.zeros(4, 3, 2, 2), ((4, 4), (4, 4), 'nearest'), "'nearest'.*centered"),
    ],
)
def test_what_does_not_fit_is_refused(weight, arguments, message):
    with pytest.raises(ValueError, match=message):
        resize_spectrum(weight, *arguments)


def test_the_four_methods():
    assert RESIZE_METHODS == ('bilinear', 'bicubic', 'centered', 'spatial')


@resizes
def test_position_embedding_is_resized_bicubically(grid, size):
    embedding = torch.randn(1, grid[0] * grid[1], 3, dtype=torch.float64)
    rows, columns = (
        sampling_matrix(old, new, cubic, corners=False) for old, new in zip(grid, size, strict=True)
    )
    expected = np.einsum(
        'Hh,Ww,hwc->HWc', rows, columns, embedding.numpy().reshape(*grid, 3)
    ).reshape(1, -1, 3)
    resized = resize_position_embedding(embedding, grid, size)
    np.testing.assert_allclose(resized.numpy(), expected, rtol=0, atol=1e-12)


def test_position_embedding_stays_on_its_grid_and_learns_on_others():
    embedding = torch.randn(1, 12, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(resize_position_embedding(embedding, (3, 4), (3, 4)), embedding)
    # As many cells, but not the same grid.
    assert not torch.equal(resize_position_embedding(embedding, (3, 4), (4, 3)), embedding)
    assert gradcheck(lambda e: resize_position_embedding(e, (3, 4), (5, 7)), (embedding,))
