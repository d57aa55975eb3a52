import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from torch.utils._python_dispatch import TorchDispatchMode
from toy import ToyModel, losses, toy_config

from gfnet_dense.durable import NonFiniteLossError, NonFiniteLossHook, latest_checkpoint
from gfnet_dense.durable.non_finite import use_fused_adam
from gfnet_dense.openmmlab import train


def state(work_dir: Path, iterations: int) -> dict:
    return torch.load(work_dir / f'iter_{iterations}.pth', weights_only=False)


@OPTIM_WRAPPERS.register_module()
class ScaledOptimWrapper(OptimWrapper):
    """As AmpOptimWrapper, which needs a GPU, uses a GradScaler."""

    def __init__(self, init_scale, factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor
        self.scaler = torch.amp.GradScaler('cpu', init_scale=init_scale)

    def backward(self, loss, **kwargs):
        self.scaler.scale(loss * self.factor).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs):
        if self.clip_grad_kwargs:
            self.scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()


ADAMW = dict(type='AdamW', lr=1e-2, weight_decay=0.1)
FUSED_ADAMW = dict(ADAMW, fused=True)
FUSED_SGD = dict(type='SGD', lr=1e-2, momentum=0.9, weight_decay=0.1, fused=True)
CLIPPED = dict(clip_grad=dict(max_norm=0.1))
SCALED = dict(type='ScaledOptimWrapper', init_scale=4.0)


@pytest.mark.parametrize(('wrapper', 'first'), [
    ({}, 1), ({}, 5), (CLIPPED, 5), (SCALED, 5), (CLIPPED | SCALED, 5)
])  # fmt: skip
@pytest.mark.parametrize('optimizer', [ADAMW, FUSED_ADAMW, FUSED_SGD])
def test_steps_that_are_not_finite_leave_weights_and_optimizer_alone(
    tmp_path, optimizer, wrapper, first
):
    """As if the steps of two iterations had not been asked for."""
    cfg = toy_config(tmp_path, broken=(first, first + 1))
    cfg.optim_wrapper.update(wrapper, optimizer=optimizer)
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)
    cfg.train_cfg.max_iters = 7
    train(cfg, seed=1)
    after, good = state(tmp_path, first + 1), state(tmp_path, 7)
    if first > 1:
        before = state(tmp_path, first - 1)
        for key, value in before['state_dict'].items():
            assert torch.equal(after['state_dict'][key], value), key
        for n, values in before['optimizer']['state'].items():
            for key, value in values.items():
                assert torch.equal(after['optimizer']['state'][n][key], value), key
    assert all(value.isfinite().all() for value in good['state_dict'].values())
    for values in good['optimizer']['state'].values():
        assert all(value.isfinite().all() for value in values.values())
        if 'step' in values:
            assert values['step'] == 5
    assert good['meta']['iter'] == 7
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert [int(n) for n in re.findall(r'loss nan at iteration (\d), .*step skipped', log)] == [
        first, first + 1
    ]  # fmt: skip


@pytest.mark.parametrize('optimizer', [ADAMW, FUSED_ADAMW])
def test_gradients_that_overflow_are_left_to_the_scaler_of_the_loss(tmp_path, optimizer):
    """It halves the scale until they are finite, here more often than the patience of the guard."""
    cfg = toy_config(tmp_path)
    cfg.optim_wrapper.update(SCALED, init_scale=2.0**127, factor=64.0, optimizer=optimizer)
    cfg.custom_hooks.append(dict(type='NonFiniteLossHook', patience=1))
    runner = train(cfg)
    assert 2 <= runner.optim_wrapper.optimizer.state_dict()['state'][0]['step'] <= 9


@pytest.mark.parametrize(('optimizer', 'waits'), [(ADAMW, 1), (FUSED_ADAMW, 0)])
def test_the_host_does_not_wait_for_the_flag_of_a_fused_optimizer(optimizer, waits):
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.is_nonzero.default,
            )
            return func(*args, **(kwargs or {}))

    weight = torch.ones(3, requires_grad=True)
    arguments = {key: value for key, value in optimizer.items() if key != 'type'}
    adamw = torch.optim.AdamW([weight], **arguments)
    hook = NonFiniteLossHook()
    model = torch.nn.BatchNorm1d(3)
    runner = SimpleNamespace(model=model, optim_wrapper=SimpleNamespace(optimizer=adamw))
    hook.before_train(runner)
    for value, expected in ((float('inf'), 1.0), (1.0, 0.0)):
        hook.before_train_iter(runner)
        weight.grad = torch.tensor([1.0, value, 2.0])
        with Waits() as seen:
            hook._before_step(adamw)
        assert seen.count == waits
        if waits:
            assert (weight.grad is None) == (value == float('inf'))
        else:
            assert adamw.found_inf == expected
            hook._after_step(adamw)
            assert not hasattr(adamw, 'found_inf')


def test_fused_kernels_are_for_configs_that_do_not_choose():
    adamw = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1.0))
    assert use_fused_adam(adamw)['optimizer'] == dict(type='AdamW', lr=1.0, fused=True)
    for optimizer in (dict(type='SGD', lr=1.0), dict(type='AdamW', foreach=False)):
        assert use_fused_adam(dict(optimizer=optimizer))['optimizer'] == optimizer


