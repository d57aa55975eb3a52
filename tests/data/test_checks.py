import re
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine import fileio
from mmengine.config import Config
from mmengine.dataset import ConcatDataset, pseudo_collate
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.registry import TRANSFORMS, init_default_scope
from mmengine.runner import Runner
from mmseg.datasets import BaseSegDataset
from mmseg.evaluation import IoUMetric
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from gfnet_dense.data.build import build_dataset
from gfnet_dense.data.checks import check_folders, find_batches, find_heads
from gfnet_dense.data.contents import Contents
from gfnet_dense.data.errors import DataError, raise_first
from gfnet_dense.data.evaluation import find_evaluation, number_names, wanted_numbers
from gfnet_dense.data.files import absent_infos, listed_infos
from gfnet_dense.data.report import inspect
from gfnet_dense.data.segmentation import check_files, check_labels
from gfnet_dense.demo import write_digits
from gfnet_dense.durable.data_checks import CheckedDataset, checked
from gfnet_dense.durable.resumable import resumable
from gfnet_dense.openmmlab import find_config
from gfnet_dense.openmmlab.label_maps import LabelMaps


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


def check_heads(model, dataset) -> None:
    raise_first(find_heads(model, dataset))


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


def faults_of(dataset, use='train', batch_size=1, **options):
    loader = DataLoader(dataset, batch_size, collate_fn=pseudo_collate)
    return inspect(use, loader, **options).faults


def part(root, **changes):
    init_default_scope('mmseg')
    options = {**config(root).dataset, **changes}
    options.pop('type')
    return BaseSegDataset(**options)


def test_a_part_may_hold_the_background_alone(digits, tmp_path):
    shutil.copytree(digits, tmp_path / 'empty')
    for path in (tmp_path / 'empty/annotations/training').iterdir():
        Image.fromarray(np.ones((64, 64), np.uint8)).save(path)
    alone = part(tmp_path / 'empty')
    assert "belong to the class 'background'" in faults_of(alone)[0]
    assert faults_of(ConcatDataset([part(digits), alone])) == []
    assert faults_of(part(tmp_path / 'empty', indices=2)) == []


@TRANSFORMS.register_module()
class FromArchive:
    """A transform of a user that finds images and labels elsewhere than in files."""

    def __call__(self, results):
        results['img'] = np.zeros((64, 64, 3), np.uint8)
        results['img_shape'] = results['ori_shape'] = (64, 64)
        results['gt_seg_map'] = np.arange(64 * 64).reshape(64, 64) % 11
        results['seg_fields'].append('gt_seg_map')
        return results


def test_what_a_step_of_the_user_loads_need_not_be_a_file(digits):
    own = [dict(type='FromArchive'), dict(type='PackSegInputs')]
    unlabelled = part(digits, data_prefix=dict(img_path='images/training'), pipeline=own)
    assert [*check_files(unlabelled, 'train')] == []
    plain = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
    unlabelled = part(digits, data_prefix=dict(img_path='images/training'), pipeline=plain)
    assert 'training needs annotations' in ' '.join(check_files(unlabelled, 'train'))
    archived, standard = part(digits, pipeline=own), part(digits)
    for path in digits.glob('*/training/*'):
        path.unlink()
    assert [*check_files(archived, 'train')] == []
    assert '6 of 6 images do not exist' in ' '.join(check_files(standard, 'train'))


@TRANSFORMS.register_module()
class Threshold:
    """A transform of a user that makes labels of grey levels."""

    def __call__(self, results):
        results['gt_seg_map'] = (results['gt_seg_map'] > 127).astype(np.uint8)
        return results


def test_labels_that_a_step_of_the_user_makes_of_a_jpeg(digits):
    for path in digits.glob('annotations/training/*.png'):
        grey = np.kron([[250, 5], [5, 250]], np.ones((32, 32))).astype(np.uint8)
        Image.fromarray(grey).save(path, 'JPEG')
    load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=False)]
    for own, faults in (([], True), ([dict(type='Threshold')], False)):
        dataset = part(
            digits,
            pipeline=[*load, *own, dict(type='PackSegInputs')],
            reduce_zero_label=False,
            metainfo=dict(classes=[str(i) for i in range(256)], palette=[(0, 0, 0)] * 256),
        )
        assert any('is a JPEG' in text for text in faults_of(dataset)) == faults


def test_several_suffixes_of_images_alone(digits):
    plain = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
    several = dict(img_suffix=('.jpg', '.png'), pipeline=plain)
    images = part(digits, data_prefix=dict(img_path='images/training'), **several)
    assert len(images) == 6
    assert [*check_files(images, 'test')] == []


def test_a_head_of_masks_may_weigh_what_is_no_object():
    class Head(nn.Module):
        out_channels = 2
        loss_decode = SimpleNamespace(class_weight=[1.0, 1.0, 0.1])

    model, dataset = nn.ModuleDict(dict(decode_head=Head())), SimpleNamespace(metainfo={})
    assert [*find_heads(model, dataset)] == []
    model.decode_head.conv_seg = nn.Conv2d(4, 2, 1)
    assert 'has 3 numbers, but there are 2 classes' in ' '.join(find_heads(model, dataset))


def test_label_maps_that_no_step_loads_are_not_demanded(digits):
    plain = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
    cfg = dict(config(digits).dataset, pipeline=plain)
    dataset = part(digits, pipeline=plain)
    shutil.rmtree(digits / 'annotations')
    check_folders(cfg)
    metric = IoUMetric(format_only=True, output_dir=str(digits))
    assert faults_of(dataset, 'test', metrics=[metric]) == []
    (fault,) = faults_of(dataset, 'test', metrics=[IoUMetric()])
    assert 'does not load them' in fault
    with pytest.raises(DataError, match='there is no folder'):
        check_folders(config(digits).dataset)


