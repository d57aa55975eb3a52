"""Configs for one's own data, through the real command line: segmentation, detection, classes."""

import json
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from PIL import Image
from processes import run, run_tool

from gfnet_dense.data import DataError, check_data
from gfnet_dense.data.guess import (
    _pairs,
    look_at_coco,
    look_at_folders,
    look_at_masks,
    read_classes,
)
from gfnet_dense.demo import write_digits
from gfnet_dense.openmmlab import LoadCodedAnnotations, new_config

COLOURS = [(0, 0, 0), (128, 64, 128), (70, 70, 70)]


def save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def photograph(side: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (side, side, 3))


def write_masks(root: Path, values: list, count: int = 6, end: str = '_mask.png') -> None:
    """Write images of stripes, and masks that hold a value for each stripe."""
    labels = np.arange(64)[:, None] * len(values) // 64 + np.zeros((1, 64), int)
    for i in range(count):
        save(photograph(), root / f'images/{i}.jpg')
        save(np.array(values)[labels], root / f'masks/{i}{end}')


def looked(root: Path, named: str = '', ignored: tuple = ()):
    return look_at_masks(root / 'images', root / 'masks', read_classes(named), ignored)


def test_masks_of_every_coding(tmp_path):
    write_masks(tmp_path / 'indices', [0, 1, 255])
    found = looked(tmp_path / 'indices')
    assert (found.values, found.ignored, found.are_indices) == ([0, 1], [255], True)
    assert (found.suffix, found.mask_suffix, found.side) == ('.jpg', '_mask.png', 64)
    assert sorted(found.train + found.val) == [*map(str, range(6))] and len(found.val) == 1

    # 255 beside 0 alone is a class.
    write_masks(tmp_path / 'binary', [0, 255])
    found = looked(tmp_path / 'binary', 'background,nucleus')
    assert (found.values, found.ignored, found.are_indices) == ([0, 255], [], False)
    assert found.classes == ['background', 'nucleus']

    write_masks(tmp_path / 'colours', COLOURS)
    found = looked(tmp_path / 'colours')
    assert sorted(found.values) == sorted(COLOURS) and found.palette == found.values
    assert found.classes == ['#000000', '#464646', '#804080']
    file = tmp_path / 'classes.txt'
    file.write_text('void 0 0 0\nroad 128 64 128\nbuilding, 70, 70, 70\nsky 70 130 180\n')
    found = looked(tmp_path / 'colours', str(file))
    assert found.classes == ['road', 'building', 'sky'] and found.ignored == [(0, 0, 0)]
    assert found.values == [(128, 64, 128), (70, 70, 70), (70, 130, 180)]
    file.write_text('road 128 64 128\nbuilding 70 70 70\n')
    assert any(
        '34% of the pixels' in note for note in looked(tmp_path / 'colours', str(file)).notes
    )

    with pytest.raises(DataError, match='the colour of each class'):
        looked(tmp_path / 'colours', 'a,b,c')
    with pytest.raises(DataError, match='2 classes are named, but the masks hold 3 values'):
        write_masks(tmp_path / 'three', [0, 5, 9])
        looked(tmp_path / 'three', 'a,b')
    assert looked(tmp_path / 'three', 'a,b', (9,)).values == [0, 5]
    with pytest.raises(DataError, match='no numbers of single objects'):
        for i in range(6):
            save(photograph(), tmp_path / f'three/masks/{i}_mask.png')
        looked(tmp_path / 'three')
    save(photograph(), tmp_path / 'others/x.png')
    with pytest.raises(DataError, match='names must begin alike'):
        look_at_masks(tmp_path / 'three/images', tmp_path / 'others', [], [])


