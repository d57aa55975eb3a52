"""Data sets built from their configs, with errors that name file and remedy."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mmengine.registry import DATASETS

from .checks import check_folders
from .coco import check_coco_file
from .errors import DataError


def build_dataset(dataset: Any) -> Any:
    """Return a data set with its list of samples, which is not empty.

    Args:
        dataset: A data set or its config.

    Raises:
        DataError: If folders are missing, the annotation file is at fault, or no images are left.
    """
    cfg, contents = dataset, ''
    if isinstance(dataset, Mapping):
        check_folders(dataset)
    else:
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
    except (KeyError, ValueError, TypeError, AttributeError, AssertionError) as e:
        contents = check_coco_file(cfg)
        if 'need at least one array' not in str(e):  # numpy says this of an empty list of samples
            raise
    raise DataError(
        f'no images are left for {cfg["type"]} in {cfg.get("data_root")}{contents}: see its '
        'data_prefix, img_suffix, ann_file and filter_cfg'
    )


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
