"""Faulty data and odd inputs, one function each, made of the embedded data.

A fault is a function of the folder of a small data set: it spoils files there and returns changes
to the config. What has to happen stands beside it: an error before the first iteration, a note in
the report, or nothing, because the data are right or are handled right; and what prediction from
its images has to say. `python tests/faults.py` writes the tables of docs/faulty_data.md.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, TRANSFORMS
from PIL import Image

from gfnet_dense.demo import write_digit_scans, write_digits
from gfnet_dense.openmmlab import find_config

ERROR, NOTE, RIGHT = 'error', 'note', 'right'


class Fault(NamedTuple):
    """One fault.

    Attributes:
        task: `'segmentation'`, `'detection'`, `'masks'` or `'classification'`.
        make: Spoils the data below a folder, and returns changes to the config by dotted key.
        outcome: `ERROR`, `NOTE` or `RIGHT`.
        says: A part of the error or of the note.
        use: The data that it is found in, `'train'`, `'val'` or `'test'`.
        predicts: A part of the error of prediction about an image; empty if all are predicted.
    """

    task: str
    make: Callable[[Path], dict[str, Any] | None]
    outcome: str
    says: str
    use: str
    predicts: str

    @property
    def title(self) -> str:
        """What is wrong, in words."""
        return (self.make.__doc__ or '').rstrip('.')


FAULTS: dict[str, Fault] = {}


def fault(
    task: str, outcome: str, says: str = '', use: str = 'train', predicts: str = ''
) -> Callable[..., Any]:
    def register(make: Callable[[Path], dict[str, Any] | None]) -> Callable[..., Any]:
        assert make.__name__ not in FAULTS
        FAULTS[make.__name__] = Fault(task, make, outcome, says, use, predicts)
        return make

    return register


# Data and configs


def write_data(root: Path) -> Path:
    """Write 8 and 4 scenes to `root/digits`, and 3 and 2 scans of each digit to `root/scans`."""
    write_digits(root / 'digits', num_training=8, num_validation=4)
    write_digit_scans(root / 'whole')
    for path in sorted((root / 'whole').glob('*/*/*.png')):
        if int(path.stem) < (3 if path.parts[-3] == 'train' else 2):
            (root / 'scans' / path.relative_to(root / 'whole').parent).mkdir(
                parents=True, exist_ok=True
            )
            shutil.copy(path, root / 'scans' / path.relative_to(root / 'whole'))
    shutil.rmtree(root / 'whole')
    return root


@HOOKS.register_module()
class CountIterations(Hook):
    """Count training iterations, over all runs."""

    count = 0

    def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
        CountIterations.count += 1


@TRANSFORMS.register_module()
class LoadArray:
    """A transform of a user: load an image from a .npy file."""

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        results['img'] = np.load(results['img_path'])
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        return results


NAMES = {
    'segmentation': 'upernet_gfnet_nano_digits',
    'detection': 'retinanet_gfnet_nano_digits',
    'masks': 'mask_rcnn_gfnet_nano_digits',
    'classification': 'gfnet_nano_digits',
}
ARCH = dict(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))


def make_config(task: str, root: Path) -> Config:
    """Return a config of a task that trains for one iteration of 4 images on data in `root`."""
    cfg = Config.fromfile(find_config(NAMES[task]))
    cfg.model.backbone.arch = ARCH
    widths = [8] * len(cfg.model.backbone.get('out_indices', range(4)))
    if task == 'segmentation':
        cfg.model.decode_head.update(in_channels=widths, channels=8)
        cfg.model.auxiliary_head.update(in_channels=8, channels=8)
    elif task != 'classification':
        cfg.model.neck.in_channels = widths
    data = root / ('scans' if task == 'classification' else 'digits')
    for use in ('train', 'val', 'test'):
        loader = cfg[f'{use}_dataloader']
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(data)
        if task in ('detection', 'masks') and use != 'train':
            file = str(data / loader.dataset.ann_file)
            cfg[f'{use}_evaluator'].ann_file = file
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=1, val_interval=1)
    cfg.param_scheduler = []
    cfg.log_level = 'WARNING'
    cfg.custom_hooks = [dict(type='CountIterations')]
    cfg.default_hooks.checkpoint.update(interval=1, by_epoch=False)
    return cfg


def apply(cfg: Config, changes: dict[str, Any] | None) -> Config:
    """Return a config with changes by dotted key; `'x': None` removes x."""
    for key, value in (changes or {}).items():
        *path, last = key.split('.')
        place: Any = cfg
        for name in path:
            place = place[int(name)] if isinstance(place, list) else place[name]
        if value is None:
            place.pop(last)
        else:
            place[int(last) if isinstance(place, list) else last] = value
    return cfg


# Files


def images(root: Path, split: str = 'training') -> list[Path]:
    return sorted((root / 'digits/images' / split).iterdir())


def maps(root: Path, split: str = 'training') -> list[Path]:
    return sorted((root / 'digits/annotations' / split).glob('*.png'))


def redraw(path: Path, change: Callable[[Image.Image], Image.Image], **options: Any) -> None:
    with Image.open(path) as file:
        image = change(file.convert(file.mode))
    image.save(path, **options)


def relabel(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    redraw(path, lambda image: Image.fromarray(change(np.array(image))))


def to_suffix(
    root: Path, suffix: str, change: Callable[[Image.Image], Image.Image], **options: Any
) -> dict[str, Any]:
    """Save all images in another format, and return the change of the config."""
    for split in ('training', 'validation'):
        for path in images(root, split):
            with Image.open(path) as file:
                change(file.convert('RGB')).save(path.with_suffix(suffix), **options)
            path.unlink()
    return {f'{use}_dataloader.dataset.img_suffix': suffix for use in ('train', 'val', 'test')}


def turn(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    redraw(path, lambda image: image, exif=exif)


def landscape(root: Path) -> None:
    """Cut all scenes to 64x48."""
    for split in ('training', 'validation'):
        for path in [*images(root, split), *maps(root, split)]:
            redraw(path, lambda image: image.crop((0, 0, 64, 48)))


def edit(root: Path, change: Callable[[dict[str, Any]], Any], subset: str = 'training') -> None:
    """Change an annotation file."""
    path = root / f'digits/annotations/instances_{subset}.json'
    content = json.loads(path.read_text())
    content = change(content) or content
    path.write_text(json.dumps(content))


def each(content: dict[str, Any], **values: Any) -> None:
    """Set values of all annotations; None removes one."""
    for annotation in content['annotations']:
        for key, value in values.items():
            if value is None:
                annotation.pop(key)
            else:
                annotation[key] = value


def both(**changes: Any) -> dict[str, Any]:
    """Return changes of validation and test."""
    return {
        f'{use}_{k.replace("__", ".")}': v for k, v in changes.items() for use in ('val', 'test')
    }


# Segmentation: images


@fault('segmentation', ERROR, 'cannot be read', predicts='cannot be read')
def truncated_image(root: Path) -> None:
    """An image is cut off."""
    path = images(root)[3]
    path.write_bytes(path.read_bytes()[:-100])


@fault('segmentation', ERROR, 'cannot be read', predicts='cannot be read')
def empty_image(root: Path) -> None:
    """An image has no bytes."""
    images(root)[3].write_bytes(b'')


@fault('segmentation', ERROR, 'cannot be read', 'val', predicts='cannot be read')
def page_as_image(root: Path) -> None:
    """An image of the validation data is an HTML page."""
    images(root, 'validation')[1].write_text('<html>not found</html>')


@fault('segmentation', RIGHT)
def grey_16_bits(root: Path) -> dict[str, Any]:
    """Grey images of 16 bits."""
    return to_suffix(root, '.png', grey16)


def grey16(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)


@fault('segmentation', ERROR, "set imdecode_backend='cv2'")
def grey_16_bits_by_pillow(root: Path) -> dict[str, Any]:
    """Grey images of 16 bits, decoded by Pillow."""
    backend = {
        f'{use}_dataloader.dataset.pipeline.0.imdecode_backend': 'pillow'
        for use in ('train', 'val')
    }
    return {**grey_16_bits(root), **backend}


@fault('segmentation', NOTE, 'nearly black')
def grey_12_bits(root: Path) -> dict[str, Any]:
    """Images of 12 bits in 16."""
    return to_suffix(root, '.png', lambda i: Image.fromarray(np.asarray(grey16(i)) >> 4))


@fault('segmentation', ERROR, 'convert the images to 8 or 16 bits', predicts='of 32 bits')
def float_image(root: Path) -> dict[str, Any]:
    """Images of floating point numbers."""
    return to_suffix(root, '.tif', lambda image: image.convert('L').convert('F'))


@fault('segmentation', RIGHT)
def palette_image(root: Path) -> dict[str, Any]:
    """Images with a palette."""
    return to_suffix(root, '.png', lambda image: image.quantize(64))


@fault('segmentation', RIGHT)
def alpha_image(root: Path) -> dict[str, Any]:
    """Images with alpha."""
    return to_suffix(root, '.png', lambda image: image.convert('RGBA'))


@fault('segmentation', RIGHT)
def cmyk_image(root: Path) -> dict[str, Any]:
    """JPEG images in CMYK."""
    return to_suffix(root, '.jpeg', lambda image: image.convert('CMYK'))


@fault('segmentation', RIGHT)
def bands_tiff(root: Path) -> dict[str, Any]:
    """TIFF images of 4 bands and 16 bits, read by tifffile."""
    import tifffile

    for path in [*images(root), *images(root, 'validation')]:
        bands = np.asarray(Image.open(path).convert('RGBA')).astype(np.uint16) * 257
        tifffile.imwrite(path.with_suffix('.tif'), bands)
        path.unlink()
    model = {
        'model.data_preprocessor.mean': [30000.0],
        'model.data_preprocessor.std': [15000.0],
        'model.backbone.in_channels': 4,
    }
    uses = ('train', 'val', 'test')
    pipeline = dict(type='LoadImageFromFile', imdecode_backend='tifffile', color_type='unchanged')
    load = {f'{use}_dataloader.dataset.pipeline.0': dict(pipeline, to_float32=True) for use in uses}
    return {**model, **load, **{f'{use}_dataloader.dataset.img_suffix': '.tif' for use in uses}}


@fault('segmentation', ERROR, '4 channels, but the data_preprocessor', predicts='network fails')
def bands_without_statistics(root: Path) -> dict[str, Any]:
    """TIFF images of 4 bands, and mean and std of 3."""
    changes = bands_tiff(root)
    return {key: value for key, value in changes.items() if 'model.data_preprocessor' not in key}


@fault('segmentation', ERROR, '4 channels, but the backbone takes 3', predicts='network fails')
def bands_without_channels(root: Path) -> dict[str, Any]:
    """TIFF images of 4 bands, and a backbone for 3."""
    return {**bands_tiff(root), 'model.backbone.in_channels': 3}


@fault('segmentation', RIGHT)
def arrays(root: Path) -> dict[str, Any]:
    """Images in .npy files, read by a transform of the user."""
    for path in [*images(root), *images(root, 'validation')]:
        np.save(path.with_suffix('.npy'), np.asarray(Image.open(path)))
        path.unlink()
    uses = ('train', 'val', 'test')
    load = {f'{use}_dataloader.dataset.pipeline.0': dict(type='LoadArray') for use in uses}
    return {**load, **{f'{use}_dataloader.dataset.img_suffix': '.npy' for use in uses}}


@fault('segmentation', ERROR, 'its image is loaded with 48x64')
def turned_by_90(root: Path) -> None:
    """EXIF turns an image by 90 degrees, and not its label map."""
    landscape(root)
    turn(images(root)[2], 6)


@fault('segmentation', NOTE, 'EXIF orientation 3')
def turned_by_180(root: Path) -> None:
    """EXIF turns an image by 180 degrees."""
    turn(images(root)[2], 3)


@fault('segmentation', ERROR, 'are left out')
def suffix_in_capitals(root: Path) -> None:
    """Half of the images end in .JPG, and img_suffix is .jpg."""
    for path in images(root)[::2]:
        path.rename(path.with_suffix('.JPG'))


@fault('segmentation', NOTE, 'other files')
def other_files(root: Path) -> None:
    """There are other files beside the images."""
    (images(root)[0].parent / 'notes.txt').write_text('notes')


@fault('segmentation', RIGHT)
def links(root: Path) -> None:
    """The images are symbolic links."""
    for path in images(root):
        shutil.move(path, root / path.name)
        path.symlink_to(root / path.name)


@fault('segmentation', RIGHT)
def subfolders(root: Path) -> None:
    """Images of equal names in subfolders, as in Cityscapes."""
    for split in ('training', 'validation'):
        for paths in (images(root, split), maps(root, split)):
            for i, path in enumerate(paths):
                folder = path.parent / f'city{i % 2}'
                folder.mkdir(exist_ok=True)
                path.rename(folder / f'{i // 2}{path.suffix}')


@fault('segmentation', RIGHT)
def names_of_many_letters(root: Path) -> None:
    """File names have spaces, umlauts, quotes and signs."""
    for folder in ('training', 'validation'):
        for paths in (images(root, folder), maps(root, folder)):
            for i, path in enumerate(paths):
                path.rename(path.with_name(f'{i} Bild ä, "Nr. %d" #1 (Kopie){path.suffix}'))


@fault('segmentation', ERROR, 'img_suffix of')
def several_suffixes(root: Path) -> dict[str, Any]:
    """img_suffix has several suffixes."""
    return {'train_dataloader.dataset.img_suffix': ('.jpg', '.png')}


@fault('segmentation', ERROR, 'cannot form a batch')
def sizes_in_training(root: Path) -> None:
    """Training images of several sizes, and no crop or padding."""
    for path in (images(root)[2], maps(root)[2]):
        redraw(path, lambda image: image.resize((96, 80), Image.Resampling.NEAREST))


@fault('segmentation', ERROR, 'The image size in a batch should be the same', 'val')
def sizes_in_validation(root: Path) -> None:
    """Validation images of several sizes in batches of 4."""
    for path in (images(root, 'validation')[2], maps(root, 'validation')[2]):
        redraw(path, lambda image: image.resize((96, 80), Image.Resampling.NEAREST))


@fault('segmentation', ERROR, 'is empty')
def empty_folder(root: Path) -> None:
    """The folder of the images is empty."""
    for path in images(root):
        path.unlink()


@fault('segmentation', ERROR, 'there is no folder')
def no_folder(root: Path) -> dict[str, Any]:
    """The folder of the data does not exist."""
    return {'train_dataloader.dataset.data_root': str(root / 'digit')}


# Segmentation: label maps


@fault('segmentation', ERROR, 'have no annotation')
def missing_map(root: Path) -> None:
    """A label map is missing."""
    maps(root)[4].unlink()


@fault('segmentation', NOTE, 'have no image')
def map_without_image(root: Path) -> None:
    """An image of a label map is missing."""
    images(root)[4].unlink()


@fault('segmentation', ERROR, 'cannot be read')
def truncated_map(root: Path) -> None:
    """A label map is cut off."""
    path = maps(root)[4]
    path.write_bytes(path.read_bytes()[:-40])


@fault('segmentation', ERROR, 'not one label per pixel')
def rgb_map(root: Path) -> None:
    """A label map has colours."""
    redraw(maps(root)[1], lambda image: image.convert('RGB'))


@fault('segmentation', ERROR, 'not one label per pixel')
def alpha_map(root: Path) -> None:
    """A label map has alpha."""
    redraw(maps(root)[1], lambda image: image.convert('LA'))


def put_palette(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putpalette([i * 7 % 256 for i in range(768)])
    return image


@fault('segmentation', RIGHT)
def palette_maps(root: Path) -> None:
    """Label maps have a palette."""
    for path in maps(root):
        redraw(path, put_palette)


@fault('segmentation', ERROR, 'not one label per pixel')
def palette_maps_by_opencv(root: Path) -> dict[str, Any]:
    """Label maps have a palette, and OpenCV reads colours."""
    palette_maps(root)
    return {'train_dataloader.dataset.pipeline.1.imdecode_backend': 'cv2'}


@fault('segmentation', RIGHT)
def maps_of_16_bits(root: Path) -> None:
    """Label maps have 16 bits."""
    for path in maps(root):
        relabel(path, lambda labels: labels.astype(np.uint16))


@fault('segmentation', ERROR, 'labels up to 301')
def labels_above_255(root: Path) -> None:
    """A label map of 16 bits has labels above 255."""
    relabel(maps(root)[5], lambda labels: (labels + 300 * (labels == 1)).astype(np.uint16))


@fault('segmentation', RIGHT)
def coded_labels_above_255(root: Path) -> dict[str, Any]:
    """Label maps of 16 bits, whose values LoadCodedAnnotations numbers."""
    uses = ('train', 'val', 'test')
    for path in [*maps(root), *maps(root, 'validation')]:
        relabel(path, lambda labels: labels.astype(np.uint16) * 100)
    load = dict(type='LoadCodedAnnotations', values=[100 * i for i in range(1, 12)])
    return {f'{use}_dataloader.dataset.pipeline.1': load for use in uses}


@fault('segmentation', ERROR, 'has 32x32 pixels')
def map_of_another_size(root: Path) -> None:
    """A label map of the training data has another size than its image."""
    redraw(maps(root)[5], lambda image: image.resize((32, 32), Image.Resampling.NEAREST))


@fault('segmentation', ERROR, 'has 32x32 pixels', 'val')
def validation_map_of_another_size(root: Path) -> None:
    """A label map of the validation data has another size than its image."""
    path = maps(root, 'validation')[1]
    redraw(path, lambda image: image.resize((32, 32), Image.Resampling.NEAREST))


@fault('segmentation', ERROR, 'has labels 19')
def labels_beyond_the_classes(root: Path) -> None:
    """A pixel has a label that no class has."""
    relabel(maps(root)[7], lambda labels: np.where(np.arange(64) + labels == 1, 20, labels))


@fault('segmentation', ERROR, 'do not draw objects so')
def objects_drawn_as_255(root: Path) -> dict[str, Any]:
    """Masks of 0 and 255 for two classes."""
    for path in [*maps(root), *maps(root, 'validation')]:
        relabel(path, lambda labels: np.where(labels > 1, 255, 0).astype(np.uint8))
    return two_classes()


def two_classes() -> dict[str, Any]:
    uses = ('train', 'val', 'test')
    meta = dict(classes=('background', 'digit'), palette=[(0, 0, 0), (255, 0, 0)])
    return {
        **{f'{use}_dataloader.dataset.metainfo': meta for use in uses},
        **{f'{use}_dataloader.dataset.reduce_zero_label': False for use in uses},
        'model.decode_head.num_classes': 2,
        'model.auxiliary_head.num_classes': 2,
    }


@fault('segmentation', RIGHT)
def masks_of_1_bit(root: Path) -> dict[str, Any]:
    """Masks of one bit for two classes."""
    for path in [*maps(root), *maps(root, 'validation')]:
        redraw(path, lambda image: image.point(lambda label: label > 1, mode='1'))
    return two_classes()


@fault('segmentation', ERROR, 'no pixel')
def nothing_labelled(root: Path) -> None:
    """All pixels have the label that is ignored."""
    for path in maps(root):
        relabel(path, np.zeros_like)


@fault('segmentation', NOTE, 'set reduce_zero_label=False')
def labels_from_0(root: Path) -> None:
    """Labels count from 0, and reduce_zero_label is set."""
    for path in maps(root):
        relabel(path, lambda labels: np.maximum(labels, 1) - np.uint8(1))
    labels = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 11
    Image.fromarray(labels).save(maps(root)[0])


@fault('segmentation', ERROR, 'is a JPEG')
def maps_as_jpeg(root: Path) -> dict[str, Any]:
    """Label maps are JPEG."""
    for path in [*maps(root), *maps(root, 'validation')]:
        with Image.open(path) as image:
            image.save(path.with_suffix('.jpeg'), quality=100)
        path.unlink()
    uses = ('train', 'val', 'test')
    return {f'{use}_dataloader.dataset.seg_map_suffix': '.jpeg' for use in uses}


# Segmentation: lists of files


def split_file(root: Path, text: Callable[[list[str]], str]) -> dict[str, Any]:
    file = root / 'digits' / 'train.txt'
    file.write_bytes(text([path.stem for path in images(root)]).encode())
    return {'train_dataloader.dataset.ann_file': 'train.txt'}


@fault('segmentation', RIGHT)
def list_with_windows_lines(root: Path) -> dict[str, Any]:
    """A list of files has Windows line ends."""
    return split_file(root, lambda names: '\r\n'.join(names) + '\r\n')


@fault('segmentation', ERROR, 'line 9 of')
def blank_line(root: Path) -> dict[str, Any]:
    """A list of files ends with a blank line."""
    return split_file(root, lambda names: '\n'.join(names) + '\n\n')


@fault('segmentation', ERROR, 'byte order mark')
def list_with_byte_order_mark(root: Path) -> dict[str, Any]:
    """A list of files begins with a byte order mark."""
    return split_file(root, lambda names: '\ufeff' + '\n'.join(names))


@fault('segmentation', ERROR, 'img_suffix adds again')
def list_with_suffixes(root: Path) -> dict[str, Any]:
    """A list of files has their suffixes."""
    return split_file(root, lambda names: '\n'.join(f'{name}.jpg' for name in names))


@fault('segmentation', ERROR, 'images do not exist')
def list_with_missing_image(root: Path) -> dict[str, Any]:
    """A list of files names an image that does not exist."""
    return split_file(root, lambda names: '\n'.join([*names, 'another']))


# Segmentation: configs


@fault('segmentation', ERROR, "classes are the text 'water'")
def classes_as_text(root: Path) -> dict[str, Any]:
    """The classes are a text."""
    uses = ('train', 'val', 'test')
    return {
        **{f'{use}_dataloader.dataset.metainfo': dict(classes='water') for use in uses},
        'model.decode_head.num_classes': 5,
        'model.auxiliary_head.num_classes': 5,
    }


@fault('segmentation', ERROR, 'num_classes=150')
def other_number_of_classes(root: Path) -> dict[str, Any]:
    """A head has another number of classes."""
    return {'model.decode_head.num_classes': 150}


@fault('segmentation', ERROR, 'one output and softmax')
def one_class_with_softmax(root: Path) -> dict[str, Any]:
    """One class with softmax: the loss is 0."""
    for path in [*maps(root), *maps(root, 'validation')]:
        relabel(path, lambda labels: np.minimum(labels, 1))
    uses = ('train', 'val', 'test')
    meta = dict(classes=('digit',), palette=[(255, 0, 0)])
    return {
        **{f'{use}_dataloader.dataset.metainfo': meta for use in uses},
        'model.decode_head.num_classes': 1,
        'model.auxiliary_head.num_classes': 1,
    }


@fault('segmentation', ERROR, 'needs the classes', 'val')
def no_classes(root: Path) -> dict[str, Any]:
    """The metainfo of the validation data has no classes."""
    return both(dataloader__dataset__metainfo=dict())


@fault('segmentation', ERROR, 'has labels 255')
def another_ignore_index(root: Path) -> dict[str, Any]:
    """The heads ignore another label than the data have."""
    return {'model.decode_head.ignore_index': 99, 'model.auxiliary_head.ignore_index': 99}


@fault('segmentation', ERROR, "asks for 'mIoU'")
def save_best_of_another_metric(root: Path) -> dict[str, Any]:
    """save_best names a number that the metric does not give."""
    return both(evaluator__iou_metrics=['mDice'])


@fault('segmentation', ERROR, 'has no IoU', 'val')
def unknown_metric(root: Path) -> dict[str, Any]:
    """The metric does not exist."""
    return both(evaluator__iou_metrics=['IoU'])


@fault('segmentation', ERROR, "asks for 'mAP'")
def scheduler_of_another_metric(root: Path) -> dict[str, Any]:
    """ReduceOnPlateau monitors a number that the metric does not give."""
    return {'param_scheduler': [dict(type='ReduceOnPlateauLR', monitor='mAP', rule='greater')]}


@fault('segmentation', ERROR, 'class_weight of CrossEntropyLoss in decode_head has 3 numbers')
def weights_of_other_classes(root: Path) -> dict[str, Any]:
    """class_weight of the loss has another number of classes."""
    return {'model.decode_head.loss_decode.class_weight': [1.0, 2.0, 3.0]}


@fault('segmentation', ERROR, "has the key 'img': name it 'img_path'")
def prefix_of_detection(root: Path) -> dict[str, Any]:
    """data_prefix has the keys of mmdet."""
    prefix = dict(img='images/training', seg_map_path='annotations/training')
    return {'train_dataloader.dataset.data_prefix': prefix}


@fault('segmentation', NOTE, 'training images are evaluated, too', 'val')
def validation_on_training_images(root: Path) -> dict[str, Any]:
    """Validation reads the training images."""
    prefix = dict(img_path='images/training', seg_map_path='annotations/training')
    return both(dataloader__dataset__data_prefix=prefix)


def without_annotations(root: Path) -> dict[str, Any]:
    shutil.rmtree(root / 'digits/annotations/validation')
    return {
        'test_dataloader.dataset.data_prefix': dict(img_path='images/validation'),
        'test_dataloader.dataset.pipeline': [
            dict(type='LoadImageFromFile'),
            dict(type='PackSegInputs'),
        ],
        'val_dataloader': None,
        'val_evaluator': None,
        'val_cfg': None,
    }


@fault('segmentation', RIGHT, use='test')
def test_images_alone(root: Path) -> dict[str, Any]:
    """Test data without annotations, and format_only."""
    metric = dict(type='IoUMetric', format_only=True, output_dir=str(root / 'out'))
    return {**without_annotations(root), 'test_evaluator': metric}


@fault('segmentation', ERROR, 'needs annotations', 'test')
def test_images_with_metric(root: Path) -> dict[str, Any]:
    """Test data without annotations, and IoU."""
    return without_annotations(root)


@fault('segmentation', ERROR, 'set output_dir', 'test')
def no_place_for_predictions(root: Path) -> dict[str, Any]:
    """format_only without output_dir."""
    return {**without_annotations(root), 'test_evaluator.format_only': True}


@fault('segmentation', RIGHT)
def persistent_workers(root: Path) -> dict[str, Any]:
    """persistent_workers without data loading processes."""
    return {f'{use}_dataloader.persistent_workers': True for use in ('train', 'val', 'test')}


@fault('segmentation', ERROR, 'set drop_last=True')
def last_batch_of_one(root: Path) -> dict[str, Any]:
    """The last batch has one image, and a norm sees one pixel of it."""
    return {'train_dataloader.batch_size': 7}


@fault('segmentation', ERROR, 'set batch_size=2 or more')
def batches_of_one(root: Path) -> dict[str, Any]:
    """Batches have one image, and a norm sees one pixel of it."""
    norms = {
        f'model.{head}.norm_cfg': dict(type='BN') for head in ('decode_head', 'auxiliary_head')
    }
    return {'train_dataloader.batch_size': 1, **norms}


@fault('segmentation', RIGHT)
def data_sets_together(root: Path) -> dict[str, Any]:
    """Two data sets in one, each repeated."""
    data = make_config('segmentation', root).train_dataloader.dataset
    repeated = dict(type='RepeatDataset', times=2, dataset=data)
    return {'train_dataloader.dataset': dict(type='ConcatDataset', datasets=[repeated, repeated])}


# Detection: images


@fault('detection', ERROR, 'do not exist')
def missing_coco_image(root: Path) -> None:
    """An image is missing."""
    images(root)[5].unlink()


@fault('detection', ERROR, 'cannot be read', predicts='cannot be read')
def truncated_coco_image(root: Path) -> None:
    """An image is cut off."""
    truncated_image(root)


@fault('detection', ERROR, 'annotations are for 640x480')
def other_size_in_json(root: Path) -> None:
    """Width and height in the file are not those of the image."""
    edit(root, lambda content: content['images'][1].update(width=640, height=480))


def coco_landscape(root: Path) -> None:
    landscape(root)
    for subset in ('training', 'validation'):
        edit(root, lambda c: [image.update(height=48) for image in c['images']] and None, subset)


@fault('detection', ERROR, "color_type='color_ignore_orientation'")
def coco_turned_by_90(root: Path) -> None:
    """EXIF turns an image by 90 degrees, and not its boxes."""
    coco_landscape(root)
    turn(images(root)[2], 6)


@fault('detection', RIGHT)
def coco_orientation_ignored(root: Path) -> dict[str, Any]:
    """EXIF turns an image, and color_type says to ignore that."""
    coco_turned_by_90(root)
    return {'train_dataloader.dataset.pipeline.0.color_type': 'color_ignore_orientation'}


@fault('detection', NOTE, 'EXIF orientation 3')
def coco_turned_by_180(root: Path) -> None:
    """EXIF turns an image by 180 degrees."""
    turn(images(root)[2], 3)


@fault('detection', ERROR, 'cannot be read')
def folder_as_image(root: Path) -> None:
    """An image is a folder."""
    path = images(root)[5]
    path.unlink()
    path.mkdir()


# Detection: annotation files


def lacking(kind: str, key: str, subset: str = 'training') -> Callable[[Path], None]:
    return lambda root: edit(root, lambda content: content[kind][1].pop(key) and None, subset)


for _kind, _keys in (
    ('images', ('id', 'file_name', 'width')),
    ('annotations', ('id', 'image_id', 'category_id', 'bbox', 'area')),
    ('categories', ('id', 'name')),
):
    for _key in _keys:
        _make = lacking(_kind, _key)
        _make.__name__, _make.__doc__ = (
            f'no_{_key}_of_{_kind}',
            f'One of the {_kind} has no {_key}.',
        )
        fault('detection', ERROR, f'have no {_key}')(_make)


@fault('detection', ERROR, 'is not JSON')
def truncated_json(root: Path) -> None:
    """The annotation file is cut off."""
    path = root / 'digits/annotations/instances_training.json'
    path.write_text(path.read_text()[:-500])


@fault('detection', ERROR, 'not a dict')
def json_list(root: Path) -> None:
    """The annotation file holds a list."""
    edit(root, lambda content: content['annotations'])


@fault('detection', ERROR, 'have no iscrowd', 'val')
def no_iscrowd_in_validation(root: Path) -> None:
    """Annotations of the validation data have no iscrowd."""
    edit(root, lambda content: each(content, iscrowd=None), 'validation')


@fault('detection', RIGHT)
def no_iscrowd_in_training(root: Path) -> None:
    """Annotations of the training data have no iscrowd."""
    edit(root, lambda content: each(content, iscrowd=None))


def ids_from_0(content: dict[str, Any]) -> None:
    for i, annotation in enumerate(content['annotations']):
        annotation['id'] = i


@fault('detection', ERROR, 'which COCO evaluation counts as missed', 'val')
def ids_from_0_in_validation(root: Path) -> None:
    """Annotation ids of the validation data count from 0."""
    edit(root, ids_from_0, 'validation')


@fault('detection', RIGHT)
def ids_from_0_in_training(root: Path) -> None:
    """Annotation ids of the training data count from 0."""
    edit(root, ids_from_0)


def twice(kind: str) -> Callable[[Path], None]:
    def change(content: dict[str, Any]) -> None:
        content[kind][1]['id'] = content[kind][0]['id']

    return lambda root: edit(root, change)


for _kind in ('images', 'annotations', 'categories'):
    _make = twice(_kind)
    _make.__name__, _make.__doc__ = f'two_{_kind}', f'Two {_kind} have the same id.'
    fault('detection', ERROR, 'occur more than once')(_make)


@fault('detection', ERROR, 'not one of its categories')
def unknown_category(root: Path) -> None:
    """A category_id is not declared."""
    edit(root, lambda content: content['annotations'][0].update(category_id=99))


@fault('detection', NOTE, 'an image_id that none of its images has')
def unknown_image(root: Path) -> None:
    """An annotation belongs to no image."""
    edit(root, lambda content: content['annotations'][0].update(image_id=99))


@fault('detection', ERROR, 'an image_id that none of its')
def image_ids_as_text(root: Path) -> None:
    """Image ids of the annotations are texts, those of the images numbers."""
    edit(root, lambda c: [a.update(image_id=str(a['image_id'])) for a in c['annotations']] and None)


def one_box(box: Any) -> Callable[[Path], None]:
    return lambda root: edit(root, lambda content: content['annotations'][0].update(bbox=box))


for _name, _title, _box in (
    ('nan_box', 'A box has NaN.', [1, 2, float('nan'), 4]),
    ('infinite_box', 'A box is infinite.', [1, 2, float('inf'), 4]),
    ('text_box', 'A box has texts.', ['1', '2', '3', '4']),
    ('box_of_three', 'A box has three numbers.', [1, 2, 3]),
):
    _make = one_box(_box)
    _make.__name__, _make.__doc__ = _name, _title
    fault('detection', ERROR, 'not four finite numbers')(_make)
for _name, _title, _box in (
    ('flat_box', 'A box has no area.', [1, 2, 0, 4]),
    ('negative_box', 'A box has a negative width.', [30, 2, -9, 4]),
    ('box_outside', 'A box lies outside of its image.', [70, 2, 9, 4]),
):
    _make = one_box(_box)
    _make.__name__, _make.__doc__ = _name, _title
    fault('detection', NOTE, 'no area in their image')(_make)


@fault('detection', NOTE, 'leave their image')
def box_half_outside(root: Path) -> None:
    """A box leaves its image."""
    edit(root, lambda content: content['annotations'][0].update(bbox=[50, 2, 30, 30]))


@fault('detection', ERROR, 'x1, y1, x2, y2')
def corners(root: Path) -> None:
    """Boxes are written as corners."""

    def change(content: dict[str, Any]) -> None:
        for annotation in content['annotations']:
            left, top, width, height = annotation['bbox']
            annotation['bbox'] = [left, top, left + width, top + height]

    edit(root, change)


@fault('detection', ERROR, 'in pixels')
def fractions(root: Path) -> None:
    """Boxes are fractions of the image."""

    def change(content: dict[str, Any]) -> None:
        for annotation in content['annotations']:
            annotation['bbox'] = [value / 64 for value in annotation['bbox']]

    edit(root, change)


@fault('detection', ERROR, 'iscrowd=1')
def all_crowds(root: Path) -> None:
    """All objects are crowds."""
    edit(root, lambda content: each(content, iscrowd=1))


@fault('detection', ERROR, 'no images are left')
def no_objects(root: Path) -> None:
    """There are no annotations."""
    edit(root, lambda content: content.update(annotations=[]))


@fault('detection', NOTE, 'gives -1 as every figure', 'val')
def no_objects_in_validation(root: Path) -> None:
    """There are no annotations in the validation data."""
    edit(root, lambda content: content.update(annotations=[]), 'validation')


@fault('detection', NOTE, 'occur more than once')
def image_twice(root: Path) -> None:
    """An image is listed under two ids."""

    def change(content: dict[str, Any]) -> None:
        content['images'].append(dict(content['images'][0], id=1000))
        content['annotations'].append(dict(content['annotations'][0], image_id=1000, id=1000))

    edit(root, change)


@fault('detection', ERROR, 'are not categories')
def other_classes(root: Path) -> dict[str, Any]:
    """Classes of the config are not in the file."""
    return classes_of_training(*'abcdefghij')


def classes_of_training(*names: str) -> dict[str, Any]:
    return {'train_dataloader.dataset.metainfo': dict(classes=names)}


DIGITS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


@fault('detection', ERROR, 'in another order')
def classes_in_another_order(root: Path) -> dict[str, Any]:
    """Classes of the config are in another order than in the file."""
    return classes_of_training(*DIGITS[::-1])


@fault('detection', ERROR, "classes are the text 'zero'")
def coco_classes_as_text(root: Path) -> dict[str, Any]:
    """The classes are a text."""
    return {'train_dataloader.dataset.metainfo': dict(classes='zero')}


@fault('detection', ERROR, 'num_classes=80')
def coco_number_of_classes(root: Path) -> dict[str, Any]:
    """The head has another number of classes."""
    return {'model.bbox_head.num_classes': 80}


@fault('detection', ERROR, "has the key 'img_path': name it 'img'")
def prefix_of_segmentation(root: Path) -> dict[str, Any]:
    """data_prefix has the key of mmseg."""
    return {'train_dataloader.dataset.data_prefix': dict(img_path='images/training')}


@fault('detection', ERROR, 'is a folder, not a file')
def folder_as_json(root: Path) -> dict[str, Any]:
    """The annotation file is a folder."""
    return {'train_dataloader.dataset.ann_file': 'annotations'}


@fault('detection', ERROR, 'are not in', 'val')
def evaluator_of_other_images(root: Path) -> dict[str, Any]:
    """The metric reads the file of other images."""
    edit(root, shift_ids)
    return evaluator_of(root)


def shift_ids(content: dict[str, Any]) -> None:
    for image in content['images']:
        image['id'] += 100
    for annotation in content['annotations']:
        annotation['image_id'] += 100


def evaluator_of(root: Path) -> dict[str, Any]:
    file = root / 'digits/annotations/instances_training.json'
    return both(evaluator__ann_file=str(file))


@fault('detection', ERROR, 'under the same id', 'val')
def evaluator_of_same_ids(root: Path) -> dict[str, Any]:
    """The metric reads the file of other images that have the same ids."""
    return evaluator_of(root)


@fault('detection', ERROR, 'have no id', 'val')
def evaluator_of_a_faulty_file(root: Path) -> dict[str, Any]:
    """The metric reads another file, whose annotations have no ids."""
    edit(root, lambda content: each(content, id=None))
    return {**evaluator_of(root), 'train_dataloader.dataset.ann_file': VALIDATION_FILE,
            'train_dataloader.dataset.data_prefix.img': 'images/validation'}  # fmt: skip


VALIDATION_FILE = 'annotations/instances_validation.json'


@fault('detection', NOTE, 'count as missed', 'val')
def part_of_the_validation(root: Path) -> dict[str, Any]:
    """Only a part of the validation images is evaluated."""
    return both(dataloader__dataset__indices=3)


@fault('detection', ERROR, 'needs masks', 'val')
def masks_of_a_box_detector(root: Path) -> dict[str, Any]:
    """The metric asks a detector of boxes for masks."""
    return both(evaluator__metric=['bbox', 'segm'])


# Masks


@fault('masks', ERROR, 'have no segmentation')
def no_masks(root: Path) -> None:
    """An annotation has no segmentation."""
    edit(root, lambda content: content['annotations'][0].pop('segmentation') and None)


def one_mask(mask: Any, subset: str = 'training') -> Callable[[Path], None]:
    def change(content: dict[str, Any]) -> None:
        content['annotations'][0]['segmentation'] = mask

    return lambda root: edit(root, change, subset)


for _name, _title, _mask, _outcome, _says, _subset in (
    ('mask_of_4_numbers', 'A segmentation is a flat list of 4 numbers.', [2, 2, 9, 9], ERROR,
     'neither a list of polygons', 'training'),
    ('polygon_of_4_numbers', 'A polygon has two points.', [[2, 2, 9, 9]], NOTE,
     'without a polygon of three points', 'training'),
    ('evaluated_polygon_of_4_numbers', 'A polygon of the validation data has two points.',
     [[2, 2, 9, 9]], ERROR, 'without a polygon of three points', 'validation'),
    ('odd_polygon', 'A polygon has an odd number of coordinates.', [[2, 2, 9, 2, 9, 9, 2]], NOTE,
     'without a polygon of three points', 'training'),
    ('nan_polygon', 'A polygon has NaN.', [[2, 2, 9, 2, 9, float('nan')]], ERROR,
     'no finite numbers', 'training'),
    ('rle_of_another_size', 'RLE is for another size.', dict(size=[32, 32], counts=[1000, 24]),
     ERROR, 'whose size is not', 'training'),
    ('rle_of_other_counts', 'Counts of RLE do not fill the image.',
     dict(size=[64, 64], counts=[1000, 24]), ERROR, 'do not add up', 'training'),
    ('rle_without_counts', 'RLE has no counts.', dict(size=[64, 64]), ERROR, 'without counts',
     'training'),
):  # fmt: skip
    _make = one_mask(_mask, _subset)
    _make.__name__, _make.__doc__ = _name, _title
    fault('masks', _outcome, _says, 'val' if _subset == 'validation' else 'train')(_make)


# Classification


def scans(root: Path, split: str = 'train') -> list[Path]:
    return sorted((root / 'scans' / split).glob('*/*'))


@fault('classification', ERROR, 'cannot be read', predicts='cannot be read')
def truncated_scan(root: Path) -> None:
    """An image is cut off."""
    scans(root)[3].write_bytes(scans(root)[3].read_bytes()[:50])


@fault('classification', ERROR, 'cannot be read', predicts='cannot be read')
def empty_scan(root: Path) -> None:
    """An image has no bytes."""
    scans(root)[3].write_bytes(b'')


@fault('classification', RIGHT)
def scans_of_16_bits(root: Path) -> None:
    """Images have 16 bits."""
    for path in scans(root):
        redraw(path, grey16)


@fault('classification', ERROR, 'convert the images to 8 or 16 bits', predicts='of 32 bits')
def float_scan(root: Path) -> None:
    """An image has floating point numbers."""
    with Image.open(scans(root)[3]) as image:
        image.convert('F').save(scans(root)[3].with_suffix('.tiff'))


@fault('classification', RIGHT)
def scans_of_many_kinds(root: Path) -> None:
    """Images with palette, alpha, in capitals."""
    redraw(scans(root)[0], lambda image: image.convert('P'))
    redraw(scans(root)[1], lambda image: image.convert('RGBA'))
    scans(root)[2].rename(scans(root)[2].with_suffix('.PNG'))


@fault('classification', NOTE, 'and prediction follows')
def turned_scan(root: Path) -> None:
    """EXIF turns an image."""
    turn(scans(root)[3], 6)


@fault('classification', ERROR, 'no images in 1 of the class folders')
def empty_class(root: Path) -> None:
    """A class has no images."""
    (root / 'scans/train/none').mkdir()


@fault('classification', ERROR, 'differ in their classes', 'val')
def class_of_the_validation_alone(root: Path) -> None:
    """The validation data have a class that the training data have not."""
    shutil.copytree(root / 'scans/val/9', root / 'scans/val/ten')


@fault('classification', ERROR, 'but num_classes is 5')
def scans_of_other_classes(root: Path) -> dict[str, Any]:
    """There are more classes than num_classes says."""
    return {'train_dataloader.dataset.num_classes': 5}


@fault('classification', ERROR, 'images must lie in')
def image_outside_of_classes(root: Path) -> None:
    """An image lies in no class folder."""
    shutil.copy(scans(root)[0], root / 'scans/train/image.png')


@fault('classification', ERROR, 'the single class')
def single_class(root: Path) -> dict[str, Any]:
    """There is one class."""
    for split in ('train', 'val'):
        for digit in range(1, 10):
            shutil.rmtree(root / 'scans' / split / str(digit))
    uses = ('train', 'val', 'test')
    return {
        **{f'{use}_dataloader.dataset.num_classes': 1 for use in uses},
        'train_dataloader.batch_size': 2,
        'model.backbone.num_classes': 1,
        'model.data_preprocessor.num_classes': 1,
    }


# Checkpoints

State = dict[str, torch.Tensor]


class FaultyCheckpoint(NamedTuple):
    """A checkpoint that is not what `torch.save` wrote of a whole model.

    Attributes:
        make: Writes it, from the weights of the segmentor of :func:`make_config`.
        start: A part of the error when training starts from it (`load_from`); empty if it does.
        use: The same for a test, a resumed run and prediction.
    """

    make: Callable[[Path, State], None]
    start: str
    use: str


CHECKPOINTS: dict[str, FaultyCheckpoint] = {}


def checkpoint(start: str = '', use: str = '') -> Callable[..., Any]:
    def register(make: Callable[[Path, State], None]) -> Callable[..., Any]:
        CHECKPOINTS[make.__name__] = FaultyCheckpoint(make, start, use)
        return make

    return register


_BROKEN = 'is not a checkpoint, or only a part of one'


@checkpoint(_BROKEN, _BROKEN)
def no_bytes(path: Path, state: State) -> None:
    """The file has no bytes."""
    path.write_bytes(b'')


@checkpoint(_BROKEN, _BROKEN)
def page_as_checkpoint(path: Path, state: State) -> None:
    """The file is an HTML page."""
    path.write_text('<html>your download has expired</html>')


@checkpoint(_BROKEN, _BROKEN)
def truncated_checkpoint(path: Path, state: State) -> None:
    """The file is cut off."""
    torch.save(dict(state_dict=state), path)
    path.write_bytes(path.read_bytes()[:-1000])


@checkpoint('is not safe to read', 'is not safe to read')
def checkpoint_with_code(path: Path, state: State) -> None:
    """The file holds an object that would be executed."""
    torch.save(dict(state_dict=state, hook=Path.home), path)


@checkpoint('not finite', 'not finite')
def weights_with_nan(path: Path, state: State) -> None:
    """A weight is NaN."""
    state['backbone.patch_embed.0.proj.bias'][1] = float('nan')
    torch.save(dict(state_dict=state), path)


@checkpoint('in other shapes', 'backbone.')
def backbone_of_another_size(path: Path, state: State) -> None:
    """The backbone has another size."""
    torch.save(dict(state_dict={k: v.expand(3, *v.shape) for k, v in state.items()}), path)


@checkpoint('', 'decode_head.conv_seg')
def head_of_another_size(path: Path, state: State) -> None:
    """The head has another number of classes."""
    torch.save({k: v[:7] if 'conv_seg' in k else v for k, v in state.items()}, path)


@checkpoint('', 'decode_head.')
def backbone_alone(path: Path, state: State) -> None:
    """There are the weights of the backbone alone."""
    torch.save({k: v for k, v in state.items() if k.startswith('backbone.')}, path)


@checkpoint()
def bare_weights(path: Path, state: State) -> None:
    """The weights stand alone, without `state_dict`."""
    torch.save(state, path)


@checkpoint()
def weights_under_model(path: Path, state: State) -> None:
    """The weights stand under `model`, as in official files."""
    torch.save(dict(model=state), path)


@checkpoint()
def prefix_of_parallel_training(path: Path, state: State) -> None:
    """Names begin with `module.`, as DistributedDataParallel saves them."""
    torch.save(dict(state_dict={f'module.{k}': v for k, v in state.items()}), path)


@checkpoint()
def prefix_of_compilation(path: Path, state: State) -> None:
    """Names have `_orig_mod.`, as torch.compile saves them."""
    names = {k: k.replace('backbone.', 'backbone._orig_mod.', 1) for k in state}
    torch.save(dict(state_dict={names[k]: v for k, v in state.items()}), path)


@checkpoint()
def half_precision(path: Path, state: State) -> None:
    """The weights are float16."""
    torch.save(dict(state_dict={k: v.half() if v.is_floating_point() else v
                                for k, v in state.items()}), path)  # fmt: skip


@checkpoint()
def safetensors_file(path: Path, state: State) -> None:
    """The file is one of safetensors, whatever its name."""
    safetensors.torch.save_file(state, path)


def checkpoint_table() -> str:
    """Return the table of checkpoints of docs/faulty_data.md."""
    says = lambda text: f'error: `{text}`' if text else 'works'  # noqa: E731
    lines = ['| checkpoint | `load_from` of a training | test, prediction |', '|---|---|---|']
    for some in CHECKPOINTS.values():
        title = (some.make.__doc__ or '').rstrip('.')
        lines.append(f'| {title} | {says(some.start)} | {says(some.use)} |')
    return '\n'.join(lines)


def table() -> str:
    """Return the table of data of docs/faulty_data.md."""
    happens = {ERROR: 'error', NOTE: 'note', RIGHT: 'works'}
    lines = []
    for task in NAMES:
        lines += [f'### {task.capitalize()}', '']
        lines += ['| input | data | what happens | it says | prediction |', '|---|---|---|---|---|']
        for some in FAULTS.values():
            if some.task == task:
                says = f'`{some.says}`' if some.says else ''
                predicts = f'error: `{some.predicts}`' if some.predicts else 'works'
                cells = some.title, some.use, happens[some.outcome], says, predicts
                lines.append(f'| {" | ".join(cells)} |')
        lines.append('')
    return '\n'.join(lines)


if __name__ == '__main__':
    print(table())
    print(checkpoint_table())
