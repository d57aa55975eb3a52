"""Every backend against the definition in float64 and a naive convolution, for any map."""

import re

import hypothesis.strategies as st
import onnx
import onnxruntime
import pytest
import torch
from filter_oracle import ERRORS, assert_near, expected, random_case, result_and_gradients
from hypothesis import given, settings
from torch import Tensor, nn

from gfnet_dense.spectral import BACKENDS, dense, global_filter

DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]

# Without a GPU 'fused' falls back to 'auto'; cuda/test_kernels.py runs its kernels there.
TESTED = [b for b in BACKENDS if b != 'fused' or torch.cuda.is_available()]
backends = pytest.mark.parametrize('backend', TESTED)
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


def filter_and_gradients(case: tuple[Tensor, ...], backend: str) -> list[Tensor]:
    return result_and_gradients(lambda x, weight: global_filter(x, weight, backend), *case)


@pytest.mark.timeout(3600)  # on a GPU kernels are compiled for every class of sizes
@devices
@pytest.mark.parametrize(
    'backend', [pytest.param(b, marks=[pytest.mark.slow] * (b != 'native')) for b in TESTED]
)
@settings(max_examples=150)
@given(
    size=sizes(),
    channels=st.one_of(st.integers(1, 4), st.integers(1, 100)),
    batch=st.integers(0, 5),
    dtype=st.sampled_from(list(ERRORS)),
    layouts=st.tuples(*[st.sampled_from(['dense', 'channels first', 'every other'])] * 3),
    seed=st.integers(0, 2**31),
)
def test_result_and_gradients(device, backend, size, channels, batch, dtype, layouts, seed):
    torch.manual_seed(seed)
    case = random_case(size, dtype, batch, channels, device)
    case = [strided(t.detach(), layout) for t, layout in zip(case, layouts, strict=True)]
    actual = filter_and_gradients(case, backend)
    assert [t.dtype for t in actual] == [dtype, dtype, case[1].dtype]
    assert_near(actual, expected(*case), ERRORS[dtype])
    again = filter_and_gradients(case, backend)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
    with torch.no_grad():
        assert torch.equal(global_filter(*case[:2], backend), actual[0])


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
    y = torch.zeros_like(x)
    u = torch.arange(height, dtype=torch.float64)[:, None, None]
    v = torch.arange(width // 2 + 1, dtype=torch.float64)[:, None]
    for p in range(height):
        for q in range(width):
            angle = 2 * torch.pi * (u * p / height + v * q / width)
            weight += kernel[p, q][:, None] * torch.stack([angle.cos(), -angle.sin()], -1)
            y += kernel[p, q] * x.roll((p, q), dims=(1, 2))
    assert_near([global_filter(x, weight, backend)], [y], 1e-12)


@devices
@backends
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('size', [(1, 1), (7, 7), (33, 34), (64, 70)], ids=str)
def test_the_whole_range_of_16_bit_values(device, backend, dtype, size):
    """Finite maps whose result is representable, while their sums are far beyond the range."""
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
    """What 'dense' does with 16-bit maps on a GPU, here on the CPU."""
    torch.manual_seed(seed)
    x, weight, g = (t.detach() for t in random_case(size, dtype, channels=2))
    case = (scale * x, scale * weight, g)
    results = expected(*case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, '_operand_dtype', lambda x: torch.float16)
        if results[0].abs().max() < torch.finfo(dtype).max:
            assert_near(filter_and_gradients(case, 'dense'), results, ERRORS[dtype])


@backends
@pytest.mark.parametrize('autocast', [torch.bfloat16, torch.float16])
def test_precision_does_not_depend_on_autocast(backend, autocast):
    case = random_case((14, 9), torch.float32)
    with torch.autocast('cpu', autocast):
        actual = filter_and_gradients(case, backend)
    assert [t.dtype for t in actual] == [torch.float32] * 3
    assert_near(actual, expected(*case), ERRORS[torch.float32])


class Filter(nn.Module):
    def __init__(self, size: tuple[int, int], backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size[0], size[1] // 2 + 1, 3, 2))
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return global_filter(x, self.weight, self.backend)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('backend', 'dynamic'), [('auto', True), *((backend, False) for backend in BACKENDS)]
)
def test_compiles_to_one_graph_with_its_gradients(backend, dynamic):
    torch.compiler.reset()
    run = torch.compile(global_filter, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    for batch, *size in ((2, 6, 8), (3, 7, 5)):
        case = random_case(tuple(size), torch.float32, batch)
        actual = result_and_gradients(lambda x, weight: run(x, weight, backend), *case)
        assert_near(actual, expected(*case), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['fft', 'dense'])
def test_a_gradient_is_compiled_whose_forward_was_not(backend):
    x, weight, g = random_case((28, 28), torch.float32, channels=4)
    y = global_filter(x, weight, backend)
    run = torch.compile(lambda y, g: torch.autograd.grad(y, (x, weight), g), backend='aot_eager')
    assert_near(list(run(y, g)), expected(x, weight, g)[1:], 1e-6)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # sizes become constants, as meant
@pytest.mark.filterwarnings('ignore:.isinstance.treespec:FutureWarning')  # torch.export in itself
@pytest.mark.parametrize('backend', ['auto', 'dense'])
@pytest.mark.parametrize('size', [(6, 8), pytest.param((7, 5), marks=pytest.mark.slow)], ids=str)
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


@pytest.mark.slow
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


def test_fake_tensors_and_inference_mode_leave_nothing_in_the_cache():
    case = random_case((11, 13), torch.float32, batch=1, channels=2)
    with torch._subclasses.FakeTensorMode():
        global_filter(torch.empty(1, 11, 13, 2), torch.empty(11, 7, 2, 2), 'dense')
    with torch.inference_mode():
        y = global_filter(*case[:2], 'dense')
    assert torch.equal(filter_and_gradients(case, 'dense')[0], y)
