"""Detectors are trained and evaluated: on data as it comes, with every option."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from PIL import Image

from gfnet_dense.data import DataError
from gfnet_dense.demo import write_digits
from gfnet_dense.openmmlab import evaluate, find_config, train

KINDS = ('mask_rcnn', 'retinanet')


@HOOKS.register_module(force=True)
class RecordHook(Hook):
    """Keep the shape of each batch and its losses."""

    seen: list = []  # noqa: RUF012

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        shapes = {tuple(image.shape[-2:]) for image in data_batch['inputs']}
        losses = {k: v.item() for k, v in outputs.items() if k.startswith('loss')}
        self.seen.append((shapes, losses))


def config(kind: str, root: Path, work_dir: Path, annotations: str, images: str) -> Config:
    """Return the nano config of a kind on other data, with a smaller backbone, for one epoch."""
    cfg = Config.fromfile(find_config(f'{kind}_gfnet_nano_digits'))
    cfg.work_dir = str(work_dir)
    cfg.model.backbone.arch = dict(
        embed_dims=(8, 64, 128, 256), depths=(1, 1, 1, 1), layer_scale_init_value=1.0
    )
    if kind == 'mask_rcnn':
        cfg.model.neck.in_channels = [8, 64, 128, 256]
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.update(
            data_root=str(root), ann_file=annotations, data_prefix=dict(img=images)
        )
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = str(root / annotations)
    cfg.train_cfg.update(max_epochs=1, val_interval=2)
    if kind == 'retinanet':
        cfg.model.test_cfg.score_thr = 0.0  # an untrained one believes in nothing
    return cfg


def square(left: float, top: float, side: float) -> list[list[float]]:
    right, bottom = left + side, top + side
    return [[left, top, right, top, right, bottom, left, bottom]]


@pytest.fixture(scope='module')
def mixed(tmp_path_factory) -> Path:
    """Six images of four sizes; of the last two one has a crowd alone and one nothing at all."""
    root = tmp_path_factory.mktemp('mixed')
    rng = np.random.default_rng(0)
    sizes = [(96, 64), (64, 96), (50, 70), (33, 120), (64, 64), (64, 64)]  # (width, height)
    boxes = {
        1: [[10, 10, 30, 30], [40, 20, 20, 20]],
        2: [[-10, 60, 40, 60]],  # beyond the left and the lower edge
        3: [[0, 0, 50, 70], [20, 20, 0.5, 9], [80, 10, 5, 5]],  # whole; too thin; beside the image
        4: [[5, 50, 20, 30]],
    }
    annotations = [
        dict(
            image_id=image, bbox=box, category_id=1 + (image + i) % 10, iscrowd=0,
            area=box[2] * box[3], segmentation=square(*box[:3]),
        )
        for image, of_image in boxes.items() for i, box in enumerate(of_image)
    ]  # fmt: skip
    crowd = dict(size=[64, 64], counts=[640, 640, 64 * 64 - 1280])
    annotations += [
        dict(image_id=image, bbox=[10, 0, 10, 64], category_id=3, iscrowd=1, area=640,
             segmentation=crowd)
        for image in (1, 5)
    ]  # fmt: skip
    annotations[-2]['segmentation'] = dict(size=[64, 96], counts=[640, 640, 64 * 96 - 1280])
    names = Config.fromfile(find_config('retinanet_gfnet_nano_digits')).metainfo.classes
    content = dict(
        images=[
            dict(id=i, file_name=f'{i}.jpg', width=width, height=height)
            for i, (width, height) in enumerate(sizes, start=1)
        ],
        annotations=[dict(annotation, id=i) for i, annotation in enumerate(annotations, start=1)],
        categories=[dict(id=i, name=name) for i, name in enumerate(names, start=1)],
    )
    (root / 'annotations.json').write_text(json.dumps(content))
    for image in content['images']:
        pixels = rng.integers(0, 255, (image['height'], image['width'], 3), np.uint8)
        Image.fromarray(pixels).save(root / image['file_name'])
    return root


@pytest.mark.parametrize('kind', KINDS)
def test_mixed_sizes_crowds_and_images_without_objects(kind, mixed, tmp_path):
    cfg = config(kind, mixed, tmp_path, 'annotations.json', '')
    cfg.train_dataloader.dataset.filter_cfg = None  # nothing is left out
    cfg.train_dataloader.batch_sampler = None  # nor sorted by aspect
    # Sizes beside the data's own, and objects clipped where they leave the image.
    resize = dict(type='RandomResize', scale=[(96, 64), (160, 80)], keep_ratio=True)
    cfg.train_dataloader.dataset.pipeline.insert(2, resize)
    cfg.custom_hooks = [dict(type='RecordHook')]
    RecordHook.seen = []
    train(cfg, seed=0)
    assert len(RecordHook.seen) == 3
    assert any(len(shapes) == 2 for shapes, _ in RecordHook.seen), 'no batch was of two sizes'
    expected = {'loss', 'loss_cls', 'loss_bbox'}
    if kind == 'mask_rcnn':
        expected |= {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_mask'}
    for _, losses in RecordHook.seen:
        assert set(losses) == expected
        assert np.isfinite([*losses.values()]).all()
    # Boxes of the model's own shape, in the coordinates of each image, were counted by pycocotools.
    metrics = evaluate(cfg, tmp_path / 'epoch_1.pth', out=str(tmp_path / 'all.pkl'))
    assert 0 <= metrics['coco/bbox_mAP'] <= 1
    predictions = pickle.loads((tmp_path / 'all.pkl').read_bytes())
    assert [p['img_id'] for p in predictions] == [1, 2, 3, 4, 5, 6]
    for prediction in predictions:
        height, width = prediction['ori_shape']
        found = prediction['pred_instances']
        assert (found['bboxes'] >= 0).all()
        assert (found['bboxes'] <= torch.tensor([width, height, width, height])).all()
        if kind == 'mask_rcnn':
            assert all(tuple(mask['size']) == (height, width) for mask in found['masks'])


@pytest.mark.parametrize(
    ('kind', 'head'), [('mask_rcnn', 'roi_head.mask_head'), ('retinanet', 'bbox_head')]
)
def test_heads_of_other_classes_are_not_trained(kind, head, mixed, tmp_path):
    """Where labels are beyond the classes torch ends in an IndexError, elsewhere nothing does."""
    cfg = config(kind, mixed, tmp_path, 'annotations.json', '')
    cfg.merge_from_dict({f'model.{head}.num_classes': 80})
    message = rf'{head} of the model has num_classes=80, but there are 10 classes'
    with pytest.raises(DataError, match=message):
        train(cfg, seed=0)


def test_boxes_are_averaged_over_scales(tmp_path):
    root = write_digits(tmp_path / 'digits', num_training=2, num_validation=3)
    file = root / 'annotations/instances_validation.json'
    content = json.loads(file.read_text())
    for annotation in content['annotations']:
        del annotation['segmentation']  # boxes alone are enough
    file.write_text(json.dumps(content))
    cfg = config('retinanet', root, tmp_path, str(file.relative_to(root)), 'images/validation')
    train(cfg, seed=0)
    checkpoint, dump = tmp_path / 'epoch_1.pth', tmp_path / 'tta.pkl'
    metrics = evaluate(cfg, checkpoint, tta=True, out=str(dump))
    assert 0 <= metrics['coco/bbox_mAP'] <= 1
    once = tmp_path / 'once.pkl'
    evaluate(cfg, checkpoint, out=str(once))
    averaged, single = (pickle.loads(file.read_bytes()) for file in (dump, once))
    assert len(averaged) == len(single) == 3
    for a, s in zip(averaged, single, strict=True):
        assert len(a['pred_instances']['bboxes']) > 0
        assert not np.array_equal(a['pred_instances']['scores'], s['pred_instances']['scores'])

    cfg.test_dataloader.dataset.metainfo.classes = cfg.metainfo.classes[:3]
    with pytest.raises(DataError, match=r'bbox_head .* num_classes=10, but there are 3 classes'):
        evaluate(cfg, checkpoint)
    with pytest.raises(ValueError, match=r'mask_rcnn_gfnet_nano_digits.py has no tta_model'):
        evaluate('mask_rcnn_gfnet_nano_digits', checkpoint, tta=True)
