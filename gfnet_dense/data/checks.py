"""What is wrong with a data set, said before the training that it would end.

Checks take built data sets and know only what those of mmengine, mmseg and mmdet share:
`get_data_info`, `metainfo` and the keys of their samples.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine import fileio
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from .errors import DataError

_SAMPLED = 64  # files that are opened; that others exist is checked for all
_NAMED = 3  # names in a message


def check_folders(dataset: Mapping[str, Any]) -> None:
    """Check that the folders of a data set exist and are not empty, by its config.

    Raises:
        DataError: If they do not or are.
    """
    for inner in (dataset.get('dataset'), *(dataset.get('datasets') or ())):
        if isinstance(inner, Mapping):
            check_folders(inner)
    if dataset.get('backend_args'):  # not on this machine
        return
    root = Path(dataset.get('data_root') or '')
    remedy = (
        'put the data there, or name its place as data_root of the dataset; the configs of '
        'gfnet_dense take it from the environment, see configs/_base_/datasets, and '
        'tools/make_digits.py writes the digits'
    )
    prefixes = dataset.get('data_prefix') or {}
    for prefix in prefixes.values() if isinstance(prefixes, Mapping) else [prefixes]:
        folder = root / (prefix or '')
        if not folder.is_dir():
            raise DataError(f'{dataset.get("type")}: there is no folder {folder}: {remedy}')
        if next(folder.iterdir(), None) is None:
            raise DataError(f'{dataset.get("type")}: the folder {folder} is empty: {remedy}')
    ann_file = dataset.get('ann_file')
    if isinstance(ann_file, str) and ann_file and not (root / ann_file).exists():
        raise DataError(f'{dataset.get("type")}: there is no {root / ann_file}: {remedy}')


def check_segmentation(dataset: Dataset) -> None:
    """Check the files of a data set of semantic segmentation.

    Every image needs its annotation. A sample of both is opened: images must be whole, labels
    within the class list. Other data sets pass.

    Raises:
        DataError: With the first files that are not so.
    """
    if not hasattr(dataset, 'get_data_info') or 'reduce_zero_label' not in dataset.get_data_info(0):
        return  # not of mmseg
    infos = (dataset.get_data_info(i) for i in range(len(dataset)))
    files = [(info['img_path'], info['seg_map_path'], info) for info in infos]
    options = dict(backend_args=getattr(dataset, 'backend_args', None))
    missing = [seg for _, seg, _ in files if not fileio.exists(seg, **options)]
    if missing:
        raise DataError(
            f'{len(missing)} of {len(files)} images have no annotation, first '
            f'{_first(missing)}: add them, or take the images out'
        )
    classes = dataset.metainfo.get('classes') or ()
    ignored = getattr(dataset, 'ignore_index', 255)
    for i in np.linspace(0, len(files) - 1, min(len(files), _SAMPLED)).astype(int):
        image, seg, info = files[i]
        _read(image, options)
        labels = _read(seg, options)
        if labels.squeeze().ndim != 2:
            raise DataError(
                f'{seg} is of shape {labels.shape}, not one label a pixel: convert it to labels'
            )
        labels = np.unique(labels).astype(int)
        shifted = ''
        if info.get('reduce_zero_label'):  # 0 and 255 are not labelled, as mmseg has it
            labels = np.where(np.isin(labels, (0, 255)), ignored, labels - 1)
            shifted = ' (after reduce_zero_label)'
        renamed = info.get('label_map') or {}
        labels = {int(renamed.get(label, label)) for label in labels} - {ignored}
        beyond = sorted(label for label in labels if not 0 <= label < len(classes))
        if classes and beyond:
            raise DataError(
                f'{seg} has labels {_first(beyond)}{shifted}, but there are {len(classes)} '
                f'classes, labels 0 to {len(classes) - 1} and {ignored} for not labelled: '
                'correct the file, or metainfo and reduce_zero_label of the dataset'
            )


def check_heads(model: nn.Module, dataset: Dataset) -> None:
    """Check that the heads of a segmentor or detector have as many classes as a data set.

    Heads are what is named so, `decode_head` or `roi_head.bbox_head.0`; those that tell other
    things apart, of proposals and of stuff, and panoptic data sets pass.

    Raises:
        DataError: With the first head that has not.
    """
    metainfo = getattr(dataset, 'metainfo', None) or {}
    classes = metainfo.get('classes')
    if not classes or 'thing_classes' in metainfo:
        return
    for name, module in model.named_modules():
        head = name.rstrip('.0123456789').rpartition('.')[2]
        if head.endswith('_head') and head not in ('rpn_head', 'semantic_head'):
            found = getattr(module, 'num_classes', None)
            if found not in (None, len(classes)):
                raise DataError(
                    f'{name} of the model has num_classes={found}, but there are {len(classes)} '
                    f'classes in {getattr(dataset, "data_root", None)}: set num_classes of every '
                    'head, or classes in the metainfo of the dataset'
                )


def _read(path: str, options: Mapping[str, Any]) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(fileio.get(path, **options))))
    except Exception as e:  # broken bytes end in errors of many kinds
        raise DataError(f'{path} cannot be read: {e}: restore it, or take it out') from e


def _first(values: list) -> str:
    names = ', '.join(map(str, values[:_NAMED]))
    return f'{names}, …' if len(values) > _NAMED else names
