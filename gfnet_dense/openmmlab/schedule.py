"""Learning rate schedules that mmengine does not have."""

import math
from typing import Any, Self

from mmengine.optim import BaseOptimWrapper, _ParamScheduler
from mmengine.optim.scheduler.param_scheduler import INF
from mmengine.registry import PARAM_SCHEDULERS
from torch.optim import Optimizer


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_ParamScheduler):
    """The cosine schedule of timm, :class:`timm.scheduler.CosineLRScheduler`.

    It differs from mmengine's warm-up followed by mmengine's cosine. The cosine starts at epoch 0
    and the warm-up replaces its beginning. Start and floor are absolute learning rates, so scaling
    the learning rate with the batch does not change them. After the cosine the rate stays at the
    floor (the cooldown).

    Args:
        optimizer: The optimizer or its wrapper.
        t_initial: Length of the cosine, warm-up included, in epochs.
        lr_min: The floor.
        warmup_t: Length of the linear warm-up in epochs.
        warmup_lr_init: Learning rate that the warm-up starts from.
        **kwargs: Arguments that mmengine's schedulers share; with `by_epoch=False` the lengths
            are iterations.

    Raises:
        ValueError: If the warm-up is not shorter than the cosine.
    """

    def __init__(
        self,
        optimizer: Optimizer | BaseOptimWrapper,
        t_initial: int,
        lr_min: float = 0.0,
        warmup_t: int = 0,
        warmup_lr_init: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if not 0 <= warmup_t < t_initial:
            raise ValueError(
                f'warmup_t must be within 0..{t_initial - 1}, below t_initial, but got {warmup_t}'
            )
        self.t_initial = t_initial
        self.lr_min = lr_min
        self.warmup_t = warmup_t
        self.warmup_lr_init = warmup_lr_init
        super().__init__(optimizer, 'lr', **kwargs)

    @classmethod
    def build_iter_from_epoch(
        cls,
        optimizer: Optimizer | BaseOptimWrapper,
        t_initial: int,
        *,
        epoch_length: int,
        warmup_t: int = 0,
        begin: int = 0,
        end: int = INF,
        **kwargs: Any,
    ) -> Self:
        """Build a schedule of iterations from lengths in epochs, for `convert_to_iter_based=True`.

        `epoch_length` is the number of iterations of an epoch.
        """
        return cls(
            optimizer,
            t_initial * epoch_length,
            warmup_t=warmup_t * epoch_length,
            begin=begin * epoch_length,
            end=end if end == INF else end * epoch_length,
            **{**kwargs, 'by_epoch': False},
        )

    def _get_value(self) -> list[float]:
        t = self.last_step
        if t < self.warmup_t:
            start = self.warmup_lr_init
            return [start + t / self.warmup_t * (lr - start) for lr in self.base_values]
        share = (1 + math.cos(math.pi * min(t / self.t_initial, 1))) / 2
        return [self.lr_min + share * (lr - self.lr_min) for lr in self.base_values]