def test_values_without_a_name_are_not_trained(tmp_path, monkeypatch):
    write_masks(tmp_path, [0, 1, 2])
    file = tmp_path / 'classes.txt'
    file.write_text('road 0\nbuilding 1\n')
    found = looked(tmp_path, str(file))
    assert (found.values, found.unnamed, found.are_indices) == ([0, 1], [2], False)
    monkeypatch.chdir(tmp_path)
    data = dict(images='images', masks='masks', arch='nano', batch=2, iterations=4)
    written = new_config('a', classes='classes.txt', **data)
    # Label 2 would be outside of the two classes of the loss.
    with DATASETS.switch_scope_and_registry('mmseg'):
        dataset = DATASETS.build(written.config.val_dataloader.dataset)
    assert dataset[0]['data_samples'].gt_sem_seg.data.unique().tolist() == [0, 1, 255]

    file.write_text('road 0\nbuilding\n')
    with pytest.raises(DataError, match='not for building'):
        looked(tmp_path, str(file))
    with pytest.raises(DataError, match='--ignore leaves no class'):
        looked(tmp_path, ignored=(0, 1, 2))
    for text in ('abc', '1,2'):
        with pytest.raises(ValueError, match=f'{text} is no value of a mask'):
            new_config('b', ignore=[text], **data)


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('a.txt', 'background 0\ngrade 1\ngrade 2\n', r'the names grade: .* names with numbers as'),
        ('a.json', '{"a": 0, "b": 1, "a": 2}', 'the names a: '),
        ('a.json', '["a", "b", "b"]', 'the names b: '),
        ('a,b,a', '', '--classes repeats a: '),
    ],
)
def test_repeated_names_of_classes(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content:
        Path(name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_classes(name)


def test_names_with_numbers_in_json(tmp_path):
    file = tmp_path / 'classes.json'
    file.write_text('{"grade 1": 1, "grade 2": [0, 0, 2]}')
    assert read_classes(str(file)) == [('grade 1', 1), ('grade 2', (0, 0, 2))]


def test_values_that_only_masks_hold_which_were_not_read(tmp_path, monkeypatch):
    write_masks(tmp_path, [0, 1])
    assert looked(tmp_path).are_indices
    monkeypatch.setattr('gfnet_dense.data.guess._READ', 3)
    found = looked(tmp_path)
    assert (found.values, found.are_indices) == ([0, 1], False)
    assert any('values were looked for in 3 of 6 masks' in note for note in found.notes)


def test_validation_images_have_their_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path / 'digits', num_training=4, num_validation=2)
    files = []
    for use, name in (('training', 'train2017'), ('validation', 'val2017')):
        Path(f'digits/images/{use}').rename(f'digits/{name}')
        files.append(f'digits/annotations/instances_{name}.json')
        Path(f'digits/annotations/instances_{use}.json').rename(files[-1])
    for i, images in enumerate((None, 'digits/train2017', 'digits')):
        written = new_config(
            f'd{i}', coco=files[0], val_coco=files[1], images=images, arch='nano', batch=2,
            iterations=4,
        )  # fmt: skip
        with DATASETS.switch_scope_and_registry('mmdet'):
            for use, name, count in (('train', 'train2017', 4), ('val', 'val2017', 2)):
                dataset = DATASETS.build(written.config[f'{use}_dataloader'].dataset)
                folders = {Path(dataset.get_data_info(i)['img_path']).parent for i in range(count)}
                assert len(dataset) == count and folders == {tmp_path / 'digits' / name}


def test_pairs_by_names_and_splits_by_folders(tmp_path):
    for split, count in (('train', 3), ('val', 2)):
        for i in range(count):
            place = f'{split}/city/{i}_{i}'
            save(photograph(), tmp_path / f'images/{place}_leftImg8bit.png')
            save(np.eye(64), tmp_path / f'masks/{place}_gtFine_labelIds.png')
    save(photograph(), tmp_path / 'images/train/city/other.png')
    found = looked(tmp_path)
    assert (found.suffix, found.mask_suffix) == ('_leftImg8bit.png', '_gtFine_labelIds.png')
    assert found.train == [f'train/city/{i}_{i}' for i in range(3)]
    assert found.val == [f'val/city/{i}_{i}' for i in range(2)]
    assert any('1 images have no mask ending in _gtFine' in note for note in found.notes)


@pytest.mark.slow
@pytest.mark.parametrize('end', ['.png', '_mask.png'])
def test_pairs_of_many_numbered_images(tmp_path, end):
    """Each number could be an end of names; looking through all of them would take minutes."""
    for name in ('images', 'masks'):
        (tmp_path / name).mkdir()
    for i in range(4000):
        (tmp_path / f'images/img_{i:05}.jpg').touch()
        (tmp_path / f'masks/img_{i:05}{end}').touch()
    start = time.process_time()
    suffix, mask_suffix, stems = _pairs(tmp_path / 'images', tmp_path / 'masks')
    assert time.process_time() - start < 20
    assert (suffix, mask_suffix, len(stems)) == ('.jpg', end, 4000)


@pytest.mark.parametrize('others', [[], ['Valid']])
def test_a_folder_test_validates_where_no_other_does(tmp_path, others):
    for split in ('train', 'test', *others):
        write_masks(tmp_path / split, [0, 1], count=2)
        for kind in ('images', 'masks'):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / split / kind).rename(tmp_path / kind / split)
    found = looked(tmp_path)
    expected = others or ['test']
    assert found.train == ['train/0', 'train/1']
    assert found.val == [f'{split}/{i}' for split in expected for i in range(2)]


