"""The cell-wise part of a block: slices and 1x1 convolutions against plain modules."""

import os
import subprocess
import sys

import pytest
import timm.layers
import torch
from torch import nn

from gfnet_dense.models import mlp
from gfnet_dense.models.gfnet import Block


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    block = Block(96, (7, 7), 'bilinear', 'auto', 0.1, 0.5).eval()
    nn.init.normal_(block.mlp.fc1.bias)
    return block


def whole(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Compute a block by its formula, in float64."""
    block = block.double()
    x = x.double()
    return x + block.gamma * timm.layers.Mlp.forward(
        block.mlp, block.norm2(block.filter(block.norm1(x)))
    )


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """Record how many cells each call of the activation gets, without a hook."""
    seen: list[int] = []
    forward = nn.GELU.forward

    def record(self: nn.GELU, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[:-1].numel())
        return forward(self, x)

    monkeypatch.setattr(nn.GELU, 'forward', record)
    return seen


# 70 x 80 cells make 3 slices of different sizes; 70 x 20 are too few.
@pytest.mark.parametrize(('width', 'slices'), [(80, 3), (20, 1)])
def test_evaluation_computes_large_maps_in_slices(
    block: Block, seen: list[int], width: int, slices: int
) -> None:
    x = torch.randn(1, 70, width, 96)
    with torch.no_grad():
        y = block(x)
        assert len(seen) == slices
        assert sum(seen) == 70 * width
        torch.testing.assert_close(y.double(), whole(block, x), rtol=1e-5, atol=1e-5)


def test_slices_take_maps_of_any_strides_and_16_bits(block: Block) -> None:
    x = torch.randn(2, 96, 70, 80).permute(0, 2, 3, 1)
    with torch.no_grad():
        torch.testing.assert_close(block(x), block(x.contiguous()), rtol=1e-5, atol=1e-5)
        with torch.autocast('cpu', torch.bfloat16):
            y = block(x)
        torch.testing.assert_close(y, block(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    'reason', ['gradients', 'training', 'hook', 'pre-hook', 'hook on all', 'forward', 'neighbours']
)
def test_whole_maps_where_slices_would_show(
    block: Block, seen: list[int], reason: str, monkeypatch
) -> None:
    x = torch.randn(1, 70, 80, 96)
    block.train(reason == 'training')
    if reason == 'hook on all':
        hooks = nn.modules.module._global_forward_hooks
        monkeypatch.setitem(hooks, 0, lambda module, args, y: None)
    if reason == 'forward':
        block.mlp.fc2.forward = block.mlp.fc2.forward
    if reason == 'neighbours':  # it also mixes cells
        block.mlp = timm.layers.GlobalResponseNormMlp(96, 4 * 96)
    if reason == 'hook':
        block.mlp.fc1.register_forward_hook(lambda module, args, y: None)
    if reason == 'pre-hook':
        block.norm2.register_forward_pre_hook(lambda module, args: None)
    with torch.set_grad_enabled(reason == 'gradients'):
        block(x)
    assert seen == [70 * 80]


@pytest.mark.parametrize('shape', [(5, 7, 8), (1, 1, 8), (9, 8)])
def test_convolution_is_the_linear_layer(shape: tuple[int, ...], monkeypatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(mlp, 'is_onednn_wider', lambda: True)
    layer = mlp.Mlp(8, 32)
    x = torch.randn(shape, requires_grad=True)
    expected = timm.layers.Mlp.forward(layer.double(), x.double())
    gradients = torch.autograd.grad(expected.square().sum(), [x, *layer.parameters()])
    y = layer.float()(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    actual = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    for g, e in zip(actual, gradients, strict=True):
        torch.testing.assert_close(g.double(), e.double(), rtol=1e-5, atol=1e-5)


def test_only_plain_float32_layers_on_a_cpu_run_as_convolutions(monkeypatch) -> None:
    called: list[torch.Tensor] = []
    monkeypatch.setattr(mlp, 'is_onednn_wider', lambda: True)
    convolve = mlp._convolve
    monkeypatch.setattr(
        mlp, '_convolve', lambda x, *layer: called.append(layer[0]) or convolve(x, *layer)
    )
    layer, x = mlp.Mlp(8, 32), torch.randn(2, 3, 3, 8)
    layer(x)
    assert [w.shape for w in called] == [(32, 8), (8, 32)]
    called.clear()
    with torch.autocast('cpu', torch.bfloat16):
        layer(x)
    layer.double()(x.double())
    layer.float()
    torch.compile(layer, backend='eager', fullgraph=True)(x)
    torch.jit.trace(layer, x, check_trace=False)
    torch.fx.symbolic_trace(layer)(x)

    class Adapter(nn.Linear):
        pass

    layer.fc1 = Adapter(8, 32)
    layer(x)
    assert not called


@pytest.mark.parametrize(
    'change',
    [
        lambda layer: layer.fc1.register_forward_hook(lambda module, args, y: torch.ones_like(y)),
        lambda layer: setattr(layer.fc2, 'forward', lambda x: x[..., :8] + 1),
        lambda layer: setattr(layer, 'norm', nn.LayerNorm(32)),
        lambda layer: setattr(layer.drop1, 'p', 1.0),
    ],
    ids=['hook', 'forward', 'norm', 'dropout'],
)
def test_convolutions_leave_nothing_out(change, monkeypatch) -> None:
    monkeypatch.setattr(mlp, 'is_onednn_wider', lambda: True)
    layer, x = mlp.Mlp(8, 32).train(), torch.randn(2, 3, 3, 8)
    plain = layer(x)
    change(layer)
    y = layer(x)
    torch.testing.assert_close(y, timm.layers.Mlp.forward(layer, x))
    assert not torch.allclose(y, plain)
    assert layer(x[:0]).shape == (0, 3, 3, 8)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != 'AVX512' or not torch.backends.mkl.is_available(),
    reason='needs AVX-512 and MKL',
)
@pytest.mark.slow
def test_mkl_tells_its_instructions() -> None:
    # This variable of MKL keeps it from AVX-512, as a processor of another vendor does.
    script = 'from gfnet_dense.models.mlp import is_onednn_wider; print(is_onednn_wider())'
    environment = {**os.environ, 'MKL_ENABLE_INSTRUCTIONS': 'AVX2'}
    done = subprocess.run(
        [sys.executable, '-c', script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == 'True'
