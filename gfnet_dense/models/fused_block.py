"""A whole block as one autograd function, for NVIDIA GPUs.

Layer by layer, autocast casts maps between 16 bits and float32 around both norms and the residual,
in both passes, and every operator is a node for autograd. Here norms and residual are the kernels
of :mod:`.cuda`, which need no casts, and the block is one node.

:func:`run` is strict: a block with hooks or with other layers than its own runs layer by layer. So
do blocks in compiled, exported or traced graphs, under `torch.func`, in forward-mode derivatives
and under dispatch modes, which need to see torch's operators.
"""

import functools
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from torch import Tensor
from torch.autograd import Function

from gfnet_dense.spectral import select_backend
from gfnet_dense.spectral.autograd import Backend, differentiable_filter
from gfnet_dense.spectral.cuda import driver
from gfnet_dense.spectral.tracing import is_capturing, is_in_forward_mode, is_plain

from . import cuda
from .global_filter import GlobalFilter
from .mlp import CELL_LAYERS, change_of, layers_of

if TYPE_CHECKING:
    from .gfnet import Block


class _Inputs(NamedTuple):
    """What the result of a block depends on: its input and its parameters."""

    x: Tensor
    spectrum: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    gamma: Tensor | None


class _Settings(NamedTuple):
    dtype: torch.dtype  # of the maps between the layers
    eps1: float
    eps2: float
    backend: str
    gelu: str  # approximation
    factors: Tensor | None  # of images, from drop path


_LAYERS = dict(norm1=LayerNorm, filter=GlobalFilter, **CELL_LAYERS)  # of a block and of its MLP


def run(block: 'Block', x: Tensor) -> Tensor | None:
    """Process a map `(B, H, W, C)` as the layers of a block do; None if they have to do it.

    The result is float32. On an NVIDIA GPU the log says once why layers have to do it.
    """
    if type(x) is not Tensor or is_capturing() or x.device.type != cuda.DEVICE:
        return None
    if isinstance(prepared := _prepare(block, x), str):
        _log_once(prepared)
        return None
    settings, inputs = prepared
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _FusedBlock.apply(settings, *inputs)
    return _infer(settings, inputs)


@functools.cache
def _log_once(reason: str) -> None:
    logging.getLogger(__name__).info('Blocks run layer by layer: %s', reason)


def _prepare(block: 'Block', x: Tensor) -> tuple[_Settings, _Inputs] | str:
    """Return what the function works with, or why the layers have to do it."""
    if reason := cuda.unsupported_reason(x):
        return reason
    if isinstance(layers := _own_layers(block), str):
        return layers
    is_autocast = torch.is_autocast_enabled(x.device.type)
    gamma = block.gamma
    if x.dtype != torch.float32 and not is_autocast:
        return '16-bit maps need autocast'
    if x.dtype != torch.float32 and gamma is None:
        return 'without LayerScale the sum of 16-bit maps has 16 bits'
    # From their dicts, since attributes of modules take many times as long.
    spectrum = layers['filter']._parameters.get('complex_weight')
    parameters = [
        layers[name]._parameters.get(key)
        for name in ('norm1', 'norm2', 'fc1', 'fc2')
        for key in ('weight', 'bias')
    ]
    tensors = [spectrum, *parameters, *(() if gamma is None else (gamma,))]
    if any(t is None or t.dtype != torch.float32 or t.device != x.device for t in tensors):
        return 'parameters must be float32, on the device of the map, and not computed'
    if is_in_forward_mode() or not is_plain(x, *tensors):
        return 'torch transforms the call'
    trained = [t.requires_grad for t in tensors]
    if torch.is_grad_enabled() and (x.requires_grad or any(trained)) and not all(trained):
        return 'layers skip the gradients of frozen parameters'

    if x.ndim != 4:
        return f'maps have 4 dimensions, not {x.ndim}'
    spectrum = layers['filter'].spectrum((x.shape[1], x.shape[2]))
    inputs = _Inputs._make((x, spectrum, *parameters, gamma))
    if not _fits(inputs):
        return 'a parameter has another shape than that of a new block'
    drop_path, factors = layers['drop_path'], None
    if drop_path.training and drop_path.drop_prob:
        factors = drop_path(x.new_ones((len(x), 1, 1, 1), dtype=torch.float32)).flatten()
    settings = _Settings(
        torch.get_autocast_dtype(x.device.type) if is_autocast else torch.float32,
        layers['norm1'].eps,
        layers['norm2'].eps,
        layers['filter'].backend,
        layers['act'].approximate,
        factors,
    )
    return settings, inputs


