"""The fused kernels: on a GPU, or on the CPU as Triton's interpreter runs them.

Triton decides which when it is imported. So where there is no GPU, one test runs this file again in
a process of its own, with the interpreter.
"""

import dataclasses
import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
from filter_oracle import (
    ERRORS,
    Case,
    assert_near,
    expected,
    random_case,
    result_and_gradients,
)
from torch import Tensor, distributed, nn

from gfnet_dense.models import GlobalFilter
from gfnet_dense.spectral import global_filter
from gfnet_dense.spectral import triton as fused
from gfnet_dense.spectral.reference import reference_filter
from gfnet_dense.spectral.triton import folded

triton = pytest.importorskip('triton', minversion='3.4')

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = 'cuda' if torch.cuda.is_available() and not INTERPRETED else 'cpu'
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason='needs a GPU; test_under_the_interpreter runs it without one',
)
needs_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason='needs a GPU, not the interpreter'
)
dtypes = pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)

# Tiles of 8, 16 and 32 values along either axis, filled and not, with a middle cell and without.
# Of larger maps the interpreter takes few, in large blocks; see `larger_blocks`.
HALF, BFLOAT = torch.float16, torch.bfloat16
PLANES = [
    ((1, 1), HALF),
    ((2, 3), BFLOAT),
    ((7, 7), HALF),
    ((13, 9), BFLOAT),
    ((14, 14), BFLOAT),
    ((16, 16), HALF),
    ((28, 20), BFLOAT),
    ((5, 33), HALF),
    ((64, 64), BFLOAT),
]
LARGER = [((100, 25), HALF), ((9, 130), BFLOAT)]
if not INTERPRETED:
    others = [(32, 32), (56, 56), (63, 17), (7, 64), (64, 14), (30, 15)]
    PLANES += itertools.product(others, (HALF, BFLOAT))
    others = [(65, 64), (128, 128), (100, 168), (200, 334), (334, 200), (7, 512), (512, 512)]
    LARGER += itertools.product(others, (HALF, BFLOAT))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Round to bfloat16 as GPUs do, where the interpreter cuts digits off, and poison memory."""
    if INTERPRETED:
        from triton.runtime import interpreter

        convert = interpreter._convert_float

        def round_to_nearest(values, source, target, mode):
            if target != triton.language.bfloat16:
                return convert(values, source, target, mode)
            return torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()

        monkeypatch.setattr(interpreter, '_convert_float', round_to_nearest)
        # A third of the time goes into checks that no index overflows, in maps as small as these.
        quick = dataclasses.replace(
            interpreter.interpreter_builder.options, sanitize_overflow=False
        )
        monkeypatch.setattr(interpreter.interpreter_builder, 'options', quick)
    if INTERPRETED or torch.cuda.is_available():
        # Fills what `empty` returns with NaN.
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)
    else:
        yield


@pytest.fixture
def larger_blocks(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(fused, '_ROWS', 32)
        monkeypatch.setattr(fused, '_columns', lambda height: 16)


def case(size, dtype, batch: int = 2, channels: int = 3) -> Case:
    return random_case(size, dtype, batch, channels, DEVICE)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """Return the result in float64, differentiable to any order."""
    return reference_filter(x.double().cpu(), weight.double().cpu())


def by_kernels(x: Tensor, weight: Tensor) -> Tensor:
    assert fused.unsupported_reason(x) is None
    return global_filter(x, weight, 'fused')


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason='the interpreter runs')
def test_under_the_interpreter():
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__]
    run = subprocess.run(
        command, env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert 'passed' in run.stdout


# Of a program in bytes, by compute capability (CUDA programming guide).
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
TYPES = {HALF: '*fp16', BFLOAT: '*bf16', torch.float32: '*fp32', torch.int32: '*i32'}


class Compiler:
    """Stands in for a kernel: launches compile it for a GPU that need not be there."""

    def __init__(self, kernel, capability: int) -> None:
        self.tuner = kernel if hasattr(kernel, 'configs') else None
        self.kernel = kernel.fn if self.tuner else kernel
        self.capability = capability
        self.target = triton.backends.compiler.GPUTarget('cuda', capability, 32)

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *values, num_warps: int = 0, num_stages: int = 1, **constants) -> None:
        if self.tuner:
            for config in self.tuner.early_config_prune(self.tuner.configs, {}, **constants):
                self.compile(values, {**constants, **config.kwargs}, config.num_warps)
        else:
            self.compile(values, constants, num_warps)

    def compile(self, values, constants: dict, num_warps: int) -> None:
        signature, attributes = dict.fromkeys(self.kernel.arg_names, 'constexpr'), {}
        for i, (name, value) in enumerate(zip(self.kernel.arg_names, values, strict=False)):
            if isinstance(value, Tensor):
                signature[name] = TYPES[value.dtype]
            else:
                signature[name] = 'i32' if isinstance(value, int) else 'fp32'
            if isinstance(value, Tensor) or (name == 'channels' and value % 16 == 0):
                attributes[(i,)] = [['tt.divisibility', 16]]
        source = triton.compiler.ASTSource(self.kernel, signature, constants, attributes)
        options = {'num_warps': num_warps, 'num_stages': 1}
        compiled = triton.compile(source, target=self.target, options=options)
        assert compiled.asm['cubin']
        assert compiled.metadata.shared <= SHARED_MEMORY[self.capability]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason='Triton compiles or interprets')
@pytest.mark.parametrize(
    ('size', 'capability'),
    [((16, 16), 80), ((64, 64), 90), ((128, 128), 90), ((64, 64), 86), ((512, 9), 86)],
    ids=str,
)
def test_compiles_for_a_gpu_and_fits_its_memory(monkeypatch, size, capability):
    from gfnet_dense.spectral.triton import kernels

    monkeypatch.setattr(fused, '_shared_memory', lambda device: SHARED_MEMORY[capability])
    for name, kernel in vars(kernels).copy().items():
        if not name.startswith('_') and isinstance(kernel, triton.KernelInterface):
            monkeypatch.setattr(kernels, name, Compiler(kernel, capability))
    with torch.no_grad():
        x, weight, g = (t.cpu() for t in case(size, BFLOAT, channels=32))
        fused.filter(x, weight, False)
        fused.correlate(g, x)


@needs_kernels
@pytest.mark.parametrize(('size', 'dtype'), PLANES, ids=str)
def test_maps_on_the_chip(size, dtype):
    inputs = case(size, dtype)
    actual = result_and_gradients(by_kernels, *inputs)
    assert [t.dtype for t in actual] == [dtype, dtype, torch.float32]
    assert_near(actual, expected(*inputs), ERRORS[dtype])


@needs_kernels
@pytest.mark.parametrize(('size', 'dtype'), LARGER, ids=str)
def test_larger_maps(larger_blocks, size, dtype):
    inputs = case(size, dtype, batch=1)
    actual = result_and_gradients(by_kernels, *inputs)
    assert_near(actual, expected(*inputs), ERRORS[dtype])


@needs_kernels
@pytest.mark.parametrize('size', [(6, 8), (7, 5)], ids=str)
def test_kernels_of_larger_maps_follow_the_model(larger_blocks, size):
    """Each of the three kernels against its counterpart in :mod:`folded`, on real intermediates."""
    x, weight, _ = (t.detach() for t in case(size, HALF))
    y = torch.empty_like(x)
    z, exponents = fused._transform_rows(x)
    actual = coefficients(z, exponents, rows=fused._ROWS)
    model = folded.transform(x.cpu().double().permute(0, 3, 1, 2))
    assert_near(actual, list(model), 2e-3)
    exponents = fused._filter_columns(z, exponents, weight, size[1], 1.0)
    actual = coefficients(z, exponents, columns=fused._columns(size[0]))
    model = folded.filter_columns(*model, weight.cpu().double(), size[1])
    assert_near(actual, list(model), 3e-3)
    fused._restore_rows(z, exponents, y)
    assert_near([y], [folded.restore(*model, size[1]).permute(0, 2, 3, 1)], ERRORS[HALF])


def coefficients(z: Tensor, exponents: Tensor, rows: int = 0, columns: int = 0) -> list[Tensor]:
    """Return cosines and sines `(B, C, H, ceil(W / 2))` from what lies between two kernels."""
    exponents = exponents.repeat_interleave(rows or columns, 1).repeat_interleave(
        fused._CHANNELS, 2
    )
    half, height, channels = z.shape[2:]
    exponents = exponents[:, : height if rows else half, :channels].cpu()
    exponents = exponents[:, None] if rows else exponents[:, :, None]  # (B, ceil(W / 2), H, C)
    return [torch.ldexp(part.cpu().double(), exponents).permute(0, 3, 2, 1) for part in z.unbind(1)]


@needs_kernels
def test_chunks_and_blocks_of_larger_maps(monkeypatch):
    """Blocks as GPUs have them, several of each kind, on a map that is not large."""
    monkeypatch.setattr(fused, '_PLANE', 0)
    monkeypatch.setattr(fused, '_CHUNK', 3 * 6 * 33 * 2)
    inputs = case((3, 6), HALF, batch=2, channels=33)
    actual = result_and_gradients(by_kernels, *inputs)
    assert_near(actual, expected(*inputs), ERRORS[HALF])


@needs_kernels
def test_shares_of_the_images(monkeypatch):
    monkeypatch.setattr(fused, '_PROGRAMS', 2)
    inputs = case((4, 3), HALF, batch=3, channels=1)
    actual = result_and_gradients(by_kernels, *inputs)
    assert_near(actual, expected(*inputs), ERRORS[HALF])


@needs_kernels
def test_the_same_every_time_and_from_any_strides():
    x, weight, g = case((7, 6), BFLOAT, batch=1, channels=20)
    first = result_and_gradients(by_kernels, x, weight, g)
    x, g = (t.detach().movedim(-1, 1).contiguous().movedim(1, -1) for t in (x, g))
    weight = weight.detach().repeat_interleave(2, dim=1)[:, ::2]
    assert not (x.is_contiguous() or weight.is_contiguous() or g.is_contiguous())
    inputs = x.requires_grad_(), weight.requires_grad_()
    second = result_and_gradients(by_kernels, *inputs, g)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_kernels
@dtypes
def test_the_whole_range_of_values(dtype):
    """Sums beyond the range, neighbours a million times smaller, and results that fit again."""
    largest, size = torch.finfo(dtype).max, (7, 12)
    weight = torch.zeros(7, 7, 3, 2, device=DEVICE)
    weight[..., 0] = 0.5
    x = torch.rand(1, *size, 3, device=DEVICE) * 2 - 1
    x[..., 1] = torch.tensor([1.0, -1.0], device=DEVICE).repeat(6)
    x[..., 2] *= 1e-6
    y = by_kernels((x * largest).to(dtype), weight)
    expected = (x * largest).to(dtype).double() / 2
    for channel in range(3):
        assert_near([y[..., channel]], [expected[..., channel]], ERRORS[dtype])
    if dtype == BFLOAT:
        y = by_kernels((1e-30 * x).to(dtype), torch.full_like(weight, 3e38))
        expected = reference((1e-30 * x).to(dtype), torch.full_like(weight, 3e38))
        assert_near([y], [expected], ERRORS[dtype])
    assert not by_kernels(torch.zeros_like(x, dtype=dtype), weight).any()


@needs_kernels
def test_gradients_of_gradients():
    x, weight, _ = case((3, 4), HALF, batch=1)

    def second(function, x: Tensor, weight: Tensor) -> list[Tensor]:
        y = function(x, weight).double()
        first = torch.autograd.grad((y**2).sum(), (x, weight), create_graph=True)
        return list(torch.autograd.grad(sum((t.double() ** 2).sum() for t in first), (x, weight)))

    inputs = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    assert_near(second(by_kernels, x, weight), second(reference, *inputs), 3 * ERRORS[HALF])


@needs_kernels
def test_forward_derivatives():
    x, weight, _ = (t.detach() for t in case((3, 4), HALF, batch=1))
    dx, dweight, _ = (t.detach() for t in case((3, 4), HALF, batch=1))

    def derivatives(function, x: Tensor, weight: Tensor, *tangents: Tensor) -> list[Tensor]:
        def gradient(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.grad(lambda *at: (function(*at).double() ** 2).sum(), (0, 1))(
                x, weight
            )

        _, first = torch.func.jvp(function, (x, weight), tangents)
        return [first, *torch.func.jvp(gradient, (x, weight), tangents)[1]]

    actual = derivatives(by_kernels, x, weight, dx, dweight)
    expected = derivatives(reference, *(t.double() for t in (x, weight, dx, dweight)))
    assert_near(actual, expected, 3 * ERRORS[HALF])


@needs_kernels
def test_forward_derivatives_in_a_graph():
    x, weight, dx = (t.detach() for t in case((3, 4), HALF, batch=1))
    torch.compiler.reset()

    def derivative(x: Tensor, weight: Tensor, dx: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: by_fused(x, weight), (x,), (dx,))[1]

    def by_fused(x: Tensor, weight: Tensor) -> Tensor:
        return global_filter(x, weight, 'fused')

    run = torch.compile(derivative, backend='aot_eager', fullgraph=True)
    assert_near([run(x, weight, dx)], [reference(dx, weight)], ERRORS[HALF])


@needs_kernels
def test_vmap_over_either_and_gradients_of_each_image():
    xs, weights, _ = (
        torch.stack(t).detach() for t in zip(*(case((3, 4), HALF) for _ in 'ab'), strict=True)
    )
    for dims in ((0, 0), (0, None), (None, 0)):
        inputs = [t if dim == 0 else t[0] for t, dim in zip((xs, weights), dims, strict=True)]
        actual = torch.func.vmap(by_kernels, dims)(*inputs)
        expected = torch.func.vmap(reference, dims)(*inputs)
        assert_near([actual], [expected], ERRORS[HALF])

    def loss(function):
        return lambda weight, image: (function(image[None], weight).double() ** 2).sum()

    actual, expected = (
        torch.func.vmap(torch.func.grad(loss(function)), (None, 0))(weights[0], xs[0])
        for function in (by_kernels, reference)
    )
    assert_near([actual], [expected], 2 * ERRORS[HALF])


@needs_kernels
def test_jacobians():
    x, weight, _ = (t.detach() for t in case((3, 2), HALF, batch=1, channels=1))
    expected = torch.func.jacrev(reference)(x.double(), weight)
    assert_near([torch.func.jacrev(by_kernels)(x, weight)], [expected], ERRORS[HALF])
    assert_near([torch.func.jacfwd(by_kernels)(x, weight)], [expected], ERRORS[HALF])


@needs_kernels
def test_operators_are_what_torch_asks_for():
    x, weight, g = case((4, 3), HALF, batch=1)
    checks = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    torch.library.opcheck(fused.filter, (x, weight, True), test_utils=checks)
    torch.library.opcheck(fused.correlate, (g.requires_grad_(), x), test_utils=checks)


@needs_kernels
@pytest.mark.parametrize('dynamic', [False, True])
def test_compiles_to_one_graph_with_its_gradients(dynamic):
    torch.compiler.reset()
    run = torch.compile(by_kernels, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    inputs = case((4, 6), BFLOAT, batch=1)
    actual = result_and_gradients(run, *inputs)
    expected = result_and_gradients(by_kernels, *inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@needs_kernels
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # sizes become constants, as meant
def test_exported_graphs_hold_operators_of_torch_alone():
    layer = GlobalFilter(2, (4, 6), backend='fused').to(DEVICE)
    x = torch.randn(1, 4, 6, 2, device=DEVICE, dtype=HALF)
    traced = torch.jit.trace(layer, x, check_trace=False).inlined_graph
    for graph in (traced, torch.export.export(layer, (x,)).graph):
        assert 'bmm' in str(graph)
        assert not re.search(r'gfnet_dense(::|\.)fused', str(graph))


@needs_kernels
def test_trains_under_ddp(tmp_path):
    distributed.init_process_group(
        'gloo', store=distributed.FileStore(str(tmp_path / 'store')), rank=0, world_size=1
    )
    try:
        layer = GlobalFilter(2, (4, 3), backend='fused').to(DEVICE)
        start = layer.complex_weight.detach().clone()
        parallel = nn.parallel.DistributedDataParallel(layer)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=1.0)
        weight = start.double().requires_grad_()
        for x in torch.randn(2, 1, 4, 3, 2, device=DEVICE).to(HALF):
            optimizer.zero_grad()
            parallel(x).double().square().mean().backward()
            optimizer.step()
            (gradient,) = torch.autograd.grad(reference(x, weight).square().mean(), weight)
            weight = (weight - gradient).detach().requires_grad_()
        steps = [layer.complex_weight.detach() - start], [(weight - start).detach()]
        assert_near(*steps, ERRORS[HALF])
    finally:
        distributed.destroy_process_group()


@needs_kernels
def test_gradients_only_where_they_are_asked_for(monkeypatch):
    x, weight, g = case((3, 2), HALF, batch=1)
    expected = result_and_gradients(by_kernels, x, weight, g)[1:]
    for index, tensor in enumerate((x, weight)):
        for t in (x, weight):
            t.requires_grad_(t is tensor)
        (gradient,) = torch.autograd.grad(by_kernels(x, weight), tensor, g)
        assert torch.equal(gradient, expected[index])


@needs_kernels
def test_under_autocast_the_layer_works_in_16_bits():
    layer = GlobalFilter(3, (4, 6), backend='fused').to(DEVICE)
    x = torch.randn(1, 4, 6, 3, device=DEVICE, requires_grad=True)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, torch.autocast(DEVICE, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert [t.dtype for t in saved if t.shape == x.shape] == [torch.bfloat16]
    y.sum().backward()
    assert x.grad.dtype == layer.complex_weight.grad.dtype == torch.float32
    assert_near([y], [reference(x.bfloat16(), layer.complex_weight)], ERRORS[BFLOAT])


@needs_kernels
def test_no_images():
    x, weight, g = case((4, 3), HALF, batch=0)
    y, *gradients = result_and_gradients(by_kernels, x, weight, g)
    assert y.shape == gradients[0].shape == x.shape
    assert not gradients[1].any()


@needs_gpu
def test_cuda_graphs():
    x, weight, g = case((16, 16), BFLOAT)
    result_and_gradients(by_kernels, x, weight, g)  # compiles and tunes, which no graph holds
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = result_and_gradients(by_kernels, x, weight, g)
    with torch.no_grad():
        x.normal_()
    graph.replay()
    expected = result_and_gradients(by_kernels, x, weight, g)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_a_device_that_is_not_the_current_one():
    inputs = case((16, 16), BFLOAT)
    expected = result_and_gradients(by_kernels, *inputs)
    others = [t.detach().to('cuda:1') for t in inputs]
    actual = result_and_gradients(by_kernels, *(t.requires_grad_() for t in others))
    assert all(torch.equal(a.cpu(), e.cpu()) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ('shape', 'dtype', 'message'),
    [
        ((1, 4, 4, 1), torch.float32, 'not torch.float32'),
        ((1, 513, 1, 1), torch.bfloat16, 'up to 512 cells'),
        ((1, 512, 512, 4096), torch.bfloat16, r'2\*\*30 values'),
        ((1, 4, 4, 1), torch.bfloat16, None if INTERPRETED else 'NVIDIA GPU'),
    ],
)
def test_what_the_kernels_do_not_take(shape, dtype, message):
    reason = fused.unsupported_reason(torch.empty(1, dtype=dtype).expand(shape))
    assert re.search(message, reason) if message else reason is None