@pytest.mark.parametrize(('part', 'together'), [('', False), ('', True), ('_photo', False)])
def test_images_that_are_left_out(tmp_path, part, together):
    images = tmp_path / ('masks' if together else 'images')
    for i in range(5):
        save(photograph(), images / f'{i}{part}.{"jpg" if i < 3 else "png"}')
        save(np.eye(64), tmp_path / f'masks/{i}_mask.png')
    save(photograph(), images / f'lone{part}.jpg')
    found = look_at_masks(images, tmp_path / 'masks', [], [])
    assert found.suffix == f'{part}.jpg'
    left_out = [note for note in found.notes if 'left out' in note]
    assert len(left_out) == 2
    assert left_out[0].startswith(f'2 images with masks end in {part}.png and')
    assert left_out[1].startswith('1 images have no mask ending in _mask.png')


def test_masks_beside_their_images(tmp_path):
    for i in range(4):
        save(photograph(), tmp_path / f'{i}.png')
        save(np.eye(64), tmp_path / f'{i}_mask.png')
    found = look_at_masks(tmp_path, tmp_path, [], [])
    assert (found.suffix, found.mask_suffix) == ('.png', '_mask.png')
    assert sorted(found.train + found.val) == ['0', '1', '2', '3']


def test_values_of_masks_become_labels(tmp_path):
    mask = np.array([*COLOURS, (1, 2, 3)])[[[0, 1], [2, 3], [1, 1]]]
    save(mask, tmp_path / 'colours.png')
    results = LoadCodedAnnotations(COLOURS)({'seg_map_path': str(tmp_path / 'colours.png')})
    assert results['gt_seg_map'].tolist() == [[0, 1], [2, 255], [1, 1]]
    assert results['seg_fields'] == ['gt_seg_map'] and results['gt_seg_map'].dtype == np.uint8
    save(np.array([[7, 255], [0, 7]]), tmp_path / 'values.png')
    results = LoadCodedAnnotations([255, 7])({'seg_map_path': str(tmp_path / 'values.png')})
    assert results['gt_seg_map'].tolist() == [[1, 0], [255, 1]]
    with pytest.raises(ValueError, match='another kind of mask'):
        LoadCodedAnnotations([0, 1])({'seg_map_path': str(tmp_path / 'colours.png')})
    with pytest.raises(ValueError, match='different numbers'):
        LoadCodedAnnotations([1, 1])
    with pytest.raises(ValueError, match='ignore_index must be within'):
        LoadCodedAnnotations([10, 20], ignore_index=256)


@pytest.mark.slow
def test_segmentation_by_the_command_line(tmp_path, monkeypatch, gfnet):
    write_masks(tmp_path, COLOURS)
    out = run_tool(
        'new.py', 'stripes', '--images', 'images', '--masks', 'masks', '--arch', 'nano',
        '--iterations', 2, '--batch', 2, cwd=tmp_path,
    ).stdout  # fmt: skip
    assert 'The data have no faults' in out and 'gfnet train stripes.py' in out
    assert not [*tmp_path.glob('*.partial')]
    cfg = Config.fromfile(tmp_path / 'stripes.py')
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 3
    assert cfg.model.backbone.img_size == 64
    with DATASETS.switch_scope_and_registry('mmseg'):
        dataset = DATASETS.build(cfg.val_dataloader.dataset)
    labels = dataset[0]['data_samples'].gt_sem_seg.data
    # Colours in their order are black, grey, purple; stripes are black, purple, grey.
    assert [int(labels[0, y, 0]) for y in (5, 30, 60)] == [0, 2, 1]

    run_tool('train.py', 'stripes.py', '--work-dir', 'run', cwd=tmp_path)
    assert (tmp_path / 'run/iter_2.pth').is_file()
    monkeypatch.chdir(tmp_path)
    status, _, err = gfnet('new', 'stripes', '--images', 'images', '--masks', 'masks')
    assert status == 1 and 'stripes.py exists' in err


