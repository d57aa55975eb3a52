"""Checks of configs and models against their data, before training starts.

Data sets are used through what mmengine, mmseg and mmdet share: `get_data_info`, `metainfo` and the
keys of their samples.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import get_world_size
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import BatchSampler, DataLoader

from .contents import keep_random_state
from .errors import DataError, Fault, Findings
from .files import LIBRARIES, is_empty

_PROBED = 4  # samples that are brought through the pipeline into one batch
_LOOKED_AT = 2000  # samples among which images of different sizes are looked for


def check_folders(dataset: Mapping[str, Any]) -> None:
    """Check that the folders in the config of a data set exist and are not empty.

    Args:
        dataset: Config of a data set, also of a wrapper around others.

    Raises:
        DataError: If a folder or the annotation file does not exist, a folder is empty, or the
            classes are a text.
    """
    for inner in (dataset.get('dataset'), *(dataset.get('datasets') or ())):
        if isinstance(inner, Mapping):
            check_folders(inner)
    classes = (dataset.get('metainfo') or {}).get('classes')
    if isinstance(classes, str) and not os.path.exists(classes):  # mmengine reads a file of names
        raise DataError(
            f'{dataset.get("type")}: classes are the text {classes!r}: write a tuple of names, '
            f'with a comma even for one, ({classes!r},)'
        )
    ann_file = dataset.get('ann_file')
    if dataset.get('backend_args') or '://' in f'{dataset.get("data_root")} {ann_file}':
        return  # on another machine
    root = Path(dataset.get('data_root') or '')
    remedy = (
        'put the data there, or set data_root of the dataset; configs that read it from an '
        'environment variable name the variable beside it'
    )
    prefixes = dataset.get('data_prefix') or {}
    prefixes = dict(prefixes) if isinstance(prefixes, Mapping) else {'': prefixes}
    if 'Annotation' not in str(dataset.get('pipeline')):
        prefixes.pop('seg_map_path', None)  # `LoadAnnotations` would load them
    for prefix in prefixes.values():
        folder = root / (prefix or '')
        try:
            empty = is_empty(folder)
        except OSError:
            raise DataError(
                f'{dataset.get("type")}: there is no folder {folder}: {remedy}'
            ) from None
        if empty:
            raise DataError(f'{dataset.get("type")}: the folder {folder} is empty: {remedy}')
    if isinstance(ann_file, str) and ann_file and not os.path.exists(root / ann_file):
        raise DataError(f'{dataset.get("type")}: there is no file {root / ann_file}: {remedy}')


def metainfo_of(dataset: Any) -> Mapping[str, Any]:
    """Return the metainfo of a data set; of mmdet's `ConcatDataset`, that of its first one."""
    metainfo = getattr(dataset, 'metainfo', None) or {}
    return metainfo[0] if isinstance(metainfo, list) else metainfo


def find_heads(model: nn.Module, dataset: Any) -> Findings:
    """Find heads with another number of classes than a data set, and heads that cannot learn.

    Heads are modules with names such as `decode_head` or `roi_head.bbox_head.0`. `rpn_head` and
    `semantic_head` count other things and pass, and so do panoptic data sets.

    Args:
        model: The model, perhaps wrapped for several processes.
        dataset: Its `metainfo` has the classes.
    """
    metainfo = metainfo_of(dataset)
    classes = metainfo.get('classes')
    for name, module in model.named_modules():
        head = name.rstrip('.0123456789').rpartition('.')[2]
        if not head.endswith('_head') or head in ('rpn_head', 'semantic_head'):
            continue
        found = getattr(module, 'num_classes', None)
        if classes and 'thing_classes' not in metainfo and found not in (None, len(classes)):
            yield Fault(
                f'{name} of the model has num_classes={found}, but there are {len(classes)} '
                f'classes in {getattr(dataset, "data_root", None)}: set num_classes of every '
                'head, or classes in the metainfo of the dataset'
            )
        loss = getattr(module, 'loss_decode', None)
        losses = loss if isinstance(loss, nn.ModuleList) else [loss]
        outputs = getattr(module, 'out_channels', None)
        for some in losses:
            weights = getattr(some, 'class_weight', None)
            # Heads without this layer classify masks, and may have a weight for "no object".
            if not isinstance(weights, list | tuple) or not hasattr(module, 'conv_seg'):
                continue
            if outputs not in (None, 1, len(weights)):
                yield Fault(
                    f'class_weight of {type(some).__name__} in {name} has {len(weights)} numbers, '
                    f'but there are {outputs} classes: write one for each class'
                )
        softmax = any(getattr(some, 'use_sigmoid', None) is False for some in losses)
        if outputs == 1 and softmax:
            yield Fault(
                f'{name} of the model has one output and softmax, which is always right: its loss '
                'is 0. Add a class for the background, or set num_classes=2, out_channels=1 and '
                'use_sigmoid=True of its loss'
            )


