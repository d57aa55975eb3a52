"""What is exported of a model: a network from RGB images to named outputs."""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfnet_dense.models.gfnet import GFNetBase

OUTPUTS = ('logits', 'raw', 'labels', 'features')


class ExportError(ValueError):
    """A model cannot be exported, or its file computes something else than PyTorch."""


Compute = Callable[[Any, Tensor, tuple[int, int]], Sequence[Tensor]]


class Padding(NamedTuple):
    """How normalised images are padded at right and bottom: to a least size and to multiples."""

    divisor: int = 1
    least: tuple[int, int] = (0, 0)  # (H, W)
    value: float = 0.0

    def padded(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the size `(H, W)` that images of a size are padded to."""
        height, width = (
            -(-max(side, least) // self.divisor) * self.divisor
            for side, least in zip(shape, self.least, strict=True)
        )
        return height, width


_NO_PADDING = Padding()


class Deployed(nn.Module):
    """A network from RGB images to named outputs.

    Args:
        network: The network.
        compute: Computes the outputs from the network, normalised and padded images
            `(B, 3, H', W')`, and the size `(H, W)` before padding.
        names: The names of the outputs.
        mean: Mean of the three channels, in the order that the network takes, 0 to 255.
        std: Their standard deviation.
        rgb: Whether the network takes RGB, and not BGR.
        padding: How its tests pad images.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        compute: Compute,
        names: Sequence[str],
        mean: Sequence[float] | Tensor,
        std: Sequence[float] | Tensor,
        rgb: bool = True,
        padding: Padding = _NO_PADDING,
    ) -> None:
        super().__init__()
        self.network, self.compute, self.names, self.rgb = network, compute, tuple(names), rgb
        self.padding = padding
        for name, value in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.as_tensor(value).float().view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of uint8 images `(B, H, W, 3)`: RGB, 0 to 255."""
        x = images.permute(0, 3, 1, 2)
        x = (x if self.rgb else x.flip(1)).float()
        x = ((x - self.mean) / self.std).to(next(self.network.parameters()).dtype)
        shape = x.shape[2], x.shape[3]
        height, width = self.padding.padded(shape)
        if (height, width) != shape:
            x = F.pad(x, (0, width - shape[1], 0, height - shape[0]), value=self.padding.value)
        outputs = self.compute(self.network, x, shape)
        return tuple(y.float() if y.is_floating_point() else y for y in outputs)

    def fixed(self, shape: tuple[int, int], half: bool = False) -> 'Deployed':
        """Return a copy for images of one size `(H, W)`, perhaps with float16 weights."""
        deployed = copy.deepcopy(self)
        for module in deployed.modules():
            if isinstance(module, GFNetBase):
                # In float32, before the weights are rounded.
                module.set_input_size(self.padding.padded(shape))
        if half:
            deployed.network.half()
        return deployed.requires_grad_(False).eval()


def deploy(model: nn.Module, task: str, output: str = 'logits') -> Deployed:
    """Return what is exported of a model of :func:`gfnet_dense.inference.load_model`.

    Args:
        model: The model.
        task: Its task.
        output: A name of :data:`OUTPUTS`:

            - `'logits'`: logits `(B, num_classes)` of a classifier; `(B, num_classes, H, W)` of a
              segmentor, resized to the image. Of a detector of one stage the `boxes` `(B, N, 4)`
              in pixels (left, top, right, bottom) and `scores` `(B, N, num_classes)` of all
              anchors, from which non-maximum suppression selects.
            - `'raw'`: what the last layer computes: a segmentor's logits at its own stride, of the
              image as its tests pad it.
            - `'labels'`: the class of an image `(B,)` or pixel `(B, H, W)`, the index of the
              largest logit; uint8 if 256 classes are enough, else int32.
            - `'features'`: the maps of the backbone of a segmentor or detector, likewise.

    Raises:
        ExportError: If the model has no such output that a file can hold.
    """
    preprocessor: Any = model.data_preprocessor
    swaps = getattr(preprocessor, '_channel_conversion', False)
    normalizes = getattr(preprocessor, '_enable_normalize', False)
    statistics = (preprocessor.mean, preprocessor.std) if normalizes else ([0.0] * 3, [1.0] * 3)
    # mmseg and mmdet read BGR images; those of ImageFolder are RGB.
    rgb = (task == 'classification') != swaps
    network, compute, names = _computation(model, task, output)
    mean, std = statistics
    return Deployed(network, compute, names, mean, std, rgb, _padding(preprocessor)).eval()


def _padding(preprocessor: Any) -> Padding:
    value = getattr(preprocessor, 'pad_value', 0.0)
    if not hasattr(preprocessor, 'test_cfg'):  # mmdet's
        return Padding(getattr(preprocessor, 'pad_size_divisor', 1), value=value)
    options = preprocessor.test_cfg or {}  # mmseg's
    least = options.get('size') or (0, 0)
    return Padding(options.get('size_divisor') or 1, (least[0], least[-1]), value)


def _computation(model: Any, task: str, output: str) -> tuple[nn.Module, Compute, Sequence[str]]:
    if output not in OUTPUTS:
        raise ExportError(f'unknown output {output!r}, choose one of {", ".join(OUTPUTS)}')
    detects = task not in ('segmentation', 'classification')
    if output == 'features':
        if task == 'classification':
            raise ExportError('a classifier has no maps to export: choose logits or labels')
        maps = [f'map{i}' for i in range(len(getattr(model.backbone, 'out_indices', [0])))]
        return model.backbone, lambda backbone, x, shape: backbone(x), maps
    if detects and not _is_retinanet(model):
        raise ExportError(
            f'{type(model).__name__} cannot be exported, only RetinaNet of all detectors: an '
            "exported file cannot hold mmcv's operators, such as RoIAlign. Export the backbone of "
            'this one with --features'
        )
    if detects and output == 'labels':
        raise ExportError(
            "a detector's labels need non-maximum suppression, which is mmcv's own operator and "
            'stays outside the file: omit --labels for boxes and scores'
        )
    if detects and output == 'logits':
        return model, _boxes, ('boxes', 'scores')
    if detects:
        count = len(model.bbox_head.prior_generator.strides)
        levels = [f'{kind}{i}' for kind in ('scores', 'deltas') for i in range(count)]
        return model, lambda model, x, _: [*itertools.chain(*model(x, mode='tensor'))], levels
    logits = _raw_logits if task == 'classification' or output == 'raw' else _logits
    if output == 'labels':
        return model, lambda model, *x: (labels_from(logits(model, *x), model),), ('labels',)
    return model, lambda model, *x: (logits(model, *x),), ('logits',)


def _raw_logits(model: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:
    logits: Tensor = model(x, mode='tensor')
    return logits


def _logits(model: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:
    logits: Tensor = model.encode_decode(x, [dict(img_shape=(x.shape[2], x.shape[3]))])
    return logits[..., : shape[0], : shape[1]]


def labels_from(logits: Tensor, model: Any) -> Tensor:
    """Return the classes that logits `(B, num_classes, ...)` of a model mean."""
    if logits.shape[1] == 1:  # one logit for two classes, as mmseg's `threshold` has it
        return (logits[:, 0].sigmoid() > model.decode_head.threshold).to(torch.uint8)
    return logits.argmax(1).to(torch.uint8 if logits.shape[1] <= 256 else torch.int32)


def _is_retinanet(model: Any) -> bool:
    from mmdet.models.dense_heads import RetinaHead

    return isinstance(getattr(model, 'bbox_head', None), RetinaHead)


def _boxes(model: Any, x: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    head = model.bbox_head
    logits, deltas = model(x, mode='tensor')
    anchors = head.prior_generator.grid_priors([y.shape[-2:] for y in logits], device=x.device)
    scores = [y.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, head.num_classes)) for y in logits]
    deltas = [y.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)) for y in deltas]
    deltas = torch.cat(deltas, 1).float()
    anchors = torch.cat(anchors).repeat(len(deltas), 1)
    boxes = head.bbox_coder.decode(anchors, deltas.flatten(0, 1), max_shape=shape)
    return boxes.view(deltas.shape), torch.cat(scores, 1).sigmoid()
