"""Checks of metrics against the data that they evaluate, before training starts."""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from torch import nn

from .checks import metainfo_of
from .coco import check_file
from .contents import parts
from .errors import Fault, Findings, Note, join_first
from .files import has_own_steps, loads_annotations, without_objects

# The names of the numbers of mmseg's IoUMetric, by the entries of its iou_metrics.
_IOU = {
    'mIoU': ('mIoU', 'mAcc'),
    'mDice': ('mDice', 'mAcc'),
    'mFscore': ('mFscore', 'mPrecision', 'mRecall'),
}
_LOOKED_AT = 20_000  # training images
_COCO = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')


def find_evaluation(
    metrics: Sequence[Any],
    dataset: Any,
    use: str,
    model: nn.Module | None = None,
    wanted: Iterable[str] = (),
    ann_files: Sequence[str | None] = (),
) -> Findings:
    """Find metrics that fail after the last image, or give numbers against another truth.

    Args:
        metrics: The metrics of an evaluator, such as mmseg's `IoUMetric`.
        dataset: The data set that they evaluate.
        use: `'val'` or `'test'`.
        model: The model.
        wanted: Names of numbers that hooks ask for, such as `save_best`.
        ann_files: The annotation files of the metrics in the config, for messages.
    """
    infos = [part.get_data_info(0) for part in parts(dataset) if hasattr(part, 'get_data_info')]
    names: set[str] | None = set()
    for i, metric in enumerate(metrics):
        if type(metric).__name__ == 'IoUMetric':  # its subclasses may differ in all of it
            yield from _find_iou(metric, dataset, use, infos)
        elif _is_a(metric, 'CocoMetric'):
            name = ann_files[i] if i < len(ann_files) else None
            yield from _find_coco(metric, dataset, use, model, name)
        elif type(metric).__name__ == 'LabelMaps':
            yield from _find_label_maps(metric, dataset)
        found = number_names(metric)
        names = None if found is None or names is None else names | found
    if not names:
        return
    for name in wanted:
        if name not in names:
            yield Fault(
                f'a hook (save_best, monitor) or scheduler asks for {name!r}, but the '
                f'{use}_evaluator gives {join_first(sorted(names), 10)}: set one of them, or add '
                'the metric'
            )


def find_training_images(dataset: Any, training: Any) -> Findings:
    """Find training images, of many those evenly spread, that are evaluated, too."""
    evaluated = {info.get('img_path') for info in _infos(dataset)} - {None}
    paths = [info.get('img_path') for info in _infos(training, _LOOKED_AT)]
    if shared := [path for path in paths if path in evaluated]:
        yield Note(
            f'{len(shared)} of {len(paths)} training images are evaluated, too, so that metrics '
            f'say little about other images: {join_first(shared)}'
        )


def number_names(metric: Any) -> set[str] | None:
    """Return the names of the numbers that a metric gives; None if they are not known here."""
    kind = type(metric).__name__
    if kind == 'LabelMaps' or getattr(metric, 'format_only', False):
        return set()
    if kind == 'IoUMetric':
        found = {'aAcc'}.union(*(_IOU.get(name, ()) for name in _listed(metric.metrics)))
    elif kind == 'Accuracy' and hasattr(metric, 'topk'):
        found = {f'top{k}' for k in metric.topk}
    elif kind == 'CocoMetric' and {*metric.metrics} <= {'bbox', 'segm'} and not metric.classwise:
        found = {f'{m}_{n}' for m in metric.metrics for n in metric.metric_items or _COCO}
    else:
        return None
    return {f'{metric.prefix}/{name}' for name in found} if metric.prefix else found


