import os
import resource
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner
from toy import toy_config

from gfnet_dense.engine import WorkDirError, latest_checkpoint, train
from gfnet_dense.serialization import CheckpointError, write_whole


def write(path: Path, iterations: int) -> Path:
    torch.save({'meta': {'iter': iterations}, 'optimizer': {}, 'state_dict': {}}, path)
    return path


def test_a_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / 'a.pth'
    path.write_text('old')
    with pytest.raises(KeyboardInterrupt), write_whole(path) as file:
        file.write(b'ne')
        assert path.read_text() == 'old'
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth'] and path.read_text() == 'old'
    with write_whole(path) as file:
        file.write(b'new')
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth'] and path.read_text() == 'new'


def test_the_last_checkpoint_is_the_one_that_was_saved_last(tmp_path):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / 'no') is None
    old, new = write(tmp_path / 'iter_90.pth', 90), write(tmp_path / 'iter_100.pth', 100)
    write(tmp_path / 'best_mIoU_iter_200.pth', 200)
    torch.save({'state_dict': {}}, tmp_path / 'iter_300.pth')  # weights alone
    assert latest_checkpoint(tmp_path) == new
    # A run that went back to an older checkpoint goes on from there.
    (tmp_path / 'last_checkpoint').write_text(str(old))
    assert latest_checkpoint(tmp_path) == old


@pytest.mark.parametrize('note', ['', 'gone.pth', 'iter_100.pth'])
def test_half_written_files_are_passed_over(tmp_path, note, caplog):
    old, half = write(tmp_path / 'iter_90.pth', 90), write(tmp_path / 'iter_100.pth', 100)
    half.write_bytes(half.read_bytes()[:-100])
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / note) if note else '')
    assert latest_checkpoint(tmp_path) == old


def test_an_older_checkpoint_goes_when_the_newer_one_is_whole(tmp_path, monkeypatch):
    seen = []
    save = Runner.save_checkpoint

    def look(self, out_dir, filename, *args, **kwargs):
        seen.append(sorted(p.name for p in tmp_path.glob('*.pth')))
        save(self, out_dir, filename, *args, **kwargs)

    monkeypatch.setattr(Runner, 'save_checkpoint', look)
    (tmp_path / 'iter_9.pth.gone.partial').write_text('of a run that was killed')
    cfg = toy_config(tmp_path)
    cfg.train_cfg.val_interval = 6
    cfg.default_hooks.checkpoint.update(save_best='mean', rule='greater')
    train(cfg)
    regular = [[name for name in names if name.startswith('iter')] for names in seen]
    assert regular[:3] == [[], ['iter_3.pth'], ['iter_6.pth']] and all(regular[1:])
    best = [[name for name in names if name.startswith('best')] for names in seen]
    assert all(best[best.index(['best_mean_iter_6.pth']) :])
    assert [p.name for p in tmp_path.glob('iter*')] == ['iter_12.pth']
    assert len([*tmp_path.glob('best*')]) == 1
    assert not [*tmp_path.glob('*.partial')]


def test_a_full_disk_ends_the_run_and_keeps_what_is_there(tmp_path):
    cfg = toy_config(tmp_path)
    train(cfg)
    before = (tmp_path / 'iter_12.pth').read_bytes()
    cfg.train_cfg.max_iters = 24
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A quota: no file grows beyond what is smaller than a checkpoint.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r'iter_15\.pth could not be written.*--resume'):
            train(cfg, resume='auto')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.glob('*.pth*')] == ['iter_12.pth']
    assert (tmp_path / 'iter_12.pth').read_bytes() == before
    assert not [*tmp_path.glob('*.partial')]
    train(cfg, resume='auto')
    assert latest_checkpoint(tmp_path).name == 'iter_24.pth'


def test_a_work_dir_belongs_to_one_run(tmp_path):
    cfg = toy_config(tmp_path)
    train(cfg)
    with pytest.raises(WorkDirError, match=r'holds the checkpoints of another run.*iter_12\.pth'):
        train(cfg)
    if os.fork() == 0:  # locks are between processes
        try:
            from gfnet_dense.engine.work_dir import reserved

            with reserved(tmp_path, resume=True):
                (tmp_path / 'held').touch()
                while not (tmp_path / 'enough').exists():
                    pass
        finally:
            os._exit(0)
    while not (tmp_path / 'held').exists():
        pass
    try:
        with pytest.raises(WorkDirError, match=r'in use by process \d+ on .*--work-dir'):
            train(cfg, resume='auto')
    finally:
        (tmp_path / 'enough').touch()
        os.wait()
    with pytest.raises(WorkDirError, match='cannot be written to'):
        train(cfg, work_dir='/dev/null/run')


def test_training_starts_from_weights_that_fit(tmp_path):
    """mmengine itself only logs that a file matches nothing."""
    train(toy_config(tmp_path / 'first'))
    cfg = toy_config(tmp_path / 'second')
    cfg.load_from = str(tmp_path / 'first' / 'iter_12.pth')
    train(cfg)
    cfg.work_dir, cfg.load_from = str(tmp_path / 'third'), str(tmp_path / 'other.pth')
    torch.save({'model': {'foo': torch.zeros(1)}}, cfg.load_from)
    with pytest.raises(CheckpointError, match=r'other\.pth lacks 4 of 4 weights.*init_cfg'):
        train(cfg)
