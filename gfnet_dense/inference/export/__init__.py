"""A trained model in one file, ONNX or `torch.export`, proved equal before the file appears.

A file holds everything between an RGB image of one size and the logits or labels: normalisation,
network, resizing of the logits. It needs nothing of this project. Filters are stored for the size
of the file and computed with real matrix products, so no runtime needs complex numbers or FFTs.
"""

import copy
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config

from gfnet_dense.serialization import write_whole

from ..loading import find_task, load_model, type_name, unwrapped_dataset
from . import formats, proof
from .networks import ExportError, deploy

__all__ = ['FORMATS', 'PRECISIONS', 'ExportError', 'Exported', 'export_model']

PRECISIONS = tuple(proof.BOUNDS)
FORMATS = ('.onnx', '.pt2')
_NUM_CALIBRATION = 32  # images whose activations determine the scales of int8


@dataclass
class Exported:
    """A file that was proved equal to its model."""

    path: Path
    task: str
    precision: str
    images: str  # that proved it
    comparisons: list[proof.Comparison]
    failures: dict[str, str]  # why a runtime cannot run it

    def __str__(self) -> str:
        metric = 'mIoU' if self.task == 'segmentation' else 'top-1 accuracy'
        lines = [
            f'{self.path}: {self.precision}, {self.path.stat().st_size / 1e6:.1f} MB, '
            f'compared with PyTorch on {self.images}'
        ]
        for comparison in self.comparisons:
            parts = [f'{comparison.milliseconds:.1f} ms']
            if comparison.runtime != 'PyTorch':
                parts += comparison.differences_in_words()
            if (accuracy := comparison.accuracy(self.task)) is not None:
                parts.append(f'{metric} {accuracy:.2f}')
            lines.append(f'  {comparison.runtime:<12}  {", ".join(parts)}')
        lines += [f'  {name:<12}  cannot run it: {why}' for name, why in self.failures.items()]
        return '\n'.join(lines)


def export_model(
    config: str | Path | Config,
    checkpoint: str | Path,
    out: str | Path,
    shapes: Sequence[tuple[int, int]],
    *,
    batch: int | None = 1,
    output: str = 'logits',
    precision: str = 'float32',
    images: Sequence[str | Path] = (),
    num_images: int = proof.NUM_IMAGES,
) -> list[Exported]:
    """Export a trained model, a file for each size, and prove every file before it appears.

    A file takes uint8 RGB images `(B, H, W, 3)` and normalises them. Its metadata name task,
    classes, colours and preprocessing. It is compared with PyTorch in ONNX Runtime, and in OpenVINO
    where that is installed, or in PyTorch's own runtime for `.pt2`.

    Args:
        config: A config, its path, or the name of one of this project's.
        checkpoint: The weights, as for :func:`gfnet_dense.inference.load_model`.
        out: The file, ending in `.onnx` or `.pt2`. For several sizes, `-HxW` is added to its name.
        shapes: Sizes `(H, W)` in pixels.
        batch: Images of a call; None for any number.
        output: See :func:`deploy`.
        precision: `'float32'`; `'float16'` for weights and network, with filters computed in
            float32; `'int8'`, for ONNX alone, for convolutions and linear layers.
        images: Images that prove the file, and whose activations scale int8. By default these are
            the config's test images, and its training images for int8, where they are there. Else
            they are parts of a photograph.
        num_images: How many of them prove the file.

    Returns:
        What was written, one for each size.

    Raises:
        FileNotFoundError: If there is no such config or checkpoint.
        CheckpointError: If the weights cannot be read or are not those of the model.
        InputError: If an image is missing or cannot be decoded.
        ExportError: If the model has no such output, a package is missing, or a runtime differs
            from PyTorch by more than :data:`proof.BOUNDS`.
    """
    out = Path(out)
    _check_request(out, shapes, batch, precision, num_images)
    loaded, cfg = load_model(config, checkpoint)
    model: Any = loaded
    task = find_task(cfg)
    reference = deploy(model, task, output)
    samples, ignore_index = [proof.Sample(proof.open_image(path)) for path in images], 255
    source = 'given images'
    if not samples:
        samples, ignore_index = proof.samples_of(cfg, task, num_images)
        source = 'images of the test data'
    if not samples:
        samples = proof.photographs(num_images)
        source = 'parts of a photograph'
    exported = []
    for height, width in shapes:
        shape = height, width
        path = out
        if len(shapes) > 1:
            path = out.with_name(f'{out.stem}-{height}x{width}{out.suffix}')
        metadata = _metadata(model, cfg, task, reference.names, shape, precision)
        deployed = reference.fixed(shape, half=precision == 'float16')
        example = torch.zeros(batch or 2, *shape, 3, dtype=torch.uint8)
        write = formats.to_pt2 if out.suffix == '.pt2' else formats.to_onnx
        content = write(deployed, example, batch is None, metadata)
        if precision == 'int8':
            training = copy.deepcopy(cfg)
            training.test_dataloader = cfg.get('train_dataloader')
            scaling = [] if images else proof.samples_of(training, 'any', _NUM_CALIBRATION)[0]
            parts = proof.batches_of(scaling or samples, batch)
            content = formats.quantized(
                content, (np.stack([proof.resized(s.image, shape) for s in part]) for part in parts)
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path) as file:
            file.write(content)
            runs, failures = formats.runs_of(content, out.suffix)
            classes = model.dataset_meta['classes']
            comparisons = proof.prove(
                reference,
                runs,
                samples,
                shape,
                batch,
                proof.BOUNDS[precision],
                len(classes),
                ignore_index,
            )
        used = f'{len(samples)} {source}'
        exported.append(Exported(path, task, precision, used, comparisons, failures))
    return exported


