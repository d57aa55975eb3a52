"""The report of a GPU, rehearsed on a CPU."""

import importlib
import json
import subprocess
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filter_oracle import ERRORS
from processes import ROOT, run_tool


@pytest.fixture(scope='module')
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'tools')
        yield importlib.import_module('gpu_report')


def measured(tool, part: int, out: Path, seconds: float = 600, only: tuple = ()) -> list[dict]:
    assert tool.run_rows(part, tool.CPU, out, time.time() + seconds, only) == 0
    return tool.read(out)


def test_correct_backends_pass(tool, tmp_path):
    rows = [row for row in measured(tool, 1, tmp_path) if row['table'] == tool.CORRECT[0]]
    cells = [pair for row in rows for pair in row['cells'].items()]
    assert {backend for backend, _ in cells} == {'fused', 'dense', 'fft'}
    for row in rows:
        ((backend, cell),) = row['cells'].items()
        dtype = next(dtype for dtype in ERRORS if str(dtype).split('.')[1] in row['label'])
        assert 0 < cell[''] <= ERRORS[dtype], backend


def test_what_is_wrong_fails_and_the_run_goes_on(tool, tmp_path, monkeypatch):
    right, right_norm = tool.global_filter, tool.cuda.normalize
    monkeypatch.setattr(tool, 'global_filter', lambda *inputs: 1.01 * right(*inputs))
    monkeypatch.setattr(tool.cuda, 'normalize', lambda x, *rest: right_norm(1.1 * x, *rest))
    planned = [*tool.correctness(tool.CPU)]
    failed = [
        cell['failed'] for row in measured(tool, 1, tmp_path) for cell in row['cells'].values()
    ]
    assert len(failed) == sum(len(row.columns) for row in planned)
    assert all(text.startswith('AssertionError') for text in failed)


def test_the_official_form_computes_the_same(tool):
    arch = dict(embed_dims=(4, 8), depths=(1, 2), patch_size=4, layer_scale_init_value=0.5)
    model, x = tool.GFNetPyramid(arch, img_size=32, num_classes=0), torch.randn(2, 3, 32, 32)
    expected = model(x)
    actual = tool.official(model)(x)
    assert not torch.equal(actual, expected)  # the filter is another one
    assert torch.allclose(actual, expected, atol=1e-5)


def test_times_are_kept_continued_and_rendered(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, '_copy_rate', lambda device: 1e10)
    assert measured(tool, 2, tmp_path, seconds=-1) == []  # out of time
    assert measured(tool, 2, tmp_path, only=('forward |', 'of another size')) == []
    assert "no row holds 'forward |' and 'of another size'" in capsys.readouterr().out
    rows = measured(tool, 2, tmp_path, only=('forward |', '| float32 |'))
    assert {row['label'] for row in rows} == {'3x2x2 | float32 | forward | eager'}
    measured(tool, 2, tmp_path)
    rows = measured(tool, 3, tmp_path)
    file = tmp_path / 'results.jsonl'
    text = file.read_text()
    assert [json.loads(line) for line in text.splitlines()] == rows
    for row in rows:
        for _column, cell in row['cells'].items():
            if row['table'] == tool.PROFILE[0]:
                assert 0 <= cell['%'] <= 100
            else:
                assert cell['ms'] > 0 and float(cell['x'].split()[0]) > 0
    measured(tool, 3, tmp_path)
    assert file.read_text() == text

    page = tool.render(tool.CPU, rows)
    ((line, *_),) = [[x for x in page.splitlines() if '3x2x2 | bfloat16 | forward |' in x]]
    assert line.count('1.00 (1.00-1.00) x') == 1
    filters, product = page.index(tool.FILTER[0]), page.index(tool.PRODUCT[0])
    assert 'not measured' not in page[filters:product]
    assert page[product:].count('not measured') == len([*tool.products(tool.CPU)])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearses_on_a_cpu(tool, tmp_path, monkeypatch, gfnet):
    """Processes run part 1, the first rows of 2 and 3, and the training that is interrupted."""

    def train_here(command: list[str], **options) -> subprocess.CompletedProcess:
        arguments = command[command.index(str(ROOT / 'tools/train.py')) + 1 :]
        arguments.remove('--launcher=pytorch')
        status, out, err = gfnet('train', *arguments)
        return subprocess.CompletedProcess(command, status, out, err)

    with monkeypatch.context() as patch:
        patch.setattr(tool, 'subprocess', SimpleNamespace(run=train_here))
        for part in (2, 3, 4):
            rows = [*tool.PARTS[part](tool.CPU)][int(part < 4) :]
            here = [row for row in rows if 'SIGTERM' not in row.label]
            assert here
            patch.setitem(tool.PARTS, part, lambda at, here=here: here)
            measured(tool, part, tmp_path)
    run_tool('gpu_report.py', '--rehearse', '--out', tmp_path, '--minutes', 14)
    planned = [row.label for part in tool.PARTS.values() for row in part(tool.CPU)]
    assert Counter(row['label'] for row in tool.read(tmp_path)) == Counter(planned)
