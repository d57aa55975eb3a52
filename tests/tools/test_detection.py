"""Detection on the command line, and OpenMMLab's inference functions on what was trained here."""

import json
import pickle
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from processes import ROOT, free_port, run, run_tool

from gfnet_dense.demo import CLASSES, PALETTE, write_digits
from gfnet_dense.openmmlab import evaluate, train

DETECTOR = ROOT / 'configs' / 'mask_rcnn_gfnet_nano_digits.py'
SEGMENTOR = ROOT / 'configs' / 'upernet_gfnet_nano_digits.py'
# What mmengine says when it turns the safety of loading off.
UNSAFE = 'safely load'


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'digits'
    return write_digits(root, num_training=4, num_validation=3)


def metrics(out: str) -> dict[str, float]:
    return {key: float(value) for key, value in re.findall(r'(coco/\w+): (-?[\d.]+)', out)}


@pytest.fixture(scope='module')
def trained(tmp_path_factory, digits) -> tuple[Path, str]:
    """Train Mask R-CNN for two iterations; return checkpoint and log."""
    work_dir = tmp_path_factory.mktemp('detector')
    cfg = detector(digits)
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    cfg.train_dataloader.batch_size = 2
    train(cfg, work_dir=str(work_dir), seed=0, auto_scale_lr=True)
    (log,) = work_dir.glob('*/*.log')
    return work_dir / 'epoch_1.pth', log.read_text()


@pytest.fixture(scope='module')
def evaluated(trained, digits, tmp_path_factory) -> tuple[list[dict], dict[str, float]]:
    """Evaluate it in one process; return predictions and metrics."""
    work_dir = tmp_path_factory.mktemp('evaluated')
    found = evaluate(
        detector(digits), trained[0], work_dir=str(work_dir), out=str(work_dir / 'all.pkl')
    )
    return pickle.loads((work_dir / 'all.pkl').read_bytes()), found


def detector(digits: Path, truth: Path | None = None) -> Config:
    cfg = on_digits(Config.fromfile(DETECTOR), digits)
    truth = truth or digits / 'annotations/instances_validation.json'
    for part in (cfg.val_evaluator, cfg.test_evaluator, cfg.test_dataloader.dataset):
        part.ann_file = str(truth)
    return cfg


def on_digits(cfg: Config, digits: Path) -> Config:
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(digits)
    return cfg


def test_training_says_what_it_does(trained, digits):
    _, out = trained
    for line in (
        r'model +MaskRCNN of GFNetPyramid, FPN, RPNHead, StandardRoIHead; 3\.\d\dM parameters',
        rf'training data +4 images, CocoDataset in {re.escape(str(digits))}',
        rf'validation data +3 images, CocoDataset in {re.escape(str(digits))}',
        r'total batch +2 ',
        r'learning rate +0\.00025, scaled to the total batch from that for 16\n',
    ):
        assert re.search(line, out), line
    assert set(metrics(out)) >= {'coco/bbox_mAP', 'coco/segm_mAP', 'coco/bbox_mAP_50'}


def test_evaluation_predicts_boxes_and_masks(trained, evaluated):
    predictions, found = evaluated
    # The evaluation during training saw the same weights and data.
    assert found == pytest.approx(metrics(trained[1]))
    assert [Path(p['img_path']).name for p in predictions] == [
        f'ADE_val_0000000{i}.jpg' for i in (1, 2, 3)
    ]
    for prediction in predictions:
        instances = prediction['pred_instances']
        assert len(instances['bboxes']) == len(instances['masks']) > 0
        assert all(mask['size'] == [64, 64] for mask in instances['masks'])


