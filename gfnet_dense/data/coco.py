"""What is wrong with a detection data set, said before the training that it would end or spoil.

A built data set tells which images it will open and how it numbers the categories of its
annotation file. Whether those are the classes of its config only the file tells, and what was
dropped from it. So the file is read once more.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine import fileio
from mmengine.logging import print_log
from torch.utils.data import Dataset

from .errors import DataError

_NAMED = 3  # names in a message


def check_coco(dataset: Dataset) -> None:
    """Check annotations and images of a data set in the layout of COCO.

    What is no error but left out of the training, boxes without area in their image, is counted
    in the log. Other data sets pass.

    Args:
        dataset: A data set like mmdet's `CocoDataset`, perhaps inside of mmengine's wrappers.

    Raises:
        DataError: If images are missing, masks are missing that the pipeline loads, or the
            categories of the file are not the classes of the data set, in their order.
    """
    for part in _parts(dataset):
        if hasattr(part, 'cat2label'):
            _check_categories(part)
            _check_samples(part)


def _parts(dataset: Any) -> Iterator[Any]:
    """Yield the data sets inside of wrappers."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset
    else:
        for part in inner:
            yield from _parts(part)


def _check_categories(dataset: Any) -> None:
    file, classes = dataset.ann_file, dataset.metainfo['classes']
    if isinstance(classes, str):  # would match every category whose name is a part of it
        raise DataError(
            f'classes are the text {classes!r}: write a list of names, with a comma even for one, '
            f'({classes!r},)'
        )
    content = fileio.load(file, backend_args=dataset.backend_args)
    names = {category['id']: category['name'] for category in content['categories']}
    absent = [name for name in classes if name not in names.values()]
    if absent:
        raise DataError(
            f'{len(absent)} of {len(classes)} classes are no category of {file}: {_first(absent)}; '
            f'it has {_first([*names.values()], 10)}: correct the classes in the metainfo of the '
            'dataset'
        )
    labelled = tuple(names[i] for i in sorted(dataset.cat2label, key=dataset.cat2label.get))
    if labelled != tuple(classes):
        raise DataError(
            f'{file} lists the classes in another order, and labels follow it: write them as '
            f'{labelled} in the metainfo of the dataset'
        )
    boxes = [annotation for annotation in content['annotations'] if 'bbox' in annotation]
    unknown = Counter(box['category_id'] for box in boxes if box['category_id'] not in names)
    if unknown:
        raise DataError(
            f'{unknown.total()} of {len(boxes)} annotations in {file} have a category_id that its '
            f'categories have not: {_first(sorted(unknown))}; they have '
            f'{_first(sorted(names), 10)}: correct the file'
        )
    sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
    unused = sum(not _has_area(box, sizes) for box in boxes)
    if unused:
        print_log(
            f'{unused} of {len(boxes)} boxes in {file} have no area in their image and are not '
            'used',
            logger='current',
        )


def _has_area(box: Mapping[str, Any], sizes: Mapping[Any, tuple[float, float]]) -> bool:
    """Tell whether mmdet uses a box, by the rule of its `CocoDataset`."""
    left, top, width, height = box['bbox']
    image_width, image_height = sizes.get(box['image_id'], (0, 0))
    return (
        min(left + width, image_width) > max(left, 0)
        and min(top + height, image_height) > max(top, 0)
        and min(width, height) >= 1
        and box['area'] > 0
    )


def _check_samples(dataset: Any) -> None:
    with_masks = any(
        getattr(transform, 'with_mask', False) for transform in dataset.pipeline.transforms
    )
    missing, without_mask = [], 0
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        if not fileio.exists(info['img_path'], backend_args=dataset.backend_args):
            missing.append(info['img_path'])
        without_mask += sum('mask' not in instance for instance in info['instances'])
    if missing:
        raise DataError(
            f'{len(missing)} of {len(dataset)} images that {dataset.ann_file} names are not '
            f'there: {_first(missing)}: restore them, or correct data_root and data_prefix'
        )
    if with_masks and without_mask:
        raise DataError(
            f'{without_mask} objects in {dataset.ann_file} have no segmentation, but the pipeline '
            'loads masks: add them, or take a config for boxes alone, such as RetinaNet'
        )


def _first(values: Sequence[Any], count: int = _NAMED) -> str:
    names = ', '.join(map(str, values[:count]))
    return f'{names}, …' if len(values) > count else names
