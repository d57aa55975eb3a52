"""A model of a config with the weights of a checkpoint, ready to predict."""

import colorsys
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS
from timm.data import ImageNetInfo
from torch import nn

from gfnet_dense.data.errors import join_first
from gfnet_dense.durable.checkpoints import local_file
from gfnet_dense.models.checkpoint import find_state_dict, find_weights
from gfnet_dense.models.gfnet import official_network
from gfnet_dense.models.hub import OFFICIAL_WEIGHTS
from gfnet_dense.openmmlab import find_config
from gfnet_dense.serialization import CheckpointError, check_finite, load_file

TASKS = ('segmentation', 'detection', 'instance segmentation', 'classification')

# Where a model keeps the number of its classes.
_HEADS = ('decode_head', 'roi_head.bbox_head', 'bbox_head', 'panoptic_head', 'head', 'backbone')


def load_model(
    config: str | Path | Config, checkpoint: str | Path, device: str | torch.device = 'cpu'
) -> tuple[nn.Module, Config]:
    """Build the model of a config and load all of its weights. Nothing in the file is executed.

    Args:
        config: A config, its path, or the name of one of this project's.
        checkpoint: A checkpoint of this model; for a classifier also an official file or its name,
            such as `'gfnet-h-s'`, which is downloaded on first use, as a URL is.
        device: Device of the model.

    Returns:
        The model in evaluation mode and a copy of its config. The model has
        `dataset_meta = dict(classes=..., palette=...)`: the names of its classes, which are those
        of the data that the checkpoint was trained on, else those of the config's data, else
        numbers; and a colour of three numbers from 0 to 255 for each of them.

    Raises:
        FileNotFoundError: If there is no such config or checkpoint.
        CheckpointError: If the file is not safe to read or its weights are not those of the model.
        ValueError: If the config has no model of a known task.
    """
    if isinstance(config, Config):
        cfg = copy.deepcopy(config)
    else:
        cfg = Config.fromfile(find_config(config))
    task = find_task(cfg)
    if task == 'classification' and str(checkpoint) in OFFICIAL_WEIGHTS:
        checkpoint = find_weights(checkpoint, official_network)
    checkpoint = local_file(checkpoint)
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f'no checkpoint at {checkpoint}')
    content = load_file(checkpoint, mmap=True)
    state = find_state_dict(content, checkpoint)
    check_finite(state, checkpoint)

    options = copy.deepcopy(cfg.model)
    options.pop('pretrained', None)
    if 'backbone' in options:  # all weights come from the checkpoint
        options.backbone.pop('init_cfg', None)
    with MODELS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        model: Any = revert_sync_batchnorm(registry.build(options))
    _load_weights(model, state, checkpoint)
    meta = content.get('meta') or {} if isinstance(content, Mapping) else {}
    model.dataset_meta = _dataset_meta(cfg, meta.get('dataset_meta') or {}, _num_classes(model))
    return model.to(device).eval(), cfg


def find_task(cfg: Config) -> str:
    """Return what the model of a config predicts, one of :data:`TASKS`.

    Raises:
        ValueError: If it is none of these.
    """
    model = cfg.get('model') or {}
    keys = set(_keys(model))
    if 'decode_head' in model:
        return 'segmentation'
    if keys & {'mask_head', 'panoptic_head'}:
        return 'instance segmentation'
    if keys & {'bbox_head', 'rpn_head', 'roi_head'}:
        return 'detection'
    if 'head' in model or (model.get('backbone') or {}).get('num_classes'):
        return 'classification'
    raise ValueError(
        f'{cfg.filename or "the config"} has no model of {", ".join(TASKS[:-1])} or {TASKS[-1]}: '
        f'its model is {model.get("type", "missing")} with {join_first(model)}'
    )


def find_test_data(cfg: Config) -> Any:
    """Return the data set of a config's tests, with its class names but without its samples.

    It reads no data. Wrappers, such as one that repeats the data, are taken off.

    Returns:
        The data set, or None if the config has none.
    """
    dataset = unwrapped_dataset(cfg)
    if dataset is None:
        return None
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        return registry.build(dict(copy.deepcopy(dataset), lazy_init=True))


def unwrapped_dataset(cfg: Config) -> Any:
    """Return the config of the data set of a config's tests, without wrappers; None without one."""
    loader = cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}
    dataset = loader.get('dataset')
    while dataset is not None and ('dataset' in dataset or 'datasets' in dataset):
        dataset = dataset.get('dataset') or dataset['datasets'][0]
    return dataset


def type_name(step: Mapping[str, Any]) -> str:
    """Return the name of a step of a pipeline, whose type is a class or its name in a registry."""
    return getattr(step['type'], '__name__', str(step['type'])).rpartition('.')[2]


def _keys(config: Any) -> Iterator[str]:
    """Yield the keys of nested dicts and lists."""
    if isinstance(config, Mapping):
        yield from config
        config = config.values()
    elif not isinstance(config, list | tuple):
        return
    for value in config:
        yield from _keys(value)


def _load_weights(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    faults = []
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as e:  # shapes
        faults = [line.strip().rstrip('.') for line in str(e).splitlines()[1:]]
    else:
        if result.missing_keys:
            faults.append(f'it lacks {join_first(result.missing_keys)}')
        if result.unexpected_keys:
            faults.append(f'it holds {join_first(result.unexpected_keys)}')
    if faults:
        raise CheckpointError(
            f'{path} does not fit {type(model).__name__} of the config: {join_first(faults, 2)}. '
            'Use the config that it was trained with'
        )


def _num_classes(model: nn.Module) -> int | None:
    for name in _HEADS:
        head: Any = model
        for part in name.split('.'):
            head = getattr(head, part, None)
        if isinstance(head, nn.ModuleList):  # a cascade
            head = head[-1]
        if found := getattr(head, 'num_classes', None):
            return int(found)
    return None


def _dataset_meta(cfg: Config, meta: Mapping[str, Any], count: int | None) -> dict[str, Any]:
    if not meta.get('classes') and (data := find_test_data(cfg)) is not None:
        meta = data.metainfo
    classes = meta.get('classes') or ()
    if isinstance(classes, str):  # its letters are no names
        classes = ()
    if not classes and count == 1000 and find_task(cfg) == 'classification':
        classes = ImageNetInfo().label_descriptions()  # official weights are all of ImageNet
    count = count or len(classes)
    if len(classes) != count:
        classes = [f'class {i}' for i in range(count)]
    palette = meta.get('palette')
    if not isinstance(palette, Sequence) or isinstance(palette, str) or len(palette) != count:
        palette = [_colour(i) for i in range(count)]
    return dict(
        classes=tuple(str(name).strip() for name in classes),  # mmseg has 'bed '
        palette=[tuple(int(value) for value in colour) for colour in palette],
    )


def _colour(index: int) -> tuple[int, ...]:
    """Return a colour that differs from those of the indices before it."""
    # Hues apart by the golden ratio; three levels of brightness tell the closest hues apart.
    rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.85, (0.95, 0.7, 0.5)[index // 8 % 3])
    return tuple(round(255 * value) for value in rgb)