def test_two_processes_evaluate_to_the_same(trained, evaluated, digits, tmp_path):
    """Three images on two processes: one of them is seen twice, and must count once.

    The truth is made of predictions, so that there is a mAP to compare.
    """
    truth = tmp_path / 'truth.json'
    truth.write_text(json.dumps(truth_of(evaluated[0])))
    one = evaluate(
        detector(digits, truth), trained[0], work_dir=str(tmp_path), out=str(tmp_path / '1.pkl')
    )
    out = run_tool(
        'dist_test.sh', DETECTOR, trained[0], 2, '--out', '2.pkl',
        '--show-dir', 'pictures', '--cfg-options', f'test_evaluator.ann_file={truth}',
        f'test_dataloader.dataset.ann_file={truth}', 'test_dataloader.num_workers=0',
        'test_dataloader.persistent_workers=False',
        'default_hooks.visualization.score_thr=0.05',  # untrained scores are low
        cwd=tmp_path, MASTER_PORT=free_port(), DIGITS_ROOT=digits,
    ).stdout  # fmt: skip
    assert UNSAFE not in out
    assert 0.1 < one['coco/bbox_mAP'] < 0.9
    assert metrics(out) == pytest.approx(one)
    dumps = [pickle.loads((tmp_path / f'{n}.pkl').read_bytes()) for n in (1, 2)]
    for a, b in zip(*dumps, strict=True):
        assert a['img_id'] == b['img_id']
        torch.testing.assert_close(a['pred_instances']['bboxes'], b['pred_instances']['bboxes'])

    pictures = list((tmp_path / 'pictures').rglob('*.png'))
    assert len(pictures) == 2  # those of the first process
    for picture in pictures:  # truth beside prediction, drawn alike and so different
        left, right = np.split(np.asarray(Image.open(picture)), 2, axis=1)
        assert left.shape == (64, 64, 3)
        assert not np.array_equal(left, right)


def truth_of(predictions: list[dict]) -> dict:
    """Return annotations: of each image a few predictions, in the last image of another class."""
    images, annotations = [], []
    for prediction in predictions:
        image = prediction['img_id']
        images.append(
            dict(id=image, file_name=Path(prediction['img_path']).name, width=64, height=64)
        )
        found = prediction['pred_instances']
        for i in range(0, 12, 4):
            left, top, right, bottom = found['bboxes'][i].tolist()
            mask = found['masks'][i]
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image,
                    category_id=1 + (int(found['labels'][i]) + (image == 3)) % 10,
                    bbox=[left, top, right - left, bottom - top],
                    area=(right - left) * (bottom - top),
                    segmentation=dict(size=mask['size'], counts=mask['counts'].decode()),
                    iscrowd=0,
                )
            )
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES[1:], start=1)]
    return dict(images=images, annotations=annotations, categories=categories)


def infer(task: str, config: Path, checkpoint: Path, image: Path, cwd: Path) -> dict:
    # Somewhere without data and without our package among what is imported at the start.
    script = Path(__file__).with_name('inference.py')
    out = run(sys.executable, script, task, config, checkpoint, image, cwd=cwd).stdout
    assert UNSAFE not in out
    return json.loads(out.splitlines()[-1])


def test_mmdets_inference_functions(trained, evaluated, digits, tmp_path):
    image = digits / 'images/validation/ADE_val_00000002.jpg'
    found = infer('detection', DETECTOR, trained[0], image, tmp_path)
    expected = evaluated[0][1]['pred_instances']
    for key in ('bboxes', 'scores', 'labels'):
        np.testing.assert_allclose(found['init_detector'][key], expected[key], rtol=1e-4, atol=1e-4)
    assert len(found['masks']) == len(expected['masks'])
    for name in ('DetInferencer', 'alone'):
        np.testing.assert_allclose(
            found[name]['bboxes'], expected['bboxes'], rtol=1e-4, atol=1e-4, err_msg=name
        )
    for meta in found['meta']:
        assert tuple(meta['classes']) == CLASSES[1:]
        assert tuple(map(tuple, meta['palette'])) == PALETTE[1:]


# In this process, from another folder.


def infer_here(config: Path, checkpoint: Path, image: Path, monkeypatch, folder: Path) -> dict:
    monkeypatch.delenv('COCO_ROOT', raising=False)
    monkeypatch.delenv('DIGITS_ROOT', raising=False)
    monkeypatch.chdir(folder)
    detection = runpy.run_path(str(Path(__file__).with_name('inference.py')))['detection']
    found = detection(str(config), str(checkpoint), str(image))
    for name in ('DetInferencer', 'alone'):
        for key in ('bboxes', 'scores', 'labels'):
            assert len(found[name][key]) > 0
            np.testing.assert_allclose(found[name][key], found['init_detector'][key], rtol=1e-4)
    return found


