import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT, run_tool

from gfnet_dense.demo import CLASSES, write_digits


@pytest.fixture(scope='module')
def demo():
    spec = importlib.util.spec_from_file_location('demo', ROOT / 'tools' / 'demo.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_ends_with_its_results_and_reuses_them(demo, tmp_path, monkeypatch, capsys):
    arguments = ['--data-root', 'digits', '--work-dir', str(tmp_path / 'run'), '--iterations', '2']
    first = run_tool('demo.py', *arguments, cwd=tmp_path).stdout
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['demo.py', *arguments])
    demo.main()
    for printed, again in ((first, False), (capsys.readouterr().out, True)):
        assert ('done before' in printed) == again
        end = printed[printed.rindex('mIoU over 11 classes') :]
        assert re.search(r"always 'background' +7\.\d %", end)
        for name in ('checkpoint', 'log', 'picture'):
            assert Path(re.search(rf'{name} +([^\s:]+)', end)[1]).is_file()
    picture = np.asarray(Image.open(tmp_path / 'run' / 'demo.png'))
    assert min(picture.shape[:2]) > 500
    assert picture.std() > 10


def test_the_constant_answer_is_scored_as_mmseg_scores(demo, tmp_path):
    from mmseg.evaluation import IoUMetric

    root = write_digits(tmp_path / 'digits', num_training=20, num_validation=60)
    name, miou = demo.constant_miou(root)
    assert name == 'background'

    areas = [
        IoUMetric.intersect_and_union(
            torch.zeros(label.shape), torch.from_numpy(label), len(CLASSES), 255
        )
        for label in demo.read_labels(root, 'validation')
    ]
    metrics = IoUMetric.total_area_to_metrics(*map(sum, zip(*areas, strict=True)), ['mIoU'])
    assert not np.isnan(
        metrics['IoU']
    ).any()  # every class occurs, so that both take all into the mean
    assert miou == pytest.approx(100 * metrics['IoU'].mean())
    assert 6 < miou < 9
