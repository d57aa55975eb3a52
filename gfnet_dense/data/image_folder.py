"""Images for classification in the standard folder layout, through timm's reader and transforms."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from mmengine.structures import BaseDataElement
from PIL import Image
from timm.data import create_transform
from timm.data.readers.reader_image_folder import ReaderImageFolder

from .errors import DataError

# The folder that the classes of all others are compared with.
_TRAINING = 'train'
_NAMED = 5  # folders that a message names


@DATASETS.register_module()
class ImageFolder(BaseDataset):
    """Images in one folder for each class, `SPLIT/CLASS/*.JPEG`, as ImageNet is laid out.

    Classes are numbered in the natural order of their folders' names, as timm does. A sample is
    `dict(inputs=image, data_samples=BaseDataElement)`: the image is uint8 RGB of shape
    `(3, H, W)`; the element has the class index `gt_label` and the file's `img_path`.

    An image that cannot be decoded ends the run with an error that names the file: what stands in
    for it, or is left out, would change the data without anybody knowing.

    Args:
        data_root: Folder of the data set.
        split: Folder below it, such as `'train'` or `'val'`.
        transform: Arguments of :func:`timm.data.create_transform`. Images are normalised, and
            after that perhaps erased, by the model's data preprocessor, on its device.
        num_classes: Number of classes that there have to be; None for any.
        **kwargs: Arguments of :class:`mmengine.dataset.BaseDataset`, such as `indices`.

    Raises:
        DataError: If there is no such folder, its images lie in another way, or its classes are
            not `num_classes` or not those of the folder `train` beside it. Later, if an image
            cannot be decoded.
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
                f'{_names(set(classes) - expected)} only in {self.split}, '
                f'{_names(expected - set(classes))} only in {_TRAINING}'
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


def _scan(folder: Path) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Return path and class index of every image, and the names of the classes."""
    if not folder.is_dir():
        raise DataError(
            f'no folder {folder}: put the images into {folder}/CLASS/, or set data_root'
        )
    try:
        reader = ReaderImageFolder(str(folder))
    except RuntimeError as e:  # no image at all
        raise DataError(f'{folder} holds no images in folders of their classes: {e}') from None
    # timm names a class by the folder an image lies in, however deep that is.
    for path, _ in reader.samples:
        if os.path.dirname(os.path.dirname(path)) != str(folder):
            raise DataError(f'images must lie in {folder}/CLASS/, but one is {path}: move it')
    if empty := set(_class_folders(folder)) - set(reader.class_to_idx):
        raise DataError(
            f'no images in {len(empty)} of the class folders of {folder}: {_names(empty)}; '
            'fill or remove them'
        )
    return reader.samples, tuple(reader.class_to_idx)


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_dir() and entry.name[0] != '.']


def _names(names: Iterable[str]) -> str:
    names = sorted(names)
    if not names:
        return 'none'
    more = f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''
    return ', '.join(names[:_NAMED]) + more


def _read(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert('RGB')
    except Exception as e:  # broken bytes end in errors of many kinds
        raise DataError(f'{path} cannot be decoded: {e}; replace or remove it') from e
