import errno
import json
import os
import pickle
import resource
import struct
import time
from pathlib import Path

import pytest
import torch
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from toy import toy_config

from gfnet_dense.durable import WorkDirError, latest_checkpoint, lock_work_dir
from gfnet_dense.durable.checkpoints import local_file
from gfnet_dense.openmmlab import evaluate, train
from gfnet_dense.serialization import CheckpointError, load_file, write_whole


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
    with pytest.raises(
        WorkDirError, match=r'holds the checkpoints of another run, such as iter_12\.pth'
    ):
        train(cfg)
    other_process, ours = os.pipe(), os.pipe()
    if os.fork() == 0:  # locks are between processes
        try:
            with lock_work_dir(tmp_path, tmp_path / 'iter_12.pth'):
                os.write(ours[1], b'locked')
                os.read(other_process[0], 1)
        finally:
            os._exit(0)
    assert os.read(ours[0], 6) == b'locked'
    try:
        with pytest.raises(WorkDirError, match=r'in use by process \d+ on .*--work-dir'):
            train(cfg, resume='auto')
    finally:
        os.write(other_process[1], b'x')
        os.wait()
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'best_mIoU_iter_3.pth').touch()
    with pytest.raises(WorkDirError, match=r'another run, such as best_mIoU_iter_3\.pth'):
        train(cfg, work_dir=str(other), resume=str(tmp_path / 'iter_12.pth'))
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


def test_a_work_dir_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def lockf(*args):
        raise OSError(37, 'No locks available')

    monkeypatch.setattr('gfnet_dense.durable.work_dir.fcntl.lockf', lockf)
    train(toy_config(tmp_path))


def test_what_is_read_as_one_thing_is_not_executed_as_another(tmp_path):
    """A safetensors file whose bytes are a pickle as well."""
    executed, path = tmp_path / 'executed', tmp_path / 'both.pth'
    code = f"cos\nmkdir\n(S'{executed}'\ntR.".encode()
    entry = json.dumps(dict(dtype='U8', shape=[len(code)], data_offsets=[0, len(code)]))
    head, tail = '{"__metadata__":{"a":"', f'"}},"p":{entry}}}'
    # To pickle the length of the header is an opcode and a number without meaning, and most of the
    # header a string that it skips.
    skipped = '#' * (0x7E - len(tail))
    length = 0x55 + 64 * 256
    header = (
        head + 'N' * (length - len(head) - len(tail) - 2 - len(skipped)) + 'U~' + skipped + tail
    )
    path.write_bytes(struct.pack('<Q', length) + header.encode() + code)
    assert [*load_file(path)] == ['p']
    pickle.loads(path.read_bytes())
    executed.rmdir()  # what a pickle it is

    cfg = toy_config(tmp_path / 'run')
    cfg.test_dataloader, cfg.test_cfg = cfg.val_dataloader, dict(type='TestLoop')
    cfg.test_evaluator = cfg.val_evaluator
    with pytest.raises(RuntimeError, match='p'):
        evaluate(cfg, path)
    cfg.load_from = str(path)
    with pytest.raises(CheckpointError):
        train(cfg)
    assert not executed.exists()


def test_checkpoints_wait_for_gradients_that_accumulate(tmp_path):
    cfg = toy_config(tmp_path)
    cfg.optim_wrapper.accumulative_counts = 4
    cfg.default_hooks.checkpoint.max_keep_ckpts = -1
    train(cfg)
    names = sorted(int(p.stem.split('_')[1]) for p in tmp_path.glob('*.pth'))
    assert names == [4, 8, 12]  # due at 3, 6, 9 and 12


def test_a_whole_checkpoint_that_is_not_noted_yet_is_found(tmp_path):
    old = write(tmp_path / 'iter_90.pth', 90)
    (tmp_path / 'last_checkpoint').write_text(str(old))
    new = write(tmp_path / 'iter_100.pth', 100)
    os.utime(new, (time.time() + 1,) * 2)  # clocks of files are coarse
    assert latest_checkpoint(tmp_path) == new


def test_checkpoints_may_go_to_another_folder(tmp_path):
    cfg = toy_config(tmp_path / 'run')
    cfg.default_hooks.checkpoint.out_dir = str(tmp_path / 'elsewhere')
    train(cfg)
    assert latest_checkpoint(tmp_path / 'run') == tmp_path / 'elsewhere/run/iter_12.pth'


def test_a_validation_by_itself_returns_its_metrics(tmp_path):
    train(toy_config(tmp_path / 'run'))
    cfg = toy_config(tmp_path / 'val')
    cfg.runner_type, cfg.load_from = 'DurableRunner', str(tmp_path / 'run' / 'iter_12.pth')
    assert RUNNERS.build(cfg).val()['number'] == 22
    state = load_file(cfg.load_from)
    del state['state_dict']['layers.2.bias']
    torch.save(state, cfg.load_from)
    with pytest.raises(RuntimeError, match=r'layers\.2\.bias'):
        RUNNERS.build(cfg).val()


def test_another_head_of_a_model_without_a_backbone(tmp_path, caplog):
    train(toy_config(tmp_path / 'run'))
    file = tmp_path / 'run' / 'iter_12.pth'
    state = load_file(file)
    state['state_dict']['layers.2.bias'] = torch.zeros(7)
    torch.save(state, file)
    cfg = toy_config(tmp_path / 'finetuned')
    cfg.load_from = str(file)
    train(cfg)
    torch.save({'model': {'foo': torch.zeros(1)}}, file)
    cfg.work_dir = str(tmp_path / 'again')
    with pytest.raises(CheckpointError, match='lacks 4 of 4 weights'):
        train(cfg)


def test_weights_of_the_web_are_downloaded_once(tmp_path, monkeypatch):
    train(toy_config(tmp_path / 'run'))
    asked = []

    def download(url, path):
        asked.append(url)
        Path(path).write_bytes((tmp_path / 'run' / 'iter_12.pth').read_bytes())

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    urls = [f'https://example.org/{run}/iter_12.pth?version=1' for run in 'aab']
    for i, url in enumerate(urls):
        cfg = toy_config(tmp_path / str(i))
        cfg.load_from = url
        train(cfg)
    assert asked == urls[1:]  # each once, whatever its name
    files = (tmp_path / 'hub' / 'checkpoints').glob('*.pth')
    assert {path.name.partition('-')[2] for path in files} == {'iter_12.pth'}
    assert local_file(tmp_path) == str(tmp_path)


def test_a_disk_that_fails_does_not_make_a_bad_file(tmp_path, monkeypatch):
    path = write(tmp_path / 'iter_9.pth', 9)

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(torch, 'load', fail)
    with pytest.raises(OSError, match='Input/output error'):
        load_file(path)
