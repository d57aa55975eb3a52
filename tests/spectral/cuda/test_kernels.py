"""The CUDA kernels: on a GPU, or emulated on the CPU, see `emulated_cuda.py`."""

import itertools
import re
from collections import Counter

import pytest
import torch
from emulated_cuda import SHARED_MEMORY, kernels, shuffled_threads
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
from gfnet_dense.spectral import cuda, global_filter
from gfnet_dense.spectral.cuda import blocks, driver, maps, strips
from gfnet_dense.spectral.reference import reference_filter

ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'
dtypes = pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)

# Tiles of every kind, filled and not, with a middle cell and without; channels that fill blocks,
# that do not, and that cannot be read several at once. Maps that are filtered and correlated whole,
# filtered whole and correlated in strips, and all in strips.
HALF, BFLOAT = torch.float16, torch.bfloat16
CASES = [
    ((1, 1), HALF, 3),
    ((2, 3), BFLOAT, 3),
    ((7, 7), HALF, 16),
    ((13, 9), BFLOAT, 16),
    ((16, 16), HALF, 24),
    ((28, 20), BFLOAT, 3),
    ((5, 33), HALF, 8),
    ((63, 17), BFLOAT, 9),
    ((60, 50), BFLOAT, 8),
    ((100, 25), HALF, 8),
    ((9, 130), BFLOAT, 3),
    ((66, 130), BFLOAT, 4),
]
if ON_GPU:
    sizes = [(14, 14), (32, 32), (56, 56), (63, 17), (7, 64), (65, 64), (128, 128), (100, 168)]
    sizes += [(200, 200), (7, 512), (512, 5)]
    CASES += itertools.product(sizes, (HALF, BFLOAT), (16, 5))


@pytest.fixture(autouse=True)
def _kernels():
    with kernels():
        yield


def case(size, dtype, batch: int = 2, channels: int = 3) -> Case:
    return random_case(size, dtype, batch, channels, DEVICE)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """Return the result in float64, differentiable to any order."""
    return reference_filter(x.double().cpu(), weight.double().cpu())


def by_kernels(x: Tensor, weight: Tensor) -> Tensor:
    assert cuda.unsupported_reason(x) is None
    return global_filter(x, weight, 'fused')


@pytest.mark.parametrize(('size', 'dtype', 'channels'), CASES, ids=str)
def test_by_definition(size, dtype, channels):
    inputs = case(size, dtype, channels=channels)
    actual = result_and_gradients(by_kernels, *inputs)
    assert [t.dtype for t in actual] == [dtype, dtype, torch.float32]
    assert_near(actual, expected(*inputs), ERRORS[dtype])


def in_strips(monkeypatch) -> None:
    """Let the smallest maps be cut into strips, as large ones are."""
    monkeypatch.setattr(cuda, 'whole_channels', lambda *_: 0)


# Halves of 8 to 176, one strip and several, one share of the images and several.
@pytest.mark.parametrize(
    ('size', 'dtype', 'channels'),
    [
        ((1, 1), HALF, 3),
        ((7, 6), BFLOAT, 16),
        ((4, 40), HALF, 24),
        ((37, 5), BFLOAT, 8),
        ((20, 21), HALF, 40),
        ((200, 18), HALF, 8),
        ((18, 334), BFLOAT, 8),
    ],
    ids=str,
)
def test_strips_by_definition(monkeypatch, size, dtype, channels):
    in_strips(monkeypatch)
    inputs = case(size, dtype, batch=3, channels=channels)
    actual = result_and_gradients(by_kernels, *inputs)
    assert_near(actual, expected(*inputs), ERRORS[dtype])


def test_with_less_shared_memory(monkeypatch):
    """GPUs of compute capability 8.6 leave a block 99 KB."""
    monkeypatch.setattr(driver, 'shared_memory', lambda device: 99 * 1024)
    blocks._kernel.cache_clear()
    inputs = case((32, 20), HALF, batch=1, channels=4)
    assert blocks.whole_channels(32, 20, 99 * 1024) < blocks.whole_channels(32, 20, SHARED_MEMORY)
    actual = result_and_gradients(by_kernels, *inputs)
    assert_near(actual, expected(*inputs), ERRORS[HALF])


@pytest.mark.skipif(ON_GPU, reason='needs the emulation')
@pytest.mark.parametrize('cut', [False, True], ids=['whole', 'strips'])
@pytest.mark.parametrize('size', [(13, 9), (28, 20), (36, 37)], ids=str)
def test_any_order_of_threads(monkeypatch, size, cut):
    """A missing barrier shows where threads overtake each other."""
    if cut:
        in_strips(monkeypatch)
    x, weight, g = (t.detach() for t in case(size, HALF, channels=8))
    results = []
    for seed in (0, 1, 2):
        with shuffled_threads(seed):
            results.append((cuda.filter(x, weight, False), cuda.correlate(g, x)))
    assert all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    )