def test_metainfo_that_differs_between_parts():
    dataset = SimpleNamespace(metainfo=[dict(classes='ab'), dict(classes='ab', palette=[])])
    model = nn.Module()
    model.decode_head = nn.Module()
    model.decode_head.num_classes = 2
    check_heads(model, dataset)
    model.decode_head.num_classes = 3
    with pytest.raises(DataError, match='num_classes=3, but there are 2'):
        check_heads(model, dataset)


def test_of_remote_files_a_sample_is_looked_for(monkeypatch):
    looked = []
    monkeypatch.setattr(fileio, 'exists', lambda path, **_: looked.append(path) or True)
    dataset = [dict(img_path=f'{i}.png') for i in range(1000)]

    class Remote(list):
        get_data_info = list.__getitem__

    remote = Remote(dataset)
    remote.backend_args = dict(backend='petrel')
    assert absent_infos(remote, listed_infos(remote), 'img_path') == []
    assert len(looked) == 64
    assert (looked[0], looked[-1]) == ('0.png', '999.png')


def test_remote_folders_are_not_looked_for():
    check_folders(dict(type='A', data_root='s3://bucket/ade', data_prefix=dict(img_path='x')))


class Counted(list):
    """A data set that counts how often it is asked."""

    asked = 0

    def get_data_info(self, i):
        self.asked += 1
        return dict(width=self[i], height=8)


def test_few_samples_of_a_long_data_set_are_looked_at():
    dataset = Counted([8] * 40_000)
    assert [*find_batches(DataLoader(dataset, 4), None, 'train')] == []
    assert 0 < dataset.asked <= 2000


class Images(Counted):
    def __getitem__(self, i):
        return torch.zeros(super().__getitem__(i)) if self.works else {}['key']

    def get_data_info(self, i):
        return dict(width=list.__getitem__(self, i), height=8, img_path=str(i))

    works = True


def test_batches_of_another_sampler_are_not_guessed():
    dataset = Images([8, 8, 9, 9])
    (fault,) = find_batches(DataLoader(dataset, 4, shuffle=True), None, 'train')
    assert 'cannot form a batch' in fault
    assert 'bring them to one size' in fault
    grouped = DataLoader(dataset, batch_sampler=[[0, 1], [2, 3]])
    assert [*find_batches(grouped, None, 'train')] == []
    dataset.works = False
    (fault,) = find_batches(DataLoader(dataset, 4, shuffle=True), None, 'train')
    assert 'KeyError' in fault
    assert 'size' not in fault


def test_augmentation_of_batches_is_not_run():
    class Preprocessor(nn.Module):
        batch_augments = None

        def forward(self, data, training):
            raise ValueError('called')

    class Samples(Counted):
        def __getitem__(self, i):
            return dict(inputs=torch.zeros(3, 8, 8))

        def get_data_info(self, i):
            return dict(width=8, height=8)

    model = nn.Module()
    model.data_preprocessor = Preprocessor()
    loader = DataLoader(Samples([8] * 4), 2)
    assert len([*find_batches(loader, model, 'train')]) == 1
    Preprocessor.batch_augments = [nn.Identity()]
    assert [*find_batches(loader, model, 'train')] == []


def test_numbers_of_own_metrics_are_not_known():
    class Boundary(IoUMetric):
        pass

    assert number_names(IoUMetric()) == {'aAcc', 'mIoU', 'mAcc'}
    assert number_names(Boundary(iou_metrics=['bIoU'])) is None


def test_a_hook_of_the_user_may_monitor_anything():
    class Watch(Hook):
        monitor = 'grad_norm'

    hooks = [Watch(), EarlyStoppingHook('mIoU'), CheckpointHook(save_best='mAcc')]
    hooks[2].key_indicators = ['mAcc']  # as before a run
    assert wanted_numbers(hooks) == ['mIoU', 'mAcc']


def test_a_list_of_files_in_another_encoding(digits):
    (digits / 'train.txt').write_bytes('caf\xe9\n'.encode('latin-1'))
    cfg = dict(config(digits).dataset, ann_file='train.txt', type='mmseg.BaseSegDataset')
    cfg['pipeline'] = []
    with pytest.raises(DataError, match=r'train\.txt is not UTF-8'):
        build_dataset(cfg)


def test_labels_below_zero():
    dataset = SimpleNamespace(metainfo=dict(classes=('a', 'b')), data_root='x')
    contents = Contents(1, read=1, pixels=Counter({'0': 5, '1': 5, '-1': 2}))
    contents.examples['-1'] = 'a.npy'
    (fault,) = check_labels(dataset, contents, (255,), 'train')
    assert fault.startswith('a.npy has labels -1, but')


def test_label_maps_of_one_name_are_found_before_the_test(tmp_path):
    images = [dict(img_path=f'/{folder}/a.png') for folder in ('x', 'y')]

    class Samples(list):
        get_data_info = list.__getitem__

    (fault,) = find_evaluation([LabelMaps(tmp_path)], Samples(images), 'test')
    assert '/x/a.png and /y/a.png would both be written' in fault
    assert [*find_evaluation([LabelMaps(tmp_path)], Samples(images[:1]), 'test')] == []


def test_another_error_of_a_data_set_is_not_laid_to_its_prefix(digits):
    prefix = dict(img_path='images/training', seg_map_path='annotations/training')
    options = dict(data_root=str(digits), data_prefix=prefix, metainfo=dict(classes=('no', 'such')))
    with pytest.raises(ValueError, match='classes'):
        build_dataset(dict(type='mmseg.ADE20KDataset', **options))
