import re

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.datasets import BaseSegDataset
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from gfnet_dense.data.checks import check_folders, check_heads, find_batches
from gfnet_dense.data.errors import DataError, raise_first
from gfnet_dense.data.report import inspect
from gfnet_dense.demo import write_digits
from gfnet_dense.durable.data_checks import CheckedDataset, checked
from gfnet_dense.durable.resumable import resumable
from gfnet_dense.openmmlab import find_config


@pytest.fixture
def digits(tmp_path):
    return write_digits(tmp_path / 'digits', num_training=6, num_validation=1)


def config(root):
    cfg = Config.fromfile(find_config('upernet_gfnet_nano_digits')).train_dataloader
    cfg.dataset.data_root = str(root)
    return cfg


def check(root, **changes):
    init_default_scope('mmseg')
    options = {**config(root).dataset, **changes}
    options.pop('type')
    raise_first(inspect('train', DataLoader(BaseSegDataset(**options))).findings)


def annotation(root, i=2):
    return sorted((root / 'annotations/training').glob('*.png'))[i]


def test_good_data_pass(digits):
    check_folders(config(digits).dataset)
    check(digits)


@pytest.mark.parametrize('wrap', [False, True])
def test_missing_and_empty_folders(tmp_path, digits, wrap):
    def build(root):
        cfg = config(root)
        if wrap:
            cfg.dataset = dict(type='RepeatDataset', times=2, dataset=cfg.dataset)
        checked(cfg)

    with pytest.raises(DataError, match=rf'no folder {tmp_path}/no/images/training.*data_root'):
        build(tmp_path / 'no')
    for path in (digits / 'images/training').iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r'images/training is empty'):
        build(digits)


def test_an_annotation_file_that_is_not_there(digits):
    cfg = config(digits).dataset
    cfg.ann_file = 'no.txt'
    with pytest.raises(DataError, match=r'there is no .*no\.txt'):
        check_folders(cfg)


def test_images_without_annotation_are_counted_and_named(digits):
    gone = [annotation(digits, i) for i in range(5)]
    for path in gone:
        path.unlink()
    with pytest.raises(DataError) as error:
        check(digits)
    assert str(error.value).startswith('5 of 6 images have no annotation, first ')
    assert all(str(path) in str(error.value) for path in gone[:3])


@pytest.mark.parametrize('reduce_zero_label', [True, False])
def test_labels_beyond_the_classes(digits, reduce_zero_label):
    """The digits have 11 classes, labels 1 to 11 in the files."""
    path = annotation(digits)
    labels = np.array(Image.open(path))
    beyond = 12 if reduce_zero_label else 11
    labels[0, :3] = 0, 255, beyond
    Image.fromarray(labels).save(path)
    with pytest.raises(DataError, match=rf'{re.escape(str(path))} has labels 11[ ,].*11 classes'):
        check(digits, reduce_zero_label=reduce_zero_label)
    if reduce_zero_label:
        labels[0, :3] = 0, 255, 11
        Image.fromarray(labels).save(path)
        check(digits)


def test_colours_are_no_labels(digits):
    path = annotation(digits)
    Image.open(path).convert('RGB').save(path)
    with pytest.raises(DataError, match=r'shape \(64, 64, 3\), not one label per pixel'):
        check(digits)


@pytest.mark.parametrize('folder', ['images', 'annotations'])
def test_truncated_files(digits, folder):
    path = sorted((digits / folder / 'training').iterdir())[3]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=rf'{re.escape(str(path))} cannot be read'):
        check(digits)


def test_images_of_another_suffix(digits):
    cfg = config(digits)
    cfg.dataset.update(type='mmseg.BaseSegDataset', pipeline=[], img_suffix='.tif')
    message = rf'no images are left for mmseg.BaseSegDataset in {digits}: .*img_suffix'
    with pytest.raises(DataError, match=message):
        CheckedDataset(cfg.dataset)


@pytest.mark.parametrize('head', ['decode_head', 'auxiliary_head', 'bbox_head', 'mask_head'])
@pytest.mark.parametrize('where', ['{}', '{}.1', 'roi_head.{}', 'module.{}'])
def test_heads_have_the_classes_of_the_data(digits, head, where):
    options = dict(config(digits).dataset, pipeline=[])
    options.pop('type')
    dataset = BaseSegDataset(**options)
    name = where.format(head)
    model = nn.Module()
    inner = model
    for part in name.split('.'):
        inner.add_module(part, nn.Module())
        inner = inner.get_submodule(part)
    inner.num_classes = 11
    # Of the backbone, of proposals and of a loss other things are counted.
    model.backbone, model.rpn_head, inner.loss = nn.Module(), nn.Module(), nn.Module()
    model.backbone.num_classes = inner.loss.num_classes = 0
    model.rpn_head.num_classes = 1
    check_heads(model, dataset)
    inner.num_classes = 150
    message = rf'{name} of the model has num_classes=150, but there are 11 classes in {digits}'
    with pytest.raises(DataError, match=message):
        check_heads(model, dataset)


class Pooled(nn.Module):
    """What a UPerHead and a PSPHead have: a batch norm of maps of one pixel."""

    def __init__(self):
        super().__init__()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))


@pytest.mark.parametrize(
    ('sampler', 'drop_last', 'faulty'),
    [
        ('DefaultSampler', False, True),
        ('DefaultSampler', True, False),
        ('InfiniteSampler', False, False),
    ],
)
def test_last_batches_of_resumable_loaders(digits, sampler, drop_last, faulty):
    cfg = config(digits)  # of 6 images
    cfg.update(batch_size=5, drop_last=drop_last, num_workers=0, persistent_workers=False)
    cfg.sampler = dict(type=sampler, shuffle=True)
    init_default_scope('mmseg')
    loader = Runner.build_dataloader(resumable(cfg, seed=0))
    findings = [str(finding) for finding in find_batches(loader, Pooled(), 'train')]
    assert any('set drop_last=True' in finding for finding in findings) == faulty