def test_batched_gradients():
    """As in `torch.autograd.functional.jacobian(..., vectorize=True)`."""
    x, weight, _ = case((3, 4), HALF)
    y = by_kernels(x, weight)
    g = torch.randn(3, *y.shape, device=DEVICE).to(HALF)
    batched = torch.autograd.grad(y, (x, weight), g, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        single = torch.autograd.grad(y, (x, weight), g[i], retain_graph=True)
        assert all(torch.equal(b[i], s) for b, s in zip(batched, single, strict=True))


def test_gradients_in_chunks(monkeypatch):
    monkeypatch.setattr(maps, '_GRADIENTS', 2 * 4 * 3 * 2 * 3 * 2)  # of two images
    inputs = case((3, 3), HALF, batch=5)
    actual = result_and_gradients(by_kernels, *inputs)
    assert_near(actual, expected(*inputs), ERRORS[HALF])


# Bytes of shared memory of a block, by compute capability (CUDA programming guide).
LIMITS = {80: 163 * 1024, 86: 99 * 1024, 90: SHARED_MEMORY}


MAPS = 'filter_maps', 'correlate_maps'
STRIPS = 'transform_strips', 'filter_strips', 'restore_strips', 'correlate_strips'
COMPILED = [*itertools.product(MAPS, [((16, 16), 80), ((32, 64), 90), ((16, 16), 86)])]
COMPILED += [('filter_maps', ((64, 64), 90)), ('filter_maps', ((28, 20), 86))]
COMPILED += itertools.product(STRIPS, [((16, 16), 80), ((64, 64), 90), ((100, 168), 90)])


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'on'), COMPILED, ids=str)
def test_compiles_for_a_gpu(name, on):
    pytest.importorskip('cuda.bindings')
    size, capability = on
    division = blocks.divide(name, *size, LIMITS[capability])
    macros = blocks.definitions(name, *size, 8, BFLOAT, division)
    options = ['-std=c++17', f'--gpu-architecture=sm_{capability}']
    options += [f'-D{macro}={value}' for macro, value in macros.items()]
    assert driver.compile_source(blocks.source_of(name), options).startswith(b'\x7fELF')


@pytest.mark.parametrize('name', blocks.KERNELS)
def test_blocks_fit_on_every_gpu(name):
    for limit, (height, width) in itertools.product(
        LIMITS.values(), itertools.product(range(1, blocks.LARGEST_SIDE + 1, 15), repeat=2)
    ):
        if 'maps' in name and not blocks.whole_channels(height, width, limit):
            continue
        division = blocks.divide(name, height, width, limit)
        assert division.shared <= limit
        assert division.warps <= 32
        # Of a multiprocessor: a block takes 1 KB for itself.
        assert division.warps * division.resident <= 48
        assert (
            division.resident == 1 or division.resident * (division.shared + 1024) <= limit + 1024
        )


def test_the_same_every_time_and_from_any_strides():
    x, weight, g = case((7, 6), HALF, batch=1, channels=16)
    first = result_and_gradients(by_kernels, x, weight, g)
    x, g = (t.detach().movedim(-1, 1).contiguous().movedim(1, -1) for t in (x, g))
    weight = weight.detach().repeat_interleave(2, dim=1)[:, ::2]
    assert not (x.is_contiguous() or weight.is_contiguous() or g.is_contiguous())
    inputs = x.requires_grad_(), weight.requires_grad_()
    second = result_and_gradients(by_kernels, *inputs, g)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize('cut', [False, True], ids=['whole', 'strips'])
@dtypes
def test_the_whole_range_of_values(monkeypatch, dtype, cut):
    """Sums beyond the range, neighbours a million times smaller, and results that fit again."""
    if cut:
        in_strips(monkeypatch)
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
        y = by_kernels((1e-32 * x).to(dtype), torch.full_like(weight, 1e32))
        expected = reference((1e-32 * x).to(dtype), torch.full_like(weight, 1e32))
        assert_near([y], [expected], ERRORS[dtype])
    assert not by_kernels(torch.zeros_like(x, dtype=dtype), weight).any()


@pytest.mark.parametrize('size', [(60, 50), (100, 25), (66, 130)], ids=str)
def test_a_quiet_channel_beside_a_loud_one(size):
    """Its values lie in other frequencies, a hundred thousand times smaller."""
    x, weight, g = (t.detach().clone() for t in case(size, HALF, batch=1, channels=8))
    x[..., 0], g[..., 0] = 1, 1
    x[..., 1:] /= 1000
    g[..., 1:] /= 1000
    weight[:] = torch.tensor([1.0, 0.0], device=DEVICE)
    inputs = x.requires_grad_(), weight.requires_grad_(), g
    actual, truth = result_and_gradients(by_kernels, *inputs), expected(*inputs)
    quiet = [[y[..., 1:], dx[..., 1:], dw[..., 1:, :]] for y, dx, dw in (actual, truth)]
    assert_near(*quiet, ERRORS[HALF])


