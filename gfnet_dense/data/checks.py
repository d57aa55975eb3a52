"""Checks of folders, segmentation data sets and numbers of classes, before training starts.

Data sets are used through what mmengine, mmseg and mmdet share: `get_data_info`, `metainfo` and the
keys of their samples.
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

from .errors import DataError, join_first

_SAMPLED = 64  # how many files are opened; all are checked to exist


def check_folders(dataset: Mapping[str, Any]) -> None:
    """Check that the folders in the config of a data set exist and are not empty.

    Args:
        dataset: Config of a data set, also of a wrapper around others.

    Raises:
        DataError: If a folder or the annotation file does not exist, or a folder is empty.
    """
    for inner in (dataset.get('dataset'), *(dataset.get('datasets') or ())):
        if isinstance(inner, Mapping):
            check_folders(inner)
    if dataset.get('backend_args'):  # on another machine
        return
    root = Path(dataset.get('data_root') or '')
    remedy = (
        'put the data there, or set data_root of the dataset; configs that read it from an '
        'environment variable name the variable beside it'
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
        raise DataError(f'{dataset.get("type")}: there is no file {root / ann_file}: {remedy}')


def check_segmentation(dataset: Any) -> None:
    """Check the files of a data set of semantic segmentation.

    Every image needs an annotation. Up to 64 pairs, evenly spread, are opened: both files must be
    readable, and labels must belong to a class. Data sets of other kinds pass.

    Args:
        dataset: A data set like mmseg's `BaseSegDataset`.

    Raises:
        DataError: Names the first files at fault.
    """
    if not hasattr(dataset, 'get_data_info') or 'reduce_zero_label' not in dataset.get_data_info(0):
        return  # another kind
    infos = (dataset.get_data_info(i) for i in range(len(dataset)))
    files = [(info['img_path'], info['seg_map_path'], info) for info in infos]
    options = dict(backend_args=getattr(dataset, 'backend_args', None))
    missing = [seg for _, seg, _ in files if not fileio.exists(seg, **options)]
    if missing:
        raise DataError(
            f'{len(missing)} of {len(files)} images have no annotation, first '
            f'{join_first(missing)}: add the annotations, or remove the images'
        )
    classes = dataset.metainfo.get('classes') or ()
    ignored = getattr(dataset, 'ignore_index', 255)
    for i in np.linspace(0, len(files) - 1, min(len(files), _SAMPLED)).astype(int):
        image, seg, info = files[i]
        _read(image, options)
        labels = _read(seg, options)
        if labels.squeeze().ndim != 2:
            raise DataError(
                f'{seg} has shape {labels.shape}, not one label per pixel: convert it to labels'
            )
        labels = np.unique(labels).astype(int)
        shifted = ''
        if info.get('reduce_zero_label'):  # as mmseg does: 0 and 255 become `ignored`
            labels = np.where(np.isin(labels, (0, 255)), ignored, labels - 1)
            shifted = ' (after reduce_zero_label)'
        renamed = info.get('label_map') or {}
        trained = {int(renamed.get(label, label)) for label in labels} - {ignored}
        beyond = sorted(label for label in trained if not 0 <= label < len(classes))
        if classes and beyond:
            raise DataError(
                f'{seg} has labels {join_first(beyond)}{shifted}, but there are {len(classes)} '
                f'classes: labels 0 to {len(classes) - 1}, and {ignored} for unlabelled pixels; '
                'correct the file, or metainfo and reduce_zero_label of the dataset'
            )


def check_heads(model: nn.Module, dataset: Dataset[Any]) -> None:
    """Check that the heads of a segmentor or detector have as many classes as a data set.

    Heads are modules with names such as `decode_head` or `roi_head.bbox_head.0`. `rpn_head` and
    `semantic_head` count other things and pass, and so do panoptic data sets.

    Args:
        model: The model, perhaps wrapped for several processes.
        dataset: Its `metainfo` has the classes.

    Raises:
        DataError: Names the first head with another number of classes.
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


def _read(path: str, options: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(Image.open(io.BytesIO(fileio.get(path, **options))))
    except Exception as e:  # broken bytes raise errors of many kinds
        raise DataError(f'{path} cannot be read: {e}: restore or remove it') from e