def _check_request(
    out: Path,
    shapes: Sequence[tuple[int, int]],
    batch: int | None,
    precision: str,
    num_images: int,
) -> None:
    if out.suffix not in FORMATS:
        raise ExportError(f'{out} must end in {" or ".join(FORMATS)}')
    if precision not in PRECISIONS:
        raise ExportError(f'unknown precision {precision!r}, choose one of {", ".join(PRECISIONS)}')
    if precision == 'int8' and out.suffix != '.onnx':
        raise ExportError(f'int8 is for ONNX alone, but {out} is not: name a file ending in .onnx')
    if batch is not None and batch < 1:
        raise ExportError(f'a batch has 1 image or more, but got {batch}')
    if num_images < 1:
        raise ExportError(f'a file is compared on 1 image or more, but got {num_images}')
    if too_small := [shape for shape in shapes if min(shape) < 1]:
        raise ExportError(f'an image has 1 pixel a side or more, but got {too_small[0]}')
    if not shapes:
        raise ExportError(
            f'a file has one size, in pixels, but got {[*shapes]}: its filters are stored for that '
            'size, since resizing filters and computing Fourier matrices for every image would '
            'cost more than the network. Give one --shape for each size'
        )


_MEANINGS = {
    'logits': 'logits of each class, class in axis 1',
    'labels': 'index of the class',
    'boxes': 'left, top, right, bottom of each anchor in pixels, before non-maximum suppression',
    'scores': 'score of each class for each anchor, 0 to 1',
}


def _metadata(
    model: Any,
    cfg: Config,
    task: str,
    names: Sequence[str],
    shape: tuple[int, int],
    precision: str,
) -> dict[str, str]:
    dataset = unwrapped_dataset(cfg) or {}
    pipeline = dataset.get('pipeline', ())
    steps = [{**s, 'type': type_name(s)} for s in pipeline if 'Resize' in type_name(s)]
    steps = steps or [dataset['transform']] if 'transform' in dataset else steps
    values = dict(
        generator=f'gfnet-dense {importlib.metadata.version("gfnet-dense")}',
        config=Path(cfg.filename or 'unnamed').stem,
        task=task,
        precision=precision,
        classes=model.dataset_meta['classes'],
        palette=model.dataset_meta['palette'],
        input=dict(
            name='images', dtype='uint8', layout='NHWC', colour='RGB', size=shape, resized_by=steps
        ),
        outputs={name: _MEANINGS.get(name, 'as the network computes it') for name in names},
    )
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
    }