def ignored_labels(model: nn.Module | None, metrics: Any = ()) -> tuple[int, ...]:
    """Return the labels that all heads of a segmentor and all metrics ignore, 255 by default."""
    modules = [] if model is None else [m for m in model.modules() if hasattr(m, 'loss_decode')]
    found = [
        {some.ignore_index}
        for some in (*modules, *metrics)
        if isinstance(getattr(some, 'ignore_index', None), int)
    ]
    return tuple(sorted(set.intersection(*found))) if found else (255,)


def find_batches(loader: DataLoader[Any], model: nn.Module | None, use: str) -> Findings:
    """Find images that cannot form a batch, and a last batch that norms cannot take.

    Args:
        loader: The dataloader; its samples are whole.
        model: Its `data_preprocessor` makes the batch; None does without.
        use: `'train'`, `'val'` or `'test'`.
    """
    batch: int = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None) or 1
    if use == 'train' and model is not None:
        yield from _find_last_batch(loader, model, batch)
    if model is not None and (found := list(_find_channels(loader, model))):
        yield from found
        return  # a batch would only fail because of them
    # A sampler of batches may put images of one size together.
    plain = type(getattr(loader.batch_sampler, '_batches', loader.batch_sampler)) is BatchSampler
    if not plain or batch < 2 or not hasattr(loader.dataset, '__len__') or len(loader.dataset) < 2:
        return
    chosen = _different_samples(loader, batch)
    with keep_random_state():
        try:
            samples = [loader.dataset[i] for i in chosen]
            data = loader.collate_fn(samples)
            preprocessor = getattr(model, 'data_preprocessor', None)
            inputs = samples[0].get('inputs') if isinstance(samples[0], Mapping) else None
            # Samples of test-time augmentation hold a list of images.
            # Augmentation of batches may wait for other processes, which are not here.
            waits = get_world_size() > 1 or getattr(preprocessor, 'batch_augments', None)
            skipped = use == 'train' and waits
            if preprocessor is not None and not skipped and isinstance(inputs, Tensor):
                preprocessor(data, use == 'train')
        except DataError as e:
            yield Fault(str(e))
        except Exception as e:  # of any library
            names = ', '.join(_describe(loader.dataset, i) for i in chosen[:2])
            text = f'images such as {names} cannot form a batch: {_first_line(e)}'
            stacking = isinstance(e, RuntimeError | ValueError | AssertionError)
            if stacking and any(word in str(e) for word in ('size', 'shape')):
                text += (
                    ': bring them to one size in the pipeline (Resize, RandomCrop, Pad), or set '
                    f'batch_size=1 of the {use}_dataloader'
                )
            yield Fault(text)


