"""The end of a run whose loss is no longer a number."""

import math
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from .checkpoints import latest_checkpoint


class NonFiniteLossError(FloatingPointError):
    """The loss was NaN or infinite too many times in a row."""


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Leave out steps along gradients that are not finite, and end the run after some in a row.

    Weights, running statistics and optimizer are those of the last good iteration throughout, so
    that a checkpoint in between is good, too.

    Args:
        patience: Iterations in a row whose loss or gradients are not finite, after which the run
            ends.

    Raises:
        NonFiniteLossError: Names iteration, learning rate and files, and how to see it again.
    """

    priority = 'ABOVE_NORMAL'  # before the hooks that save a checkpoint

    def __init__(self, patience: int = 5) -> None:
        if patience < 1:
            raise ValueError(f'patience must be positive, but got {patience}')
        self.patience = patience
        self._in_a_row = 0
        self._left_out = False

    def before_train(self, runner: Runner) -> None:
        """Look at gradients before each step of the optimizer."""
        runner.optim_wrapper.optimizer.register_step_pre_hook(self._leave_out)

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Keep the running statistics, which a forward pass changes already."""
        self._statistics = [buffer.clone() for buffer in _statistics(runner.model)]

    def _leave_out(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group['params']]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        # All processes see the same gradients, so they leave out the same steps.
        if not norm.isfinite():
            self._left_out = True
            for p in params:
                p.grad = None  # for optimizers, nothing to do

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Count iterations that are not finite."""
        loss = float(torch.as_tensor((outputs or {}).get('loss', 0.0)).detach())
        bad = self._left_out or not math.isfinite(loss)
        self._left_out = False
        if not bad:
            if runner.optim_wrapper.should_update():  # a step was made
                self._in_a_row = 0
            return
        self._in_a_row += 1
        for buffer, before in zip(_statistics(runner.model), self._statistics, strict=True):
            buffer.copy_(before)
        files = _files(data_batch)
        what = f'loss {loss} at iteration {runner.iter + 1}, learning rate {_lr(runner):g}'
        if self._in_a_row < self.patience:
            runner.logger.warning(f'{what}: step left out; files: {files}')
            return
        checkpoint = latest_checkpoint(runner.work_dir)
        again = f'--resume {checkpoint}' if checkpoint else f'--seed {runner.seed}'
        raise NonFiniteLossError(
            f'{what}, {self._in_a_row} in a row that are not finite; files of this batch: {files}'
            f'\n{again} runs into it again, with the same data and random numbers; a lower '
            'learning rate, gradient clipping or bfloat16 in place of float16 may help'
        )


def _statistics(model: nn.Module) -> list[torch.Tensor]:
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def _lr(runner: Runner) -> float:
    return max(group['lr'] for group in runner.optim_wrapper.optimizer.param_groups)


def _files(data_batch: Any) -> str:
    samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
    paths = [getattr(sample, 'img_path', None) for sample in samples or ()]
    return ', '.join(str(path) for path in paths if path) or 'not known'
