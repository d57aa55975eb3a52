"""Every backend against float64 `torch.fft` and a naive convolution, for any map there may be."""

import functools
import re

import hypothesis.strategies as st
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jvp, vjp, vmap

from gfnet_dense.spectral import BACKENDS, dense, global_filter, hermitian_part

DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]
ERRORS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 5e-3}

# Where there is no GPU, 'fused' is 'auto'; test_fused.py runs its kernels there.
backends = pytest.mark.parametrize(
    'backend', [b for b in BACKENDS if b != 'fused' or torch.cuda.is_available()]
)
devices = pytest.mark.parametrize('device', DEVICES)


@st.composite
def sizes(draw) -> tuple[int, int]:
    """Draw sides of 1 to 70 cells, the cheap ones more often."""
    side = st.one_of(st.integers(1, 16), st.integers(1, 70))
    return draw(side), draw(side)


def strided(tensor: Tensor, layout: str) -> Tensor:
    """Return the same values with other strides."""
    if layout == 'channels first':
        return tensor.movedim(-1, 1).contiguous().movedim(1, -1)
    if layout == 'every other':
        return tensor.repeat_interleave(2, dim=-2)[..., ::2, :]
    return tensor


def reference(x: Tensor, weight: Tensor, g: Tensor) -> list[Tensor]:
    """Return the result and both gradients in float64, by autograd of `torch.fft`."""
    if not len(x):  # which FFT libraries refuse
        return [x.double(), x.double(), torch.zeros_like(weight, dtype=torch.float64)]
    x, weight = (t.detach().double().cpu().requires_grad_() for t in (x, weight))
    kernel = torch.view_as_complex(hermitian_part(weight, x.shape[2]).contiguous())
    spectrum = torch.fft.rfft2(x, dim=(1, 2)) * kernel
    y = torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2))
    return [y.detach(), *torch.autograd.grad(y, (x, weight), g.double().cpu())]


def filter_and_gradients(x: Tensor, weight: Tensor, g: Tensor, backend: str) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = global_filter(x, weight, backend)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), g)]


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        error = (a.double().cpu() - e).abs().max() if e.numel() else torch.zeros(())
        assert error <= tolerance * max(1e-30, e.abs().max() if e.numel() else 0)


@pytest.mark.timeout(3600)  # on a GPU kernels are compiled for every class of sizes
@devices
@backends
@settings(max_examples=150)
@given(
    size=sizes(),
    channels=st.one_of(st.integers(1, 4), st.integers(1, 100)),
    batch=st.integers(0, 5),
    dtype=st.sampled_from(list(ERRORS)),
    layouts=st.tuples(*[st.sampled_from(['dense', 'channels first', 'every other'])] * 3),
    seed=st.integers(0, 2**31),
)
def test_result_and_gradients(
    device, backend, size, channels, batch, dtype, layouts, seed
):
    (height, width), generator = size, torch.Generator().manual_seed(seed)
    shapes = (batch, height, width, channels), (height, width // 2 + 1, channels, 2)
    x, weight, g = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (*shapes, shapes[0])
    )
    weight_dtype = torch.promote_types(dtype, torch.float32)
    weight = strided(weight.to(device, weight_dtype), layouts[1])
    x, g = strided(x.to(device, dtype), layouts[0]), strided(g.to(device, dtype), layouts[2])
    # The smaller block cuts maps of this size into parts, channels included.
    with pytest.MonkeyPatch.context() as patch:
        actual = filter_and_gradients(x, weight, g, backend)
        assert [t.dtype for t in actual] == [dtype, dtype, weight_dtype]
        assert_near(actual, reference(x, weight, g), ERRORS[dtype])
        again = filter_and_gradients(x, weight, g, backend)
        assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
        with torch.no_grad():
            assert torch.equal(global_filter(x, weight, backend), actual[0])


