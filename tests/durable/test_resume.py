import multiprocessing
import multiprocessing.connection
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from toy import LossesHook, ToyMetric, losses, toy_config

from gfnet_dense.data.errors import DataError
from gfnet_dense.durable import latest_checkpoint
from gfnet_dense.durable.checkpoints import INTERRUPTED
from gfnet_dense.openmmlab import train


class StopError(Exception):
    pass


def stop():
    raise StopError


@pytest.fixture
def then(monkeypatch):
    """Return a way to make something happen in an iteration."""
    return lambda iteration, what: monkeypatch.setattr(
        LossesHook, 'then', iteration and (iteration, what)
    )


def weights(path: Path) -> dict:
    return torch.load(path, weights_only=False)['state_dict']


def assert_same_run(work_dir: Path, reference: Path) -> None:
    """Hold losses, rates, data and final weights of two runs against each other."""
    run, whole = losses(work_dir), losses(reference)
    assert run.keys() == whole.keys() == {*range(1, 13)}
    for n in whole:
        assert run[n] == whole[n], f'iteration {n}'
    last = latest_checkpoint(reference)
    for key, value in weights(last).items():
        assert torch.equal(weights(Path(work_dir) / last.name)[key], value), key


@pytest.mark.parametrize('by_epoch', [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, then, by_epoch):
    train(toy_config(tmp_path / 'whole', by_epoch))
    seed = torch.load(latest_checkpoint(tmp_path / 'whole'), weights_only=False)['meta']['seed']
    # The seed comes from the checkpoint; data loading processes change nothing.
    then(8, stop)
    with pytest.raises(StopError):
        train(toy_config(tmp_path / 'run', by_epoch), seed=seed)
    then(None, None)
    assert latest_checkpoint(tmp_path / 'run').name == ('epoch_2.pth' if by_epoch else 'iter_6.pth')
    train(toy_config(tmp_path / 'run', by_epoch, workers=2), resume='auto')
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


@pytest.mark.parametrize('by_epoch', [False, True])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_leave_a_checkpoint_of_the_very_iteration(tmp_path, then, by_epoch, number):
    train(toy_config(tmp_path / 'whole', by_epoch), seed=5)
    before = signal.getsignal(number)
    then(5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as error:
        train(toy_config(tmp_path / 'run', by_epoch), seed=5)
    assert number == signal.SIGINT or error.value.code == 143
    assert signal.getsignal(number) is before
    then(None, None)
    assert latest_checkpoint(tmp_path / 'run').name == INTERRUPTED
    # 5 of 12, in the middle of the second epoch.
    assert max(losses(tmp_path / 'run')) == 5
    train(toy_config(tmp_path / 'run', by_epoch), resume='auto')
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')
    assert not (tmp_path / 'run' / INTERRUPTED).exists()


def test_an_infinite_run_over_a_finite_sampler_resumes_in_its_pass(tmp_path, then):
    def config(name):
        cfg = toy_config(tmp_path / name)
        cfg.train_dataloader.sampler.type = 'DefaultSampler'
        return cfg

    train(config('whole'), seed=1)
    then(8, stop)
    with pytest.raises(StopError):
        train(config('run'), seed=1)
    then(None, None)
    train(config('run'), resume='auto')
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


def test_signals_wait_for_gradients_that_accumulate(tmp_path, then):
    cfg = toy_config(tmp_path)
    cfg.optim_wrapper.accumulative_counts = 4
    then(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(cfg)
    assert torch.load(tmp_path / INTERRUPTED, weights_only=False)['meta']['iter'] == 8


def test_resuming_needs_a_checkpoint_of_training(tmp_path):
    weights_only = tmp_path / 'weights.pth'
    torch.save({'state_dict': {}}, weights_only)
    with pytest.raises(ValueError, match=r'weights\.pth holds no run.*load_from'):
        train(toy_config(tmp_path / 'run'), resume=str(weights_only))


def workers_except(others):
    return [worker for worker in multiprocessing.active_children() if worker not in others]


def test_the_death_of_a_data_loading_process_is_explained(tmp_path, then):
    others = multiprocessing.active_children()  # of loaders of other tests, about to end
    then(4, lambda: os.kill(workers_except(others)[0].pid, signal.SIGKILL))
    with pytest.raises(DataError, match=r'DataLoader worker .*killed.*lower num_workers'):
        train(toy_config(tmp_path, workers=1))
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'DataError: DataLoader worker' in log
    assert f'The last checkpoint is {tmp_path}/iter_3.pth; --resume continues' in log


def test_the_signal_of_a_launcher_reaches_data_loading_processes_too(tmp_path, then):
    train(toy_config(tmp_path / 'whole'), seed=5)

    others = multiprocessing.active_children()

    def launcher():
        workers.extend(workers_except(others))
        child = os.fork()
        if child == 0:  # another process than their parent
            try:
                for pid in [os.getppid(), *(worker.pid for worker in workers)]:
                    with suppress(ProcessLookupError):  # one that has ended by itself
                        os.kill(pid, signal.SIGTERM)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        # None of them ends.
        sentinels = [worker.sentinel for worker in workers]
        assert not multiprocessing.connection.wait(sentinels, timeout=0.5)

    workers = []
    then(5, launcher)
    with pytest.raises(SystemExit):
        train(toy_config(tmp_path / 'run', workers=2), seed=5)
    then(None, None)
    assert workers and latest_checkpoint(tmp_path / 'run').name == INTERRUPTED
    train(toy_config(tmp_path / 'run', workers=2), resume='auto')
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


def test_an_average_of_the_weights_survives_a_signal_in_validation(tmp_path, then, monkeypatch):
    """EMAHook has exchanged the weights then."""

    def config(name):
        cfg = toy_config(tmp_path / name)
        cfg.train_cfg.val_interval = 5  # where no checkpoint is due
        cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.1))
        return cfg

    train(config('whole'), seed=5)
    process = ToyMetric.process
    asked = []

    def told(self, *args):
        if not asked:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))
        process(self, *args)

    monkeypatch.setattr(ToyMetric, 'process', told)
    with pytest.raises(SystemExit):
        train(config('run'), seed=5)
    train(config('run'), resume='auto')
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


def test_an_interrupted_epoch_goes_on_with_other_batches(tmp_path, then):
    """After 16 of 22 samples there are 6 left: one batch of 11, less one."""
    then(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(toy_config(tmp_path, by_epoch=True))
    then(None, None)
    cfg = toy_config(tmp_path, by_epoch=True)
    cfg.train_dataloader.batch_size = 11
    train(cfg, resume='auto')
    # One of two batches is left of this epoch, then two epochs of two.
    assert max(losses(tmp_path)) == 5 + 1 + 4
    assert latest_checkpoint(tmp_path).name == 'epoch_4.pth'


def test_a_validation_that_was_cut_off_is_done_after_resuming(tmp_path, monkeypatch):
    def config():
        cfg = toy_config(tmp_path)
        cfg.default_hooks.checkpoint.update(save_best='mean', rule='greater')
        return cfg

    with monkeypatch.context() as patch:
        patch.setattr(ToyMetric, 'process', lambda *args: stop())
        with pytest.raises(StopError):
            train(config())
    assert not [*tmp_path.glob('best*')]
    train(config(), resume='auto')
    assert [path.name for path in tmp_path.glob('best*')] == ['best_mean_iter_12.pth']
