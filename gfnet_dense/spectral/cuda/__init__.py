"""The global filter in CUDA C++, for 16-bit maps on NVIDIA GPUs: the backend 'fused'.

Transforms are matrix products on tensor cores; `tiles.h` says how, and :mod:`.folded` explains the
algebra in plain torch. Small maps are read once and written once (:mod:`.maps`); larger ones leave
their coefficients in memory between passes (:mod:`.strips`). :mod:`.driver` compiles the kernels on
first use. The backward pass keeps the map and the spectrum.
"""

import functools

import torch
from torch import Tensor

from ..tracing import is_plain, operator_unsupported_reason
from . import driver, maps, strips
from .blocks import LARGEST_SIDE, fits_integers, whole_channels

_DEVICE = 'cuda'


def unsupported_reason(x: Tensor) -> str | None:
    """Say why maps like `x` cannot be filtered here; None if they can."""
    if reason := operator_unsupported_reason():
        return reason
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f'it supports float16 and bfloat16, not {x.dtype}'
    if x.device.type != _DEVICE:
        return 'it needs an NVIDIA GPU'
    if reason := _device_reason(x.device.index):
        return reason
    batch, height, width, channels = x.shape
    if batch >= 2**16 or not fits_integers(height, width, channels):
        return 'it supports up to 65535 images of 2**30 values'
    if max(height, width) > LARGEST_SIDE:
        return f'it supports maps of up to {LARGEST_SIDE} cells a side'
    return None


_cached_reason = functools.cache(driver.unsupported_reason)


@torch.compiler.assume_constant_result
def _device_reason(device: int) -> str | None:
    return _cached_reason(device)


NAMESPACE = __name__.replace('.', '_')
_LIBRARY = torch.library.Library(NAMESPACE, 'DEF')
for _schema in (
    'filter(Tensor x, Tensor weight, bool conjugate) -> Tensor',
    'correlate(Tensor g, Tensor x) -> Tensor',
    'adjoint(Tensor g, Tensor x, Tensor weight) -> (Tensor, Tensor)',
):
    _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
_OPERATORS = getattr(torch.ops, NAMESPACE)


def filter(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    run = _filter if is_plain(x, weight) else _OPERATORS.filter.default
    return run(x, weight, conjugate)


def correlate(g: Tensor, x: Tensor) -> Tensor:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    run = _correlate if is_plain(g, x) else _OPERATORS.correlate.default
    return run(g, x)


def adjoint(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    run = _adjoint if is_plain(g, x, weight) else _OPERATORS.adjoint.default
    return run(g, x, weight)


def _filter(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    with torch.cuda.device_of(x):
        if _whole_channels(x):
            return maps.filter(x, weight, conjugate)
        return strips.filter(strips.transform(x), weight, conjugate)


def _correlate(g: Tensor, x: Tensor) -> Tensor:
    with torch.cuda.device_of(x):
        if _whole_channels(x) == 16:  # with fewer strips are faster
            return maps.correlate(g, x)
        return strips.correlate(strips.transform(g), strips.transform(x))


def _adjoint(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(x):
        if _whole_channels(x) == 16:
            return maps.filter(g, weight, True), maps.correlate(g, x)
        of_g = strips.transform(g)
        grad_weight = strips.correlate(of_g, strips.transform(x))
        return strips.filter(of_g, weight, True), grad_weight


def _whole_channels(x: Tensor) -> int:
    _, height, width, _ = x.shape
    return whole_channels(height, width, driver.shared_memory(x.device.index))


_LIBRARY.impl('filter', _filter, 'CUDA')
_LIBRARY.impl('correlate', _correlate, 'CUDA')
_LIBRARY.impl('adjoint', _adjoint, 'CUDA')


@torch.library.register_fake(f'{NAMESPACE}::filter', lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake(f'{NAMESPACE}::correlate', lib=_LIBRARY)
def _(g: Tensor, x: Tensor) -> Tensor:
    _, height, width, channels = x.shape
    return x.new_empty((height, width // 2 + 1, channels, 2), dtype=torch.float32)


@torch.library.register_fake(f'{NAMESPACE}::adjoint', lib=_LIBRARY)
def _(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)
