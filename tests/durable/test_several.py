"""What takes processes of its own, each kind in one of them to spare the imports."""

import sys
import time
from pathlib import Path

import pytest
from processes import free_port, run, run_tool
from toy import toy_config

from gfnet_dense.demo import write_digits

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_twenty_times_equals_an_undisturbed_one(tmp_path):
    digits = write_digits(tmp_path / 'digits', num_training=16, num_validation=1)
    script, folder = HERE / 'killed.py', tmp_path / 'runs'
    result = run(sys.executable, script, folder, DIGITS_ROOT=digits)
    assert 'killed 20 times, equal an undisturbed run' in result.stdout


@pytest.mark.slow
def test_runs_of_two_processes(tmp_path):
    run(sys.executable, HERE / 'ranks.py', tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(('dead', 'killed'), [(0, True), (1, False)])
def test_the_launcher_ends_the_other_process_of_a_run(tmp_path, dead, killed):
    cfg = toy_config(tmp_path)
    cfg.custom_imports = dict(imports=['toy'])
    cfg.custom_hooks.append(dict(type='DieHook', rank=dead, iteration=5, killed=killed))
    cfg.dump(tmp_path / 'config.py')
    result = run_tool('dist_train.sh', tmp_path / 'config.py', 2, status=1, MASTER_PORT=free_port())
    ended = time.time()
    assert ended - float((tmp_path / 'died').read_text()) < 60
    # The other process says from where to continue, and so does one that ends by an error.
    said = f'The last checkpoint is {tmp_path}/iter_3.pth; --resume continues from it.'
    assert result.stdout.count(said) == (1 if killed else 2), result.stdout