@backends
@settings(max_examples=40)
@given(
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    channels=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_is_a_circular_convolution(backend, height, width, channels, seed):
    """Any real kernel, as a spectrum by explicit sums, one tap at a time."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(height, width, channels, generator=generator, dtype=torch.float64)
    x = torch.randn(2, height, width, channels, generator=generator, dtype=torch.float64)
    weight = torch.zeros(height, width // 2 + 1, channels, 2, dtype=torch.float64)
    expected = torch.zeros_like(x)
    u = torch.arange(height, dtype=torch.float64)[:, None, None]
    v = torch.arange(width // 2 + 1, dtype=torch.float64)[:, None]
    for p in range(height):
        for q in range(width):
            angle = 2 * torch.pi * (u * p / height + v * q / width)
            weight += kernel[p, q][:, None] * torch.stack([angle.cos(), -angle.sin()], -1)
            expected += kernel[p, q] * x.roll((p, q), dims=(1, 2))
    assert_near([global_filter(x, weight, backend)], [expected], 1e-12)


@backends
@pytest.mark.parametrize('size', [(1, 1), (3, 2), (2, 3), (4, 4)], ids=str)
def test_derivatives_of_any_order_and_kind(backend, size):
    x = torch.randn(2, *size, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(size[0], size[1] // 2 + 1, 1, 2, dtype=torch.float64, requires_grad=True)
    inputs = (x, weight)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return global_filter(x, weight, backend)

    def gradient(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(x, weight).pow(3).sum(), (x, weight), create_graph=True)

    assert gradcheck(run, inputs, check_forward_ad=True)
    assert gradgradcheck(run, inputs, check_fwd_over_rev=True)
    assert gradgradcheck(gradient, inputs)


@pytest.mark.parametrize('backend', ['fft', 'dense'])
@pytest.mark.parametrize(
    ('dtype', 'learned', 'kept'),
    [(torch.float32, True, 1), (torch.float32, False, 0), (torch.bfloat16, True, 0)],
    ids=str,
)
def test_keeps_a_spectrum_for_the_gradient_where_that_pays(backend, dtype, learned, kept):
    x = torch.randn(2, 6, 5, 3, dtype=dtype, requires_grad=True)
    weight = torch.randn(6, 3, 3, 2, requires_grad=learned)
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        global_filter(x, weight, backend)
    assert len(saved) == 2 + kept


@backends
@pytest.mark.parametrize('size', [(3, 4), (5, 3)], ids=str)
def test_transforms_of_torch_func(backend, size):
    n, shape = 3, (2, *size, 2)
    xs = torch.randn(n, *shape, dtype=torch.float64)
    weights = torch.randn(n, size[0], size[1] // 2 + 1, 2, 2, dtype=torch.float64)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return global_filter(x, weight, backend)

    def pull(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return vjp(run, x, weight)[1](x)

    for function in (run, pull, lambda x, w: jvp(run, (x, w), (x, w))[1]):
        for dims in ((0, 0), (0, None), (None, 0)):
            inputs = [t if d == 0 else t[0] for t, d in zip((xs, weights), dims, strict=True)]
            actual = vmap(function, dims)(*inputs)
            rows = [
                function(*(t[i] if d == 0 else t for t, d in zip(inputs, dims, strict=True)))
                for i in range(n)
            ]
            expected = (
                tuple(map(torch.stack, zip(*rows, strict=True)))
                if isinstance(actual, tuple)
                else torch.stack(rows)
            )
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)

    # Linear in either input: the second derivatives of x alone are none, of both together the map.
    second = hessian(lambda x, w: run(x, w).sum(), argnums=(0, 1))(xs[0], weights[0])
    assert not second[0][0].any()
    dot = torch.einsum(
        '...,...->', second[0][1].flatten(0, 3).flatten(1) @ weights[0].flatten(), xs[0].flatten()
    )
    torch.testing.assert_close(dot, run(xs[0], weights[0]).sum())


@devices
@backends
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('size', [(1, 1), (7, 7), (33, 34), (64, 70)], ids=str)
def test_the_whole_range_of_16_bit_values(device, backend, dtype, size):
    """Finite maps whose result is representable: their sums are far beyond the range."""
    largest = torch.finfo(dtype).max
    weight = torch.zeros(size[0], size[1] // 2 + 1, 2, 2)
    weight[..., 0] = 0.5
    maps = torch.rand(2, *size, 2) * 2 - 1, torch.ones(2, *size, 2), -torch.ones(2, *size, 2)
    for x in maps:
        x = (x * largest).to(dtype)
        with torch.no_grad():
            y = global_filter(x.to(device), weight.to(device), backend)
        assert_near([y], [x.double() / 2], ERRORS[dtype])
    for x in (torch.zeros(2, *size, 2), torch.full((2, *size, 2), torch.finfo(dtype).tiny)):
        y = global_filter(x.to(device, dtype), weight.to(device), backend)
        torch.testing.assert_close(y.cpu().double(), x.double() / 2, rtol=0.02, atol=1e-6)


@settings(max_examples=60)
@given(
    size=sizes(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    scale=st.sampled_from([0.1, 1.0, 50.0]),
    seed=st.integers(0, 2**31),
)
def test_products_of_float16_factors(size, dtype, scale, seed):
    """What GPUs do with 16-bit maps, here where there is none."""
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(2, *size, 2, generator=generator) for _ in range(2))
    x, g = (scale * x).to(dtype), g.to(dtype)
    weight = scale * torch.randn(size[0], size[1] // 2 + 1, 2, 2, generator=generator)
    inputs = x.requires_grad_(), weight.requires_grad_()
    make = functools.partial(dense._Dense, operands=torch.float16)
    y = blockwise.filter_map(make, x, weight)
    expected = reference(x, weight, g)
    if expected[0].abs().max() < torch.finfo(dtype).max:
        actual = [y.detach(), *torch.autograd.grad(y, inputs, g)]
        assert_near(actual, expected, ERRORS[dtype])


@pytest.mark.parametrize('backend', ['fft', 'dense'])
def test_a_gradient_is_compiled_whose_forward_was_not(backend):
    x = torch.randn(2, 28, 28, 4, requires_grad=True)
    weight = torch.randn(28, 15, 4, 2, requires_grad=True)
    y, g = global_filter(x, weight, backend), torch.randn(2, 28, 28, 4)
    run = torch.compile(lambda y, g: torch.autograd.grad(y, (x, weight), g), backend='aot_eager')
    assert_near(list(run(y, g)), reference(x, weight, g)[1:], 1e-6)


class Filter(nn.Module):
    def __init__(self, size: tuple[int, int], backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size[0], size[1] // 2 + 1, 3, 2))
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return global_filter(x, self.weight, self.backend)


@pytest.mark.parametrize(
    ('backend', 'dynamic'), [*((backend, False) for backend in BACKENDS), ('auto', True)]
)
def test_compiles_to_one_graph_with_its_gradients(backend, dynamic):
    torch.compiler.reset()
    run = torch.compile(global_filter, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    for batch, height, width in ((2, 6, 8), (3, 7, 5)):
        x, g = torch.randn(2, batch, height, width, 3)
        weight = torch.randn(height, width // 2 + 1, 3, 2)
        inputs = x.requires_grad_(), weight.requires_grad_()
        y = run(x, weight, backend)
        actual = [y.detach(), *torch.autograd.grad(y, inputs, g)]
        assert_near(actual, reference(x, weight, g), 1e-6)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # sizes become constants, as meant
@pytest.mark.filterwarnings('ignore:.isinstance.treespec:FutureWarning')  # torch.export in itself
@pytest.mark.parametrize('backend', ['auto', 'dense'])
@pytest.mark.parametrize('size', [(6, 8), (7, 5)], ids=str)
def test_graphs_without_complex_numbers(tmp_path, backend, size):
    model, x, other = Filter(size, backend), torch.randn(2, *size, 3), torch.randn(5, *size, 3)

    traced = torch.jit.trace(model, x)
    torch.jit.save(traced, tmp_path / 'model.pt')
    assert_near([torch.jit.load(tmp_path / 'model.pt')(other)], [model(other).double()], 1e-6)

    batch = torch.export.Dim('batch', min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes={'x': {0: batch}})
    assert_near([exported.module()(other)], [model(other).double()], 1e-6)

    for graph in (traced.inlined_graph, exported.graph):
        assert 'bmm' in str(graph)
        assert not re.search('fft|complex', str(graph), re.IGNORECASE)


@pytest.mark.filterwarnings('ignore:.isinstance.treespec:FutureWarning')  # torch.export in itself
@pytest.mark.parametrize('size', [(6, 8), (7, 5)], ids=str)
def test_onnx_runtime_computes_it_without_its_own_fourier_transform(tmp_path, size):
    model, x, other = Filter(size, 'auto'), torch.randn(2, *size, 3), torch.randn(5, *size, 3)
    batch = torch.export.Dim('batch', min=1, max=64)
    program = torch.onnx.export(
        model, (x,), dynamo=True, dynamic_shapes={'x': {0: batch}}, verbose=False
    )
    program.save(tmp_path / 'model.onnx')
    operators = {node.op_type for node in onnx.load(tmp_path / 'model.onnx').graph.node}
    assert 'MatMul' in operators and 'DFT' not in operators
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    (actual,) = session.run(None, {'x': other.numpy()})
    assert_near([torch.from_numpy(actual)], [model(other).double()], 1e-6)


def test_tensors_without_values_leave_nothing_behind():
    x, weight = torch.randn(1, 11, 13, 2), torch.randn(11, 7, 2, 2)
    with torch._subclasses.FakeTensorMode():
        global_filter(torch.empty(1, 11, 13, 2), torch.empty(11, 7, 2, 2), 'dense')
    with torch.inference_mode():
        y = global_filter(x, weight, 'dense')
    result, *_ = filter_and_gradients(x, weight, x, 'dense')
    assert torch.equal(result, y)


@backends
def test_gradients_only_where_they_are_asked_for(backend):
    x, weight = torch.randn(2, 5, 6, 3), torch.randn(5, 4, 3, 2)
    expected = filter_and_gradients(x, weight, x, backend)[1:]
    for index, tensor in enumerate((x, weight)):
        tensor.requires_grad_()
        y = global_filter(x, weight, backend)
        (gradient,) = torch.autograd.grad(y, tensor, x.detach())
        torch.testing.assert_close(gradient, expected[index])
        tensor.requires_grad_(False)
