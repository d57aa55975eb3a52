"""The operator against direct sums, numbers of the official code, and its own mathematics."""

import logging
import shutil

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from filter_oracle import SIZES, convolve_by_definition, inverse_by_definition, random_case
from hypothesis import given, settings
from torch import Tensor

from gfnet_dense import spectral
from gfnet_dense.spectral import (
    BACKENDS,
    global_filter,
    hermitian_part,
    resize_spectrum,
    unsupported_reason,
)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='needs a C++ compiler'
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def random_map_and_spectrum(*args, **kwargs) -> list[Tensor]:
    x, weight, _ = (t.detach() for t in random_case(*args, **kwargs))
    return [x, weight]


@pytest.mark.parametrize('case', ['native', 'larger', 'odd', 'smaller', 'wide'])
def test_agrees_with_the_official_layer(golden, relative_error, case):
    numbers = golden('filter')
    weight, x = numbers[f'{case}.weight'], numbers[f'{case}.input']
    grid = (weight.shape[0], weight.shape[0])
    weight = resize_spectrum(weight, grid, x.shape[1:3], 'bilinear')
    y = global_filter(x, weight)
    assert y.dtype == torch.float64
    assert relative_error(y, numbers[f'{case}.output']) < 1e-12


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_is_a_circular_convolution(relative_error, size, backend):
    x, weight = random_map_and_spectrum(size)
    y = global_filter(x, weight, backend)
    assert relative_error(y, convolve_by_definition(x, weight)) < 1e-12


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_a_spectrum_that_is_not_hermitian(relative_error, size):
    """Inverse along H, drop the imaginary parts of the zero and Nyquist columns, then along W."""
    x, weight = random_map_and_spectrum(size)
    spectrum = np.fft.rfft2(x.numpy(), axes=(1, 2)) * torch.view_as_complex(weight).numpy()
    expected = torch.from_numpy(inverse_by_definition(spectrum, size[1]))
    assert relative_error(global_filter(x, weight), expected) < 1e-12


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_hermitian_part_is_what_acts(relative_error, size):
    x, weight = random_map_and_spectrum(size)
    part = hermitian_part(weight, size[1])
    kernel = inverse_by_definition(torch.view_as_complex(weight).numpy(), size[1])
    spectrum = torch.from_numpy(np.fft.rfft2(kernel, axes=(0, 1)))
    assert relative_error(torch.view_as_complex(part.contiguous()), spectrum) < 1e-12
    torch.testing.assert_close(hermitian_part(part, size[1]), part, rtol=0, atol=1e-15)
    rest = global_filter(x, weight - part)
    assert rest.abs().max() < 1e-12


@settings(max_examples=50)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.integers(1, 3),
    shift=st.tuples(st.integers(-50, 50), st.integers(-50, 50)),
    factor=st.floats(-10, 10),
    seed=st.integers(0, 2**31),
)
def test_is_linear_and_commutes_with_shifts(height, width, channels, shift, factor, seed):
    torch.manual_seed(seed)
    x, weight = random_map_and_spectrum((height, width), batch=2, channels=channels)
    first, second = x[:1], x[1:]
    y = global_filter(x, weight)
    close = {'rtol': 0, 'atol': 1e-11 * max(1, y.abs().max().item())}

    combined = global_filter(first + factor * second, weight)
    torch.testing.assert_close(combined, y[:1] + factor * y[1:], **close)

    shifted = global_filter(x.roll(shift, dims=(1, 2)), weight)
    torch.testing.assert_close(shifted, y.roll(shift, dims=(1, 2)), **close)

    # Frequency zero passes with its own real factor.
    torch.testing.assert_close(y.sum((1, 2)), x.sum((1, 2)) * weight[0, 0, :, 0], **close)

    ones = torch.zeros_like(weight)
    ones[..., 0] = 1
    torch.testing.assert_close(global_filter(x, ones), x, **close)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('autocast', [None, torch.bfloat16, torch.float16])
def test_16_bit_maps_are_filtered_in_float32(dtype, autocast):
    x, weight = random_map_and_spectrum((14, 9))
    x = x.to(dtype)
    with torch.autocast('cpu', autocast, enabled=autocast is not None):
        y = global_filter(x, weight.float())
    assert y.dtype == dtype
    expected = convolve_by_definition(x.double(), weight)
    # No more than the result's own rounding, and that of float32.
    rounding = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-6 * expected.abs().max()
    assert ((y.double() - expected).abs() <= rounding).all()


@pytest.mark.parametrize('autocast', [torch.bfloat16, torch.float16])
def test_float32_stays_float32_under_autocast(relative_error, autocast):
    x, weight = random_map_and_spectrum((14, 9))
    with torch.autocast('cpu', autocast):
        y = global_filter(x.float(), weight.float())
    assert y.dtype == torch.float32
    assert relative_error(y.double(), convolve_by_definition(x, weight)) < 1e-6


def test_a_spectrum_beyond_the_range_of_float16():
    x = torch.full((1, 32, 32, 2), 1000.0, dtype=torch.float16)  # their sum is 1,024,000
    weight = torch.zeros(32, 17, 2, 2)
    weight[..., 0] = 1
    torch.testing.assert_close(global_filter(x, weight), x)


