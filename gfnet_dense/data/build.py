"""Data sets built from their configs, with errors that name file and remedy."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS

from .coco import check_coco_file
from .errors import DataError, not_permitted


def build_dataset(dataset: Any) -> Any:
    """Return a data set with its list of samples, which is not empty.

    Args:
        dataset: A data set or its config.

    Raises:
        DataError: If an annotation file is at fault, or no images are left.
    """
    cfg, contents = dataset, ''
    if not isinstance(dataset, Mapping):
        cfg = dict(type=type(dataset).__name__, data_root=getattr(dataset, 'data_root', None))
    while isinstance(cfg.get('dataset'), Mapping):
        cfg = cfg['dataset']
    try:
        if isinstance(dataset, Mapping):
            dataset = DATASETS.build(dict(dataset))
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
        if len(dataset) > 0:
            return dataset
    except DataError:
        raise
    except PermissionError as e:
        raise DataError(not_permitted(e.filename)) from e
    except IsADirectoryError as e:
        raise DataError(f'{e.filename} is a folder, not a file: correct ann_file') from e
    except (KeyError, ValueError, TypeError, AttributeError, AssertionError) as e:
        inner = [*_inner(cfg)]
        for each in inner:
            _check_prefix(each)
            _check_encoding(each)
            contents = check_coco_file(each)
        if len(inner) > 1:
            contents = ''  # it would speak of the last one alone
        if 'need at least one array' not in str(e):  # numpy says this of an empty list of samples
            raise
    raise DataError(
        f'no images are left for {cfg["type"]} in {cfg.get("data_root")}{contents}: see its '
        'data_prefix, img_suffix, ann_file and filter_cfg'
    )


def _inner(cfg: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the configs of data sets inside those of wrappers."""
    wrapped = cfg.get('datasets') or ([cfg['dataset']] if 'dataset' in cfg else [])
    if not wrapped:
        yield cfg
    for each in wrapped:
        if isinstance(each, Mapping):
            yield from _inner(each)


def _check_prefix(cfg: Mapping[str, Any]) -> None:
    """Name the key of the images in `data_prefix`, which mmseg and mmdet call differently.

    Raises:
        DataError: If a data set of the one has the key of the other.
    """
    prefix, kind = cfg.get('data_prefix') or {}, cfg.get('type')
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(None) as registry:  # that of the config
            kind = registry.get(kind)
    bases = [base.__name__ for base in getattr(kind, '__mro__', ())]
    for base, key, other in (
        ('BaseSegDataset', 'img_path', 'img'),
        ('BaseDetDataset', 'img', 'img_path'),
    ):
        if base in bases and key not in prefix and other in prefix:
            raise DataError(f'data_prefix of {bases[0]} has the key {other!r}: name it {key!r}')


def _check_encoding(cfg: Mapping[str, Any]) -> None:
    """Name a list of files that is not UTF-8.

    Raises:
        DataError: If it is not.
    """
    path = os.path.join(cfg.get('data_root') or '', cfg.get('ann_file') or '')
    if path.endswith('.txt') and os.path.isfile(path):
        try:
            Path(path).read_text(encoding='utf-8')
        except UnicodeDecodeError as e:
            raise DataError(f'{path} is not UTF-8 text: {e}: save it in that encoding') from e


@contextmanager
def explained_evaluator(evaluator: Any) -> Iterator[None]:
    """Name the annotation file of a metric that cannot be built because of it.

    Args:
        evaluator: Config of an evaluator.

    Raises:
        DataError: If the block fails and an annotation file is at fault.
    """
    try:
        yield
    except Exception:
        for metric in evaluator if isinstance(evaluator, list | tuple) else [evaluator]:
            if isinstance(metric, Mapping) and metric.get('ann_file'):
                check_coco_file(dict(metric, data_root=''))
        raise
