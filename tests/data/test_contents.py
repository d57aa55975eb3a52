"""What is read of a data set, and when it is remembered."""

import json
import os
import shutil
import threading
from typing import ClassVar

import numpy as np
import pytest
from faults import apply, images, make_config, maps, redraw, scans, write_data
from mmengine.fileio import LocalBackend, register_backend
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope
from mmseg.datasets import BaseSegDataset
from PIL import Image

from gfnet_dense.data import check_data, contents, report
from gfnet_dense.data.contents import Contents, keep_random_state, read_contents, remember


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('data'))


@pytest.fixture
def root(data, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return shutil.copytree(data, tmp_path / 'data')


def build(root, task='segmentation', use='train'):
    cfg = make_config(task, root)
    init_default_scope(cfg.default_scope)
    return DATASETS.build(cfg[f'{use}_dataloader'].dataset)


def test_pixels_are_counted_as_the_model_sees_them(root):
    found = read_contents(build(root))
    labels = np.concatenate([np.asarray(Image.open(path)).ravel() for path in maps(root)])
    # reduce_zero_label: 0 is ignored, and 1 taken off the others.
    expected = {str(v - 1 if v else 255): int((labels == v).sum()) for v in np.unique(labels)}
    assert dict(found.pixels) == expected
    assert (found.samples, found.read, dict(found.sizes)) == (8, 8, {'64x64': 8})
    assert found.images['0'] == 8
    assert found.counts == {} and found.empty == 0


def test_objects_are_counted(root):
    dataset = build(root, 'detection')
    found = read_contents(dataset)
    labels = [i['bbox_label'] for n in range(8) for i in dataset.get_data_info(n)['instances']]
    assert found.objects == {str(label): labels.count(label) for label in {*labels}}


def compute(calls):
    def compute():
        calls.append(1)
        return dict(calls=len(calls)), True

    return compute


@pytest.fixture
def slow(monkeypatch):
    """Let everything be worth remembering."""
    monkeypatch.setattr(contents, '_WORTH_REMEMBERING', -1.0)


def test_a_verdict_holds_while_nothing_changes(root, slow):
    calls = []
    for _ in range(3):
        assert remember(build(root), 'train', [255], compute(calls)) == dict(calls=1)
    assert remember(build(root), 'train', [0], compute(calls)) == dict(calls=2)  # other options
    assert remember(build(root), 'val', [0], compute(calls)) == dict(calls=3)


@pytest.mark.parametrize(
    'change',
    [
        lambda root: Image.new('L', (64, 64), 1).save(maps(root)[3]),
        lambda root: images(root)[3].write_bytes(b'other bytes'),
        lambda root: (images(root)[0].parent / 'new.JPG').write_bytes(b''),
        lambda root: images(root)[3].unlink(),
    ],
)
def test_a_change_of_a_file_is_seen(root, slow, change):
    calls = []
    remember(build(root), 'train', [], compute(calls))
    change(root)
    assert remember(build(root), 'train', [], compute(calls)) == dict(calls=2)


def test_what_is_read_in_no_time_is_read_again(root, tmp_path):
    calls = []
    for _ in range(2):
        remember(build(root), 'train', [], compute(calls))
    assert len(calls) == 2
    assert not (tmp_path / 'cache').exists()


def test_a_broken_cache_and_a_home_that_cannot_be_written_to(root, tmp_path, slow, monkeypatch):
    calls = []
    remember(build(root), 'train', [], compute(calls))
    (file,) = (tmp_path / 'cache').rglob('*.json')
    file.write_text('{"key"')
    assert remember(build(root), 'train', [], compute(calls)) == dict(calls=2)
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    assert remember(build(root), 'train', [], compute(calls)) == dict(calls=3)


def test_contents_survive_json(root):
    found = read_contents(build(root))
    assert Contents.from_json(json.loads(json.dumps(vars(found)))) == found


def test_random_numbers_stay_as_they_were(root):
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    with keep_random_state():
        np.random.rand(100)
    read_contents(build(root))
    assert np.random.rand() == expected


class Recording:
    """A transform of a user, without `__repr__`; it notes the objects and threads that call it."""

    calls: ClassVar[list] = []

    def __init__(self, value=0):
        self.value = value
        self.called = False

    def __call__(self, results):
        Recording.calls.append((self, threading.get_ident()))
        self.called = True
        return results


@TRANSFORMS.register_module()
class LoadFrame(Recording):
    """Load an image and its labels from elsewhere than a file."""

    def __call__(self, results):
        results['img'] = np.zeros((64, 64, 3), np.uint8)
        results['img_shape'] = results['ori_shape'] = (64, 64)
        return super().__call__(results)


@DATASETS.register_module()
class WithHelper(BaseSegDataset):
    """A data set of a user with a method of its own."""

    def load_image(self, index):
        raise AssertionError('this is not for checks')


@register_backend('elsewhere')
class Elsewhere(LocalBackend):
    """Files below `/elsewhere`, which this machine has in another place."""

    place = ''

    def get(self, filepath):
        return super().get(str(filepath).replace('/elsewhere', self.place))

    def exists(self, filepath):
        return super().exists(str(filepath).replace('/elsewhere', self.place))

    def list_dir_or_file(self, dir_path, *args, **kwargs):
        path = str(dir_path).replace('/elsewhere', self.place)
        return super().list_dir_or_file(path, *args, **kwargs)


def check(cfg, **changes):
    """Return the report on training data."""
    cfg = apply(cfg, {key.replace('__', '.'): value for key, value in changes.items()})
    for use in ('val', 'test'):
        cfg[f'{use}_dataloader'] = cfg[f'{use}_evaluator'] = None
    (found,) = check_data(cfg)
    return found


@pytest.mark.slow
def test_masks_with_a_label_map(root):
    """Labels of detection are loaded after the image, as in HTC."""
    cfg = make_config('masks', root)
    dataset = cfg.train_dataloader.dataset
    dataset.data_prefix = dict(img='images/training', seg='annotations/training')
    dataset.pipeline[1] = dict(
        type='LoadAnnotations', with_bbox=True, with_mask=True, with_seg=True
    )
    assert check(cfg).faults == []


def test_label_maps_elsewhere(root, monkeypatch):
    monkeypatch.setattr(Elsewhere, 'place', str(root / 'digits'))
    backend = dict(backend='elsewhere')
    cfg = make_config('segmentation', root)
    dataset = cfg.train_dataloader.dataset
    dataset.update(data_root='/elsewhere', backend_args=backend)
    for step in dataset.pipeline[:2]:
        step.backend_args = backend
    found = check(cfg)
    assert found.faults == []
    assert found.contents[0][1].pixels.total() == 8 * 64 * 64


def test_a_method_of_a_user_is_not_called(root):
    cfg = make_config('segmentation', root)
    assert check(cfg, train_dataloader__dataset__type='WithHelper').faults == []


@pytest.fixture
def user_cfg(root):
    Recording.calls.clear()
    cfg = make_config('segmentation', root)
    cfg.train_dataloader.dataset.pipeline[0] = dict(type='LoadFrame')
    return cfg


def test_transforms_of_a_user_run_as_copies_in_one_thread(user_cfg, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(8))
    found = check(user_cfg)
    ((part, _),) = found.contents
    kept = part.pipeline.transforms[0]
    assert not kept.called
    assert all(step is not kept for step, _ in Recording.calls)
    readers = {thread for _, thread in Recording.calls} - {threading.get_ident()}
    assert len(Recording.calls) > 8 and len(readers) == 1


def test_our_transforms_run_in_several_threads_unless_images_are_large(root, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(8))
    part = build(root)
    load_image, load_labels, _ = contents.loaders(part, part.get_data_info(0), 'train')
    count = lambda: contents._thread_count(part, [*range(8)], load_image, load_labels)  # noqa: E731
    assert count() == 8
    monkeypatch.setattr(contents, '_PIXELS', 2 * 64 * 64)
    assert count() == 2


def test_images_that_only_the_pipeline_can_load(user_cfg, monkeypatch):
    """The path names no file, but a frame of an archive."""
    init_default_scope(user_cfg.default_scope)
    part = DATASETS.build(user_cfg.train_dataloader.dataset)
    info = part.get_data_info
    monkeypatch.setattr(part, 'get_data_info', lambda i: dict(info(i), img_path=f'frame{i}'))
    found = read_contents(part)
    assert found.faults == {} and found.sizes == {'64x64': 8}


@pytest.mark.parametrize(
    ('step', 'faulty'),
    [
        (dict(type='Resize', scale=(64, 64), keep_ratio=False), False),
        (dict(type='RandomCrop', crop_size=(32, 32)), True),
    ],
)
def test_labels_of_another_size_may_be_resized_but_not_cropped(root, step, faulty):
    for path in maps(root):
        redraw(path, lambda image: image.resize((96, 96), Image.Resampling.NEAREST))
    cfg = make_config('segmentation', root)
    cfg.train_dataloader.dataset.pipeline.insert(2, step)
    found = check(cfg)
    (text,) = [finding for finding in found.findings if '96x96' in finding]
    assert (text in found.faults) == faulty
    assert '(8 files are like this)' in text


def test_each_image_without_8_bits_is_decoded(root, monkeypatch):
    monkeypatch.setattr(contents, '_SAMPLED', 2)
    path = scans(root)[7]
    with Image.open(path) as file:
        file.convert('F').save(path.with_suffix('.tiff'))
    path.unlink()
    (fault,) = check(make_config('classification', root)).faults
    assert path.stem in fault


def test_synchronised_norms_may_have_one_image_a_process(root):
    for norm, count in (('SyncBN', 0), ('BN', 1)):
        cfg = make_config('segmentation', root)
        cfg.train_dataloader.batch_size = 1
        norm_cfg = dict(type=norm)
        changes = dict(
            model__decode_head__norm_cfg=norm_cfg, model__auxiliary_head__norm_cfg=norm_cfg
        )
        found = check(cfg, **changes)
        assert len(found.faults) == count
        assert any('1x1 pixels' in finding for finding in found.findings)


def test_what_cannot_be_checked_is_no_fault(root, monkeypatch):
    def fail(*args, **kwargs):
        raise IndexError('unknown kind')

    monkeypatch.setattr(report, 'inspect', fail)
    found = check(make_config('segmentation', root))
    assert found.findings == ['could not be checked: IndexError: unknown kind']
    assert found.faults == []


def test_steps_without_a_repr_are_remembered(user_cfg, slow):
    calls = []
    for value, expected in ((0, 1), (0, 1), (1, 2)):
        user_cfg.train_dataloader.dataset.pipeline[0]['value'] = value
        init_default_scope(user_cfg.default_scope)
        part = DATASETS.build(user_cfg.train_dataloader.dataset)
        assert remember(part, 'train', [], compute(calls)) == dict(calls=expected)


def test_a_file_with_its_old_times_is_another_file(root, slow):
    calls = []
    remember(build(root), 'train', [], compute(calls))
    path = images(root)[3]
    status = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert remember(build(root), 'train', [], compute(calls)) == dict(calls=2)


def test_values_that_json_cannot_hold(root, slow):
    box = dict(bbox=np.array([-5.0, 0, 3, 3]), bbox_label=0)
    found = Contents(1)
    contents._add_objects(found, dict(width=10, height=10, instances=[box]))
    assert json.loads(json.dumps(vars(found)))['outside'] == 1
    result = remember(build(root), 'train', [], lambda: (dict(value=np.int64(3)), True))
    assert result == dict(value=3)


def test_only_hooks_that_choose_by_a_number_need_it():
    hooks = dict(
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', save_best=['mIoU', 'auto'])),
        custom_hooks=[
            dict(type='MonitorHook', monitor='grad_norm'),
            dict(type='mmengine.EarlyStoppingHook', monitor='mAcc'),
        ],
    )
    assert report._wanted(hooks) == ['mIoU', 'mAcc']
