"""What takes processes of its own, each kind in one of them to spare the imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gfnet_dense.demo import write_digits

HERE = Path(__file__).parent


def run(script: str, folder: Path, **environment: str) -> str:
    environment = {
        **os.environ, 'PYTHONPATH': str(HERE.parent), 'OMP_NUM_THREADS': '1', **environment
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, str(HERE / script), str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_twenty_times_equals_an_undisturbed_one(tmp_path):
    digits = write_digits(tmp_path / 'digits', num_training=16, num_validation=1)
    out = run('killed.py', tmp_path / 'runs', DIGITS_ROOT=str(digits))
    assert 'killed 20 times, equal an undisturbed run' in out


@pytest.mark.slow
def test_runs_of_two_processes(tmp_path):
    run('ranks.py', tmp_path)
