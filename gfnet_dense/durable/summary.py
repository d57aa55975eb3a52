"""A summary of a run in a few lines, before its first iteration."""

import logging
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from .optimizers import accumulated_batches, parameter_groups, wrappers_of


@HOOKS.register_module()
class RunSummaryHook(Hook):
    """Log model, weights, data, batch, learning rate, device and precision before training."""

    priority = 'LOWEST'  # the last message before the first iteration

    def before_train(self, runner: Runner) -> None:
        """Log the summary."""
        lines = {
            'model': _model(runner),
            'weights': _weights(runner),
            'training data': _data(runner.train_dataloader.dataset),
        }
        if runner.val_loop is not None:
            lines['validation data'] = _data(runner.val_dataloader.dataset)
        lines |= {
            'total batch': _batch(runner),
            'learning rate': _learning_rate(runner),
            'iterations': f'{runner.iter} to {runner.max_iters}',
            'device': _device(runner),
            'precision': _precision(runner),
            'config and hooks': f'in {runner.logger.log_file}',
        }
        width = max(map(len, lines))
        runner.logger.info(
            '\n'.join(['This run:', *(f'  {key:<{width}}  {lines[key]}' for key in lines)])
        )


def show_on_console(logger: logging.Logger, *, overview: bool) -> None:
    """Keep long messages that are no warnings off the console (`overview`), or show them again.

    The log file gets all messages.
    """
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler):
            (handler.addFilter if overview else handler.removeFilter)(_is_short)


def _is_short(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or record.getMessage().count('\n') < 10


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrapper for several processes."""
    inner: nn.Module = model.module if is_model_wrapper(model) else model  # type: ignore[assignment]
    return inner


def _batch(runner: Runner) -> str:
    loader = runner.train_dataloader
    # A loader with a batch sampler of its own has no batch size.
    batch = loader.batch_size or loader.batch_sampler.batch_size
    steps = accumulated_batches(runner.optim_wrapper)
    text = f'{batch} in each of {runner.world_size} processes'
    if steps > 1:
        text += f', {steps} accumulated'
    return f'{batch * runner.world_size * steps} ({text})'


def _learning_rate(runner: Runner) -> str:
    # The rates that schedulers start from: after --auto-scale-lr, before warm-up.
    groups = parameter_groups(runner.optim_wrapper)
    rates = [group.get('initial_lr', group['lr']) for group in groups]
    lowest, highest = min(rates), max(rates)
    text = f'{highest:g}' if lowest == highest else f'{highest:g}, by layer down to {lowest:.3g}'
    scaling = runner.auto_scale_lr or {}
    if scaling.get('enable'):
        text += f', scaled to the total batch from that for {scaling["base_batch_size"]}'
    # These rates do not scale with the batch. Above the learning rate, the schedule would rise.
    for scheduler in runner.param_schedulers or ():
        for name in ('lr_min', 'warmup_lr_init'):
            rate = getattr(scheduler, name, 0.0)
            if rate > highest * (1 + 1e-6):
                text += f', below the {name} {rate:g} of the schedule: lower that, too'
    return text


def _model(runner: Runner) -> str:
    model = unwrapped(runner.model)
    parts = ', '.join(
        type(child).__name__
        for name, child in model.named_children()
        if name != 'data_preprocessor'
    )
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = f'{type(model).__name__} of {parts}; {total / 1e6:.2f}M parameters'
    return text if trained == total else f'{text}, {trained / 1e6:.2f}M of them trained'


def _weights(runner: Runner) -> str:
    if file := runner.cfg.get('load_from'):
        return f'{"resumed" if runner.cfg.get("resume") else "loaded"} from {file}'
    files = [
        f'{name or "model"} from {module.loaded_from}'
        for name, module in unwrapped(runner.model).named_modules()
        if getattr(module, 'loaded_from', None)
    ]
    return ', '.join(files) or 'none loaded, trained from scratch'


def _data(dataset: Any) -> str:
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    place = getattr(dataset, 'data_root', None) or getattr(dataset, 'ann_file', None) or '?'
    return f'{len(dataset)} images, {type(dataset).__name__} in {place}'


def _device(runner: Runner) -> str:
    device = next(runner.model.parameters()).device
    if device.type == 'cuda':
        return f'{runner.world_size} x {torch.cuda.get_device_name(device)}'
    return f'{device.type}, {torch.get_num_threads()} threads in each process'


def _precision(runner: Runner) -> str:
    wrapper, *_ = wrappers_of(runner.optim_wrapper)
    if isinstance(wrapper, AmpOptimWrapper):
        return f'mixed, {wrapper.cast_dtype or torch.float16}'
    return str(next(runner.model.parameters()).dtype)
