import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from gfnet_dense.data import CLASSES, write_digits

DEMO = Path(__file__).parents[2] / 'tools' / 'demo.py'


def test_the_constant_answer_is_scored_as_mmseg_scores(tmp_path):
    from mmseg.evaluation import IoUMetric

    spec = importlib.util.spec_from_file_location('demo', DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    root = write_digits(tmp_path / 'digits', num_training=20, num_validation=30)
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
