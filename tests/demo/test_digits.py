import json
import re
import runpy
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from processes import ROOT, run_tool
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from gfnet_dense.demo import CLASSES, PALETTE, digits, write_digit_scans, write_digits

TOOL = ROOT / 'tools' / 'make_digits.py'
SMALL = {'num_training': 40, 'num_validation': 12, 'seed': 3}
TINY = {'num_training': 3, 'num_validation': 2, 'image_size': 48}


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp('data') / 'digits', **SMALL)


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def contents(root: Path) -> dict[str, bytes]:
    return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob('*') if f.is_file()}


def times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in [root, *root.rglob('*')]}


# What is written.


def test_layout_is_that_of_ade20k(small):
    names = {
        'training': [f'ADE_train_{number:08d}' for number in range(1, 41)],
        'validation': [f'ADE_val_{number:08d}' for number in range(1, 13)],
    }
    expected = {'digits.json'}
    for subset, stems in names.items():
        expected |= {f'images/{subset}/{stem}.jpg' for stem in stems}
        expected |= {f'annotations/{subset}/{stem}.png' for stem in stems}
        expected |= {f'annotations/instances_{subset}.json'}
    assert set(contents(small)) == expected


def test_labels_are_single_channel_and_as_large_as_their_images(small):
    found = set()
    for path in small.glob('annotations/*/*.png'):
        labels = read(path)
        image = read(small / 'images' / path.parent.name / f'{path.stem}.jpg')
        assert image.shape == (64, 64, 3)
        assert labels.shape == (64, 64)
        assert image.dtype == labels.dtype == np.uint8
        found |= set(np.unique(labels))
    assert found == set(range(12))
    assert len(CLASSES) == len(set(PALETTE)) == 11


def test_ink_is_brighter_than_background_and_the_rim_between_and_thin(small):
    rim = []
    for path in small.glob('annotations/*/*.png'):
        labels = read(path)
        grey = read(small / 'images' / path.parent.name / f'{path.stem}.jpg').mean(axis=2)
        assert grey[labels == 1].mean() < grey[labels == 0].mean() < grey[labels > 1].mean()
        rim.append(np.mean(labels == 0))
    assert 0 < np.mean(rim) < 0.05


def test_annotated_shapes_are_the_digits_they_are_named_after(small):
    """A nearest-neighbour classifier that knows only scikit-learn's scans reads the masks."""

    def signature(ink):
        ys, xs = np.nonzero(ink)
        box = Image.fromarray(ink[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])
        return np.asarray(box.resize((8, 8), Image.Resampling.BOX), float).ravel()

    scans = sklearn.datasets.load_digits()
    known = np.stack([signature((scan > 6).astype(np.uint8) * 255) for scan in scans.images])
    hits = []
    for subset in ('training', 'validation'):
        coco = COCO(small / f'annotations/instances_{subset}.json')
        for annotation in coco.loadAnns(coco.getAnnIds()):
            distances = ((known - signature(coco.annToMask(annotation) * 255)) ** 2).sum(axis=1)
            name = coco.loadCats(annotation['category_id'])[0]['name']
            hits.append(CLASSES.index(name) - 1 == scans.target[distances.argmin()])
    assert np.mean(hits) > 0.7


@pytest.mark.parametrize('subset', ['training', 'validation'])
def test_coco_instances_are_the_label_maps(small, subset):
    coco = COCO(small / f'annotations/instances_{subset}.json')
    assert [c['id'] for c in coco.loadCats(coco.getCatIds())] == list(range(1, 11))
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES[1:])
    assert len(coco.getImgIds()) == SMALL[f'num_{subset}']
    ids = [annotation['id'] for annotation in coco.dataset['annotations']]
    assert ids == list(range(1, len(ids) + 1))
    for image in coco.loadImgs(coco.getImgIds()):
        labels = read(small / 'annotations' / subset / image['file_name'].replace('.jpg', '.png'))
        assert (small / 'images' / subset / image['file_name']).is_file()
        assert labels.shape == (image['height'], image['width'])
        from_coco = np.zeros(labels.shape, int)
        annotations = coco.loadAnns(coco.getAnnIds(image['id']))
        assert len(annotations) in (1, 2)
        for annotation in annotations:
            mask = coco.annToMask(annotation)
            assert not from_coco[mask == 1].any(), 'a pixel belongs to two digits'
            from_coco += mask * (annotation['category_id'] + 1)
            rle = coco.annToRLE(annotation)
            assert annotation['area'] == coco_mask.area(rle)
            assert annotation['bbox'] == coco_mask.toBbox(rle).tolist()
            assert annotation['iscrowd'] == 0
        np.testing.assert_array_equal(from_coco, np.where(labels > 1, labels, 0))


