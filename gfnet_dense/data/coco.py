"""Checks of data sets in COCO's layout, before training starts.

A built data set knows its images and how it numbers categories. Only the annotation file knows the
names of the categories and what the data set left out, so the checks read that file again.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine import fileio
from mmengine.logging import print_log
from torch.utils.data import Dataset

from .errors import DataError, join_first

_READ = ('image_id', 'category_id', 'bbox', 'area')  # what mmdet reads of every annotation


def check_coco(dataset: Dataset[Any]) -> None:
    """Check annotations and images of a data set in COCO's layout.

    mmdet leaves some boxes out, such as those without area in their image. The log says how many.
    Data sets of other kinds pass.

    Args:
        dataset: A data set like mmdet's `CocoDataset`, perhaps inside mmengine's wrappers.

    Raises:
        DataError: If images are missing, the pipeline loads masks that are missing, annotations
            lack a key or belong to no image, or the classes of the data set are not categories of
            the file in the same order.
    """
    for part in _parts(dataset):
        if hasattr(part, 'cat2label'):
            content = fileio.load(part.ann_file, backend_args=part.backend_args)
            _check_categories(part, content)
            _check_annotations(content, part.ann_file)
            _check_samples(part)


def check_coco_file(dataset: Mapping[str, Any]) -> str:
    """Check the annotation file of a data set that could not be built.

    Args:
        dataset: Config of the data set.

    Returns:
        A clause for an error message: how many images and annotations the file has. Empty if the
        file is not in COCO's layout.

    Raises:
        DataError: If the annotations are at fault.
    """
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    file = fileio.join_path(dataset.get('data_root') or '', dataset.get('ann_file') or '')
    options = dict(backend_args=dataset.get('backend_args'))
    if not file.endswith('.json') or not fileio.exists(file, **options):
        return ''
    content = fileio.load(file, **options)
    if not isinstance(content, Mapping) or 'images' not in content:
        return ''
    _check_annotations(content, file)
    count = len(content.get('annotations', ()))
    return f', where {file} has {len(content["images"])} images and {count} annotations'


def _parts(dataset: Any) -> Iterator[Any]:
    """Yield the data sets inside wrappers."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset
    else:
        for part in inner:
            yield from _parts(part)


def _check_categories(dataset: Any, content: Mapping[str, Any]) -> None:
    file, classes = dataset.ann_file, dataset.metainfo['classes']
    if isinstance(classes, str):  # mmdet would take every category whose name is a part of it
        raise DataError(
            f'classes are the text {classes!r}: write a tuple of names, with a comma even for one, '
            f'({classes!r},)'
        )
    names = {category['id']: category['name'] for category in content['categories']}
    absent = [name for name in classes if name not in names.values()]
    if absent:
        raise DataError(
            f'{len(absent)} of {len(classes)} classes are not categories of {file}: '
            f'{join_first(absent)}; it has {join_first(names.values(), 10)}: correct the classes '
            'in the metainfo of the dataset'
        )
    labelled = tuple(names[i] for i in sorted(dataset.cat2label, key=dataset.cat2label.get))
    if labelled != tuple(classes):
        raise DataError(
            f'{file} lists the classes in another order, and labels follow it: write them as '
            f'{labelled} in the metainfo of the dataset'
        )


def _check_annotations(content: Mapping[str, Any], file: str) -> None:
    # Files of test images have no annotations, and panoptic segments have no boxes.
    boxes = [a for a in content.get('annotations', ()) if 'segments_info' not in a]
    for key in _READ:
        if lacking := [box.get('id') for box in boxes if key not in box]:
            raise DataError(
                f'{len(lacking)} of {len(boxes)} annotations in {file} have no {key}, first the '
                f'ids {join_first(lacking)}: correct the file'
            )
    broken = [box.get('id') for box in boxes if not _is_box(box['bbox'])]
    if broken:
        raise DataError(
            f'{len(broken)} of {len(boxes)} annotations in {file} have a bbox that is not four '
            f'finite numbers, first the ids {join_first(broken)}: correct the file'
        )
    names = {category['id'] for category in content['categories']}
    unknown = Counter(box['category_id'] for box in boxes if box['category_id'] not in names)
    if unknown:
        raise DataError(
            f'{unknown.total()} of {len(boxes)} annotations in {file} have a category_id that is '
            f'not one of its categories: {join_first(sorted(unknown))}; they have '
            f'{join_first(sorted(names), 10)}: correct the file'
        )
    sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
    placed = [box for box in boxes if box['image_id'] in sizes]
    if boxes and not placed:
        raise DataError(
            f'{len(boxes)} of {len(boxes)} annotations in {file} have an image_id that none of its '
            f'{len(sizes)} images has, such as {boxes[0]["image_id"]}: correct the file'
        )
    unused = sum(not _has_area(box, sizes[box['image_id']]) for box in placed)
    for count, reason in (
        (len(boxes) - len(placed), 'an image_id that none of its images has'),
        (unused, 'no area in their image'),
    ):
        if count:
            print_log(
                f'{count} of {len(boxes)} boxes in {file} have {reason} and are not used',
                logger='current',
            )


def _is_box(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 4 and all(map(math.isfinite, value))


def _has_area(box: Mapping[str, Any], size: tuple[float, float]) -> bool:
    """Return whether mmdet uses a box, by the rule of its `CocoDataset`."""
    left, top, width, height = box['bbox']
    image_width, image_height = size
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
            f'{len(missing)} of {len(dataset)} images of {dataset.ann_file} do not exist: '
            f'{join_first(missing)}: restore them, or correct data_root and data_prefix'
        )
    if with_masks and without_mask:
        raise DataError(
            f'{without_mask} objects in {dataset.ann_file} have no segmentation, but the pipeline '
            'loads masks: add them, or use a config for boxes alone, such as RetinaNet'
        )