def test_inference_with_retinanet(digits, tmp_path, monkeypatch):
    path = ROOT / 'configs' / 'retinanet_gfnet_nano_digits.py'
    monkeypatch.setenv('DIGITS_ROOT', str(digits))
    cfg = on_digits(Config.fromfile(path), digits)
    cfg.train_cfg.update(max_epochs=1, val_interval=2)
    cfg.model.test_cfg.score_thr = 0.0  # an untrained one believes in nothing
    train(cfg, work_dir=str(tmp_path / 'run'), seed=0)
    # The config that the run left, and its checkpoint.
    path, checkpoint = tmp_path / 'run' / path.name, tmp_path / 'run' / 'epoch_1.pth'
    image = digits / 'images/validation/ADE_val_00000002.jpg'
    found = infer_here(path, checkpoint, image, monkeypatch, tmp_path)
    assert found['masks'] == []
    for meta in found['meta']:
        assert tuple(meta['classes']) == CLASSES[1:]


OF_COCO = """
_base_ = '{configs}/mask_rcnn_gfnet_h_ti_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='GFNetPyramid',
        arch=dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
        img_size=64,
    ),
    neck=dict(in_channels=[8, 16, 24, 32], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16),
    ),
    test_cfg=dict(rpn=dict(max_per_img=50), rcnn=dict(score_thr=0.0)),
)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(**loader)
val_dataloader = dict(**loader)
test_dataloader = dict(**loader)
train_cfg = dict(max_epochs=1)
"""


def test_inference_with_a_config_of_coco(digits, tmp_path, monkeypatch):
    """A network of the leaf's structure, on digits that bear the names of COCO's classes."""
    from mmdet.datasets import CocoDataset

    classes, palette = (CocoDataset.METAINFO[key] for key in ('classes', 'palette'))
    for part, name in (('training', 'train2017'), ('validation', 'val2017')):
        content = json.loads((digits / f'annotations/instances_{part}.json').read_text())
        content['categories'] = [dict(id=i, name=name) for i, name in enumerate(classes, start=1)]
        (tmp_path / 'annotations').mkdir(exist_ok=True)
        (tmp_path / f'annotations/instances_{name}.json').write_text(json.dumps(content))
        (tmp_path / name).symlink_to(digits / 'images' / part)
    own = tmp_path / 'own.py'
    own.write_text(OF_COCO.format(configs=ROOT / 'configs'))
    monkeypatch.setenv('COCO_ROOT', str(tmp_path))
    cfg = Config.fromfile(own)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        (resize,) = (step for step in loader.dataset.pipeline if step.type == 'Resize')
        resize.scale = (96, 64)  # not 800, for the sake of time
    train(cfg, work_dir=str(tmp_path / 'run'), seed=0)
    path, checkpoint = tmp_path / 'run' / 'own.py', tmp_path / 'run' / 'epoch_1.pth'
    image = digits / 'images/validation/ADE_val_00000002.jpg'
    found = infer_here(path, checkpoint, image, monkeypatch, digits)
    assert len(found['masks']) == len(found['init_detector']['labels'])
    assert max(found['init_detector']['labels']) < 80
    for meta in found['meta']:
        assert tuple(meta['classes']) == classes and len(classes) == 80
        assert [tuple(colour) for colour in meta['palette']] == palette


@pytest.fixture(scope='module')
def segmentor(digits, tmp_path_factory) -> tuple[Path, Path]:
    """Train two iterations of UperNet; return the checkpoint and the labels it predicts."""
    work_dir = tmp_path_factory.mktemp('segmentor')
    cfg = on_digits(Config.fromfile(SEGMENTOR), digits)
    cfg.train_cfg.update(max_iters=2, val_interval=1)
    cfg.default_hooks.checkpoint.interval = 1
    train(cfg, work_dir=str(work_dir), seed=0)
    checkpoint, labels = work_dir / 'iter_2.pth', work_dir / 'labels'
    evaluate(cfg, checkpoint, work_dir=str(work_dir), out=str(labels))
    return checkpoint, labels


def test_mmsegs_inference_functions(segmentor, digits, tmp_path):
    checkpoint, labels = segmentor
    image = digits / 'images/validation/ADE_val_00000002.jpg'
    found = infer('segmentation', SEGMENTOR, checkpoint, image, tmp_path)
    expected = np.asarray(Image.open(labels / 'ADE_val_00000002.png')).astype(int) - 1
    for name in ('init_model', 'MMSegInferencer'):
        np.testing.assert_array_equal(found[name], expected)
    for meta in found['meta']:
        assert tuple(meta['classes']) == CLASSES
        assert tuple(map(tuple, meta['palette'])) == PALETTE
