"""What is written for predictions: codes of annotations, tables and pictures."""

from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

import gfnet_dense.openmmlab  # noqa: F401 - registers LoadCodedAnnotations
from gfnet_dense.inference.outputs import _annotation_coding


@pytest.mark.parametrize(
    ('codes', 'no_class', 'dtype'),
    [([0, 255], 1, np.uint8), ([1, 255], 0, np.uint8), ([7, 1000], 255, np.uint16)],
)
def test_coded_masks_keep_their_codes(codes, no_class, dtype):
    dataset = dict(
        type='BaseSegDataset',
        metainfo=dict(classes=('background', 'cell')),
        pipeline=[dict(type='LoadCodedAnnotations', values=codes)],
    )
    cfg = Config(dict(default_scope='mmseg', test_dataloader=dict(dataset=dataset)))
    predictor = SimpleNamespace(cfg=cfg, task='segmentation', classes=('background', 'cell'))
    values = _annotation_coding(predictor)
    assert values[[0, 1, 255]].tolist() == [*codes, no_class]
    assert values.dtype == dtype
    Image.fromarray(values[None])  # Pillow can write it
