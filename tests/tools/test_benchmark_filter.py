"""The table that the benchmark of the filter prints."""

import re
import subprocess

import torch
from processes import ROOT, run_tool

from gfnet_dense.spectral import BACKENDS

BRIEF = '--repeats', 2, '--seconds', 0


def test_prints_a_ratio_for_every_contender_and_says_where():
    sizes = '--sizes', '4x6x2', '5x3x1', '--batch', 1, 3
    result = run_tool('benchmark_filter.py', *sizes, *BRIEF, stderr=subprocess.PIPE)
    heading, *lines = result.stdout.splitlines()
    assert f'torch {torch.__version__}' in heading
    assert 'float32' in heading
    names = ['contiguous', *(name for name in BACKENDS if name != 'fused')]  # which needs a GPU
    assert f'| baseline ms | {" | ".join(names)} |' in result.stdout
    rows = [line for line in lines if re.match(r'\| [13]x(4x6x2|5x3x1) \| forward', line)]
    assert len(rows) == 8
    for row in rows:
        assert len(re.findall(r'\d+\.\d\d \(\d+\.\d\d-\d+\.\d\d\), \d+ %', row)) == len(names)


def test_the_filter_of_another_checkout_takes_part():
    sizes = '--sizes', '4x4x8', '--batch', 1
    printed = run_tool('benchmark_filter.py', '--against', ROOT, *sizes, *BRIEF).stdout
    assert f' | {ROOT.name} |' in printed
    assert len(re.findall(r'(?m)^\| 1x4x4x8 \|', printed)) == 2
