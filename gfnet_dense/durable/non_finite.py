"""Skip optimizer steps that are not finite, and stop a run whose loss stays so."""

import math
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from .checkpoints import latest_checkpoint
from .optimizers import makes_step, parameter_groups, wrappers_of


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradients were NaN or infinite too many times in a row."""


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Skip optimizer steps along gradients that are not finite; stop the run after some in a row.

    Weights, optimizer state and running statistics (`running_mean` and `running_var` of modules)
    always stay those of the last good iteration, so every checkpoint is good.

    Of several optimizers, each is judged by the gradients of its own parameters.

    Fused Adam and AdamW, which the runner chooses on a GPU, skip a step by a flag on the device.
    The host reads the flag after mmengine has read the loss for its log, so it adds no wait for the
    device. For other optimizers the host reads the flag before the step.

    Args:
        patience: How many iterations in a row may have a loss or gradients that are not finite.

    Raises:
        NonFiniteLossError: Names iteration, learning rate and files, and how to reproduce it.
    """

    priority = 'ABOVE_NORMAL'  # after mmengine reads the loss, before hooks that save a checkpoint

    def __init__(self, patience: int = 5) -> None:
        if patience < 1:
            raise ValueError(f'patience must be positive, but got {patience}')
        self.patience = patience
        self._in_a_row = 0
        self._found: Tensor | None = None  # whether gradients of this iteration are not finite

    def before_train(self, runner: Runner) -> None:
        """Check gradients before each step of the optimizer."""
        for wrapper in wrappers_of(runner.optim_wrapper):
            wrapper.optimizer.register_step_pre_hook(self._before_step)
            wrapper.optimizer.register_step_post_hook(self._after_step)
        self._statistics: list[Tensor] = [
            statistic
            for module in runner.model.modules()
            for name in ('running_mean', 'running_var')
            if isinstance(statistic := getattr(module, name, None), Tensor)
        ]

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Copy the running statistics, which the forward pass changes, in one kernel."""
        self._found = None
        if self._statistics:
            self._copy = torch.cat([statistic.flatten() for statistic in self._statistics])

    def _before_step(self, optimizer: Optimizer, *args: Any) -> None:
        if hasattr(optimizer, 'found_inf'):  # a GradScaler has looked at the gradients
            return
        params = [p for group in optimizer.param_groups for p in group['params']]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        # All processes have the same gradients, so they skip the same steps.
        found = ~norm.isfinite()
        self._found = found if self._found is None else self._found | found
        if _skips_by_flag(optimizer):
            optimizer.found_inf = found.float()  # type: ignore[attr-defined]
        elif found:
            for p in params:
                p.grad = None  # optimizers skip parameters without a gradient

    def _after_step(self, optimizer: Optimizer, *args: Any) -> None:
        if self._found is not None and hasattr(optimizer, 'found_inf'):
            del optimizer.found_inf

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Restore the running statistics and count, if the iteration is not finite."""
        loss = float(torch.as_tensor((outputs or {}).get('loss', 0.0)).detach())
        if math.isfinite(loss) and (self._found is None or not self._found):
            if makes_step(runner.optim_wrapper):
                self._in_a_row = 0
            return
        self._in_a_row += 1
        if self._statistics:
            copies = self._copy.split([statistic.numel() for statistic in self._statistics])
            for statistic, values in zip(self._statistics, copies, strict=True):
                statistic.copy_(values.view_as(statistic))
        files = _files(data_batch)
        rate = max(group['lr'] for group in parameter_groups(runner.optim_wrapper))
        what = f'loss {loss} at iteration {runner.iter + 1}, learning rate {rate:g}'
        if self._in_a_row < self.patience:
            runner.logger.warning(f'{what}: step skipped; files: {files}')
            return
        checkpoint = latest_checkpoint(runner.work_dir)
        again = f'--resume {checkpoint}' if checkpoint else f'--seed {runner.seed}'
        raise NonFiniteLossError(
            f'{what}; loss or gradients were not finite {self._in_a_row} times in a row; files of '
            f'this batch: {files}\n{again} reproduces it, with the same data and random numbers; a '
            'lower learning rate, gradient clipping or bfloat16 instead of float16 may help'
        )


def use_fused_adam(optim_wrapper: Any) -> Any:
    """Return the config of an optimizer wrapper with the fused kernels of Adam or AdamW.

    Anything else, also a config that chooses an implementation itself, is returned unchanged.
    """
    optimizer = optim_wrapper.get('optimizer') if isinstance(optim_wrapper, dict) else None
    if not isinstance(optimizer, dict) or optimizer.get('type') not in ('Adam', 'AdamW'):
        return optim_wrapper
    if {'fused', 'foreach', 'capturable', 'differentiable'} & {*optimizer}:
        return optim_wrapper
    return dict(optim_wrapper, optimizer=dict(optimizer, fused=True))


def _skips_by_flag(optimizer: Optimizer) -> bool:
    """Return whether the optimizer skips a step if its `found_inf` is 1, as GradScaler uses it."""
    # Not the fused SGD: a skipped first step leaves its momentum uninitialised.
    groups = optimizer.param_groups
    return isinstance(optimizer, Adam | AdamW) and all(group.get('fused') for group in groups)


def _files(data_batch: Any) -> str:
    samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
    paths = [getattr(sample, 'img_path', None) for sample in samples or ()]
    return ', '.join(str(path) for path in paths if path) or 'unknown'
