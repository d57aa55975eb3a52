"""Objects beside those of mmdet."""

import json

import numpy as np
import pytest
from mmengine.registry import MODELS
from pycocotools import mask as coco_mask
from random_models import (
    DETECTOR,
    INSTANCE_SEGMENTOR,
    random_checkpoint,
)

import gfnet_dense
from gfnet_dense.demo import CLASSES
from gfnet_dense.inference import Predictor


@pytest.fixture(scope='module')
def detector(tmp_path_factory) -> Predictor:
    path = random_checkpoint(INSTANCE_SEGMENTOR, tmp_path_factory.mktemp('weights'))
    return gfnet_dense.load(INSTANCE_SEGMENTOR, path, 'cpu', batch_size=2)


def test_objects_are_those_of_mmdet(detector, images, tmp_path):
    from mmdet.apis import inference_detector

    detector.model.cfg = detector.cfg
    for image, prediction in zip(images[:4], detector.predict(images[:4]), strict=True):
        bgr = np.ascontiguousarray(image[:, :, ::-1])
        # mmseg's functions, called before, set the scope of the process to theirs.
        with MODELS.switch_scope_and_registry('mmdet'):
            expected = inference_detector(detector.model, bgr).pred_instances
        assert len(expected.scores) > 5
        np.testing.assert_allclose(prediction.scores, expected.scores, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(prediction.boxes, expected.bboxes, atol=0.01)
        np.testing.assert_array_equal(prediction.labels, expected.labels)
        assert prediction.masks.shape == (len(expected.scores), *image.shape[:2])
        assert (prediction.masks != expected.masks.numpy()).mean() < 1e-3

    prediction.save(tmp_path / 'found.json')
    with pytest.raises(ValueError, match=r'found\.png must end in \.json'):
        prediction.save(tmp_path / 'found.png')
    found = json.loads((tmp_path / 'found.json').read_text())
    assert len(found) == len(prediction.boxes)
    left, top, width, height = found[0]['bbox']
    np.testing.assert_allclose([left, top, left + width, top + height], prediction.boxes[0])
    np.testing.assert_array_equal(
        coco_mask.decode(found[0]['segmentation']).astype(bool), prediction.masks[0]
    )
    assert found[0]['class'] == CLASSES[1:][found[0]['label']]


def test_large_images_are_not_segmented_together(detector, images, monkeypatch):
    batches = []
    predict = detector._predict
    monkeypatch.setattr(detector, '_predict', lambda b: batches.append(len(b)) or predict(b))
    same = [images[0], images[2], images[5]]  # of one size
    detector.predict(same)
    # Masks of one image alone reach the limit.
    monkeypatch.setattr('gfnet_dense.inference.predictor._WINDOW_BYTES', 100 * 64 * 64)
    detector.predict(same)
    assert batches == [2, 1, 1, 1, 1]


def test_a_detector_averages_views(images, tmp_path):
    path = random_checkpoint(DETECTOR, tmp_path)
    averaged = gfnet_dense.load(DETECTOR, path, 'cpu', tta=True)
    for image, prediction in zip(images[:3], averaged.predict(images[:3]), strict=True):
        assert len(prediction.boxes) > 0 and prediction.masks is None
        assert (prediction.boxes[:, 2:] <= (image.shape[1], image.shape[0])).all()
        assert (np.diff(prediction.scores) <= 0).all()
