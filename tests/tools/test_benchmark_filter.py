"""The table that the benchmark of the filter prints."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from gfnet_dense.spectral import BACKENDS

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'benchmark_filter.py'


def test_prints_a_ratio_for_every_contender_and_says_where():
    command = [sys.executable, TOOL, '--sizes', '4x6x2', '5x3x1', '--repeats', '2']
    command += ['--batch', '1', '3', '--seconds', '0']
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    heading, *lines = run.stdout.splitlines()
    assert f'torch {torch.__version__}' in heading
    assert 'float32' in heading
    names = ['contiguous', *(name for name in BACKENDS if name != 'fused')]  # which needs a GPU
    assert f'| baseline ms | {" | ".join(names)} |' in run.stdout
    rows = [line for line in lines if re.match(r'\| [13]x(4x6x2|5x3x1) \| forward', line)]
    assert len(rows) == 8
    for row in rows:
        assert len(re.findall(r'\d+\.\d\d \(\d+\.\d\d-\d+\.\d\d\)', row)) == len(names)


def test_the_filter_of_another_checkout_takes_part():
    root = TOOL.parents[1]
    command = [sys.executable, TOOL, '--against', root, '--sizes', '4x4x8', '--repeats', '2']
    command += ['--batch', '1', '--seconds', '0']
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f' | {root.name} |' in run.stdout
    assert len(re.findall(r'(?m)^\| 1x4x4x8 \|', run.stdout)) == 2
