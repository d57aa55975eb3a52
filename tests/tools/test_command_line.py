"""The command line, for real: data, training, interruption, resume, evaluation, two processes."""

import argparse
import os
import pickle
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import DistSamplerSeedHook
from PIL import Image
from processes import ROOT, free_port, run_tool

from gfnet_dense.demo import CLASSES, write_digits
from gfnet_dense.openmmlab import GFNetPyramid

CONFIG = ROOT / 'configs' / 'upernet_gfnet_nano_digits.py'
ARCH = Config.fromfile(CONFIG).model.backbone.arch
SHORT = (
    'train_dataloader.batch_size=4',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.logger.interval=1',
    'train_cfg.val_interval=4',
)


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    return write_digits(
        tmp_path_factory.mktemp('data') / 'digits', num_training=16, num_validation=5
    )


@pytest.fixture(scope='module', autouse=True)
def digits_root(digits) -> Iterator[None]:
    """Name the data in the environment of this process and of those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('DIGITS_ROOT', str(digits))
        yield


def start(*command, until: str) -> tuple[subprocess.Popen, str]:
    """Start a command; return it, and its output up to a line that holds a pattern."""
    process = subprocess.Popen(
        [str(c) for c in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = ''
    for line in process.stdout:
        output += line
        if re.search(until, line):
            return process, output
    raise AssertionError(f'ended with {process.wait()}: {output[-5000:]}')


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[Path, str]:
    """Train four iterations, from a folder that is not the checkout; config by name."""
    cwd = tmp_path_factory.mktemp('elsewhere')
    result = run_tool(
        'train.py', 'upernet_gfnet_nano_digits', '--work-dir', 'run', '--seed', '3',
        '--cfg-options', 'train_cfg.max_iters=4', *SHORT, cwd=cwd,
    )  # fmt: skip
    return cwd / 'run', result.stdout


def test_training_says_what_it_does_and_saves(trained, digits):
    work_dir, out = trained
    summary = out[out.index('This run:') :]
    for line in (
        r'model +EncoderDecoder of GFNetPyramid, UPerHead, FCNHead; 2\.\d\dM parameters',
        r'weights +none loaded, trained from scratch',
        rf'training data +16 images, BaseSegDataset in {re.escape(str(digits))}',
        rf'validation data +5 images, BaseSegDataset in {re.escape(str(digits))}',
        r'total batch +4 ',
        r'learning rate +0\.002',
        r'device +cpu',
        r'precision +torch.float32',
    ):
        assert re.search(line, summary), (line, summary[:1500])
    assert re.search(r'Iter\(train\) \[4/4\].*eta', out)
    assert re.search(r'mIoU: \d', out)
    checkpoint = torch.load(work_dir / 'iter_4.pth', weights_only=False)
    assert checkpoint['meta']['iter'] == 4 and checkpoint['meta']['seed'] == 3
    assert 'backbone.blocks.0.0.filter.complex_weight' in checkpoint['state_dict']


def test_what_comes_before_the_first_iteration_fits_a_screen(trained):
    work_dir, out = trained
    before = out[: out.index('Iter(train)')]
    assert len(before.splitlines()) <= 40
    (log,) = work_dir.glob('*/*.log')
    assert f'config and hooks  in {log}' in before
    text = log.read_text()
    for part in ('System environment:', 'Config:', 'Hooks will be executed', 'This run:'):
        assert part in text
    # Long messages of evaluation are shown, such as the table of classes.
    assert re.search(r'^\| +background +\|', out, re.MULTILINE)


def test_a_segmentors_checkpoint_is_read_safely_into_a_backbone(trained):
    checkpoint = trained[0] / 'iter_4.pth'
    backbone = GFNetPyramid(ARCH, img_size=64)
    backbone.load_pretrained(checkpoint)
    state = torch.load(checkpoint, weights_only=False)['state_dict']
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, state[f'backbone.{key}']), key


def test_a_killed_run_resumes_from_its_latest_checkpoint(tmp_path, gfnet):
    arguments = [
        CONFIG, '--work-dir', tmp_path, '--cfg-options', *SHORT, 'train_cfg.val_interval=100',
    ]  # fmt: skip
    process, _ = start(
        sys.executable, ROOT / 'tools/train.py', *arguments, 'train_cfg.max_iters=10000',
        until=r'train\) \[ *3/',
    )  # fmt: skip
    process.kill()
    process.communicate()
    saved = int(re.search(r'iter_(\d+)', (tmp_path / 'last_checkpoint').read_text())[1])

    status, out, _ = gfnet('train', *arguments, f'train_cfg.max_iters={saved + 2}', '--resume')
    assert status == 0
    assert f'iter_{saved}.pth' in out
    iterations = [int(i) for i in re.findall(r'Iter\(train\) \[\s*(\d+)/', out)]
    assert iterations == [saved + 1, saved + 2]
    checkpoint = torch.load(tmp_path / f'iter_{saved + 2}.pth', weights_only=False)
    steps = {int(state['step']) for state in checkpoint['optimizer']['state'].values()}
    assert steps == {saved + 2}


def test_an_image_that_is_deleted_during_the_run_is_named(tmp_path, gfnet, monkeypatch):
    digits = write_digits(tmp_path / 'digits', num_training=8, num_validation=1)
    monkeypatch.setenv('DIGITS_ROOT', str(digits))
    gone = sorted((digits / 'images/training').iterdir())[3]

    def delete(hook, runner, *args, **kwargs) -> None:
        if runner.iter == 2:
            gone.unlink()

    monkeypatch.setattr(DistSamplerSeedHook, 'after_train_iter', delete)
    status, out, err = gfnet(
        'train', CONFIG, '--work-dir', tmp_path / 'run',
        '--cfg-options', *SHORT, 'train_cfg.val_interval=10000', 'train_cfg.max_iters=10000',
        'train_dataloader.num_workers=1',
    )  # fmt: skip
    assert status == 1 and not gone.exists()
    last = err.strip().splitlines()[-1]
    assert 'DataError' in last and f'{gone} cannot be loaded: FileNotFoundError' in last
    assert 'The last checkpoint is' in out


def test_an_unknown_head_is_named(tmp_path, gfnet):
    status, _, err = gfnet(
        'train', CONFIG, '--work-dir', tmp_path,
        '--cfg-options', 'model.decode_head.type=FooHead',
    )  # fmt: skip
    assert status == 1
    assert "KeyError: 'FooHead is not in the mmseg::model registry" in err


def test_evaluation_predicts_draws_and_averages(trained, digits, tmp_path, gfnet):
    work_dir, trained_out = trained
    labels, pictures, dump = tmp_path / 'labels', tmp_path / 'pictures', tmp_path / 'all.pkl'
    base = [CONFIG, work_dir / 'iter_4.pth']
    options = ['--work-dir', tmp_path / 'work', '--cfg-options', *SHORT]

    out = run_tool('test.py', *base, '--out', labels, '--show-dir', pictures, *options).stdout
    # mmengine loads a file without any safety when its own list of safe types does not do.
    assert 'safely load' not in out
    pattern = r'mIoU: (\d+\.\d+)'
    # The evaluation during training saw the same weights and data.
    assert re.findall(pattern, out)[-1] == re.findall(pattern, trained_out)[-1]
    names = sorted(path.stem for path in (digits / 'images/validation').glob('*.jpg'))
    assert sorted(path.stem for path in labels.glob('*.png')) == names
    assert len(list(pictures.rglob('*.png'))) == len(names)

    # --out is in the labels of the data set, 0 for not labelled: the mIoU again, by hand.
    truth = [np.array(Image.open(digits / f'annotations/validation/{n}.png')) for n in names]
    found = [np.array(Image.open(labels / f'{n}.png')) for n in names]
    truth, found = np.stack(truth), np.stack(found)
    ious = []
    for c in range(1, len(CLASSES) + 1):
        in_truth, in_found = (truth == c), (found == c) & (truth > 0)
        if (in_truth | in_found).any():
            ious.append((in_truth & in_found).sum() / (in_truth | in_found).sum())
    assert 100 * np.mean(ious) == pytest.approx(float(re.findall(pattern, out)[-1]), abs=0.006)

    status, out, _ = gfnet('test', *base, '--tta', '--out', dump, *options)
    assert status == 0
    assert re.search(pattern, out)
    with dump.open('rb') as file:
        assert len(pickle.load(file)) == len(names)


def test_a_checkpoint_that_does_not_fit_is_not_evaluated(tmp_path, gfnet, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / 'other.pth'
    torch.save({'state_dict': {'foo': torch.zeros(1)}}, checkpoint)
    status, out, err = gfnet('test', CONFIG, checkpoint, '--cfg-options', *SHORT)
    assert status == 1
    assert 'foo' in err
    assert not re.search(r'mIoU: \d', out)


def test_learning_rate_scales_with_the_batch(tmp_path, gfnet):
    status, out, _ = gfnet(
        'train', CONFIG, '--work-dir', tmp_path, '--auto-scale-lr',
        '--cfg-options', 'train_cfg.max_iters=1', *SHORT,
    )  # fmt: skip
    assert status == 0
    # Made for 32 images at 0.002; there are 4.
    assert re.search(r'learning rate +0\.00025, scaled', out)
    assert re.search(r'total batch +4 ', out)


def test_two_processes_train_validate_and_save(tmp_path, gfnet):
    arguments = ['--work-dir', tmp_path, '--cfg-options', 'train_cfg.max_iters=2', *SHORT]
    out = run_tool(
        'dist_train.sh', CONFIG, 2, *arguments, 'train_cfg.val_interval=2',
        cwd=tmp_path, MASTER_PORT=free_port(),
    ).stdout  # fmt: skip
    assert re.search(r'total batch +8 \(4 in each of 2 processes\)', out)
    trained_miou = re.findall(r'mIoU: (\d+\.\d+)', out)[-1]
    checkpoint = tmp_path / 'iter_2.pth'
    state = torch.load(checkpoint, weights_only=False)['state_dict']
    assert not any(key.startswith('module.') for key in state)

    # One process says the same, although two do not divide the five images.
    status, out, _ = gfnet('test', CONFIG, checkpoint, '--work-dir', tmp_path / 'one')
    assert status == 0
    assert re.findall(r'mIoU: (\d+\.\d+)', out)[-1] == trained_miou


def test_an_ade20k_config_trains_from_official_weights(tmp_path, digits, gfnet, monkeypatch):
    """The digits are in the layout of ADE20K, with fewer labels."""
    file = tmp_path / 'torch' / 'hub' / 'checkpoints' / 'gfnet-h-ti.pth'
    file.parent.mkdir(parents=True)
    official = GFNetPyramid('h-ti', num_classes=1000).state_dict()
    torch.save({'model': official, 'args': argparse.Namespace(lr=1e-3), 'epoch': 299}, file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('ADE20K_ROOT', str(digits))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    command = [
        'train', 'fpn_gfnet_h_ti_ade20k', '--work-dir', tmp_path / 'run',
        '--cfg-options', 'train_cfg.max_iters=1', *SHORT, 'train_dataloader.batch_size=2',
        'train_cfg.val_interval=1', 'val_dataloader.dataset.indices=1',
    ]  # fmt: skip
    status, out, _ = gfnet(*command)
    assert status == 0
    assert re.search(rf'weights +backbone from {file}', out)
    assert 'resized from grid (56, 56) to (128, 128), bicubic: pos_embed' in out
    assert re.search(r'resized from grid \(7, 7\) to \(16, 16\), bilinear: blocks\.3\.0', out)
    assert re.search(r'newly initialised: norm0\.weight', out)
    assert re.search(r'model +EncoderDecoder of GFNetPyramid, FPN, FPNHead; 26\.11M', out)
    assert re.search(r'mIoU: \d', out)

    file.unlink()
    with monkeypatch.context() as patch:
        infer_with_classes_of_ade20k(tmp_path / 'run' / 'iter_1.pth', digits, patch)

    command[command.index(tmp_path / 'run')] = tmp_path / 'again'
    status, _, err = gfnet(*command)
    assert status == 1
    assert 'DownloadError: the official weights gfnet-h-ti cannot be downloaded' in err
    assert 'cloud.tsinghua.edu.cn' in err and str(file) in err


def infer_with_classes_of_ade20k(checkpoint, digits, monkeypatch):
    """From another folder, without data and without official weights."""
    monkeypatch.chdir(digits)
    monkeypatch.delenv('ADE20K_ROOT')
    monkeypatch.delenv('DIGITS_ROOT')
    segmentation = runpy.run_path(str(Path(__file__).with_name('inference.py')))['segmentation']
    config = ROOT / 'configs' / 'fpn_gfnet_h_ti_ade20k.py'
    image = digits / 'images/validation/ADE_val_00000002.jpg'
    found = segmentation(str(config), str(checkpoint), str(image))
    labels = np.array(found['init_model'])
    assert labels.shape == (64, 64) and 0 <= labels.min() <= labels.max() < 150
    np.testing.assert_array_equal(found['MMSegInferencer'], labels)
    for meta in found['meta']:
        assert len(meta['classes']) == len(meta['palette']) == 150
        assert (meta['classes'][0], meta['classes'][-1]) == ('wall', 'flag')
        assert [*map(list, meta['palette'])][::149] == [[120, 120, 120], [92, 0, 255]]


@pytest.mark.parametrize('script', ['dist_train', 'dist_test', 'slurm_train', 'slurm_test'])
def test_scripts_say_how_they_are_used(script):
    result = run_tool(f'{script}.sh', status=2, stderr=subprocess.PIPE)
    assert result.stderr.startswith('usage:')


def test_slurm_scripts_ask_for_what_they_are_told(tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    environment = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'GPUS': 16, 'PYTHON': 'python'}
    out = run_tool(
        'slurm_train.sh', 'part', 'job', 'c.py', 'work', '--amp', cwd=tmp_path, **environment
    ).stdout.split()
    assert {'--partition=part', '--job-name=job', '--ntasks=16', '--ntasks-per-node=8'} <= set(out)
    script = next(i for i, word in enumerate(out) if word.endswith('tools/train.py'))
    assert out[script + 1 :] == ['c.py', '--work-dir', 'work', '--amp', '--launcher', 'slurm']
