"""Pretraining by the command line, and what is made of it: evaluation, dense configs, figures."""

import re
import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from processes import ROOT, free_port, run_tool
from torch import nn
from torch._dynamo.utils import counters

from gfnet_dense.demo import write_digit_scans
from gfnet_dense.openmmlab import evaluate, find_config, train
from gfnet_dense.serialization import load_file

NANO = 'gfnet_nano_digits'
DENSE = sorted(path.stem for path in (ROOT / 'configs').glob('*_gfnet_nano_digits.py'))


@pytest.fixture(scope='module')
def scans(tmp_path_factory) -> Path:
    return write_digit_scans(tmp_path_factory.mktemp('data') / 'scans')


@pytest.fixture(scope='module')
def pretrained(scans, tmp_path_factory) -> tuple[Path, str]:
    """Two processes train an epoch of 2 batches and evaluate on 9 images, 5 and 4 of them."""
    work_dir = tmp_path_factory.mktemp('pretrained')
    result = run_tool(
        'dist_train.sh', 'gfnet_nano_digits', 2, '--seed', 0, '--work-dir', work_dir,
        '--cfg-options', 'train_cfg.max_epochs=1',
        'train_dataloader.dataset.indices=128', 'val_dataloader.dataset.indices=9',
        'test_dataloader.dataset.indices=9', 'val_dataloader.batch_size=2',
        cwd=work_dir, DIGIT_SCANS_ROOT=scans, MASTER_PORT=free_port(),
    )  # fmt: skip
    return work_dir / 'epoch_1.pth', result.stdout


def test_two_processes_say_what_they_do(pretrained, scans):
    out = pretrained[1]
    summary = out[out.index('This run:') :]
    for line in (
        r'model +ImageClassifier of GFNetPyramid; 1\.90M parameters',
        r'weights +none loaded, trained from scratch',
        rf'training data +128 images, ImageFolder in {scans}',
        rf'validation data +9 images, ImageFolder in {scans}',
        r'total batch +64 \(32 in each of 2 processes\)',
        r'learning rate +0\.004, scaled to the total batch from that for 32',
        r'iterations +0 to 2\n',
    ):
        assert re.search(line, summary), (line, summary[:1500])
    assert 'Scaling the original LR by 2.0' in out


def test_a_compiled_backbone_learns_the_same(scans, tmp_path, monkeypatch):
    monkeypatch.setenv('DIGIT_SCANS_ROOT', str(scans))
    # Without code generation, which takes a minute and is torch's own matter.
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, 'compile', lambda m: compile_module(m, backend='aot_eager'))
    options = {
        'train_cfg.max_epochs': 1, 'train_dataloader.dataset.indices': 64,
        'val_dataloader.dataset.indices': 9, 'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False, 'val_dataloader.num_workers': 0,
        'val_dataloader.persistent_workers': False,
    }  # fmt: skip
    torch.compiler.reset()
    counters.clear()
    plain, compiled = (
        train(NANO, work_dir=str(tmp_path / name), seed=0, compiled=bool(name), cfg_options=options)
        for name in ('', 'compiled')
    )
    assert counters['stats']['unique_graphs'] == 2  # of training and of evaluation
    assert not counters['graph_break']
    plain, compiled = (
        load_file(Path(run.work_dir) / 'epoch_1.pth')['state_dict'] for run in (plain, compiled)
    )
    assert plain.keys() == compiled.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_two_processes_and_one_evaluate_alike(pretrained, scans, tmp_path, monkeypatch):
    monkeypatch.setenv('DIGIT_SCANS_ROOT', str(scans))
    options = {'test_dataloader.dataset.indices': 9, 'test_dataloader.num_workers': 0}
    options['test_dataloader.persistent_workers'] = False
    found = evaluate(
        'gfnet_nano_digits', pretrained[0], work_dir=str(tmp_path), cfg_options=options
    )
    for name, value in found.items():
        assert re.findall(rf'{name}: (\d+\.\d+)', pretrained[1])[-1] == f'{value:.4f}'


@pytest.mark.parametrize('name', DENSE)
def test_dense_configs_start_from_a_pretrained_checkpoint(pretrained, name):
    """Every tensor of the pretrained network but its classifier is in the backbone then."""
    cfg = Config.fromfile(find_config(name))
    package = cfg.default_scope
    import_module(f'{package}.models')
    init_default_scope(package)
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(pretrained[0]))
    model = import_module(f'{package}.registry').MODELS.build(cfg.model)
    model.init_weights()
    trained = torch.load(pretrained[0], weights_only=False)['state_dict']
    arrived = model.backbone.state_dict()
    for key, value in trained.items():
        key = key.removeprefix('backbone.').replace('norm.', 'norm3.', key.startswith('backbone.n'))
        if not key.startswith('head.'):
            assert torch.equal(arrived[key], value), key
    assert any('filter.complex_weight' in key for key in arrived)


def test_the_tool_writes_scans(tmp_path, monkeypatch, capsys):
    tool = ROOT / 'tools' / 'make_digits.py'
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['make_digits.py', '--scans'])
    runpy.run_path(str(tool), run_name='__main__')
    assert 'data/digit_scans: 1797 scans in train/ and val/' in capsys.readouterr().out
    assert len(list(Path('data/digit_scans/val').glob('*/*.png'))) == 364
    monkeypatch.setattr(sys, 'argv', ['make_digits.py', '--scans', '--seed', '3'])
    with pytest.raises(SystemExit):
        runpy.run_path(str(tool), run_name='__main__')
    assert '--seed is for scenes: leave it, or --scans' in capsys.readouterr().err


def test_the_benchmark_prints_both_rates(scans, monkeypatch, capsys):
    monkeypatch.setenv('DIGIT_SCANS_ROOT', str(scans))
    options = ['--batches', '3', '--steps', '1', '--cfg-options', 'train_dataloader.batch_size=4']
    monkeypatch.setattr(sys, 'argv', ['benchmark_data.py', 'gfnet_nano_digits', *options])
    runpy.run_path(str(ROOT / 'tools' / 'benchmark_data.py'), run_name='__main__')
    out = capsys.readouterr().out
    assert re.search(r'gfnet_nano_digits: batches of 4, 1 workers, \d+ cores; ', out)
    loading, training = (float(rate) for rate in re.findall(r'(\d+\.\d) images/s', out))
    ratio = float(re.search(r'is (\d+\.\d+) times as fast', out)[1])
    assert ratio == pytest.approx(loading / training, rel=0.05)