def test_quiet_rows_beside_loud_ones(monkeypatch):
    """Strips have scales of their own: the gradient of a channel of quiet ones stays precise."""
    in_strips(monkeypatch)
    x, _, g = (t.detach().clone() for t in case((40, 21), BFLOAT, batch=1, channels=8))
    # The first and the last rows of the map, which are the first strips, are loud.
    rows = torch.arange(40, device=DEVICE)
    quiet = ((rows >= 8) & (rows < 32))[:, None]
    for t in (x, g):
        t[..., 1] *= torch.where(quiet, 1e-7, 0)
        t[..., [0, *range(2, 8)]] *= torch.where(quiet, 0, 1)[..., None]
    truth = expected(x, torch.zeros(40, 11, 8, 2, device=DEVICE), g)[2]
    assert_near([cuda.correlate(g, x)[:, :, 1]], [truth[:, :, 1]], ERRORS[BFLOAT])


@pytest.mark.parametrize('cut', [False, True], ids=['whole', 'strips'])
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_channels_and_images_keep_what_is_not_finite_to_themselves(monkeypatch, bad, cut):
    if cut:
        in_strips(monkeypatch)
    x, weight, g = (t.detach().clone() for t in case((20, 20), BFLOAT, channels=4))
    x[0, 3, 4, 1] = bad
    y = by_kernels(x, weight)
    assert not y[0, ..., 1].isfinite().any()
    others = [0, 2, 3]
    truth = reference(x, weight)[0]
    assert_near([y[0][..., others], y[1]], [truth[..., others], reference(x, weight)[1]], 5e-3)
    gradient = cuda.correlate(g, x)
    assert not gradient[..., 1, :].isfinite().all(-1).any()
    assert gradient[..., others, :].isfinite().all() and gradient[..., others, :].any()


def test_zeros_without_memory_and_lazily_negated_maps():
    x, weight, _ = case((4, 6), HALF, batch=1)
    (gradient,) = torch.autograd.grad(torch.sgn(by_kernels(x, weight)).sum(), x)
    assert not gradient.any()
    negated = torch._neg_view(x.detach())
    with torch.no_grad():
        assert torch.equal(by_kernels(negated, weight), by_kernels(-x, weight))


def test_float64_stays_under_autocast():
    layer = GlobalFilter(3, (4, 6), backend='fused').to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer(torch.randn(1, 4, 6, 3, device=DEVICE).double()).dtype == torch.float64


def test_channels_that_vmap_makes_are_counted():
    with pytest.raises(ValueError, match='too large'):
        blocks._kernel('filter_maps', 200, 200, 27000, HALF, 0)


def test_gradients_of_gradients():
    x, weight, _ = case((3, 4), HALF, batch=1)

    def second(function, x: Tensor, weight: Tensor) -> list[Tensor]:
        y = function(x, weight).double()
        first = torch.autograd.grad((y**2).sum(), (x, weight), create_graph=True)
        return list(torch.autograd.grad(sum((t.double() ** 2).sum() for t in first), (x, weight)))

    inputs = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    assert_near(second(by_kernels, x, weight), second(reference, *inputs), 3 * ERRORS[HALF])


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


def test_forward_derivatives_in_a_graph():
    x, weight, dx = (t.detach() for t in case((3, 4), HALF, batch=1))
    torch.compiler.reset()

    def derivative(x: Tensor, weight: Tensor, dx: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: by_fused(x, weight), (x,), (dx,))[1]

    def by_fused(x: Tensor, weight: Tensor) -> Tensor:
        return global_filter(x, weight, 'fused')

    run = torch.compile(derivative, backend='aot_eager', fullgraph=True)
    assert_near([run(x, weight, dx)], [reference(dx, weight)], ERRORS[HALF])


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


def test_jacobians():
    x, weight, _ = (t.detach() for t in case((3, 2), HALF, batch=1, channels=1))
    expected = torch.func.jacrev(reference)(x.double(), weight)
    assert_near([torch.func.jacrev(by_kernels)(x, weight)], [expected], ERRORS[HALF])
    assert_near([torch.func.jacfwd(by_kernels)(x, weight)], [expected], ERRORS[HALF])