@pytest.mark.slow
def test_the_printed_command_is_quoted(tmp_path, monkeypatch, gfnet):
    write_masks(tmp_path, [0, 1])
    monkeypatch.chdir(tmp_path)
    status, out, _ = gfnet(
        'new', 'my data', '--images', 'images', '--masks', 'masks', '--arch', 'nano',
        '--iterations', 2, '--batch', 2,
    )  # fmt: skip
    assert status == 0
    assert "  gfnet train 'my data.py' --work-dir 'work_dirs/my data'\n" in out


@pytest.mark.slow
def test_detection_by_the_command_line(tmp_path):
    digits = write_digits(tmp_path / 'digits', num_training=5, num_validation=1)
    file = digits / 'annotations/instances_training.json'
    out = run_tool(
        'new.py', 'digits', '--coco', file, '--images', digits / 'images/training',
        '--arch', 'nano', '--iterations', 4, '--batch', 2, cwd=tmp_path,
    )  # fmt: skip
    assert '10 classes: zero, one' in out.stdout
    assert 'creating index' not in out.stdout and 'OneDL' not in out.stdout
    assert 'Mask R-CNN' in (tmp_path / 'digits.py').read_text()
    whole = json.loads(file.read_text())
    parts = [json.loads((tmp_path / f'digits_{use}.json').read_text()) for use in ('train', 'val')]
    assert [len(part['images']) for part in parts] == [4, 1]
    assert sum(len(part['annotations']) for part in parts) == len(whole['annotations'])
    cfg = Config.fromfile(tmp_path / 'digits.py')
    assert (
        cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 10
    )
    assert cfg.train_cfg.max_epochs == 2
    assert cfg.val_evaluator.ann_file == str(tmp_path / 'digits_val.json')

    trained = run_tool('train.py', 'digits.py', '--work-dir', 'run', cwd=tmp_path)
    assert 'coco/bbox_mAP' in trained.stdout
    run_tool(
        'predict.py', 'digits.py', 'run/epoch_2.pth', digits / 'images/validation',
        '--out', 'results', cwd=tmp_path,
    )  # fmt: skip
    images = json.loads((tmp_path / 'results/images.json').read_text())
    assert len(images['images']) == 1
    assert [item['name'] for item in images['categories']] == cfg.metainfo['classes']
    results = json.loads((tmp_path / 'results/predictions.json').read_text())
    assert {'bbox', 'score', 'segmentation'} <= {*results[0]}


@pytest.mark.slow
def test_classification_by_the_command_line(tmp_path):
    for name in ('cat', 'dog'):
        for i in range(5):
            save(photograph(), tmp_path / f'pets/{name}/{i}.png')
    arguments = '--images', 'pets', '--arch', 'nano', '--iterations', 4
    run_tool('new.py', 'pets_config', *arguments, cwd=tmp_path)
    cfg = Config.fromfile(tmp_path / 'pets_config.py')
    assert cfg.model.backbone.num_classes == 2 and cfg.model.type == 'ImageClassifier'
    links = [*(tmp_path / 'pets_config_data').glob('*/*/*.png')]
    assert len(links) == 10 and all(link.is_symlink() and link.is_file() for link in links)
    assert len([link for link in links if '/val/' in str(link)]) == 2


def test_classes_without_a_split_are_held_out_one_by_one(tmp_path):
    for i in range(20):
        for j in range(8):
            save(photograph(8), tmp_path / f'{i}/{j}.png')
    found = look_at_folders(tmp_path)
    val = Counter(Path(name).parent.name for name in found.val)
    assert val == {f'{i}': 2 for i in range(20)} and len(found.train) == 120
    assert not {*found.train} & {*found.val} and look_at_folders(tmp_path) == found
    save(photograph(8), tmp_path / 'lone/0.png')
    with pytest.raises(DataError, match=r'lone has a single image, .*: add images'):
        look_at_folders(tmp_path)


