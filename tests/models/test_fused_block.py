"""Blocks as one function, with kernels for norms and residual, on a GPU or emulated."""

import copy
import itertools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from emulated_cuda import kernels, shuffled_threads
from filter_oracle import ERRORS, assert_near
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from gfnet_dense.models import GFNetPyramid, cuda, fused_block
from gfnet_dense.models.gfnet import Block
from gfnet_dense.spectral.reference import reference_filter

ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'
FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-6

# Channels that the lanes of a cell share evenly and unevenly, and that one has for itself; so many
# cells that a block of threads processes several turns, and the last is not full.
CASES = [
    (4, (2, 9, 211), FLOAT, BFLOAT),
    (36, (3, 7, 31), FLOAT, FLOAT),
    (96, (2, 9, 11), BFLOAT, BFLOAT),
    (768, (1, 5, 7), HALF, HALF),
]
if ON_GPU:
    channels, types = (64, 96, 192, 384, 512, 768, 1000, 1024), (FLOAT, BFLOAT, HALF)
    CASES += itertools.product(channels, [(2, 67, 45)], types, types)
cases = pytest.mark.parametrize(('channels', 'size', 'map_', 'result'), CASES, ids=str)


@pytest.fixture(autouse=True)
def _kernels():
    with kernels():
        yield


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Return the names of the kernels that are launched."""
    names, launch = [], cuda._launch

    def note(name: str, *args, **options) -> None:
        names.append(name)
        launch(name, *args, **options)

    monkeypatch.setattr(cuda, '_launch', note)
    return names


def draw(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    x = 3 * torch.randn(shape, dtype=torch.float64, device=DEVICE) + 1
    return x.to(dtype)


def truth(function, *inputs: Tensor, g: Tensor) -> list[Tensor]:
    """Return result and gradients of a function in float64."""
    inputs = [t.double().cpu().requires_grad_() for t in inputs]
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs, g.double().cpu())]


def assert_all_near(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert_near([a], [e], ERRORS[a.dtype])


# The kernels


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def normalized(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor) -> list[Tensor]:
    """Return the result of the kernels and its gradients."""
    y, statistics = cuda.normalize(x, weight, bias, EPS, g.dtype)
    sums = cuda.new_sums(x, 3)
    grad_x = cuda.normalize_backward(g, x, weight, statistics, None, sums, 1)
    return [y, grad_x, *sums.sum(0)[1:]]


def norm_case(channels: int, size, map_, result) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, g = draw(*size, channels, dtype=map_), draw(*size, channels, dtype=result)
    return x, draw(channels), draw(channels), g


@cases
def test_layer_norm(channels, size, map_, result):
    x, weight, bias, g = norm_case(channels, size, map_, result)
    assert cuda.unsupported_reason(x) is None
    actual, expected = normalized(x, weight, bias, g), truth(layer_norm, x, weight, bias, g=g)
    assert [t.dtype for t in actual] == [result, map_, FLOAT, FLOAT]
    assert_all_near(actual, expected)
    _, statistics = cuda.normalize(x, weight, bias, EPS, result)
    residual, sums = draw(*x.shape), cuda.new_sums(x, 2)
    actual = cuda.normalize_backward(g, x, weight, statistics, residual, sums, 0)
    assert_near([actual], [expected[1] + residual.double().cpu()], ERRORS[map_])


@cases
def test_add_scaled(channels, size, map_, result):
    x, y, g = draw(*size, channels, dtype=map_), draw(*size, channels, dtype=result), None
    scale, factors, g = draw(channels), draw(len(x)), draw(*x.shape)

    def by_torch(x: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        return x + scale * factors.double().cpu()[:, None, None, None] * (y + bias)

    out, sums = cuda.add_scaled(x, scale, factors, y), cuda.new_sums(x, 2)
    grad_y = cuda.add_scaled_backward(g, scale, factors, y, sums, 0)
    expected, _, *gradients = truth(by_torch, x, scale, y, torch.zeros(channels), g=g)
    grad_scale, grad_bias = sums.sum(0)
    assert_all_near([out, grad_scale, grad_y, grad_bias], [expected, *gradients])
    assert torch.equal(cuda.add_scaled(x, None, None, y), x + y.float())
    grad_y = cuda.add_scaled_backward(g, None, None, y, sums, 0)
    assert torch.equal(grad_y, g.to(result))


@pytest.mark.skipif(ON_GPU, reason='needs the emulation')
def test_any_order_of_threads():
    case = norm_case(96, (2, 9, 11), BFLOAT, BFLOAT)
    results = []
    for seed in (0, 1, 2):
        with shuffled_threads(seed):
            results.append(normalized(*case))
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize('channels', [96, 768, 1000])
@pytest.mark.parametrize(
    ('capability', 'map_', 'result'),
    [(80, FLOAT, BFLOAT), (90, FLOAT, FLOAT), (90, HALF, HALF), (90, BFLOAT, BFLOAT)],
    ids=str,
)
def test_compiles_for_a_gpu(channels, capability, map_, result):
    pytest.importorskip('cuda.bindings')
    options = ['-std=c++17', f'--gpu-architecture=sm_{capability}']
    definitions = cuda._definitions(channels, map_, result)
    options += [f'-D{macro}={value}' for macro, value in definitions.items()]
    assert cuda.driver.compile_source(cuda._SOURCE, options).startswith(b'\x7fELF')
    assert cuda._shared(channels) <= 48 * 1024  # what a block has without asking for more


# Blocks

KERNELS = Counter(normalize=2, add_scaled=1)
BACKWARD = Counter(normalize_backward=2, add_scaled_backward=1)


def make_block(dim: int = 4, drop_path: float = 0.0, gamma: float | None = 0.5) -> Block:
    block = Block(dim, (6, 5), 'bilinear', 'auto', drop_path, gamma).to(DEVICE)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return block


def autocast(dtype: torch.dtype = BFLOAT, enabled: bool = True):
    return torch.autocast(DEVICE, dtype, enabled)


def step(block: nn.Module, x: Tensor, g: Tensor, **options) -> list[Tensor]:
    """Return result and gradients of a block."""
    x = x.detach().requires_grad_()
    with autocast(**options):
        y = block(x)
    return [y, *torch.autograd.grad(y, [x, *block.parameters()], g)]


def by_definition(block: Block, x: Tensor, factors: Tensor | None = None) -> Tensor:
    """Compute a block in float64."""
    y = block.norm2(reference_filter(block.norm1(x), block.filter.spectrum(x.shape[1:3])))
    y = block.mlp.fc2(F.gelu(block.mlp.fc1(y)))
    if factors is not None:
        y = y * factors
    return x + (y if block.gamma is None else block.gamma * y)


@pytest.mark.parametrize('gamma', [0.5, None])
@pytest.mark.parametrize('dtype', [FLOAT, BFLOAT])
@pytest.mark.parametrize('size', [(6, 5), (9, 8)], ids=str)
def test_a_block(launched, gamma, dtype, size):
    block, x, g = make_block(gamma=gamma), draw(3, *size, 4), draw(3, *size, 4)
    actual = step(block, x, g, enabled=dtype == BFLOAT)
    assert Counter(launched) == KERNELS + BACKWARD
    assert {t.dtype for t in actual} == {FLOAT}
    exact = copy.deepcopy(block).double().cpu()
    x = x.double().cpu().requires_grad_()
    y = by_definition(exact, x)
    expected = [y, *torch.autograd.grad(y, [x, *exact.parameters()], g.double().cpu())]
    # Several roundings to bfloat16 add up.
    assert_near(actual, expected, 1e-5 if dtype == FLOAT else 5 * ERRORS[BFLOAT])
    launched.clear()
    with torch.no_grad(), autocast(enabled=dtype == BFLOAT):
        assert torch.equal(block(x.to(DEVICE, FLOAT)), actual[0])
    assert Counter(launched) == KERNELS


def test_16_bit_maps_between_stages(launched):
    block, x = make_block(), draw(2, 6, 5, 4, dtype=BFLOAT).requires_grad_()
    with autocast():
        y = block(x)
    assert y.dtype == FLOAT and launched
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.dtype == BFLOAT
    exact = copy.deepcopy(block).double().cpu()
    expected = truth(lambda x: by_definition(exact, x), x.detach(), g=torch.ones_like(y))
    assert_near([y, grad], expected, 5 * ERRORS[BFLOAT])


def test_drop_path(launched, monkeypatch):
    block, x, g = make_block(drop_path=0.5), draw(64, 6, 5, 4), draw(64, 6, 5, 4)

    def steps() -> list[Tensor]:
        torch.manual_seed(0)
        results = step(block, x, g, enabled=False)
        with torch.no_grad():
            return [*results, block(x), block.eval()(x), block.train()(x)]

    actual = steps()
    assert Counter(launched) == KERNELS + KERNELS + KERNELS + KERNELS + BACKWARD
    dropped = (actual[0] == x).flatten(1).all(1).sum()
    assert 16 < dropped < 48
    monkeypatch.setattr(fused_block, 'run', lambda *_: None)
    assert_near(actual, [t.double().cpu() for t in steps()], 1e-5)


def test_strides_and_addresses():
    block, x, g = make_block(), draw(2, 6, 5, 4), draw(2, 6, 5, 4)
    expected = step(block, x, g)
    strided = (t.movedim(-1, 1).contiguous().movedim(1, -1) for t in (x, g))
    assert all(map(torch.equal, expected, step(block, *strided)))

    def shifted(t: Tensor) -> Tensor:  # to an address that is no multiple of 16
        return torch.cat([t.new_zeros(2), t.flatten()])[2:].view(t.shape)

    for parameter in block.parameters():
        parameter.data = shifted(parameter.data)
    assert all(map(torch.equal, expected, step(block, shifted(x), shifted(g))))


@pytest.mark.parametrize('enabled', [False, True])
def test_backward_under_autocast(enabled):
    block, x, g = make_block(), draw(2, 6, 5, 4), draw(2, 6, 5, 4)
    expected = step(block, x, g, enabled=enabled)
    x = x.requires_grad_()
    with autocast(enabled=enabled):
        y = block(x)
    with autocast():
        actual = torch.autograd.grad(y, [x, *block.parameters()], g)
    assert all(map(torch.equal, expected[1:], actual))


def gradients_of_gradients(function, x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    x = x.requires_grad_()
    inputs = [x, *parameters]
    first = torch.autograd.grad(function(x).square().sum(), inputs, create_graph=True)
    return [*torch.autograd.grad(sum(t.square().sum() for t in first), inputs)]


def test_second_derivatives():
    block, x = make_block(), draw(2, 6, 5, 4)
    actual = gradients_of_gradients(block, x, [*block.parameters()])
    exact = copy.deepcopy(block).double().cpu()
    expected = gradients_of_gradients(
        lambda x: by_definition(exact, x), x.detach().double().cpu(), [*exact.parameters()]
    )
    assert_near(actual, expected, 2e-5)


def test_second_derivatives_of_inputs_that_depend_on_each_other():
    block, x = make_block(), 0.3 * draw(2, 6, 5, 4)
    block.norm2 = block.norm1

    def twice(block: nn.Module, x: Tensor) -> Tensor:
        return block(block(x))

    exact = copy.deepcopy(block).double().cpu()
    parameters = [*dict.fromkeys(block.parameters())]
    actual = gradients_of_gradients(lambda x: twice(block, x), x, parameters)
    expected = gradients_of_gradients(
        lambda x: by_definition(exact, by_definition(exact, x)),
        x.detach().double().cpu(),
        [*dict.fromkeys(exact.parameters())],
    )
    assert_near(actual, expected, 1e-4)


def test_tangents_of_gradients():
    block, x = make_block(), draw(2, 6, 5, 4).requires_grad_()
    y, g, t = block(x), draw(2, 6, 5, 4), draw(2, 6, 5, 4)
    with forward_ad.dual_level():
        (grad,) = torch.autograd.grad(y, x, forward_ad.make_dual(g, t), retain_graph=True)
        tangent = forward_ad.unpack_dual(grad).tangent
    (expected,) = torch.autograd.grad(y, x, t)
    assert_near([tangent], [expected.double().cpu()], 1e-4)


def test_batched_gradients(launched):
    """As in `torch.autograd.functional.jacobian(..., vectorize=True)`."""
    block, x = make_block(), draw(2, 6, 5, 4).requires_grad_()
    y, inputs = block(x), [x, *block.parameters()]
    assert launched
    g = draw(3, *y.shape)
    batched = torch.autograd.grad(y, inputs, g, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        single = torch.autograd.grad(y, inputs, g[i], retain_graph=True)
        assert_near([b[i] for b in batched], [t.double().cpu() for t in single], 1e-5)


def test_frozen_parameters(launched):
    block = make_block().requires_grad_(False)
    x = draw(2, 6, 5, 4).requires_grad_()
    block(x).sum().backward()
    assert launched == [] and x.grad is not None
    y = block(x.detach())  # all are frozen
    assert Counter(launched) == KERNELS and not y.requires_grad
    launched.clear()
    block.norm1.requires_grad_()
    block(x.detach()).sum().backward()
    assert launched == [] and block.norm1.weight.grad is not None
    block.requires_grad_()
    block(x.detach()).sum().backward()
    assert Counter(launched) == KERNELS + BACKWARD
    assert all(p.grad is not None for p in block.parameters())


def test_saved_maps_come_back_with_other_strides(launched):
    """As hooks may return them that keep saved tensors elsewhere."""

    def elsewhere(t: Tensor) -> Tensor:
        return (
            torch.cat([t.new_zeros(1), t.mT.flatten()])[1:].view(t.mT.shape).mT if t.ndim > 1 else t
        )

    block, x, g = make_block(), draw(2, 6, 5, 4), draw(2, 6, 5, 4)
    expected = step(block, x, g)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, elsewhere):
        assert all(map(torch.equal, expected, step(block, x, g)))
    assert Counter(launched) == KERNELS + KERNELS + BACKWARD + BACKWARD


@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_network_trains_as_layer_by_layer(launched, monkeypatch, checkpointing):
    torch.manual_seed(0)
    arch = dict(embed_dims=(4, 4), depths=(1, 2), patch_size=4, layer_scale_init_value=0.5)
    model = GFNetPyramid(arch, img_size=32, num_classes=0).to(DEVICE)
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(2, 3, 32, 32, device=DEVICE)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with autocast():
            y = model(images)[-1]
        y.float().square().sum().backward()
        return [y, *(p.grad for p in model.parameters() if p.grad is not None)]

    actual = gradients()
    forwards = 2 if checkpointing else 1  # of three blocks
    forward, backward = [*KERNELS.elements()], [*BACKWARD.elements()]
    assert Counter(launched) == Counter(3 * forwards * forward + 3 * backward)
    monkeypatch.setattr(fused_block, 'run', lambda *_: None)
    assert_near(actual, [t.double().cpu() for t in gradients()], 0.05)


# What runs layer by layer


class Adapter(nn.Linear):
    """Stands for a layer that somebody has put in."""


def set_class(layer: nn.Module, kind: type) -> None:
    layer.__class__ = kind


def set_parameter(layer: nn.Module, name: str, *shape: int) -> None:
    setattr(layer, name, nn.Parameter(torch.ones(shape, device=DEVICE)))


def ignore(*_) -> None:
    pass


# What is done to a block, and why its layers run then.
CHANGES = {
    'forward hook': (lambda b: b.filter.register_forward_hook(ignore), 'filter has hooks'),
    'pre-hook': (lambda b: b.mlp.act.register_forward_pre_hook(ignore), 'act has hooks'),
    'backward hook': (lambda b: b.mlp.register_full_backward_hook(ignore), 'mlp has hooks'),
    'backward pre-hook': (
        lambda b: b.mlp.fc2.register_full_backward_pre_hook(ignore),
        'fc2 has hooks',
    ),
    'forward': (lambda b: setattr(b.filter, 'forward', lambda x: 2 * x), 'filter has a forward'),
    'compile': (lambda b: b.norm2.compile(backend='eager'), 'norm2 has a forward'),
    'adapter': (lambda b: set_class(b.mlp.fc1, Adapter), 'fc1 is a Adapter'),
    'parametrisation': (
        lambda b: nn.utils.parametrizations.weight_norm(b.mlp.fc2),
        'fc2 is a Parametrized',
    ),
    'pruning': (lambda b: prune.l1_unstructured(b.mlp.fc1, 'weight', 0.5), 'fc1 has hooks'),
    'no MLP': (lambda b: setattr(b, 'mlp', nn.Identity()), 'mlp is a Identity'),
    'first dropout': (lambda b: setattr(b.mlp.drop1, 'p', 0.5), 'dropout'),
    'second dropout': (lambda b: setattr(b.mlp.drop2, 'p', 0.5), 'dropout'),
    'first fast norm': (lambda b: setattr(b.norm1, '_fast_norm', True), 'fast norm'),
    'second fast norm': (lambda b: setattr(b.norm2, '_fast_norm', True), 'fast norm'),
    'backend': (lambda b: setattr(b.filter, 'backend', 'fft'), "filter_backend is 'fft'"),
    '16-bit parameter': (lambda b: b.filter.bfloat16(), 'must be float32'),
    'no bias': (lambda b: setattr(b.mlp.fc2, 'bias', None), 'must be float32'),
    'shared scale': (lambda b: set_parameter(b, 'gamma', 1), 'another shape'),
    'shared bias': (lambda b: set_parameter(b.mlp.fc1, 'bias', 1), 'another shape'),
    'shape of norm1': (lambda b: set_parameter(b.norm1, 'weight', 2), 'another shape'),
    'shape of norm2': (lambda b: set_parameter(b.norm2, 'bias', 8), 'another shape'),
    'shape of fc1': (lambda b: set_parameter(b.mlp.fc1, 'weight', 16, 8), 'another shape'),
    'shape of fc2': (lambda b: set_parameter(b.mlp.fc2, 'weight', 8, 16), 'another shape'),
    'shape of filter': (
        lambda b: set_parameter(b.filter, 'complex_weight', 9, 2, 4, 2),
        'another shape',
    ),
    'frozen norm': (lambda b: b.norm1.requires_grad_(False), 'frozen'),
}


@pytest.mark.parametrize('what', CHANGES)
def test_changed_blocks(launched, what):
    block, (change, reason) = make_block(), CHANGES[what]
    change(block)
    x = draw(2, 6, 5, 4)
    assert reason in fused_block._prepare(block, x)
    if 'shape of' in what:  # the layers report it
        with pytest.raises((RuntimeError, ValueError)):
            block(x)
    else:
        with autocast():
            block(x)
    assert launched == []


def test_maps_that_do_not_fit(launched, caplog):
    block, x = make_block(), draw(2, 6, 5, 4)
    for map_, reason in (
        (x[0], 'not 3'),
        (x[None], 'not 5'),
        (x[:0], '1 to 2'),
        (draw(2, 6, 5, 6), 'not 6'),
        (x.double(), 'not torch.float64'),
        (x.bfloat16(), 'need autocast'),
    ):
        assert reason in fused_block._prepare(block, map_)
    with autocast():
        assert 'LayerScale' in fused_block._prepare(make_block(gamma=None), x.bfloat16())
    caplog.set_level('INFO', 'gfnet_dense')
    fused_block._log_once.cache_clear()
    for _ in range(2):
        make_block(6)(draw(2, 6, 5, 6))
    assert [record.getMessage() for record in caplog.records] == [
        'Blocks run layer by layer: it supports 4, 8, ... 1024 channels, not 6'
    ]
    assert launched == []


def test_changed_scale_and_settings(launched, monkeypatch):
    block, x, g = make_block(), draw(2, 6, 5, 4), draw(2, 6, 5, 4)
    prune.l1_unstructured(block, 'gamma', 0.5)
    block.norm2.eps = 0.5
    block.mlp.act = nn.GELU('tanh')
    block.drop_path.drop_prob = 0.5
    block.eval().drop_path.train()

    def steps() -> list[Tensor]:
        torch.manual_seed(1)
        return step(block, x, g, enabled=False)

    actual = steps()
    assert Counter(launched) == KERNELS + BACKWARD
    monkeypatch.setattr(fused_block, 'run', lambda *_: None)
    assert_near(actual, [t.double().cpu() for t in steps()], 1e-5)


def test_other_ways_to_run(launched):
    block, x = make_block(), draw(2, 6, 5, 4)
    with forward_ad.dual_level():
        y = block(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(y).tangent is not None
    torch.func.grad(lambda x: block(x).sum())(x)
    torch.func.vmap(block, randomness='same')(x[None])
    with FlopCounterMode(display=False) as counter:
        block(x)
    assert counter.get_total_flops() > 0
    torch.compile(block, backend='eager', fullgraph=True)(x)
    handle = nn.modules.module.register_module_forward_hook(ignore)
    block(x)
    handle.remove()
    assert launched == []


def test_backbones_of_openmmlab(launched):
    """Frozen stages run as one function, too, and so do averaged and synchronised models."""
    pytest.importorskip('mmengine')
    from mmengine.model import ExponentialMovingAverage

    from gfnet_dense.openmmlab import GFNetPyramid as Backbone

    arch = dict(embed_dims=(4, 4), depths=(1, 1), patch_size=4, layer_scale_init_value=0.5)
    model = Backbone(arch=arch, img_size=32, frozen_stages=1, norm_eval=True, with_cp=True)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model.to(DEVICE)).train()
    images = torch.randn(2, 3, 32, 32, device=DEVICE)
    with autocast():
        outputs = model(images)
    sum(y.float().sum() for y in outputs).backward()
    # The second block runs again for its backward pass.
    assert Counter(launched) == KERNELS + KERNELS + KERNELS + BACKWARD
    launched.clear()
    with torch.no_grad(), autocast():
        ExponentialMovingAverage(model)(images)
    assert Counter(launched) == KERNELS + KERNELS
