"""Multiply-accumulates (MACs) and parameters of a model, part by part."""

import copy
import dataclasses
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gfnet_dense.models.gfnet import GFNetBase, PatchEmbed
from gfnet_dense.models.global_filter import GlobalFilter
from gfnet_dense.models.mlp import Mlp

from .launch import find_config

# Proposals for the box heads and boxes for the mask heads, per image. mmdetection 2 counted with
# these numbers and this image size, and so do published numbers of two-stage detectors.
PROPOSALS, MASKS = 1000, 100
DETECTION_SHAPE = 800, 1280

CONVENTION = f"""\
One MAC is one multiplication with its addition, in convolutions and matrix products. For a global
filter of N = H W cells the authors count, per channel, 2 N ceil(log2(N)) MACs for the transforms
and 4 H (W // 2 + 1) for the product of spectra; the backend does not matter. RoI heads are counted
at {PROPOSALS} proposals and {MASKS} masks. Not counted: norms, activations, LayerScale, pooling,
resizing, RoIAlign, NMS, and parts that act in training only."""

KINDS = ('patch embedding', 'filters', 'MLPs')
_KINDS = {PatchEmbed: KINDS[0], GlobalFilter: KINDS[1], Mlp: KINDS[2]}


@dataclasses.dataclass(frozen=True)
class Complexity:
    """MACs and parameters of a model; `str()` makes a table of them.

    Attributes:
        name: Name of the model.
        shape: Height and width of the image in pixels.
        macs: MACs by part of the model and kind, a name of :data:`KINDS` or `'other'`.
        parameters: Parameters by part of the model.
    """

    name: str
    shape: tuple[int, int]
    macs: Counter[tuple[str, str]]
    parameters: Counter[str]

    def __str__(self) -> str:
        kinds = [kind for kind in KINDS if any(kind == k for _, k in self.macs)]
        unit, scale = ('GMACs', 1e9) if self.macs.total() >= 1e9 else ('MMACs', 1e6)
        rows = [[unit, *kinds, 'total', 'parameters']]
        parts = dict.fromkeys([*self.parameters, *(part for part, _ in self.macs)])
        for part in (*parts, 'total'):
            within: Counter[str] = Counter()
            for (p, kind), n in self.macs.items():
                within[kind] += n if part in (p, 'total') else 0
            figures = [*(within[kind] for kind in kinds), within.total()]
            parameters = self.parameters.total() if part == 'total' else self.parameters[part]
            counts = [f'{n / scale:.3f}' if n else '' for n in figures]
            rows.append([part, *counts, f'{parameters:,}'])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            '  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        heading = '{}, an image of {} x {} pixels (H x W)'.format(self.name, *self.shape)
        return '\n'.join([heading, '', *lines, '', CONVENTION])


def measure_complexity(name: str | Path, shape: tuple[int, int] | None = None) -> Complexity:
    """Count MACs and parameters of a model.

    Args:
        name: A config as :func:`find_config` takes it, of a classifier, segmentor or detector; or
            the name of a timm model.
        shape: Height and width of the image in pixels. By default the size that the parameters
            are made for; for detectors :data:`DETECTION_SHAPE`.

    Raises:
        FileNotFoundError: If there is neither such a config nor such a model.
        ValueError: If `shape` is not positive.
    """
    with torch.device('meta'):  # takes neither memory nor time
        if Path(name).suffix != '.py' and timm.is_model(str(name)):
            model = timm.create_model(str(name))
            pretrained: Any = model.pretrained_cfg
            default = tuple(pretrained['input_size'][1:])
        else:
            try:
                cfg = Config.fromfile(find_config(name))
            except FileNotFoundError as e:
                known = ', '.join(timm.list_models('gfnet*'))
                raise FileNotFoundError(f'{e}; and of timm models {known}') from None
            with MODELS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
                model = registry.build(cfg.model)
            size = cfg.model.get('backbone', {}).get('img_size', 224)
            default = (size, size) if isinstance(size, int) else tuple(size)
            if cfg.get('default_scope') == 'mmdet':
                default = DETECTION_SHAPE
    return count_macs(model, shape or default, Path(name).stem)


