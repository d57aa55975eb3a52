import re
from pathlib import Path

import pytest
import torch
from toy import losses, toy_config

from gfnet_dense.durable import NonFiniteLossError, latest_checkpoint
from gfnet_dense.openmmlab import train


def state(work_dir: Path, iterations: int) -> dict:
    return torch.load(work_dir / f'iter_{iterations}.pth', weights_only=False)


def test_steps_that_are_not_finite_leave_weights_and_optimizer_alone(tmp_path):
    cfg = toy_config(tmp_path, broken=(5, 6))
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)
    train(cfg)
    for key, value in state(tmp_path, 4)['state_dict'].items():
        assert torch.equal(state(tmp_path, 6)['state_dict'][key], value), key
    optimizers = [state(tmp_path, n)['optimizer']['state'] for n in (4, 6, 7)]
    assert [o[0]['step'].item() for o in optimizers] == [4, 4, 5]
    assert torch.equal(optimizers[0][0]['exp_avg'], optimizers[1][0]['exp_avg'])
    assert state(tmp_path, 12)['meta']['iter'] == 12
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert len(re.findall(r'loss nan at iteration [56], .*step skipped', log)) == 2


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
