"""A data set of images in one folder per class, with timm's reader and transforms."""

import os
from collections.abc import Iterator, Mapping
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from mmengine.structures import BaseDataElement
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.data.transforms_factory import create_transform
from torchvision.datasets.folder import IMG_EXTENSIONS

from .contents import Contents
from .errors import DataError, Fault, Findings, Note, join_first, not_permitted
from .files import is_empty

_TRAINING = 'train'  # the folder whose classes all others must have
_EXTENSIONS = {*IMG_EXTENSIONS, '.gif'}  # in any case


@DATASETS.register_module()
class ImageFolder(BaseDataset):
    """Images in one folder per class, `SPLIT/CLASS/*.JPEG`, as ImageNet is laid out.

    Classes are numbered in the natural order of their folder names, as timm does. A sample is
    `dict(inputs=image, data_samples=BaseDataElement)`: the image is uint8 RGB of shape
    `(3, H, W)`; the element has the class index `gt_label` and the file's `img_path`.

    File names ending as JPEG, PNG, WebP, BMP, TIFF, GIF, PPM and PGM are images; the log counts all
    other files. Training stops at an image that cannot be decoded and names the file: a substitute
    would change the data silently.

    Args:
        data_root: Folder of the data set.
        split: Folder below it, such as `'train'` or `'val'`.
        transform: Arguments of :func:`timm.data.create_transform`. The model's data preprocessor
            normalises images on its device, and erases random parts after that.
        num_classes: Number of classes to expect; None for any.
        **kwargs: Arguments of :class:`mmengine.dataset.BaseDataset`, such as `indices`.

    Raises:
        DataError: If the folder does not exist, its images lie elsewhere than in `SPLIT/CLASS`, or
            its classes are not `num_classes` or not those of the folder `train` beside it.
        ValueError: If `transform` asks for random erasing.
    """

    def __init__(
        self,
        data_root: str | os.PathLike[str],
        split: str,
        transform: Mapping[str, Any],
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        if transform.get('re_prob'):
            raise ValueError(
                'random erasing works on normalised images: set random_erasing of the data '
                f'preprocessor in place of re_prob={transform["re_prob"]} of the transform'
            )
        self.transform = create_transform(**transform, normalize=False)
        self.split = split
        self.num_classes = num_classes
        super().__init__(data_root=str(data_root), **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Find the images; the classes become the metainfo `classes`."""
        samples, classes = _scan(Path(self.data_root, self.split))
        self._check_classes(classes)
        self._metainfo['classes'] = classes
        return [dict(img_path=path, gt_label=label) for path, label in samples]

    def _check_classes(self, classes: tuple[str, ...]) -> None:
        folder, training = Path(self.data_root, self.split), Path(self.data_root, _TRAINING)
        if training.is_dir() and set(classes) != (expected := set(_class_folders(training))):
            raise DataError(
                f'{folder} and {training} differ in their classes: '
                f'{join_first(sorted(set(classes) - expected))} only in {self.split}, '
                f'{join_first(sorted(expected - set(classes)))} only in {_TRAINING}'
            )
        if self.num_classes not in (None, len(classes)):
            raise DataError(
                f'{folder} has {len(classes)} classes, but num_classes is {self.num_classes}: '
                'set it for model and data, or choose another folder'
            )

    def prepare_data(self, idx: int) -> dict[str, Any]:
        """Return sample `idx`.

        Raises:
            DataError: If the image cannot be decoded.
        """
        info = self.get_data_info(idx)
        sample = BaseDataElement(
            metainfo=dict(img_path=info['img_path']), gt_label=info['gt_label']
        )
        return dict(inputs=self.transform(_read(info['img_path'])), data_samples=sample)

    def load_image_for_checks(self, info: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        """Return the image of a sample, uint8 RGB of shape `(H, W, 3)`, before the transform."""
        return np.asarray(_read(info['img_path']))


def is_image_folder(part: Any) -> bool:
    """Tell whether a data set is an :class:`ImageFolder`."""
    return isinstance(part, ImageFolder)


def check_classes(part: Any, contents: Contents, use: str, **_: Any) -> Findings:
    """Find a single class."""
    classes = part.metainfo['classes']
    if len(classes) == 1:
        kind = Fault if use == 'train' else Note
        yield kind(
            f'{part.data_root} has the single class {classes[0]!r}, which is always right: add '
            'a folder of other images'
        )


def _scan(folder: Path) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Return path and class index of every image, and the names of the classes."""
    try:
        is_empty(folder)
    except OSError:
        raise DataError(
            f'no folder {folder}: put the images into {folder}/CLASS/, or set data_root'
        ) from None
    samples, class_to_idx = find_images_and_targets(str(folder), types=_EXTENSIONS)
    if not samples:
        raise DataError(
            f'{folder} holds no images in class folders, no files ending in '
            f'{", ".join(sorted(_EXTENSIONS))}'
        )
    # timm names a class by the folder an image lies in, however deep that is.
    for path, _ in samples:
        if os.path.dirname(os.path.dirname(path)) != str(folder):
            raise DataError(f'images must lie in {folder}/CLASS/, but one is {path}: move it')
    if empty := set(_class_folders(folder)) - set(class_to_idx):
        for name in sorted(empty):
            is_empty(folder / name)  # or it may not be read
        raise DataError(
            f'no images in {len(empty)} of the class folders of {folder}: '
            f'{join_first(sorted(empty), 5)}; fill or remove them'
        )
    if others := list(_other_files(folder)):
        print_log(
            f'{len(others)} files in {folder} are not taken, because their names do not end like '
            f'those of images: {join_first(sorted(others))}',
            logger='current',
            level=WARNING,
        )
    return samples, tuple(class_to_idx)


def _other_files(folder: Path) -> Iterator[str]:
    for place, _, files in os.walk(folder, followlinks=True):
        for file in files:
            if file[0] != '.' and os.path.splitext(file)[1].lower() not in _EXTENSIONS:
                yield os.path.relpath(os.path.join(place, file), folder)


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_dir() and entry.name[0] != '.']


def _read(path: str) -> Image.Image:
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            # Pillow's convert would clip at 255. It opens PGM of 16 bits in a mode of 32.
            if image.mode.startswith('I;16') or (image.mode, file.format) == ('I', 'PPM'):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ('I', 'F'):  # and here nothing says what white is
                raise ValueError(f'mode {image.mode} has no 8-bit colours, convert it')
            return image.convert('RGB')
    except PermissionError:
        raise DataError(not_permitted(path)) from None
    except Exception as e:  # broken bytes raise errors of many kinds
        raise DataError(f'{path} cannot be read: {e}; replace or remove it') from e
