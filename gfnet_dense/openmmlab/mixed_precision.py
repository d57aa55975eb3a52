"""Automatic mixed precision in training, on GPUs by mmengine and on CPUs by a wrapper of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class CPUBFloat16OptimWrapper(OptimWrapper):
    """An optimizer wrapper whose forward runs under bfloat16 autocast on a CPU.

    mmengine's `AmpOptimWrapper` refuses CPUs. Weights, gradients and checkpoints are float32. It
    pays on processors with bfloat16 instructions (avx512_bf16 or AMX); others compute bfloat16
    slower than float32.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run the forward in here."""
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


def use_mixed_precision(cfg: Config, dtype: str) -> None:
    """Change the optimizer wrapper of a config for training in `'float16'` or `'bfloat16'`.

    Raises:
        ValueError: If there is no GPU and the dtype is float16.
    """
    wrapper = cfg.optim_wrapper
    if torch.cuda.is_available():
        # bfloat16 has the range of float32, so its loss needs no scale.
        loss_scale = 'dynamic' if dtype == 'float16' else dict(enabled=False)
        wrapper.update(type='AmpOptimWrapper', dtype=dtype, loss_scale=loss_scale)
    elif dtype == 'bfloat16':
        wrapper.type = 'CPUBFloat16OptimWrapper'
    else:
        raise ValueError(f'training in {dtype} needs a GPU, and there is none: use --amp bfloat16')
