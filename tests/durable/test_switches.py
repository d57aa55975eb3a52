"""Each switch of the config, on (by the other tests of this folder) and off (here)."""

import dataclasses
import os
import signal

import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from toy import LossesHook, ToyData, losses, toy_config

from gfnet_dense.data import DataError
from gfnet_dense.durable import (
    DurableRunner,
    GFNetRunner,
    Switches,
    data_checks,
    latest_checkpoint,
)
from gfnet_dense.openmmlab import train


@pytest.fixture
def config(tmp_path):
    """Return a function that makes a config with one part switched off."""

    def make(off=None, name='run', **options):
        cfg = toy_config(tmp_path / name, **options)
        if off:
            cfg.durable = {off: False}
        return cfg

    return make


def test_both_names_build_the_same_runner(config):
    assert GFNetRunner is DurableRunner
    for name in ('DurableRunner', 'GFNetRunner'):
        assert type(RUNNERS.build(dict(config(), runner_type=name))) is DurableRunner


def test_unknown_switches_and_values_are_errors(config):
    cfg = config()
    cfg.durable = dict(data_check=False)
    with pytest.raises(ValueError, match=r'no switch data_check: it has checkpoints, .*summary'):
        train(cfg)
    cfg.durable = dict(data_checks='no')
    with pytest.raises(ValueError, match=r"durable\.data_checks must be .* but got 'no'"):
        train(cfg)


def test_checkpoints(config, tmp_path, monkeypatch):
    """mmengine removes the older checkpoint, then writes the newer one."""
    seen = []
    save = Runner.save_checkpoint

    def look(self, out_dir, filename, *args, **kwargs):
        seen.append((filename, sorted(p.name for p in tmp_path.rglob('iter*'))))
        save(self, out_dir, filename, *args, **kwargs)

    monkeypatch.setattr(Runner, 'save_checkpoint', look)
    runner = train(config('checkpoints'))
    assert seen == [(f'iter_{n}.pth', []) for n in (3, 6, 9, 12)]
    assert CheckpointHook in map(type, runner.hooks)


def test_safe_loading(config, tmp_path):
    """mmengine only logs that nothing fits, and executes what a file asks for."""
    cfg = config('safe_loading')
    cfg.load_from = str(tmp_path / 'other.pth')
    torch.save({'model': {'foo': torch.zeros(1)}}, cfg.load_from)
    train(cfg)


def test_exact_resume(config, monkeypatch):
    """mmengine's noise depends on what the process drew before."""

    def stop():
        raise InterruptedError

    def run(off):
        names = f'whole{off}', f'resumed{off}'
        train(config(off, names[0]), seed=0)
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(LossesHook, 'then', (8, stop))
            train(config(off, names[1]), seed=0)
        train(config(off, names[1]), resume='auto')
        return [losses(config(off, name).work_dir) for name in names]

    whole, resumed = run(None)
    assert whole == resumed
    whole, resumed = run('exact_resume')
    assert whole.keys() == resumed.keys() and whole != resumed


def test_interrupts(config, tmp_path, monkeypatch):
    """Python's own handler ends the run within the iteration."""
    monkeypatch.setattr(LossesHook, 'then', (5, lambda: os.kill(os.getpid(), signal.SIGINT)))
    # A shell makes what it starts in the background ignore the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config('interrupts'))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert latest_checkpoint(tmp_path / 'run').name == 'iter_3.pth'


def test_non_finite_guard(config):
    runner = train(config('non_finite_guard', broken=(5,)))
    assert all(p.isnan().all() for p in runner.model.parameters())


@pytest.mark.parametrize('off', ['data_checks', None])
def test_data_checks(config, monkeypatch, off):
    def broken(self, index):
        raise OSError('truncated')

    monkeypatch.setattr(ToyData, 'prepare_data', broken)
    with pytest.raises(OSError if off else DataError, match='truncated'):
        train(config(off))


def test_a_data_set_that_the_checks_cannot_take_is_trained_on(config, tmp_path, monkeypatch):
    def inspect(*args, **kwargs):
        raise AttributeError('img_suffix')

    monkeypatch.setattr(data_checks, 'inspect', inspect)
    train(config())
    assert 'train data could not be checked' in next(tmp_path.rglob('*.log')).read_text()


def test_work_dir_lock(config):
    train(config('work_dir_lock'))
    train(config('work_dir_lock'))


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_cpu_processes(config, monkeypatch):
    """mmengine asks for a GPU."""
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises((RuntimeError, AssertionError), match=r'CUDA|NVIDIA|accelerator'):
        train(config('cpu_processes'), launcher='pytorch')
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize('off', ['scale_accumulated_lr', None])
def test_scale_accumulated_lr(config, off):
    cfg = config(off)
    cfg.optim_wrapper.accumulative_counts = 4
    cfg.auto_scale_lr = dict(base_batch_size=16)
    runner = train(cfg, auto_scale_lr=True)
    rate = runner.optim_wrapper.param_groups[0]['initial_lr']
    assert rate == 1e-2 * (8 if off else 32) / 16


@pytest.mark.parametrize('off', ['summary', None])
def test_summary(config, tmp_path, off):
    cfg = config(off)
    cfg.log_level = 'INFO'
    train(cfg)
    log = next(tmp_path.rglob('*.log')).read_text()
    assert ('This run:' in log) == (off is None)


def test_every_switch_has_a_test():
    assert {f'test_{field.name}' for field in dataclasses.fields(Switches)} <= {*globals()}


def test_the_runner_alone_resumes_exactly(config, monkeypatch):
    """As it does for users of mmengine's own scripts."""

    def stop():
        raise InterruptedError

    def run(name, **options):
        cfg = config(name=name)
        cfg.update(runner_type='DurableRunner', randomness=dict(seed=7), **options)
        return RUNNERS.build(cfg)

    run('whole').train()
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(LossesHook, 'then', (8, stop))
        run('run').train()
    resumed = run('run', resume=True)
    resumed.train()
    assert losses(resumed.work_dir) == losses(run('whole').work_dir)
