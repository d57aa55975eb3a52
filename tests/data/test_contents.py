"""What is read of a data set, and when it is remembered."""

import shutil

import numpy as np
import pytest
from faults import images, make_config, maps, write_data
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from gfnet_dense.data import contents
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
    import json

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
