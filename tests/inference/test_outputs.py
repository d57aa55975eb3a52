"""What is written for predictions: codes of annotations, tables and pictures."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from random_models import CLASSIFIER, random_checkpoint, random_images

import gfnet_dense
import gfnet_dense.openmmlab
from gfnet_dense.inference import OutputError, Report, predict_files
from gfnet_dense.inference.drawing import draw_instances, draw_labels
from gfnet_dense.inference.outputs import Outputs, _annotation_coding, _CocoNumbers
from gfnet_dense.openmmlab.annotations import LoadCodedAnnotations


@pytest.mark.parametrize(
    ('codes', 'no_class', 'dtype'),
    [([0, 255], 1, np.uint8), ([1, 255], 0, np.uint8), ([7, 1000], 255, np.uint16)],
)
@pytest.mark.parametrize('kind', ['LoadCodedAnnotations', LoadCodedAnnotations])
def test_coded_masks_keep_their_codes(codes, no_class, dtype, kind):
    dataset = dict(
        type='BaseSegDataset',
        metainfo=dict(classes=('background', 'cell')),
        pipeline=[dict(type=kind, values=codes)],
    )
    cfg = Config(dict(default_scope='mmseg', test_dataloader=dict(dataset=dataset)))
    predictor = SimpleNamespace(cfg=cfg, task='segmentation', classes=('background', 'cell'))
    values = _annotation_coding(predictor)
    assert values[[0, 1, 255]].tolist() == [*codes, no_class]
    assert values.dtype == dtype
    Image.fromarray(values[None])  # Pillow can write it


@pytest.mark.parametrize(
    ('name', 'content'), [('test.txt', '000001\n'), ('a.json', '[]'), ('a.json', '{"info": 1}')]
)
def test_annotations_of_other_formats_number_nothing(tmp_path, monkeypatch, name, content):
    (tmp_path / name).write_text(content)
    dataset = SimpleNamespace(ann_file=str(tmp_path / name))
    monkeypatch.setattr('gfnet_dense.inference.outputs.find_test_data', lambda cfg: dataset)
    numbers = _CocoNumbers(SimpleNamespace(cfg=None, classes=('cat', 'dog')))
    assert (numbers.images, numbers.categories) == ({}, [1, 2])


def test_long_images_and_boxes_without_a_place_are_drawn():
    labels = np.zeros((112, 60_000), np.uint8)
    picture = draw_labels(np.zeros((112, 60_000, 3), np.uint8), labels, ['a'], [(9, 9, 9)], 0.5)
    assert picture.size == (60_000, 112)
    image = np.zeros((200, 200, 3), np.uint8)
    boxes = np.array([[np.nan] * 4, [20, 20, 80, 80]], np.float32)
    colours = [(255, 0, 0), (0, 255, 0)]
    picture = np.asarray(draw_instances(image, boxes, ['x', 'y'], colours, None, 0.5))
    assert picture[50, 20].tolist() == [0, 255, 0]
    assert not picture[..., 0][picture[..., 1] == 0].any()  # nothing is red


def test_a_result_that_cannot_be_written_costs_no_other_one(tmp_path, monkeypatch):
    predictor = gfnet_dense.load(CLASSIFIER, random_checkpoint(CLASSIFIER, tmp_path), 'cpu')
    for i, array in enumerate(random_images([(64, 64)] * 3)):
        Image.fromarray(array).save(tmp_path / f'{i}.png')
    write = Outputs.write

    def fail_on_the_second(error: Exception) -> None:
        def failing(self, source, prediction):
            if source.name.name == '1':
                raise error
            return write(self, source, prediction)

        monkeypatch.setattr(Outputs, 'write', failing)

    fail_on_the_second(ZeroDivisionError('oh'))
    report = predict_files(predictor, [str(tmp_path)], tmp_path / 'out')
    assert report.images == 2
    path = str(tmp_path / '1.png')
    assert report.failures == {path: f'{path}: ZeroDivisionError: oh'}
    rows = (tmp_path / 'out/predictions.csv').read_text().splitlines()
    assert [row.partition(',')[0] for row in rows[1:]] == [
        str(tmp_path / '0.png'), str(tmp_path / '2.png'),
    ]  # fmt: skip
    for number in (errno.ENOSPC, errno.EDQUOT):
        fail_on_the_second(OSError(number, os.strerror(number)))
        with pytest.raises(OSError, match=os.strerror(number)):
            predict_files(predictor, [str(tmp_path)], tmp_path / 'out')


@pytest.fixture
def predict(tmp_path) -> Callable[..., Report]:
    """Return a function that classifies images of the test's folder."""
    for i, array in enumerate(random_images([(64, 64)] * 3)):
        Image.fromarray(array).save(tmp_path / f'{i}.png')
    predictor = gfnet_dense.load(CLASSIFIER, random_checkpoint(CLASSIFIER, tmp_path), 'cpu')

    def run(*names: str, out: str = 'out', **options: bool) -> Report:
        paths = [str(tmp_path / name) for name in names]
        return predict_files(predictor, paths, tmp_path / out, **options)

    return run