def count_macs(model: nn.Module, shape: tuple[int, int], name: str = 'model') -> Complexity:
    """Count MACs and parameters of a model that is built already, as :func:`measure_complexity`.

    A layer whose cost its operators do not show, such as a global filter, has a method
    `macs(shape)` that counts them for an input of that shape.

    Args:
        model: A classifier, segmentor or detector, or any module that takes a batch of images.
            It is not changed.
        shape: Height and width of the image in pixels.
        name: What to call the model.
    """
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f'shape must be a positive (H, W), but got {tuple(shape)}')
    model = copy.deepcopy(model).to('meta').eval()
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    by_module = _count_by_module(model, torch.empty(1, channels, *shape, device='meta'))
    names = _Names(model)
    macs: Counter[tuple[str, str]] = Counter()
    parameters: Counter[str] = Counter()
    for parameter, value in model.named_parameters():
        parameters[names.part(parameter)] += value.numel()
    for module, n in by_module.items():
        macs[names.part(module), names.kind(module)] += n
    return Complexity(name, shape, +macs, parameters)


def _count_by_module(model: nn.Module, images: Tensor) -> Counter[str]:
    """Count the MACs of each module without those of the modules in it."""
    macs: Counter[str] = Counter()

    def stand_in(name: str, module: Any, x: Tensor) -> Tensor:
        macs[name] += module.macs(x.shape)
        return torch.empty_like(x)

    for name, module in model.named_modules():
        if hasattr(module, 'macs'):
            module.forward = partial(stand_in, name, module)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _Forward(model)(images)
    prefix = f'{_Forward.__name__}.model'
    total = {
        name.removeprefix(prefix).removeprefix('.'): sum(flops.values()) // 2
        for name, flops in counter.get_flop_counts().items()
        if name.startswith(prefix)
    }
    for name, n in total.items():
        macs[name] += n
        above = name
        while above:
            above = above.rpartition('.')[0]
            if above in total:
                macs[above] -= n
                break
    return macs


class _Forward(nn.Module):
    """A module around the model that runs everything the model computes for an image."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> None:
        if hasattr(self.model, 'roi_head'):
            self._detect(images)
        elif isinstance(self.model, BaseModel):
            self.model(images, mode='tensor')
        else:
            self.model(images)

    def _detect(self, images: Tensor) -> None:
        """Run a two-stage detector on boxes of no meaning: only their number counts."""
        self.model.rpn_head(self.model.extract_feat(images))
        roi_head = self.model.roi_head
        for kind, boxes in (('bbox', PROPOSALS), ('mask', MASKS)):
            if getattr(roi_head, f'with_{kind}'):
                extractors = getattr(roi_head, f'{kind}_roi_extractor')
                heads = getattr(roi_head, f'{kind}_head')
                if not isinstance(heads, nn.ModuleList):  # a cascade has one for each stage
                    extractors, heads = [extractors], [heads]
                for extractor, head in zip(extractors, heads, strict=True):
                    size = extractor.roi_layers[0].output_size
                    head(images.new_empty(boxes, extractor.out_channels, *size))


class _Names:
    """The parts of a model that modules and parameters belong to, by their names."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        networks = [name for name, module in modules.items() if isinstance(module, GFNetBase)]
        self._network: Any = modules[networks[0]] if networks else None
        self._prefix = f'{networks[0]}.' if networks and networks[0] else ''
        self._kinds = {
            name: kind
            for name, module in modules.items()
            for layer, kind in _KINDS.items()
            if isinstance(module, layer) and self._in_gfnet(name) is not None
        }

    def part(self, name: str) -> str:
        """Return a stage of a GFNet or a child of the model, of its RoI heads a grandchild."""
        inner = self._in_gfnet(name)
        if inner is not None:
            stage = self._network.get_stage(inner)
            if stage is not None:
                return f'stage {stage + 1}'
            name = inner
        first, _, rest = name.partition('.')
        if first == 'roi_head':
            return f'{first}.{rest.partition(".")[0]}'
        return first or 'elsewhere'

    def kind(self, module: str) -> str:
        """Return what a module does in a GFNet, a name of :data:`KINDS`, or `'other'`."""
        while module and module not in self._kinds:
            module = module.rpartition('.')[0]
        return self._kinds.get(module, 'other')

    def _in_gfnet(self, name: str) -> str | None:
        if self._network is None or not name.startswith(self._prefix):
            return None
        return name.removeprefix(self._prefix)