def _listed(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else [*names]


def _is_a(metric: Any, name: str) -> bool:
    return any(base.__name__ == name for base in type(metric).__mro__)


def _find_iou(metric: Any, dataset: Any, use: str, infos: Sequence[Any]) -> Findings:
    evaluator = f'IoUMetric of the {use}_evaluator'
    if unknown := [name for name in _listed(metric.metrics) if name not in _IOU]:
        yield Fault(f'{evaluator} has no {join_first(unknown)}: iou_metrics are {join_first(_IOU)}')
    if not metainfo_of(dataset).get('classes'):
        yield Fault(
            f'{evaluator} needs the classes of {getattr(dataset, "data_root", None)}: set classes '
            f'in the metainfo of the {use}_dataloader'
        )
    if metric.format_only and metric.output_dir is None:
        yield Fault(f'{evaluator} has format_only=True: set output_dir, where to write predictions')
    if not metric.format_only and any(info.get('seg_map_path') is None for info in infos):
        yield Fault(
            f'{evaluator} needs annotations, and the data_prefix of the {use}_dataloader has no '
            'seg_map_path: set it, or format_only=True and output_dir to write predictions alone'
        )
    elif not metric.format_only and not all(map(_may_annotate, parts(dataset))):
        yield Fault(
            f'{evaluator} needs annotations, and the pipeline of the {use}_dataloader does not '
            'load them: add LoadAnnotations, or set format_only=True and output_dir'
        )


def _may_annotate(part: Any) -> bool:
    known = hasattr(getattr(part, 'pipeline', None), 'transforms')
    return not known or loads_annotations(part) or has_own_steps(part)


def _find_label_maps(metric: Any, dataset: Any) -> Findings:
    images: dict[Any, str] = {}
    for info in _infos(dataset):
        other = images.setdefault(metric.path(info['img_path']), info['img_path'])
        if other != info['img_path']:
            yield Fault(
                f'{other} and {info["img_path"]} would both be written to '
                f'{metric.path(other)}: evaluate one of them at a time, or write a .pkl file'
            )
            return


def _infos(dataset: Any, most: int | None = None) -> list[Any]:
    infos = []
    for part in parts(dataset):
        if hasattr(part, 'get_data_info'):
            count = min(len(part), most or len(part))
            for i in np.unique(np.linspace(0, len(part) - 1, count).astype(int)).tolist():
                infos.append(without_objects(part.get_data_info(i)))
    return infos


def _find_coco(
    metric: Any, dataset: Any, use: str, model: nn.Module | None, name: str | None
) -> Findings:
    segm = 'segm' in metric.metrics
    if segm and model is not None and not any('mask' in key for key, _ in model.named_modules()):
        yield Fault(
            f'metric segm of the {use}_evaluator needs masks, and {type(model).__name__} predicts '
            "none: set metric='bbox'"
        )
    if metric._coco_api is None or metric.format_only:
        return
    file = name or f'the ann_file of the {use}_evaluator'
    found = list(check_file(metric._coco_api.dataset, file, segm, 'evaluator'))
    yield from (finding for finding in found if isinstance(finding, Fault))
    if metric._coco_api.dataset.get('annotations') == []:
        yield Note(
            f'{file} has no objects, of which COCO evaluation gives -1 as every figure: set '
            f'ann_file of {use}_dataloader and {use}_evaluator to another one, or format_only=True '
            'of the metric'
        )
    infos = _infos(dataset)
    images = metric._coco_api.imgs
    remedy = f'set ann_file of {use}_evaluator to that of {use}_dataloader'
    if absent := [info['img_id'] for info in infos if info.get('img_id') not in images]:
        yield Fault(
            f'{len(absent)} of {len(infos)} images of the {use}_dataloader are not in {file}, '
            f'first the ids {join_first(absent)}: {remedy}'
        )
        return
    for info in infos:
        other = images[info['img_id']].get('file_name')
        if other and os.path.basename(other) != os.path.basename(info['img_path']):
            yield Fault(
                f'{info["img_path"]} of the {use}_dataloader is {other} in {file}, under the same '
                f'id {info["img_id"]}: {remedy}'
            )
            return
    if len(infos) < len(images):
        yield Note(
            f'{use} evaluates {len(infos)} of the {len(images)} images of {file}: the others count '
            'as missed'
        )


def wanted_numbers(hooks: Iterable[Any], schedulers: Any = ()) -> list[str]:
    """Return the names of the numbers that hooks and schedulers of a runner ask for by name."""
    names = []
    if isinstance(schedulers, Mapping):  # of several optimizers
        schedulers = itertools.chain(*schedulers.values())
    for scheduler in schedulers or ():
        if getattr(scheduler, 'need_val_args', False) and scheduler.by_epoch:
            names.append(scheduler.monitor)
    for hook in hooks:
        asked: list[Any] = []
        if isinstance(hook, CheckpointHook):
            asked = [*(getattr(hook, 'key_indicators', None) or ())]
        elif isinstance(hook, EarlyStoppingHook):
            asked = [hook.monitor]
        names += [name for name in asked if isinstance(name, str) and name != 'auto']
    return names
