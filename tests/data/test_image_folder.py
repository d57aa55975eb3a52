import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dataset import default_collate
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

from gfnet_dense.data import DataError, image_folder

EVALUATION = dict(input_size=32, crop_pct=0.875, interpolation='bicubic')
# The arguments that the official code calls timm's factory with, its defaults included.
OFFICIAL_AUGMENTATION = dict(
    is_training=True,
    color_jitter=0.4,
    auto_augment='rand-m9-mstd0.5-inc1',
    interpolation='bicubic',
    re_prob=0,
    re_mode='pixel',
    re_count=1,
)


def draw(path: Path, size=(40, 30), mode='RGB') -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(map(ord, str(path.name))))
    coarse = Image.fromarray(rng.integers(256, size=(5, 6, 3), dtype=np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    """Three classes; in training 2, 3 and 1 images, in validation one each."""
    for name, count in (('2', 2), ('10', 3), ('n01440764', 1)):
        for i in range(count):
            draw(tmp_path / 'train' / name / f'{name}_{i}.JPEG')
        draw(tmp_path / 'val' / name / f'ILSVRC2012_val_{i}.JPEG')
    return tmp_path


def folder(root, split='train', transform=EVALUATION, **kwargs):
    return DATASETS.build(
        dict(type='ImageFolder', data_root=root, split=split, transform=transform, **kwargs)
    )


def test_samples_carry_image_class_and_file(root):
    dataset = folder(root, num_classes=3)
    assert len(dataset) == 6
    assert dataset.metainfo['classes'] == ('2', '10', 'n01440764')
    found = {}
    for sample in dataset:
        assert sample['inputs'].dtype == torch.uint8
        assert sample['inputs'].shape == (3, 32, 32)
        found[sample['data_samples'].img_path] = sample['data_samples'].gt_label
    assert found == {
        str(path): dataset.metainfo['classes'].index(path.parent.name)
        for path in root.glob('train/*/*')
    }
    assert [dataset.get_data_info(i)['gt_label'] for i in range(6)] == [0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(('size', 'resized'), [(224, 256), (384, 438)])
def test_evaluation_is_the_official_one(root, size, resized):
    path = root / 'val' / '2' / 'large.JPEG'
    draw(path, (500, 375))
    dataset = folder(root, 'val', dict(EVALUATION, input_size=size))
    inputs = {s['data_samples'].img_path: s['inputs'] for s in dataset}[str(path)]
    steps = [Resize(resized, InterpolationMode.BICUBIC), CenterCrop(size), PILToTensor()]
    assert torch.equal(inputs, Compose(steps)(Image.open(path)))


def test_augmentation_and_normalisation_are_the_official_ones(root):
    import random

    from gfnet_dense.openmmlab import ClassificationPreprocessor

    ours = dict(OFFICIAL_AUGMENTATION, input_size=64)
    for key in ('re_prob', 're_mode', 're_count'):
        ours.pop(key)
    dataset = folder(root, transform=ours)
    official = create_transform(input_size=64, **OFFICIAL_AUGMENTATION)
    normalise = ClassificationPreprocessor(
        3, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]
    )
    for seed in range(3):
        results = []
        for run in (
            lambda: normalise(default_collate([dataset[4]]))['inputs'][0],
            lambda: official(Image.open(dataset.get_data_info(4)['img_path']).convert('RGB')),
        ):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            results.append(run())
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('mode', ['L', 'CMYK', 'P', 'RGBA', '1'])
def test_images_of_every_kind_become_rgb(root, mode):
    suffix = 'JPEG' if mode == 'CMYK' else 'png'
    draw(root / 'train' / '2' / f'0.{suffix}', mode=mode)
    assert folder(root)[0]['inputs'].shape == (3, 32, 32)


def test_sixteen_bits_of_grey_become_eight(root):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    path = root / 'train' / '2' / '0.png'
    Image.fromarray(ramp.astype(np.uint16)).save(path)
    with Image.open(path) as image:
        assert image.mode == 'I;16'
    inputs = folder(root, transform=dict(EVALUATION, crop_pct=1.0))[0]['inputs']
    assert torch.equal(inputs[0], torch.from_numpy(ramp // 256).byte())
    assert torch.equal(inputs[0], inputs[1]) and torch.equal(inputs[0], inputs[2])


def test_what_pillow_opens_is_taken_and_the_rest_is_named(root, monkeypatch):
    lines = []
    monkeypatch.setattr(image_folder, 'print_log', lambda line, **kwargs: lines.append(line))
    assert len(folder(root)) == 6
    assert lines == []
    kinds = ('webp', 'bmp', 'tif', 'TIFF', 'gif', 'ppm', 'pgm')
    for kind in kinds:
        draw(root / 'train' / '10' / f'a.{kind}')
    for name in ('10/b.heic', '2/notes.txt', '2/.DS_Store', 'LOC_synset_mapping.txt'):
        (root / 'train' / name).write_text('no image')
    dataset = folder(root)
    assert len(dataset) == 6 + len(kinds)
    for sample in dataset:
        assert sample['inputs'].shape == (3, 32, 32)
    (line,) = lines
    assert line.startswith(f'3 files in {root}/train are not taken')
    assert line.endswith('images: 10/b.heic, 2/notes.txt, LOC_synset_mapping.txt')


def test_a_loader_stacks_images_and_takes_parts(root):
    dataset = dict(
        type='ImageFolder', data_root=str(root), split='train', transform=EVALUATION, indices=5
    )
    loader = Runner.build_dataloader(
        dict(
            dataset=dataset,
            sampler=dict(type='DefaultSampler', shuffle=False),
            batch_size=3,
            num_workers=1,
            collate_fn=dict(type='default_collate'),
        ),
        seed=0,
    )
    batches = list(loader)
    assert [tuple(batch['inputs'].shape) for batch in batches] == [(3, 3, 32, 32), (2, 3, 32, 32)]
    assert [s.gt_label for batch in batches for s in batch['data_samples']] == [0, 0, 1, 1, 1]


# What can be wrong with a folder.


def test_class_folders_may_be_links_and_hidden_ones_do_not_count(root):
    shutil.move(root / 'train' / '10', root / 'elsewhere')
    (root / 'train' / '10').symlink_to(root / 'elsewhere')
    (root / 'train' / '.cache').mkdir()
    (root / 'train' / 'LOC_synset_mapping.txt').write_text('no image')
    assert len(folder(root)) == 6


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_missing_folder_is_named(tmp_path, split):
    with pytest.raises(DataError, match=rf'no folder {tmp_path}/{split}.*CLASS/, or set data_root'):
        folder(tmp_path, split)


@pytest.mark.parametrize('entry', [None, 'cat'])
def test_a_folder_without_images_is_named(tmp_path, entry):
    (tmp_path / 'train' / (entry or '')).mkdir(parents=True)
    with pytest.raises(DataError, match=rf'{tmp_path}/train holds no images'):
        folder(tmp_path)


def test_class_folders_without_images_are_named(root):
    for i in range(7):
        (root / 'train' / f'empty{i}').mkdir()
    (root / 'train' / 'empty6' / 'notes.txt').write_text('no image')
    with pytest.raises(DataError, match=r'no images in 7 .*/train: empty0, .*empty4 and 2 more'):
        folder(root)


@pytest.mark.parametrize('stray', ['train/1.JPEG', 'train/2/more/1.JPEG', 'train/2/10/1.JPEG'])
def test_an_image_in_another_place_is_named(root, stray):
    draw(root / stray)
    with pytest.raises(DataError, match=rf'must lie in {root}/train/CLASS/, but one is .*{stray}'):
        folder(root)


def test_classes_of_validation_must_be_those_of_training(root):
    shutil.move(root / 'val' / '10', root / 'val' / 'n02')
    with pytest.raises(DataError, match=r'n02 only in val, 10 only in train'):
        folder(root, 'val', num_classes=3)
    shutil.rmtree(root / 'val' / 'n02')
    with pytest.raises(DataError, match=r'none only in val, 10 only in train'):
        folder(root, 'val')
    # Evaluation does without the training images.
    shutil.rmtree(root / 'train')
    assert folder(root, 'val').metainfo['classes'] == ('2', 'n01440764')


def test_the_number_of_classes_is_checked(root):
    with pytest.raises(DataError, match=r'/train has 3 classes, but num_classes is 1000'):
        folder(root, num_classes=1000)


def test_erasing_in_the_wrong_place_is_refused(root):
    with pytest.raises(ValueError, match=r're_prob=0\.25'):
        folder(root, transform=dict(is_training=True, re_prob=0.25))


# What can be wrong with a file: it stops the run.


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def overwrite(path: Path) -> None:
    path.write_text('<html>404</html>')


def empty(path: Path) -> None:
    path.write_bytes(b'')


def break_png(path: Path) -> None:
    draw(path.with_suffix('.png'))
    content = bytearray(path.with_suffix('.png').read_bytes())
    content[60] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize('damage', [truncate, overwrite, empty, break_png, Path.unlink])
def test_a_file_that_cannot_be_decoded_is_named(root, damage):
    dataset = folder(root)
    path = Path(dataset.get_data_info(3)['img_path'])
    damage(path)
    with pytest.raises(DataError, match=rf'{path} cannot be read: .*; replace or remove it'):
        dataset[3]
    assert dataset[2]['data_samples'].img_path.endswith('10_0.JPEG')


def test_it_is_named_through_a_worker_process(root):
    dataset = folder(root)
    path = Path(dataset.get_data_info(3)['img_path'])
    truncate(path)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=1, collate_fn=partial(default_collate)
    )
    with pytest.raises(DataError, match=str(path)):
        list(loader)
