"""What takes processes of its own, each kind in one of them to spare the imports."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import toy_config

from gfnet_dense.demo import write_digits

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a command with this checkout's package and the helpers of the tests."""
    path = os.pathsep.join([str(HERE.parent), str(REPOSITORY), os.environ['PYTHONPATH']])
    return subprocess.run(
        command,
        env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1', **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_twenty_times_equals_an_undisturbed_one(tmp_path):
    digits = write_digits(tmp_path / 'digits', num_training=16, num_validation=1)
    script, folder = str(HERE / 'killed.py'), str(tmp_path / 'runs')
    result = run(sys.executable, script, folder, DIGITS_ROOT=str(digits))
    assert result.returncode == 0, result.stdout[-3000:]
    assert 'killed 20 times, equal an undisturbed run' in result.stdout


@pytest.mark.slow
def test_runs_of_two_processes(tmp_path):
    result = run(sys.executable, str(HERE / 'ranks.py'), str(tmp_path))
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(('dead', 'killed'), [(0, True), (1, False)])
def test_the_launcher_ends_the_other_process_of_a_run(tmp_path, dead, killed):
    cfg = toy_config(tmp_path)
    cfg.custom_imports = dict(imports=['toy'])
    cfg.custom_hooks.append(dict(type='DieHook', rank=dead, iteration=5, killed=killed))
    cfg.dump(tmp_path / 'config.py')
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port = server.getsockname()[1]
    script = str(REPOSITORY / 'tools' / 'dist_train.sh')
    options = dict(PYTHON=sys.executable, MASTER_PORT=str(port))
    result = run('bash', script, str(tmp_path / 'config.py'), '2', **options)
    ended = time.time()
    assert result.returncode != 0, result.stdout
    assert ended - float((tmp_path / 'died').read_text()) < 60
    # The other process says from where to continue, and so does one that ends by an error.
    said = f'The last checkpoint is {tmp_path}/iter_3.pth; --resume continues from it.'
    assert result.stdout.count(said) == (1 if killed else 2), result.stdout