@pytest.mark.parametrize('weight_dtype', [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_dtypes_of_result_and_gradients_are_those_of_the_inputs(dtype, weight_dtype):
    x, weight = random_map_and_spectrum((4, 6))
    x, weight = x.to(dtype).requires_grad_(), weight.to(weight_dtype).requires_grad_()
    y = global_filter(x, weight)
    assert y.dtype == dtype
    y.sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (dtype, weight_dtype)


def test_an_empty_batch_gives_an_empty_batch():
    x = torch.zeros(0, 4, 5, 2, requires_grad=True)
    weight = torch.randn(4, 3, 2, 2, requires_grad=True)
    y = global_filter(x, weight)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad is None or not weight.grad.any()


def test_strides_do_not_matter_and_inputs_are_left_alone():
    x, weight = random_map_and_spectrum((6, 8))
    expected = global_filter(x, weight)
    strided_x = [
        x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        x.repeat_interleave(2, dim=2)[:, :, ::2],
        x.transpose(0, 3).contiguous().transpose(0, 3),
    ]
    strided_weight = [
        weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        weight.repeat_interleave(2, dim=0)[::2],
    ]
    for a in strided_x:
        for b in strided_weight:
            assert not a.is_contiguous()
            assert not b.is_contiguous()
            copies = a.clone(), b.clone()
            torch.testing.assert_close(global_filter(a, b), expected, rtol=0, atol=1e-12)
            assert torch.equal(a, copies[0])
            assert torch.equal(b, copies[1])
    one = x[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(global_filter(one, weight)[2], expected[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize('backend', BACKENDS)
def test_a_spectrum_may_begin_anywhere_in_memory(backend):
    """As a part of one long vector of parameters, after an odd number of others."""
    x, weight = random_map_and_spectrum((6, 8))
    vector = torch.cat([torch.zeros(3), weight.flatten()])
    part = vector[3:].view(weight.shape)
    assert part.storage_offset() % 2 == 1
    expected = global_filter(x, weight, backend)
    torch.testing.assert_close(global_filter(x, part, backend), expected, rtol=0, atol=1e-12)


@needs_gpu
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_every_device_computes_the_same(relative_error, size):
    x, weight = random_map_and_spectrum(size)
    y = global_filter(x.cuda(), weight.cuda())
    assert y.is_cuda
    assert relative_error(y.cpu(), global_filter(x, weight)) < 1e-12


@pytest.mark.parametrize(
    ('x', 'weight', 'error', 'message'),
    [
        (torch.zeros(1, 4, 4, 2, dtype=torch.int64), None, TypeError, 'torch.int64'),
        (torch.zeros(1, 4, 4, 2, dtype=torch.complex64), None, TypeError, 'torch.complex64'),
        (None, torch.zeros(4, 3, 2, dtype=torch.complex64), TypeError, 'torch.complex64'),
        (None, torch.zeros(4, 3, 2, 2, dtype=torch.int32), TypeError, 'torch.int32'),
        (torch.zeros(4, 4, 2), None, ValueError, r'\(B, H, W, C\), but got \(4, 4, 2\)'),
        (torch.zeros(1, 0, 4, 2), None, ValueError, r'but got \(1, 0, 4, 2\)'),
        (torch.zeros(1, 4, 4, 0), None, ValueError, r'but got \(1, 4, 4, 0\)'),
        (torch.zeros(1, 5, 4, 2), None, ValueError, r'\(5, 3, 2, 2\), but got \(4, 3, 2, 2\)'),
        (torch.zeros(1, 4, 6, 2), None, ValueError, r'\(4, 4, 2, 2\), but got \(4, 3, 2, 2\)'),
        (torch.zeros(1, 4, 4, 1), None, ValueError, r'\(4, 3, 1, 2\), but got \(4, 3, 2, 2\)'),
        (None, torch.zeros(4, 3, 2), ValueError, r'\(4, 3, 2, 2\), but got \(4, 3, 2\)'),
        (None, torch.zeros(4, 3, 2, 2, device='meta'), ValueError, 'cpu.*meta'),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, error, message):
    x = torch.zeros(1, 4, 4, 2) if x is None else x
    weight = torch.zeros(4, 3, 2, 2) if weight is None else weight
    with pytest.raises(error, match=message):
        global_filter(x, weight)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match='cufft') as e:
        global_filter(torch.zeros(1, 4, 4, 2), torch.zeros(4, 3, 2, 2), 'cufft')
    assert {'auto', 'fft'} <= set(BACKENDS)
    assert all(name in str(e.value) for name in BACKENDS)


@pytest.mark.parametrize(
    ('size', 'choice'),
    [((14, 14), 'dense'), ((64, 64), 'fft'), ((67, 67), 'dense'), ((100, 168), 'fft')],
    ids=str,
)
def test_auto_without_a_compiler(size, choice, monkeypatch, caplog):
    spectral._log_once.cache_clear()
    monkeypatch.setattr(spectral.native, 'unsupported_reason', lambda x: 'it needs a C++ compiler')
    x, weight = random_map_and_spectrum(size, torch.float32)
    results = {backend: global_filter(x, weight, backend) for backend in ('auto', 'dense', 'fft')}
    assert torch.equal(results['auto'], results[choice])
    assert not torch.equal(results['dense'], results['fft'])
    global_filter(x, weight)
    said = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in said] == [
        'filters take several times as long without C++: it needs a C++ compiler'
    ]


@needs_compiler
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_auto_on_a_cpu_with_a_compiler(dtype):
    x, weight = random_map_and_spectrum((9, 10), dtype)
    weight = weight.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(global_filter(x, weight), global_filter(x, weight, 'native'))
    assert unsupported_reason(x, 'native') is None


def test_an_unsupported_map_falls_back_and_says_so_once(caplog):
    spectral._log_once.cache_clear()
    x, weight = torch.randn(2, 4, 6, 3), torch.randn(4, 4, 3, 2)
    assert 'torch.float32' in unsupported_reason(x, 'fused')
    with caplog.at_level(logging.INFO, spectral.__name__):
        y, _ = (global_filter(x, weight, 'fused') for _ in range(2))
    assert torch.equal(y, global_filter(x, weight))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "'fused'" in record.message
    assert 'float32' in record.message
