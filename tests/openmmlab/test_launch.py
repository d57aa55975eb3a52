import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from processes import run
from toy import toy_config

from gfnet_dense.demo import write_digits
from gfnet_dense.openmmlab import evaluate, find_config, launch, train
from gfnet_dense.serialization import load_file

STEP = Path(__file__).with_name('step.py')
NANO = 'upernet_gfnet_nano_digits'


def test_configs_are_found_by_path_and_by_name(tmp_path, monkeypatch):
    by_name = find_config(NANO)
    assert by_name.name == f'{NANO}.py' and by_name.is_file()
    monkeypatch.chdir(tmp_path)
    assert find_config(NANO) == find_config(f'{NANO}.py') == find_config(f'configs/{NANO}.py')
    own = tmp_path / f'{NANO}.py'
    own.write_text('')
    assert find_config(f'{NANO}.py').resolve() == own


def test_an_unknown_config_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match=rf'no_such.*{NANO}'):
        find_config('no_such')


def test_a_name_in_another_folder_is_not_one_of_ours():
    with pytest.raises(FileNotFoundError, match='my_experiments'):
        find_config(f'my_experiments/{NANO}.py')


def test_errors_before_a_run_starts(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing to resume'):
        train(NANO, work_dir=str(tmp_path), resume='auto')
    with pytest.raises(FileNotFoundError, match=r'nothing to resume in .*mistyped'):
        train(NANO, work_dir=str(tmp_path / 'mistyped'), resume='auto')
    assert not (tmp_path / 'mistyped').exists()
    with pytest.raises(FileNotFoundError, match=r'no checkpoint at nowhere\.pth'):
        evaluate(NANO, 'nowhere.pth', work_dir=str(tmp_path))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r'float16 needs a GPU.*bfloat16'):
            train(NANO, work_dir=str(tmp_path), amp='float16')
    cfg = Config.fromfile(find_config(NANO))
    cfg.pop('auto_scale_lr')
    with pytest.raises(ValueError, match='auto_scale_lr'):
        train(cfg, work_dir=str(tmp_path), auto_scale_lr=True)
    with pytest.raises(ValueError, match='ToyModel has no backbone'):
        train(toy_config(tmp_path / 'toy'), compiled=True)


@pytest.mark.parametrize(
    ('dtype', 'loss_scale'), [('float16', 'dynamic'), ('bfloat16', {'enabled': False})]
)
def test_one_switch_trains_in_mixed_precision(monkeypatch, tmp_path, dtype, loss_scale):
    class BuiltError(Exception):
        pass

    def build(cfg):
        raise BuiltError(cfg)

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(launch, '_build', build)
    with pytest.raises(BuiltError) as error:
        train(NANO, work_dir=str(tmp_path), amp=dtype)
    wrapper = error.value.args[0].optim_wrapper
    assert (wrapper.type, wrapper.dtype, wrapper.loss_scale) == (
        'AmpOptimWrapper', dtype, loss_scale
    )  # fmt: skip
    # The wrapper is one that mmengine builds.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    AmpOptimWrapper(optimizer=optimizer, dtype=wrapper.dtype, loss_scale=wrapper.loss_scale)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU takes the wrapper of mmengine')
def test_a_cpu_trains_in_bfloat16_with_float32_weights(tmp_path, monkeypatch):
    monkeypatch.setenv(
        'DIGITS_ROOT', str(write_digits(tmp_path / 'digits', num_training=16, num_validation=1))
    )
    options = {
        'train_cfg.max_iters': 2,
        'train_cfg.val_interval': 2,
        'train_dataloader.num_workers': 0,
    }
    options |= {'train_dataloader.persistent_workers': False, 'train_dataloader.batch_size': 2}
    computed_in = set()
    monkeypatch.setattr(
        launch, '_build', lambda cfg, build=launch._build: watch(build(cfg), computed_in)
    )
    runner = train(NANO, work_dir=str(tmp_path), amp='bfloat16', cfg_options=options)
    assert computed_in == {torch.bfloat16, torch.float32}  # in training, in validation
    assert {p.dtype for p in runner.model.parameters()} == {torch.float32}
    saved = load_file(tmp_path / 'iter_2.pth')['state_dict']
    assert {v.dtype for v in saved.values() if v.is_floating_point()} == {torch.float32}
    assert all(v.isfinite().all() for v in saved.values())


def watch(runner, computed_in):
    runner.model.backbone.blocks[0][0].mlp.fc1.register_forward_hook(
        lambda module, args, y: computed_in.add(y.dtype)
    )
    return runner


@pytest.mark.slow
def test_a_step_of_two_processes_equals_one_with_the_joined_batch(tmp_path, monkeypatch):
    digits = write_digits(tmp_path / 'digits', num_training=8, num_validation=1)
    torchrun = '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'
    run(sys.executable, *torchrun, STEP, tmp_path / 'two', 8, DIGITS_ROOT=digits)
    monkeypatch.setenv('DIGITS_ROOT', str(digits))
    monkeypatch.setattr('sys.argv', [str(STEP), str(tmp_path / 'one'), '8'])
    runpy.run_path(str(STEP))
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ('one', 'two'))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-5, msg=key)
    # The step was a real one.
    start = torch.ones_like(one['backbone.norm0.weight'])
    assert (one['backbone.norm0.weight'] - start).abs().max() > 1e-3