def test_operators_are_what_torch_asks_for():
    x, weight, g = case((4, 3), HALF, batch=1)
    checks = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    operators = getattr(torch.ops, cuda.NAMESPACE)
    torch.library.opcheck(operators.filter.default, (x, weight, True), test_utils=checks)
    arguments = g.requires_grad_(), x
    torch.library.opcheck(operators.correlate.default, arguments, test_utils=checks)
    arguments = (*(t.detach() for t in (g, x, weight)),)
    torch.library.opcheck(operators.adjoint.default, arguments, test_utils=checks)


compiles = pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_exporting'),
    reason='needs torch 2.7, before which all graphs count as exported',
)


@compiles
@pytest.mark.parametrize('dynamic', [False, True])
def test_compiles_to_one_graph_with_its_gradients(dynamic):
    torch.compiler.reset()
    run = torch.compile(by_kernels, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    inputs = case((4, 6), BFLOAT, batch=1)
    actual = result_and_gradients(run, *inputs)
    expected = result_and_gradients(by_kernels, *inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@compiles
def test_a_backward_pass_in_strips_transforms_the_gradient_once(monkeypatch):
    """In compiled graphs, too."""
    in_strips(monkeypatch)
    names, kernel_for = [], strips.kernel_for
    monkeypatch.setattr(
        strips, 'kernel_for', lambda name, x: names.append(name) or kernel_for(name, x)
    )
    torch.compiler.reset()
    compiled = torch.compile(by_kernels, backend='aot_eager', fullgraph=True)
    for function in (by_kernels, compiled):
        names.clear()
        result_and_gradients(function, *case((4, 6), BFLOAT))
        assert Counter(names) == dict(
            transform_strips=3, filter_strips=2, restore_strips=2, correlate_strips=1
        )


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # sizes become constants, as meant
def test_exported_graphs_hold_operators_of_torch_alone():
    layer = GlobalFilter(2, (4, 6), backend='fused').to(DEVICE)
    x = torch.randn(1, 4, 6, 2, device=DEVICE, dtype=HALF)
    traced = torch.jit.trace(layer, x, check_trace=False).inlined_graph
    for graph in (traced, torch.export.export(layer, (x,)).graph):
        assert 'bmm' in str(graph)
        assert not re.search(cuda.NAMESPACE, str(graph))


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


def test_gradients_only_where_they_are_asked_for():
    x, weight, g = case((3, 2), HALF, batch=1)
    expected = result_and_gradients(by_kernels, x, weight, g)[1:]
    for index, tensor in enumerate((x, weight)):
        for t in (x, weight):
            t.requires_grad_(t is tensor)
        (gradient,) = torch.autograd.grad(by_kernels(x, weight), tensor, g)
        assert torch.equal(gradient, expected[index])


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


def test_no_images():
    x, weight, g = case((4, 3), HALF, batch=0)
    y, *gradients = result_and_gradients(by_kernels, x, weight, g)
    assert y.shape == gradients[0].shape == x.shape
    assert not gradients[1].any()


@pytest.mark.skipif(not ON_GPU, reason='needs a GPU')
@pytest.mark.parametrize('size', [(16, 16), (128, 128)], ids=str)
def test_cuda_graphs(size):
    x, weight, g = case(size, BFLOAT)
    result_and_gradients(by_kernels, x, weight, g)  # compiles, which no graph holds
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = result_and_gradients(by_kernels, x, weight, g)
    with torch.no_grad():
        x.normal_()
    graph.replay()
    expected = result_and_gradients(by_kernels, x, weight, g)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
@pytest.mark.parametrize('size', [(16, 16), (128, 128)], ids=str)
def test_a_device_that_is_not_the_current_one(size):
    inputs = case(size, BFLOAT)
    expected = result_and_gradients(by_kernels, *inputs)
    others = [t.detach().to('cuda:1') for t in inputs]
    actual = result_and_gradients(by_kernels, *(t.requires_grad_() for t in others))
    assert all(torch.equal(a.cpu(), e.cpu()) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ('shape', 'dtype', 'message'),
    [
        ((1, 4, 4, 1), torch.float32, 'not torch.float32'),
        ((1, 513, 300, 1), torch.bfloat16, '512 cells a side'),
        ((1, 100, 100, 2**18), torch.bfloat16, r'2\*\*30 values'),
        ((2**16, 4, 4, 1), torch.bfloat16, '65535 images'),
        ((1, 4, 4, 1), torch.bfloat16, None),
    ],
)
def test_what_the_kernels_do_not_take(shape, dtype, message):
    x = torch.empty(1, dtype=dtype, device=DEVICE).expand(shape)
    reason = cuda.unsupported_reason(x)
    assert re.search(message, reason) if message else reason is None


@pytest.mark.skipif(ON_GPU, reason='needs a machine without a GPU')
def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(cuda, '_DEVICE', 'cuda')
    assert 'NVIDIA GPU' in cuda.unsupported_reason(torch.empty(1, 4, 4, 1, dtype=BFLOAT))
