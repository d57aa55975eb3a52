import numpy as np
import pytest
import torch
from mmengine.registry import PARAM_SCHEDULERS
from timm.scheduler import CosineLRScheduler

ARGUMENTS = dict(t_initial=12, lr_min=1e-5, warmup_t=3, warmup_lr_init=1e-6)


def optimizer(*rates: float) -> torch.optim.Optimizer:
    groups = [dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=rate) for rate in rates]
    return torch.optim.SGD(groups)


def schedule(optimizer, **kwargs):
    cfg = dict(type='WarmupCosineLR', **{**ARGUMENTS, **kwargs})
    return PARAM_SCHEDULERS.build(cfg, default_args=dict(optimizer=optimizer, epoch_length=7))


def rates(optimizer) -> list[float]:
    return [group['lr'] for group in optimizer.param_groups]


@pytest.mark.parametrize('warmup', [0, 1, 3])
def test_every_group_follows_timm(warmup):
    ours, theirs = optimizer(1e-3, 2e-4, 5e-6), optimizer(1e-3, 2e-4, 5e-6)
    scheduler = schedule(ours, warmup_t=warmup)
    oracle = CosineLRScheduler(theirs, **{**ARGUMENTS, 'warmup_t': warmup})
    for epoch in range(16):
        np.testing.assert_allclose(rates(ours), rates(theirs), rtol=1e-12)
        ours.step()
        scheduler.step()
        oracle.step(epoch + 1)


def test_a_resumed_schedule_goes_on():
    ours, whole = optimizer(1e-3), optimizer(1e-3)
    first, reference = schedule(ours), schedule(whole)
    for _ in range(5):
        ours.step()
        whole.step()
        first.step()
        reference.step()
    again = optimizer(1e-3)
    again.load_state_dict(ours.state_dict())
    resumed = schedule(again)
    resumed.load_state_dict(first.state_dict())
    for _ in range(10):
        resumed.step()
        reference.step()
        assert rates(again) == rates(whole)


def test_state_is_plain():
    state = schedule(optimizer(1e-3)).state_dict()
    assert all(isinstance(v, int | float | str | bool | list) for v in state.values())


@pytest.mark.parametrize('warmup', [12, -1])
def test_a_warm_up_that_does_not_fit_is_refused(warmup):
    with pytest.raises(ValueError, match=rf'within 0..11, .* but got {warmup}'):
        schedule(optimizer(1e-3), warmup_t=warmup)


def test_lengths_in_epochs_become_iterations():
    ours, theirs = optimizer(1e-3, 5e-6), optimizer(1e-3, 5e-6)
    ended = dict(begin=0, end=11)
    converted = schedule(ours, convert_to_iter_based=True, **ended)
    lengths = {key: 7 * value for key, value in dict(t_initial=12, warmup_t=3, end=11).items()}
    expected = schedule(theirs, **{**lengths, 'by_epoch': False})
    for _ in range(7 * 13):
        assert rates(ours) == rates(theirs)
        for group in (ours, theirs):
            group.step()
        converted.step()
        expected.step()
