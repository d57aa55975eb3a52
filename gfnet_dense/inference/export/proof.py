"""The proof that a file computes what PyTorch does, on real images."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from PIL import Image

from gfnet_dense.benchmark import measure
from gfnet_dense.data.errors import DataError

from ..images import read_image
from ..loading import find_test_data, unwrapped_dataset
from .formats import Array, Run, run_of
from .networks import Deployed, ExportError, labels_from

NUM_IMAGES = 8  # that a proof takes


class Bound(NamedTuple):
    """What a file may differ from PyTorch by."""

    difference: float  # of an output, as a share of its largest value
    equal_labels: float  # the least share of equal labels


BOUNDS = {
    'float32': Bound(1e-4, 0.999),
    'float16': Bound(2e-2, 0.99),
    'int8': Bound(0.5, 0.8),  # enough to find a broken file; what int8 costs is reported
}


class Sample(NamedTuple):
    """An image and what it shows."""

    image: Image.Image
    truth: Array | None = None  # labels (h, w) of its pixels, or its own label ()


@dataclass
class Comparison:
    """What a runtime computes beside PyTorch, on the same images."""

    runtime: str
    milliseconds: float = 0.0  # of one batch
    differences: dict[str, float] = field(default_factory=dict)  # the largest of each output
    largest: dict[str, float] = field(default_factory=dict)  # values of each output
    equal: int = 0  # labels
    labels: int = 0
    confusion: Array | int = 0  # (classes, classes): truth, prediction

    def add(self, reference: Deployed, expected: Sequence[Array], actual: Sequence[Array]) -> None:
        """Take the outputs of another batch into account."""
        for name, y, z in zip(reference.names, expected, actual, strict=True):
            if y.shape != z.shape or y.dtype != z.dtype:
                raise ExportError(
                    f'{self.runtime} computes {name} {z.dtype} {z.shape}, PyTorch {y.dtype} '
                    f'{y.shape}'
                )
            if name != 'labels':
                # not max(), which would pass over NaN
                worst = np.abs(z - y).max(initial=self.differences.get(name, 0.0))
                self.differences[name] = float(worst)
                self.largest[name] = float(np.abs(y).max(initial=self.largest.get(name, 0.0)))
        if (labels := _labels_of(reference, expected)) is not None:
            self.equal += int(np.sum(labels == _labels_of(reference, actual)))
            self.labels += labels.size

    def difference(self, name: str) -> float:
        """Return the largest difference of an output as a share of its largest value."""
        return self.differences[name] / (self.largest[name] or 1.0)

    @property
    def equal_labels(self) -> float:
        """The share of equal labels; 1 for outputs without labels."""
        return self.equal / self.labels if self.labels else 1.0

    def differences_in_words(self) -> list[str]:
        """Say what the output that differs most differs by, and how many labels are equal."""
        parts = []
        if self.differences:
            name = max(self.differences, key=self.difference)
            parts.append(
                f'largest difference {self.differences[name]:.2g} ({name} up to '
                f'{self.largest[name]:.3g})'
            )
        if self.labels:
            parts.append(f'{100 * self.equal_labels:.3f}% of labels equal')
        return parts

    def accuracy(self, task: str) -> float | None:
        """Return mIoU or top-1 accuracy in percent; None without labels of the images."""
        if isinstance(self.confusion, int):
            return None
        right = self.confusion.diagonal()
        if task == 'classification':
            return float(100 * right.sum() / self.confusion.sum())
        union = self.confusion.sum(0) + self.confusion.sum(1) - right
        return float(100 * (right / np.where(union, union, 1))[union > 0].mean())


def prove(
    reference: Deployed,
    runs: Mapping[str, Run],
    samples: Sequence[Sample],
    shape: tuple[int, int],
    batch: int | None,
    bound: Bound,
    num_classes: int = 0,
    ignore_index: int = 255,
) -> list[Comparison]:
    """Run a file beside PyTorch on real images.

    Args:
        reference: The network in PyTorch.
        runs: What runs the file, by runtime.
        samples: Images of any size, which are resized; with their labels the accuracy of each
            runtime is noted, too.
        shape: Size `(H, W)` of the file's images.
        batch: Images of a call; None for a file that takes any number.
        bound: The largest difference to accept.
        num_classes: Number of classes of the labels.
        ignore_index: Label of pixels without a class.

    Returns:
        A comparison for PyTorch, and one for each runtime.

    Raises:
        ExportError: If a runtime differs by more than the bound.
    """
    runs = {'PyTorch': run_of(reference), **runs}
    comparisons = {name: Comparison(name) for name in runs}
    batches = list(batches_of(samples, batch))
    for part in batches:
        images = np.stack([resized(sample.image, shape) for sample in part])
        expected: list[Array] = []
        for name, run in runs.items():
            outputs = run(images)
            expected = expected or outputs
            comparisons[name].add(reference, expected, outputs)
            labels = _labels_of(reference, outputs)
            for i, sample in enumerate(part):
                if sample.truth is not None and labels is not None:
                    pairs = _confusion(sample.truth, labels[i], num_classes, ignore_index)
                    comparisons[name].confusion = comparisons[name].confusion + pairs
    for comparison in comparisons.values():
        # `not <=` is true of NaN
        too_large = [
            n for n in comparison.differences if not comparison.difference(n) <= bound.difference
        ]
        if too_large or comparison.equal_labels < bound.equal_labels:
            raise ExportError(
                f'{comparison.runtime} differs from PyTorch: '
                f'{", ".join(comparison.differences_in_words())}. Allowed are '
                f'{bound.difference:g} of the largest value and '
                f'{100 * (1 - bound.equal_labels):g}% of the labels. No file is written'
            )
    images = np.stack([resized(sample.image, shape) for sample in batches[-1]])
    tasks = {name: lambda run=run: run(images) for name, run in runs.items()}
    for name, times in measure(tasks, 5, 0.2, 'cpu').items():
        comparisons[name].milliseconds = 1000 * float(np.median(times))
    return [*comparisons.values()]


def batches_of(samples: Sequence[Sample], batch: int | None) -> Iterator[list[Sample]]:
    """Divide samples into batches; for None, which is any number, into some of different sizes."""
    if batch is None:
        batch = max(2, len(samples) - 1)
        yield [samples[0]._replace(truth=None)]
    count = -(-len(samples) // batch) * batch
    # The images that fill the last batch have no labels, so that each image counts once.
    fillers = [sample._replace(truth=None) for sample in samples]
    endless = itertools.chain(samples, itertools.cycle(fillers))
    for _ in range(count // batch):
        yield [next(endless) for _ in range(batch)]


def resized(image: Image.Image, shape: tuple[int, int]) -> Array:
    """Return an image as uint8 RGB `(H, W, 3)` of a size `(H, W)`."""
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def _labels_of(deployed: Deployed, outputs: Sequence[Array]) -> Array | None:
    if deployed.names == ('labels',):
        return outputs[0]
    if deployed.names != ('logits',):
        return None
    return labels_from(torch.from_numpy(outputs[0]), deployed.network).numpy()


def _confusion(truth: Array, labels: Array, num_classes: int, ignore_index: int) -> Array:
    labels = labels.astype(np.int32)
    if labels.shape != truth.shape:
        size = truth.shape[1], truth.shape[0]
        labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    known = truth != ignore_index
    pairs = truth[known].astype(np.int64) * num_classes + labels[known]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


# Images


def samples_of(cfg: Config, task: str, count: int) -> tuple[list[Sample], int]:
    """Return test images of a config, evenly spread, and the label of pixels without a class.

    They come with labels unless the task is detection. Returns an empty list if the data set is
    missing.
    """
    cfg = copy.deepcopy(cfg)
    segments = task == 'segmentation'
    config = unwrapped_dataset(cfg)
    if config is None:
        return [], 255
    if segments:
        config.pipeline = [s for s in config.pipeline if 'Annotations' in str(s['type'])]
    try:
        dataset = find_test_data(cfg)
        with DATASETS.switch_scope_and_registry(cfg.get('default_scope')):
            dataset.full_init()
            indices = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
            infos = [dataset[i] if segments else dataset.get_data_info(i) for i in indices]
    except (OSError, DataError):
        return [], 255
    truths = [info.get('gt_seg_map' if segments else 'gt_label') for info in infos]
    samples = [
        Sample(open_image(info['img_path']), None if truth is None else np.asarray(truth))
        for info, truth in zip(infos, truths, strict=True)
    ]
    # Every label of an image is that of a class, 255, too.
    return samples, getattr(dataset, 'ignore_index', 255) if segments else -1


def open_image(path: str | Path) -> Image.Image:
    """Return an image of a file as RGB."""
    return Image.fromarray(read_image(path))


def photographs(count: int) -> list[Sample]:
    """Return parts of the photograph that matplotlib, which mmengine needs, comes with."""
    from matplotlib import cbook

    photograph = open_image(cbook.get_sample_data('grace_hopper.jpg', asfileobj=False))
    side = min(photograph.size)
    boxes = [
        (x, y, x + side // part, y + side // part)
        for part in (1, 2, 3, 4)
        for y in range(0, photograph.height - side // part + 1, side // part)
        for x in range(0, side - side // part + 1, side // part)
    ]
    return [Sample(photograph.crop(box)) for box in boxes[:count]]