def _find_channels(loader: DataLoader[Any], model: nn.Module) -> Findings:
    """Find images with other channels than the model takes."""
    with keep_random_state():
        try:
            inputs = loader.dataset[0]['inputs']
        except Exception:  # a sample of another kind, or one that cannot be loaded
            return
    if not isinstance(inputs, Tensor) or inputs.ndim != 3:
        return
    preprocessor = getattr(model, 'data_preprocessor', None)
    if type(preprocessor).__module__.partition('.')[0] not in LIBRARIES:
        return  # the user's may normalise some channels alone
    count, mean = len(inputs), getattr(preprocessor, 'mean', None)
    numbers = mean.numel() if isinstance(mean, Tensor) else 1
    remedy = (
        'set mean and std of the data_preprocessor and in_channels of the backbone, or load other '
        'channels'
    )
    if 1 not in (count, numbers) and count != numbers:
        yield Fault(
            f'{_describe(loader.dataset, 0)} is loaded with {count} channels, but the '
            f'data_preprocessor has {numbers} numbers as mean: {remedy}'
        )
        return
    count = max(count, numbers)  # one channel becomes as many as there are numbers
    taken = getattr(getattr(model, 'backbone', None), 'in_chans', None)  # as networks of timm have
    if taken and count % taken:  # several images may be stacked, as for the detection of changes
        yield Fault(
            f'{_describe(loader.dataset, 0)} is loaded with {count} channels, but the backbone '
            f'takes {taken}: {remedy}'
        )


def _first_line(error: Exception) -> str:
    return f'{type(error).__name__}: {(str(error) or "no text").splitlines()[0]}'


def _different_samples(loader: DataLoader[Any], batch: int) -> list[int]:
    """Return indices of samples that may meet in a batch, of different sizes if there are any."""
    count = len(loader.dataset)  # type: ignore[arg-type]
    shuffled = getattr(_sampler(loader), 'shuffle', True)
    step = 1 if shuffled else get_world_size()
    sizes: dict[tuple[int, int] | None, int] = {}
    for start in range(0, min(count, _LOOKED_AT), batch * step):
        indices = range(start, min(start + batch * step, count), step)
        if not shuffled:
            sizes = {}
        for i in indices:
            sizes.setdefault(_size(loader.dataset, i), i)
        if len(sizes) > 1:
            break
    chosen = [*sizes.values()]
    filled = [*chosen, *(i for i in indices if i not in chosen), *range(min(count, batch))]
    return list(dict.fromkeys(filled if shuffled else filled[: len(chosen) + len(indices)]))[
        : min(_PROBED, batch)
    ]


def _size(dataset: Any, i: int) -> tuple[int, int] | None:
    try:
        info = dataset.get_data_info(i)
        if 'width' in info:
            return info['width'], info['height']
        with Image.open(info['img_path']) as file:
            size: tuple[int, int] = file.size
            return size
    except Exception:  # Pillow cannot read it
        return None


def _describe(dataset: Any, i: int) -> str:
    size = _size(dataset, i)
    try:
        name = dataset.get_data_info(i)['img_path']
    except (AttributeError, KeyError):
        name = f'sample {i}'
    return f'{name} ({size[0]}x{size[1]})' if size else str(name)


def _sampler(loader: DataLoader[Any]) -> Any:
    # A loader that is given batches has a sampler of its own, which it does not use.
    return getattr(loader.batch_sampler, 'sampler', loader.sampler)


def _find_last_batch(loader: DataLoader[Any], model: nn.Module, batch: int) -> Findings:
    name = _norm_on_a_pixel(model)
    if name is None or (get_world_size() > 1 and _is_synchronised(model)):
        return
    sampler = _sampler(loader)
    endless = 'Infinite' in type(sampler).__name__
    last = batch if endless else len(sampler) % batch or batch
    dropped = getattr(loader.batch_sampler, 'drop_last', loader.drop_last) and last < batch
    if last == 1 and not dropped:
        which = 'each batch has' if batch == 1 else f'the last of {len(loader)} batches has'
        remedy = 'set batch_size=2 or more' if batch == 1 else 'set drop_last=True'
        yield Fault(
            f'{which} one image, and {name} of the model normalises maps of 1x1 pixels, which '
            f'takes two: {remedy} of the train_dataloader, or another batch_size than {batch}'
        )


def _norm_on_a_pixel(model: nn.Module) -> str | None:
    """Return the name of a batch norm after pooling to one pixel, as in PSP, UPer and ASPP."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            pooled = False
            for child in module:
                if isinstance(child, nn.AdaptiveAvgPool2d):
                    pooled = child.output_size in (1, (1, 1))
                elif pooled and any(isinstance(m, _BatchNorm) for m in child.modules()):
                    return name
    return None


def _is_synchronised(model: nn.Module) -> bool:
    return any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