@pytest.mark.parametrize('name', ['labels', 'overlays', 'predictions.csv'])
@pytest.mark.parametrize('resume', [False, True])
def test_files_of_others_are_never_overwritten(predict, tmp_path, name, resume):
    (tmp_path / 'data' / name).mkdir(parents=True)
    with pytest.raises(OutputError, match=f'data/{name} is not a result of gfnet predict'):
        predict('0.png', out='data', resume=resume)
    assert [path.name for path in (tmp_path / 'data').iterdir()] == [name]


def test_folders_that_cannot_be_listed_are_reported(predict, tmp_path, monkeypatch):
    folder = tmp_path / 'photos/broken'
    folder.mkdir(parents=True)
    shutil.copy(tmp_path / '0.png', tmp_path / 'photos')
    scandir = os.scandir

    def fail(path):
        if Path(path) == folder:
            raise OSError(errno.EIO, 'Input/output error', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', fail)
    report = predict('photos')
    assert report.images == 1
    assert report.failures == {str(folder): f'{folder} cannot be listed: Input/output error'}


def test_no_inputs(predict):
    with pytest.raises(ValueError, match='no inputs: name files or folders'):
        predict()


def test_two_runs_do_not_share_a_folder(predict, tmp_path):
    predict('0.png')
    records = tmp_path / 'out/.records.jsonl'
    with (tmp_path / 'out/.in_use').open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match='another prediction writes to'):
            predict('1.png')
        assert '0.png' in records.read_text()
    predict('1.png')


def test_resuming_predicts_other_images_of_the_same_name(predict, tmp_path):
    def table() -> list[str]:
        rows = (tmp_path / 'out/predictions.csv').read_text().splitlines()[1:]
        return sorted(row.partition(',')[0] for row in rows)

    (tmp_path / 'other').mkdir()
    shutil.copy2(tmp_path / '0.png', tmp_path / 'other')
    predict('0.png', '1.png')
    assert predict('other/0.png', resume=True)[:2] == (1, 0)
    assert table() == [f'{tmp_path}/1.png', f'{tmp_path}/other/0.png']
    assert predict('0.png', '1.png', resume=True)[:2] == (1, 1)
    assert table() == [f'{tmp_path}/0.png', f'{tmp_path}/1.png']
    os.utime(tmp_path / '1.png', (1, 1))
    assert predict('0.png', '1.png', resume=True)[:2] == (1, 1)
    assert predict('0.png', '1.png', resume=True)[:2] == (0, 2)
    assert table() == [f'{tmp_path}/0.png', f'{tmp_path}/1.png']


def test_an_image_that_is_called_otherwise_beside_another_one_is_listed_once(predict, tmp_path):
    (tmp_path / 'photos').mkdir()
    shutil.copy2(tmp_path / '0.png', tmp_path / 'photos')
    predict('photos')
    Image.open(tmp_path / '0.png').convert('RGB').save(tmp_path / 'photos/0.jpg')
    predict('photos', resume=True)
    rows = (tmp_path / 'out/predictions.csv').read_text().splitlines()[1:]
    names = sorted(row.partition(',')[0] for row in rows)
    assert names == [f'{tmp_path}/photos/0.jpg', f'{tmp_path}/photos/0.png']


def test_an_interrupted_replacement_is_not_taken_for_the_result(predict, tmp_path, monkeypatch):
    os.utime(tmp_path / '0.png', (1, 1))
    predict('0.png')
    os.utime(tmp_path / '0.png', (2, 2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Outputs, 'add', interrupt)  # after the files of the image are written
        predict('0.png', resume=True)
    os.utime(tmp_path / '0.png', (1, 1))
    assert predict('0.png', resume=True)[:2] == (1, 0)


def test_an_interrupted_run_leaves_no_table_of_the_run_before_it(predict, tmp_path, monkeypatch):
    predict('0.png')
    monkeypatch.setattr(Outputs, 'add', interrupt)
    with pytest.raises(KeyboardInterrupt):
        predict('0.png')
    assert not (tmp_path / 'out/predictions.csv').exists()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_resuming_keeps_nothing_of_another_model(tmp_path, monkeypatch):
    Image.fromarray(random_images([(64, 64)])[0]).save(tmp_path / '0.png')
    path = random_checkpoint(CLASSIFIER, tmp_path)
    content = torch.load(path)
    for value in content['state_dict'].values():
        value.mul_(-1.5)
    torch.save(content, tmp_path / 'other.pth')

    def predict(checkpoint, folder, **options):
        predictor = gfnet_dense.load(CLASSIFIER, checkpoint, 'cpu')
        predict_files(predictor, [str(tmp_path / '0.png')], folder, **options)
        return (folder / 'predictions.csv').read_text()

    first = predict(path, tmp_path / 'out')
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Outputs, '_open_records', interrupt)
        predict(tmp_path / 'other.pth', tmp_path / 'out')
    expected = predict(tmp_path / 'other.pth', tmp_path / 'fresh')
    assert expected != first
    assert predict(tmp_path / 'other.pth', tmp_path / 'out', resume=True) == expected
    (tmp_path / 'out/.made_by.json').write_text('{')
    assert predict(path, tmp_path / 'out', resume=True) == first