def _fits(i: _Inputs) -> bool:
    """Tell whether the shapes of parameters are those of a block for maps like its input."""
    _, height, width, channels = i.x.shape
    of_channels = i.norm1_weight, i.norm1_bias, i.norm2_weight, i.norm2_bias, i.fc2_bias
    hidden = i.fc1_weight.shape[:1]
    return (
        all(t.shape == (channels,) for t in of_channels)
        and (i.gamma is None or i.gamma.shape == (channels,))
        and i.spectrum.shape == (height, width // 2 + 1, channels, 2)
        and i.fc1_weight.shape == (*hidden, channels)
        and i.fc1_bias.shape == hidden
        and i.fc2_weight.shape == (channels, *hidden)
    )


def _own_layers(block: 'Block') -> dict[str, Any] | str:
    """Return the layers of a block by name, or why a function cannot stand for them."""
    layers = layers_of(block)
    if reason := change_of(layers, _LAYERS):
        return reason
    if layers['norm1']._fast_norm or layers['norm2']._fast_norm:
        return "timm's fast norm is on"
    if layers['filter'].backend not in ('auto', 'fused'):
        return f"its filter_backend is {layers['filter'].backend!r}, not 'auto' or 'fused'"
    return layers


def _infer(s: _Settings, i: _Inputs) -> Tensor:
    """Compute a block without gradients. Free each map once the next one is computed."""
    y, _ = cuda.normalize(i.x, i.norm1_weight, i.norm1_bias, s.eps1, s.dtype)
    y = select_backend(y, s.backend).filter(y, i.spectrum, False)
    y, _ = cuda.normalize(y, i.norm2_weight, i.norm2_bias, s.eps2, s.dtype)
    y = F.linear(y, i.fc1_weight.to(s.dtype), i.fc1_bias.to(s.dtype))
    y = F.gelu(y, approximate=s.gelu)
    y = F.linear(y, i.fc2_weight.to(s.dtype), i.fc2_bias.to(s.dtype))
    return cuda.add_scaled(i.x, i.gamma, s.factors, y)


def _by_layers(s: _Settings, i: _Inputs) -> Tensor:
    """Compute a block from differentiable operators."""
    channels = i.x.shape[-1:]
    y = F.layer_norm(i.x.float(), channels, i.norm1_weight, i.norm1_bias, s.eps1).to(s.dtype)
    y = differentiable_filter(select_backend(y, s.backend), y, i.spectrum)
    y = F.layer_norm(y.float(), channels, i.norm2_weight, i.norm2_bias, s.eps2).to(s.dtype)
    y = F.linear(y, i.fc1_weight.to(s.dtype), i.fc1_bias.to(s.dtype))
    y = F.gelu(y, approximate=s.gelu)
    y = F.linear(y, i.fc2_weight.to(s.dtype), i.fc2_bias.to(s.dtype)).float()
    if s.factors is not None:
        y = y * s.factors[:, None, None, None]
    return i.x + (y if i.gamma is None else i.gamma * y)


class _FusedBlock(Function):
    @staticmethod
    def forward(ctx: Any, s: _Settings, *inputs: Tensor | None) -> Tensor:
        i = _Inputs._make(inputs)
        normal1, statistics1 = cuda.normalize(i.x, i.norm1_weight, i.norm1_bias, s.eps1, s.dtype)
        ctx.backend = select_backend(normal1, s.backend)
        filtered = ctx.backend.filter(normal1, i.spectrum, False)
        normal2, statistics2 = cuda.normalize(
            filtered, i.norm2_weight, i.norm2_bias, s.eps2, s.dtype
        )
        # Weights in the dtype of the maps are kept, as autocast keeps them.
        fc1, fc2 = i.fc1_weight.to(s.dtype), i.fc2_weight.to(s.dtype)
        hidden = F.linear(normal2, fc1, i.fc1_bias.to(s.dtype))
        activated = F.gelu(hidden, approximate=s.gelu)
        y = F.linear(activated, fc2, i.fc2_bias.to(s.dtype))
        maps = normal1, filtered, normal2, hidden, activated, y
        ctx.save_for_backward(*inputs, statistics1, statistics2, fc1, fc2, *maps)
        ctx.settings = s
        return cuda.add_scaled(i.x, i.gamma, s.factors, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved, count = ctx.saved_tensors, len(_Inputs._fields)
        s, inputs = ctx.settings, _Inputs._make(saved[:count])
        # Under autocast products would get another dtype than in the forward pass.
        with torch.autocast(g.device.type, enabled=False):
            if torch.is_grad_enabled() or is_in_forward_mode() or not is_plain(g):
                return None, *_differentiate(s, inputs, g, ctx.needs_input_grad[1:])
            return None, *_backward(s, ctx.backend, inputs, saved[count:], g)


def _backward(
    s: _Settings, backend: Backend, i: _Inputs, saved: tuple[Tensor, ...], g: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs."""
    statistics1, statistics2, fc1, fc2, *maps = saved
    normal1, filtered, normal2, hidden, activated, y = maps
    g, sums = driver.readable(g), cuda.new_sums(i.x, 6)
    grad = cuda.add_scaled_backward(g, i.gamma, s.factors, y, sums, 0)
    grad, grad_fc2 = _linear_backward(grad, activated, fc2)
    grad = torch.ops.aten.gelu_backward(grad, hidden, approximate=s.gelu)
    grad_fc1_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32)
    grad, grad_fc1 = _linear_backward(grad, normal2, fc1)
    grad = cuda.normalize_backward(grad, filtered, i.norm2_weight, statistics2, None, sums, 2)
    grad, grad_spectrum = backend.adjoint(grad, normal1, i.spectrum)
    grad = cuda.normalize_backward(grad, i.x, i.norm1_weight, statistics1, g, sums, 4)
    gamma, fc2_bias, norm2_weight, norm2_bias, norm1_weight, norm1_bias = sums.sum(0)
    return _Inputs(
        grad,
        grad_spectrum,
        norm1_weight,
        norm1_bias,
        norm2_weight,
        norm2_bias,
        grad_fc1,
        grad_fc1_bias,
        grad_fc2,
        fc2_bias,
        None if i.gamma is None else gamma,
    )


def _linear_backward(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of a linear layer: of x in its dtype, of the weight in float32."""
    rows = g.flatten(0, -2)
    return (rows @ weight).view(x.shape), (rows.T @ x.flatten(0, -2)).float()


def _differentiate(
    s: _Settings, inputs: _Inputs, g: Tensor, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Return gradients that have derivatives, of the inputs that need them."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # x may have been computed from the same parameters. With views the gradients stop at this
        # block and do not follow that path, too.
        i = _Inputs._make(None if t is None else t.view_as(t) for t in inputs)
        y = _by_layers(s, i)
    wanted: Any = [t for t, is_needed in zip(i, needed, strict=True) if is_needed]
    grads = iter(torch.autograd.grad(y, wanted, g, create_graph=create_graph))
    return [next(grads) if is_needed else None for is_needed in needed]
