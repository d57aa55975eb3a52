"""The MLP of a block, and how a CPU computes it fast.

Two things take time on a CPU besides the arithmetic. The hidden map has four times the values of
its input: it leaves the cache, and for large blocks of memory the operating system provides new
pages at every call. So evaluation computes large maps slice by slice. And torch leaves float32
matrix products to MKL, which uses narrower instructions than oneDNN on some processors. There
linear layers run as 1x1 convolutions, which torch leaves to oneDNN.
"""

import ctypes
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm.layers
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from gfnet_dense.spectral.tracing import is_capturing

# Measured on one processor with AVX-512, for batches of 1 to 8 and the four stages of GFNet-H-S at
# 224: with fewer rows matrix products slow down, and smaller hidden maps gain nothing.
_SLICE_ROWS = 1536
_LARGE_HIDDEN_BYTES = 8 << 20


class Mlp(timm.layers.Mlp):
    """timm's MLP, with the faster matrix library for float32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Process a map `(..., C)`; the shape stays the same."""
        if not _runs_on_onednn(x) or change_of(self._modules, _MLP_LAYERS):
            return super().forward(x)
        x = self.act(_convolve(x, self.fc1.weight, self.fc1.bias))
        return _convolve(x, self.fc2.weight, self.fc2.bias)


_MLP_LAYERS: dict[str, type[nn.Module]] = dict(
    fc1=nn.Linear,
    act=nn.GELU,
    drop1=nn.Dropout,
    norm=nn.Identity,
    fc2=nn.Linear,
    drop2=nn.Dropout,
)
# The layers of a block that treat each cell alone, and those of its MLP.
CELL_LAYERS = dict(
    norm2=timm.layers.LayerNorm, mlp=Mlp, drop_path=timm.layers.DropPath, **_MLP_LAYERS
)

# Hooks on all modules, which no public function of torch tells.
_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


def change_of(layers: Mapping[str, Any], kinds: Mapping[str, type[nn.Module]]) -> str | None:
    """Say how somebody has changed or watches layers of these kinds; None if nobody does.

    Adapters, quantisation and hooks need layers to run as modules, and dropout has no other form.
    """
    if any(_GLOBAL_HOOKS):
        return 'there are hooks on all modules'
    for name, kind in kinds.items():
        layer = layers.get(name)
        if type(layer) is not kind:
            return f'{name} is a {type(layer).__name__}'
        if 'forward' in layer.__dict__ or layer._compiled_call_impl:
            return f'{name} has a forward function of its own'
        if layer._forward_hooks or layer._forward_pre_hooks:
            return f'{name} has hooks'
        if layer._backward_hooks or layer._backward_pre_hooks:
            return f'{name} has hooks'
        if isinstance(layer, nn.Dropout) and layer.p:
            return 'the MLP has dropout'
    return None


def layers_of(block: nn.Module) -> dict[str, Any]:
    """Return the layers of a block and of its MLP by name."""
    mlp = block._modules.get('mlp')
    return block._modules | (mlp._modules if mlp else {})


def apply_to_cells(
    block: nn.Module, function: Callable[..., Tensor], expansion: int, *maps: Tensor
) -> Tensor:
    """Apply a function that treats each cell alone, slice by slice where that is faster.

    The function takes as many tensors `(..., C)` as there are maps `(B, H, W, C)` and returns one.
    The largest map that it makes is `expansion` times as large. In training, with gradients and if
    somebody has changed or watches layers of `block`, which owns the function, it gets whole maps.
    """
    x = maps[0]
    if (
        isinstance(x, torch.fx.Proxy)
        or is_capturing()
        or not x.is_cpu
        or block.training
        or torch.is_grad_enabled()
    ):
        return function(*maps)
    rows = x.shape[:3].numel()
    slices = rows // _SLICE_ROWS
    if slices < 2 or expansion * x.nbytes < _LARGE_HIDDEN_BYTES:
        return function(*maps)
    if change_of(layers_of(block), CELL_LAYERS):
        return function(*maps)
    parts = zip(*(m.flatten(0, 2).chunk(slices) for m in maps), strict=True)
    return torch.cat([function(*part) for part in parts]).unflatten(0, x.shape[:3])


def _runs_on_onednn(x: Tensor) -> bool:
    return bool(
        isinstance(x, Tensor)
        and x.is_cpu
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled('cpu')
        and not is_capturing()
        and x.numel()
        and torch.backends.mkldnn.enabled
        and is_onednn_wider()
    )


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer to `(..., C)` as a 1x1 convolution; nothing is copied."""
    cells = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(cells, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


@functools.cache
def is_onednn_wider() -> bool:
    """Tell whether oneDNN uses AVX-512 on this processor and MKL does not, as on AMD's.

    MKL says itself which instructions it takes. False where torch comes without MKL.
    """
    if torch.backends.cpu.get_cpu_capability() != 'AVX512':
        return False
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / 'lib' / 'libtorch_cpu.so'))
        version = _MklVersion()
        library.mkl_serv_get_version(ctypes.byref(version))
    except (OSError, AttributeError):
        return False
    return b'AVX-512' not in version.processor


class _MklVersion(ctypes.Structure):
    """MKLVersion of mkl_service.h, which `mkl_get_version` fills."""

    _fields_ = (
        ('major', ctypes.c_int),
        ('minor', ctypes.c_int),
        ('update', ctypes.c_int),
        ('status', ctypes.c_char_p),
        ('build', ctypes.c_char_p),
        ('processor', ctypes.c_char_p),
        ('platform', ctypes.c_char_p),
    )