def test_a_digit_under_a_later_one_is_annotated_as_far_as_it_shows(tmp_path):
    """Twelve digits as high as the scene cannot but cover each other."""
    root = write_digits(
        tmp_path / 'crowd',
        num_training=5,
        num_validation=1,
        digits_per_image=(12, 12),
        digit_height=(60, 64),
    )
    coco = COCO(root / 'annotations/instances_training.json')
    for image in coco.loadImgs(coco.getImgIds()):
        labels = read(root / 'annotations/training' / image['file_name'].replace('jpg', 'png'))
        annotations = coco.loadAnns(coco.getAnnIds(image['id']))
        assert all(annotation['area'] > 0 for annotation in annotations)
        assert sum(annotation['area'] for annotation in annotations) == (labels > 1).sum()


# What validation may see.


def test_the_subsets_share_no_scan():
    training, validation = digits.load_material('training'), digits.load_material('validation')
    everything = sklearn.datasets.load_digits()
    assert len(training.scans) + len(validation.scans) == len(everything.images) == 1797
    assert not {s.tobytes() for s in training.scans} & {s.tobytes() for s in validation.scans}
    for digit, count in enumerate(np.bincount(everything.target)):
        assert abs((validation.digits == digit).sum() - count / 5) <= 1


def test_the_subsets_share_no_pixel_of_the_photographs(tmp_path, monkeypatch):
    """Photographs whose hue tells the row: the scenes show which rows they were cut from."""
    height, width = 427, 640
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, height)[:, None]
    ramp[..., 1] = 255
    photographs = sklearn.datasets.load_sample_images()
    photographs.images = [ramp, ramp]
    monkeypatch.setattr(sklearn.datasets, 'load_sample_images', lambda: photographs)
    root = write_digits(tmp_path / 'digits', num_training=60, num_validation=60)

    rows = {}
    for subset in ('training', 'validation'):
        seen = []
        for path in sorted(root.glob(f'images/{subset}/*.jpg')):
            labels = read(root / 'annotations' / subset / f'{path.stem}.png')
            # Away from the ink, whose colour the JPEG smears.
            clear = np.array([(labels[y : y + 8] == 1).all() for y in range(0, 64, 8)])
            bands = read(path).astype(float).reshape(8, -1, 3)[clear].mean(axis=1)
            seen.extend(bands[:, 0] / bands[:, 1] * height)
        rows[subset] = np.array(seen)
    assert rows['training'].min() < 30
    assert rows['training'].max() < rows['validation'].min()
    assert rows['validation'].max() > height - 30


# What decides the scenes.


def test_the_same_seed_writes_the_same_bytes(small, tmp_path):
    assert contents(write_digits(tmp_path / 'again', **SMALL)) == contents(small)


def test_another_seed_draws_other_scenes(small, tmp_path):
    other = write_digits(tmp_path / 'other', **{**SMALL, 'seed': 4})
    for path in small.glob('images/*/*.jpg'):
        assert path.read_bytes() != (other / path.relative_to(small)).read_bytes()


def test_a_scene_does_not_depend_on_how_many_there_are(small, tmp_path):
    fewer = write_digits(tmp_path / 'fewer', num_training=7, num_validation=5, seed=SMALL['seed'])
    for path in [*fewer.glob('images/*/*.jpg'), *fewer.glob('annotations/*/*.png')]:
        assert path.read_bytes() == (small / path.relative_to(fewer)).read_bytes()


def test_size_height_and_number_of_digits_are_obeyed(tmp_path):
    root = write_digits(
        tmp_path / 'digits',
        num_training=20,
        num_validation=1,
        image_size=160,
        digits_per_image=(3, 3),
        digit_height=(30, 32),
    )
    coco = COCO(root / 'annotations/instances_training.json')
    annotations = coco.loadAnns(coco.getAnnIds())
    assert len(annotations) == 60
    heights = [annotation['bbox'][3] for annotation in annotations]
    # Thresholds and the rotation move the ends of the ink by a few pixels.
    assert min(heights) >= 26
    assert max(heights) <= 38