def test_weights_and_sizes_that_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_masks(tmp_path, [0, 1])
    data = dict(images='images', masks='masks', batch=2, iterations=10)
    weights = tmp_path / 'other.pth'
    torch.save(dict(state_dict={'backbone.pos_embed': torch.zeros(1)}), weights)
    written = new_config('a', arch='h-ti', weights=str(weights), **data)
    assert written.config.model.backbone.init_cfg.checkpoint == str(weights)
    assert any('neck and heads of that file are left out' in note for note in written.notes)
    written = new_config('b', head='fpn', **data)
    assert written.config.model.backbone.init_cfg.checkpoint == 'gfnet-h-s'
    assert written.config.model.decode_head.type == 'FPNHead'
    for arguments, message in (
        (dict(head='retinanet'), 'choose upernet or fpn'),
        (dict(arch='xs'), 'maps of one stride'),
        (dict(arch='nano', head='fpn'), 'no nano backbone'),
        (dict(coco='a.json'), 'either --masks or --coco'),
        (dict(val_coco='a.json'), '--val-coco is for --coco'),
    ):
        with pytest.raises(ValueError, match=message):
            new_config('c', **{**data, **arguments})
    with pytest.raises(FileNotFoundError, match='no checkpoint at absent'):
        new_config('c', weights='absent', **data)
    assert not (tmp_path / 'c.py').exists()


def test_photos_are_never_replaced_by_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = [Path(f'fl_data/train/{name}/{i}.png') for name in ('cat', 'dog') for i in range(5)]
    for photo in photos:
        save(photograph(), photo)
    options = dict(arch='nano', batch=2, iterations=4, force=True)
    with pytest.raises(FileExistsError, match='fl_data exists and holds other files'):
        new_config('fl', images='fl_data/train', **options)
    assert all(photo.is_file() and not photo.is_symlink() for photo in photos)
    assert not Path('fl.py').exists()

    # A second run does not mix its split with that of the first.
    new_config('pets', images='fl_data/train', **options)
    photos[0].unlink()
    with pytest.raises(FileExistsError, match='exists: choose another'):
        new_config('pets', images='fl_data/train', **{**options, 'force': False})
    Path('pets.py').unlink()
    with pytest.raises(FileExistsError, match='pets_data exists: choose another'):
        new_config('pets', images='fl_data/train', **{**options, 'force': False})
    new_config('pets', images='fl_data/train', **options)
    links = [*Path('pets_data').glob('*/*/*.png')]
    assert sorted(link.resolve() for link in links) == [p.resolve() for p in photos[1:]]


def test_what_earlier_runs_wrote_is_no_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('cat', 'dog'):
        for i in range(3):
            save(photograph(), Path(name, f'{i}.png'))
    Path('work_dirs').mkdir()
    for name in ('pets', 'pets', 'others'):
        written = new_config(name, images='.', arch='nano', batch=2, iterations=4, force=True)
        assert written.config.model.backbone.num_classes == 2
        assert '2 classes: cat, dog' in str(written)


def test_coco_files_with_relative_roots(tmp_path, monkeypatch):
    digits = write_digits(tmp_path / 'digits', num_training=3, num_validation=1)
    file = digits / 'annotations/instances_training.json'
    content = json.loads(file.read_text())
    for image in content['images']:
        image['file_name'] = f'../photos/{image["file_name"]}'
    (digits / 'images/training').rename(tmp_path / 'photos')
    (tmp_path / 'marks').mkdir()
    (tmp_path / 'marks/a.json').write_text(json.dumps(content))
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    options = dict(arch='nano', batch=2, iterations=4)
    written = new_config('a', coco='../marks/a.json', **options)
    monkeypatch.chdir(tmp_path)  # training may start anywhere
    with DATASETS.switch_scope_and_registry('mmdet'):
        dataset = DATASETS.build(written.config.train_dataloader.dataset)
    paths = [Path(dataset.get_data_info(i)['img_path']).resolve() for i in range(len(dataset))]
    assert len(paths) == 2 and {path.parent for path in paths} == {tmp_path / 'photos'}


