"""The filter of maps of which some channels fit on the chip whole, by the kernels of `maps.cu`."""

import math

import torch
from torch import Tensor

from . import driver
from .blocks import address, basis_of, kernel_for

# Bytes of gradients, one for each image, that are made before they are added up.
_GRADIENTS = 2**27


def filter(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    x, weight = driver.readable(x), driver.readable(weight)
    y = torch.empty_like(x)
    kernel, blocks = kernel_for('filter_maps', x)
    bases = [basis_of(size, x.device) for size in x.shape[1:3]]
    pointers = x.data_ptr(), weight.data_ptr(), y.data_ptr(), *map(address, bases)
    kernel.launch((blocks, len(x)), *pointers, *x.shape[1:], -1 if conjugate else 1)
    return y


def correlate(g: Tensor, x: Tensor) -> Tensor:
    """See :class:`gfnet_dense.spectral.autograd.Backend`."""
    g, x = driver.readable(g), driver.readable(x)
    _, height, width, channels = x.shape
    shape = height, width // 2 + 1, channels, 2
    chunk = max(1, _GRADIENTS // (4 * math.prod(shape)))
    total: Tensor | None = None
    kernel, blocks = kernel_for('correlate_maps', x)
    bases = [basis_of(size, x.device) for size in x.shape[1:3]]
    for start in range(0, len(x), chunk):
        images = min(chunk, len(x) - start)
        gradients = x.new_empty((images, *shape), dtype=torch.float32)
        offset = start * x[0].nbytes if start else 0
        pointers = g.data_ptr() + offset, x.data_ptr() + offset, gradients.data_ptr()
        kernel.launch((blocks, images), *pointers, *map(address, bases), *x.shape[1:])
        some = gradients.sum(0) if images > 1 else gradients[0]
        total = some if total is None else total.add_(some)
    assert total is not None  # a backend is given one image at least
    return total