# What is on the disk already.


def test_the_same_call_again_writes_nothing(small):
    before = times(small)
    assert write_digits(small, **SMALL) == small
    assert times(small) == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / 'digits').mkdir()
    root = write_digits(tmp_path / 'digits', **TINY)
    assert len(list(root.glob('images/training/*.jpg'))) == 3


def test_a_link_is_followed(tmp_path):
    (tmp_path / 'digits').symlink_to(tmp_path / 'disk' / 'digits')
    root = write_digits(tmp_path / 'digits', **TINY)
    assert root.is_symlink()
    assert contents(root) == contents(tmp_path / 'disk' / 'digits')


def test_other_parameters_are_an_error_and_touch_nothing(small):
    before = times(small)
    with pytest.raises(
        FileExistsError, match=r'digits holds .*seed=3 instead of 5; .*another folder'
    ):
        write_digits(small, **{**SMALL, 'seed': 5})
    assert times(small) == before


@pytest.mark.parametrize('manifest', [None, '', '[1]', '{"format": "another"}'])
def test_a_foreign_folder_is_an_error_and_touches_nothing(tmp_path, manifest):
    (tmp_path / 'thesis.txt').write_text('years of work')
    if manifest is not None:
        (tmp_path / 'digits.json').write_text(manifest)
    before = times(tmp_path)
    with pytest.raises(FileExistsError, match='another folder'):
        write_digits(tmp_path, **TINY)
    assert times(tmp_path) == before


def test_a_foreign_file_is_an_error(tmp_path):
    (tmp_path / 'digits').write_text('no folder')
    with pytest.raises(FileExistsError, match='not a digits data set'):
        write_digits(tmp_path / 'digits', **TINY)
    assert (tmp_path / 'digits').read_text() == 'no folder'


def test_a_folder_that_lost_files_is_an_error(tmp_path):
    root = write_digits(tmp_path / 'digits', **TINY)
    next(root.glob('annotations/validation/*.png')).unlink()
    with pytest.raises(FileExistsError, match=r'has 1 files annotations/validation/\*.png instead'):
        write_digits(root, **TINY)