def test_a_loss_that_stays_nan_ends_the_run(tmp_path):
    train(toy_config(tmp_path / 'good'), seed=2)
    work_dir = tmp_path / 'run'
    with pytest.raises(NonFiniteLossError) as error:
        train(toy_config(work_dir, broken=tuple(range(7, 13))), seed=2)
    message = str(error.value)
    _, rate, *names = losses(tmp_path / 'good')[11]  # the fifth in a row
    assert f'loss nan at iteration 11, learning rate {float(rate):g}' in message
    assert '5 times in a row' in message and ', '.join(names) in message
    # The last checkpoint is one of good weights, and leads to the same failure.
    last = latest_checkpoint(work_dir)
    assert f'--resume {last}' in message and last.name == 'iter_9.pth'
    content = state(work_dir, 9)
    assert all(v.isfinite().all() for v in content['state_dict'].values())
    assert 'NonFiniteLossError' in next(work_dir.glob('*/*.log')).read_text()


def test_patience_is_an_option(tmp_path):
    cfg = toy_config(tmp_path, broken=(3,))
    cfg.custom_hooks.append(dict(type='NonFiniteLossHook', patience=1))
    with pytest.raises(NonFiniteLossError, match='at iteration 3'):
        train(cfg)
    with pytest.raises(ValueError, match='patience must be positive, but got 0'):
        cfg.custom_hooks[-1]['patience'] = 0
        cfg.work_dir = str(tmp_path / 'other')
        train(cfg)


@pytest.mark.parametrize('fused', [None, True])
def test_accumulated_gradients_that_are_not_finite_are_no_step(tmp_path, fused):
    cfg = toy_config(tmp_path, broken=(5,))
    cfg.optim_wrapper.accumulative_counts = 2
    cfg.optim_wrapper.optimizer.fused = fused
    cfg.default_hooks.checkpoint.update(interval=2, max_keep_ckpts=-1)
    train(cfg)
    four, six, eight = (state(tmp_path, n)['state_dict'] for n in (4, 6, 8))
    for key, value in four.items():
        assert torch.equal(six[key], value) and not torch.equal(eight[key], value), key
        assert eight[key].isfinite().all(), key


def test_running_statistics_stay_good(tmp_path):
    """They change in the forward pass, before anybody knows of the loss."""
    cfg = toy_config(tmp_path, broken=(5, 6))
    cfg.model.norm = True
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)
    train(cfg)
    four, six, twelve = (state(tmp_path, n)['state_dict'] for n in (4, 6, 12))
    assert torch.equal(four['norm.running_mean'], six['norm.running_mean'])
    assert not torch.equal(six['norm.running_mean'], twelve['norm.running_mean'])
    assert all(v.isfinite().all() for v in twelve.values())


def test_good_batches_between_bad_ones_are_no_steps(tmp_path):
    """Two are accumulated: every second is bad, so that no step is ever made."""
    cfg = toy_config(tmp_path, broken=(2, 4, 6, 8, 10, 12))
    cfg.optim_wrapper.accumulative_counts = 2
    with pytest.raises(NonFiniteLossError, match='at iteration 10'):
        train(cfg)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OnePerLayer:
    """An optimizer for each of the two layers."""

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        self.options = optim_wrapper_cfg['optimizer']

    def __call__(self, model):
        layers = dict(first=model.layers[0], second=model.layers[2])
        return OptimWrapperDict(
            **{
                name: OptimWrapper(torch.optim.SGD(layer.parameters(), lr=self.options['lr']))
                for name, layer in layers.items()
            }
        )


@MODELS.register_module()
class ToyModelOfTwoOptimizers(ToyModel):
    """Makes a step of both."""

    def train_step(self, data, optim_wrapper):
        losses = self(**self.data_preprocessor(data, True), mode='loss')
        losses['loss'].backward()
        for wrapper in optim_wrapper.values():
            wrapper.step()
            wrapper.zero_grad()
        return losses


def test_several_optimizers(tmp_path, monkeypatch):
    cfg = toy_config(tmp_path, broken=(3,))
    cfg.model.type = 'ToyModelOfTwoOptimizers'
    cfg.optim_wrapper = dict(constructor='OnePerLayer', optimizer=dict(lr=0.01))
    cfg.custom_hooks = []
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)
    cfg.train_cfg.max_iters = 4
    step = ToyModelOfTwoOptimizers.train_step

    def step_and_signal(model, data, optim_wrapper):
        if model.iterations == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(model, data, optim_wrapper)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ToyModelOfTwoOptimizers, 'train_step', step_and_signal)
        train(cfg)
    assert latest_checkpoint(tmp_path).name == 'interrupted.pth'
    cfg.work_dir = str(tmp_path / 'whole')
    train(cfg)
    tmp_path /= 'whole'
    weights = [state(tmp_path, i)['state_dict'] for i in (2, 3, 4)]
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]) and not torch.equal(value, weights[2][key])
    assert {*state(tmp_path, 4)['optimizer']} == {'first', 'second'}