def test_inputs_are_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path / 'digits', num_training=5, num_validation=1)
    given = Path('tr_train.json')
    Path('digits/annotations/instances_training.json').rename(given)
    content = given.read_bytes()
    data = dict(coco='tr_train.json', images='digits/images/training', batch=2, iterations=4)
    with pytest.raises(FileExistsError, match=r'tr_train\.json is an input: choose another NAME'):
        new_config('tr', arch='nano', force=True, **data)
    assert given.read_bytes() == content
    Path('other_val.json').write_text('kept')
    with pytest.raises(FileExistsError, match=r'other_val\.json exists'):
        new_config('other', arch='nano', **data)
    assert Path('other_val.json').read_text() == 'kept'
    assert not [*tmp_path.glob('*.py')] and not Path('other_train.json').exists()


def test_configs_of_many_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = dict(images='images', masks='masks', arch='nano', batch=2, iterations=4, force=True)
    for count in (9, 60):
        write_masks(tmp_path, [*range(count)])
        written = new_config('a', **data)
        assert written.config.classes == [f'class {i}' for i in range(count)]
    text = 'traffic light,' * 5 + "a very long name of a class, in one's own words " * 4
    named = [f'{i} {name}' for i, name in enumerate(text.split(','))]
    write_masks(tmp_path, [*range(len(named))])
    written = new_config('a', classes=','.join(named), **data)
    assert written.config.classes == [name.strip() for name in named]


def test_colours_of_a_palette(tmp_path):
    """Values above 85 have their colour beyond byte 255 of the palette."""
    colours = np.random.default_rng(0).integers(0, 256, (256, 3)).astype(np.uint8)
    labels = np.arange(64)[:, None] // 16 * 60 + np.zeros((1, 64), int)  # 0, 60, 120, 180
    for i in range(3):
        save(photograph(), tmp_path / f'images/{i}.jpg')
        mask = Image.fromarray(labels.astype(np.uint8), 'P')
        mask.putpalette(colours.tobytes())
        (tmp_path / 'masks').mkdir(exist_ok=True)
        mask.save(tmp_path / f'masks/{i}.png')
    found = looked(tmp_path)
    assert found.values == [0, 60, 120, 180]
    assert found.palette == [tuple(colours[value].tolist()) for value in found.values]


@pytest.mark.slow
def test_upernet_has_two_images_in_a_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_masks(tmp_path, [0, 1], count=2)  # one of them is for training
    data = dict(images='images', masks='masks', arch='nano', iterations=4)
    with pytest.raises(ValueError, match='give --batch 2 or more'):
        new_config('a', batch=1, **data)
    assert not Path('a.py').exists()
    written = new_config('a', **data)
    assert written.config.train_dataloader.batch_size == 2
    assert any('UperNet needs 2 images' in note for note in written.notes)
    assert [report.faults for report in check_data(written.config)] == [[], []]
    data['arch'] = 'h-ti'
    written = new_config('b', head='fpn', batch=1, **data)
    assert written.config.train_dataloader.batch_size == 1


@pytest.mark.slow
def test_memory_decides_the_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_masks(tmp_path, [0, 1], count=40)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')  # loggers look for their GPU
    batches = []
    for memory in (1, 4, 2**20):
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda memory=memory: (memory << 30, 0))
        written = new_config('a', images='images', masks='masks', crop=256, arch='h-ti', force=True)
        batches.append(written.config.train_dataloader.batch_size)
    assert batches[0] == 2 < batches[1] < batches[2] == 16


@pytest.mark.slow
def test_killed_while_it_writes_it_leaves_no_half_file(tmp_path):
    write_masks(tmp_path, [0, 1])
    code = (
        'import os, signal\n'
        'from gfnet_dense.openmmlab import new_config\n'
        'os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n'
        'new_config("a", images="images", masks="masks", batch=2, iterations=9)\n'
    )
    run(sys.executable, '-c', code, status=-signal.SIGKILL, cwd=tmp_path)
    files = [path.name for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) == 1 and files[0].endswith('.partial')


def test_data_that_are_not_there(tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(DataError, match='holds no images in folders of classes'):
        look_at_folders(tmp_path / 'empty')
    (tmp_path / 'a.json').write_text('{"images": []}')
    with pytest.raises(DataError, match="not in COCO's layout"):
        look_at_coco(tmp_path / 'a.json', None, None)