@pytest.mark.parametrize('interruption', [OSError('disk full'), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch, interruption):
    save, written = Image.Image.save, []

    def failing_save(image, path, **kwargs):
        if len(written) == 5:
            raise interruption
        written.append(path)
        save(image, path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, 'save', failing_save)
        with pytest.raises(type(interruption)):
            write_digits(tmp_path / 'digits', **TINY)
    assert len(written) == 5
    assert not list(tmp_path.iterdir())
    assert json.loads((write_digits(tmp_path / 'digits', **TINY) / 'digits.json').read_text())


def overtake(monkeypatch, winner: Path, root: Path) -> None:
    """Let another process publish `winner` as `root` while this one still writes."""
    write_folder = digits._write_folder

    def slow_write_folder(folder, spec):
        write_folder(folder, spec)
        shutil.copytree(winner, root)

    monkeypatch.setattr(digits, '_write_folder', slow_write_folder)


def test_the_slower_of_two_writers_takes_what_the_faster_wrote(tmp_path, monkeypatch):
    winner = write_digits(tmp_path / 'winner', **TINY)
    overtake(monkeypatch, winner, tmp_path / 'digits')
    assert contents(write_digits(tmp_path / 'digits', **TINY)) == contents(winner)
    assert {path.name for path in tmp_path.iterdir()} == {'winner', 'digits'}


def test_the_slower_of_two_writers_rejects_other_parameters(tmp_path, monkeypatch):
    winner = write_digits(tmp_path / 'winner', **{**TINY, 'seed': 1})
    overtake(monkeypatch, winner, tmp_path / 'digits')
    with pytest.raises(FileExistsError, match='seed=1 instead of 0'):
        write_digits(tmp_path / 'digits', **TINY)
    assert contents(tmp_path / 'digits') == contents(winner)


# What is asked for.


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'num_training': 0}, 'num_training must be an integer from 1 to 99999999, got 0'),
        ({'num_training': 2.5}, 'num_training .* got 2.5'),
        ({'num_validation': -1}, 'num_validation .* got -1'),
        ({'image_size': 7}, 'image_size must be an integer from 8 to 4096, got 7'),
        ({'image_size': '64'}, "image_size .* got '64'"),
        ({'digits_per_image': (0, 2)}, r'digits_per_image .* from 1 to 20, .* got \(0, 2\)'),
        ({'digits_per_image': (2, 1)}, r'digits_per_image .* the lower first, got \(2, 1\)'),
        ({'digits_per_image': 2}, 'digits_per_image must be two integers .* got 2'),
        ({'digit_height': (26, 65)}, r'digit_height .* from 8 to 64, .* got \(26, 65\)'),
        ({'digit_height': (26, 46, 50)}, r'digit_height must be two .* got \(26, 46, 50\)'),
        ({'seed': -1}, 'seed must be an integer from 0 to 4294967295, got -1'),
        ({'seed': None}, 'seed .* got None'),
    ],
)
def test_bad_arguments_are_named_with_their_range(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_digits(tmp_path / 'digits', **arguments)
    assert not list(tmp_path.iterdir())


def test_numpy_integers_and_lists_are_as_good(small):
    write_digits(
        small,
        num_training=np.int64(40),
        num_validation=12,
        digits_per_image=[1, np.int32(2)],
        seed=3,
    )


def test_an_unknown_subset_is_named():
    with pytest.raises(ValueError, match=r"'training', 'validation'.* got 'test'"):
        digits.load_material('test')


# The scans alone.


@pytest.fixture(scope='module')
def scans(tmp_path_factory) -> Path:
    return write_digit_scans(tmp_path_factory.mktemp('data') / 'scans')


def test_all_scans_are_there_in_the_folders_of_their_digits(scans):
    everything = sklearn.datasets.load_digits()
    expected = Counter(
        (str(digit), np.rint(scan * (255 / 16)).astype(np.uint8).tobytes())
        for scan, digit in zip(everything.images, everything.target, strict=True)
    )
    found = Counter((p.parent.name, read(p).tobytes()) for p in scans.glob('*/*/*.png'))
    assert found == expected
    assert {str(path.relative_to(scans)) for path in scans.glob('*')} == {
        'train', 'val', 'digits.json'
    }  # fmt: skip


def test_validation_has_the_scans_that_scenes_of_validation_have(scans):
    for split, subset in (('train', 'training'), ('val', 'validation')):
        material = digits.load_material(subset)
        assert sorted(read(path).tobytes() for path in scans.glob(f'{split}/*/*.png')) == sorted(
            scan.tobytes() for scan in material.scans
        )


def test_scans_are_written_once_and_whole(scans, tmp_path, monkeypatch):
    before = times(scans)
    assert write_digit_scans(scans) == scans
    assert times(scans) == before
    with pytest.raises(FileExistsError, match=r'scans holds digits with format=.*another folder'):
        write_digits(scans, **TINY)

    def full(*args, **kwargs):
        raise OSError('disk full')

    monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(OSError, match='disk full'):
        write_digit_scans(tmp_path / 'new')
    assert not list(tmp_path.iterdir())


# The command line.


@pytest.mark.slow
def test_the_tool_writes_data_and_preview(tmp_path):
    arguments = ['--num-training', '3', '--num-validation', '2', '--image-size', '48']
    arguments += ['--preview', 'sheets/preview.png']
    run = run_tool('make_digits.py', *arguments, cwd=tmp_path)
    assert 'data/digits: 3 training and 2 validation scenes of 48x48 pixels' in run.stdout
    assert 'sheets/preview.png' in run.stdout
    assert contents(tmp_path / 'data/digits') == contents(write_digits(tmp_path / 'same', **TINY))
    # Two rows of four pictures over a legend.
    height, width, _ = read(tmp_path / 'sheets/preview.png').shape
    assert width > 1000
    assert height > width / 2


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['{small}'], r'.*/digits holds digits with .*num_training=40 instead of 3000'),
        (['new', '--digit-height', '46', '26'], r'digit_height .* got \[46, 26\]'),
        (['new', '--seed', 'zero'], r"argument --seed: invalid int value: 'zero'"),
    ],
)
def test_the_tool_reports_errors_in_one_line(
    small, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(small=small) for argument in arguments]
    monkeypatch.setattr(sys, 'argv', ['make_digits.py', *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name='__main__')
    assert stop.value.code == 2
    assert re.match(f'make_digits.py: error: {message}', capsys.readouterr().err.splitlines()[-1])
    assert not list(tmp_path.iterdir())
