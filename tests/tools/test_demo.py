import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gfnet_dense.demo import CLASSES, write_digits

DEMO = Path(__file__).parents[2] / 'tools' / 'demo.py'


def test_the_demo_ends_with_its_results_and_reuses_them(tmp_path):
    root = write_digits(tmp_path / 'digits')
    command = [sys.executable, DEMO, '--data-root', root, '--work-dir', tmp_path / 'run']
    for again in (False, True):
        result = subprocess.run(
            [*map(str, command), '--iterations', '2'],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=250,
        )
        assert result.returncode == 0, result.stdout[-3000:]
        assert ('done before' in result.stdout) == again
        end = result.stdout[result.stdout.rindex('mIoU over 11 classes') :]
        assert re.search(r"always 'background' +7\.\d %", end)
        for name in ('checkpoint', 'log', 'picture'):
            assert Path(re.search(rf'{name} +([^\s:]+)', end)[1]).is_file()
    picture = np.asarray(Image.open(tmp_path / 'run' / 'demo.png'))
    assert min(picture.shape[:2]) > 500
    assert picture.std() > 10


def test_the_constant_answer_is_scored_as_mmseg_scores(tmp_path):
    from mmseg.evaluation import IoUMetric

    spec = importlib.util.spec_from_file_location('demo', DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
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
