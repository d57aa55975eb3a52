"""A trained model in one file, ONNX or `torch.export`, proved equal before the file appears.

A file holds everything between an RGB image of one size and the logits or labels: normalisation,
network, resizing of the logits. It needs nothing of this project. Filters are stored for the size
of the file and computed with real matrix products, so no runtime needs complex numbers or FFTs.
"""

import contextlib
import copy
import importlib.metadata
import io
import itertools
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from PIL import Image
from torch import Tensor, nn

from gfnet_dense.benchmark import measure
from gfnet_dense.data.errors import DataError
from gfnet_dense.models.gfnet import GFNetBase
from gfnet_dense.serialization import write_whole

from .images import read_image
from .loading import find_task, find_test_data, load_model, unwrapped_dataset

Array = np.ndarray[Any, Any]
Run = Callable[[Array], list[Array]]  # images to outputs

OUTPUTS = ('logits', 'raw', 'labels', 'features')
PRECISIONS = ('float32', 'float16', 'int8')
FORMATS = ('.onnx', '.pt2')

_NUM_IMAGES = 8  # that a proof takes
_NUM_CALIBRATION = 32  # images whose activations determine the scales of int8


class ExportError(ValueError):
    """A model cannot be exported, or its file computes something else than PyTorch."""


class Bound(NamedTuple):
    """What a file may differ from PyTorch by."""

    difference: float  # of an output, as a share of its largest value
    equal_labels: float  # the least share of equal labels


BOUNDS = {
    'float32': Bound(1e-4, 0.999),
    'float16': Bound(2e-2, 0.99),
    'int8': Bound(0.5, 0.8),  # enough to find a broken file; what int8 costs is reported
}


# Networks


class Deployed(nn.Module):
    """A network from RGB images to named outputs.

    Args:
        network: The network.
        compute: Computes the outputs from the network and normalised images `(B, 3, H, W)`.
        names: The names of the outputs.
        mean: Mean of the three channels, in the order that the network takes, 0 to 255.
        std: Their standard deviation.
        rgb: Whether the network takes RGB, and not BGR.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        compute: Callable[[Any, Tensor], Sequence[Tensor]],
        names: Sequence[str],
        mean: Sequence[float] | Tensor,
        std: Sequence[float] | Tensor,
        rgb: bool = True,
    ) -> None:
        super().__init__()
        self.network, self.compute, self.names, self.rgb = network, compute, tuple(names), rgb
        for name, value in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.as_tensor(value).float().view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of uint8 images `(B, H, W, 3)`: RGB, 0 to 255."""
        x = images.permute(0, 3, 1, 2)
        x = (x if self.rgb else x.flip(1)).float()
        x = ((x - self.mean) / self.std).to(next(self.network.parameters()).dtype)
        outputs = self.compute(self.network, x)
        return tuple(y.float() if y.is_floating_point() else y for y in outputs)

    def fixed(self, shape: tuple[int, int], half: bool = False) -> 'Deployed':
        """Return a copy for images of one size `(H, W)`, perhaps with float16 weights."""
        deployed = copy.deepcopy(self)
        for module in deployed.modules():
            if isinstance(module, GFNetBase):
                module.set_input_size(shape)  # in float32, before the weights are rounded
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
            - `'raw'`: what the last layer computes: a segmentor's logits at its own stride.
            - `'labels'`: the class of an image `(B,)` or pixel `(B, H, W)`, the index of the
              largest logit; uint8 if 256 classes are enough, else int32.
            - `'features'`: the maps of the backbone of a segmentor or detector.

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
    return Deployed(network, compute, names, mean, std, rgb).eval()


def _computation(
    model: Any, task: str, output: str
) -> tuple[nn.Module, Callable[[Any, Tensor], Sequence[Tensor]], Sequence[str]]:
    if output not in OUTPUTS:
        raise ExportError(f'unknown output {output!r}, choose one of {", ".join(OUTPUTS)}')
    detects = task not in ('segmentation', 'classification')
    if output == 'features':
        if task == 'classification':
            raise ExportError('a classifier has no maps to export: choose logits or labels')
        maps = [f'map{i}' for i in range(len(getattr(model.backbone, 'out_indices', [0])))]
        return model.backbone, lambda backbone, x: backbone(x), maps
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
        return model, lambda model, x: [*itertools.chain(*model(x, mode='tensor'))], levels
    logits = _raw_logits if task == 'classification' or output == 'raw' else _logits
    if output == 'labels':
        return model, lambda model, x: (_labels(logits(model, x), model),), ('labels',)
    return model, lambda model, x: (logits(model, x),), ('logits',)


def _raw_logits(model: Any, x: Tensor) -> Tensor:
    logits: Tensor = model(x, mode='tensor')
    return logits


def _logits(model: Any, x: Tensor) -> Tensor:
    logits: Tensor = model.encode_decode(x, [dict(img_shape=(x.shape[2], x.shape[3]))])
    return logits


def _labels(logits: Tensor, model: Any) -> Tensor:
    if logits.shape[1] == 1:  # one logit for two classes, as mmseg's `threshold` has it
        return (logits[:, 0].sigmoid() > model.decode_head.threshold).to(torch.uint8)
    return logits.argmax(1).to(torch.uint8 if logits.shape[1] <= 256 else torch.int32)


def _is_retinanet(model: Any) -> bool:
    from mmdet.models.dense_heads import RetinaHead

    return isinstance(getattr(model, 'bbox_head', None), RetinaHead)


def _boxes(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    head = model.bbox_head
    logits, deltas = model(x, mode='tensor')
    anchors = head.prior_generator.grid_priors([y.shape[-2:] for y in logits], device=x.device)
    scores = [y.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, head.num_classes)) for y in logits]
    deltas = [y.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)) for y in deltas]
    deltas = torch.cat(deltas, 1).float()
    anchors = torch.cat(anchors).repeat(len(deltas), 1)
    boxes = head.bbox_coder.decode(anchors, deltas.flatten(0, 1), max_shape=x.shape[-2:])
    return boxes.view(deltas.shape), torch.cat(scores, 1).sigmoid()


# Files


def to_pt2(deployed: Deployed, images: Tensor, dynamic: bool, metadata: Mapping[str, str]) -> bytes:
    """Return the file of `torch.export.save` for a network and images of the file's size."""
    file = io.BytesIO()
    extra = {'metadata.json': json.dumps(dict(metadata))}
    torch.export.save(_captured(deployed, images, dynamic), file, extra_files=extra)
    return file.getvalue()


def to_onnx(
    deployed: Deployed, images: Tensor, dynamic: bool, metadata: Mapping[str, str]
) -> bytes:
    """Return the ONNX file for a network and images of the file's size.

    Raises:
        ExportError: If a package is missing.
    """
    with _needed('onnx', 'onnxscript'):
        import onnx
        from onnxscript import optimizer
    captured = _captured(deployed, images, dynamic)
    _broadcast_matrices(captured.graph)
    with _quiet():
        program: Any = torch.onnx.export(
            captured,
            input_names=['images'],
            output_names=deployed.names,
            dynamo=True,
            verbose=False,
        )
    # Fourier matrices are constants, whatever their size. By itself the exporter would leave their
    # computation in the file.
    largest = 2**31
    optimizer.optimize(program.model, input_size_limit=largest, output_size_limit=largest)
    model = program.model_proto
    onnx.helper.set_model_props(model, dict(metadata))
    content: bytes = model.SerializeToString()
    return content


def _captured(deployed: Deployed, images: Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = {'images': {0: torch.export.Dim('batch')} if dynamic else {}}
    if dynamic and len(images) == 1:  # which would be taken for a constant
        images = images.repeat(2, 1, 1, 1)
    with torch.no_grad(), _quiet():
        return torch.export.export(deployed, (images,), dynamic_shapes=shapes)


def _broadcast_matrices(graph: torch.fx.Graph) -> None:
    """Let products broadcast their matrix: a file would hold a copy for every map of a batch."""
    for node in graph.find_nodes(op='call_function', target=torch.ops.aten.bmm.default):
        matrix, x = node.args
        if matrix.target is torch.ops.aten.expand.default:
            node.target, node.args = torch.ops.aten.matmul.default, (matrix.args[0], x)
    graph.eliminate_dead_code()


def quantized(content: bytes, batches: Iterable[Array]) -> bytes:
    """Return an ONNX file whose convolutions and linear layers compute in int8.

    This is ONNX Runtime's static quantization, by channel. Filters, norms and everything else stay
    in float32: rounded Fourier matrices cost accuracy and time, and OpenVINO 2026.4 fails to
    compile them.

    Args:
        content: The float32 file.
        batches: Images that determine the range of activations, uint8 `(B, H, W, 3)`.
    """
    with _needed('onnx', 'onnxruntime'):
        import onnx
        from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Array] | None:
            images = next(self.batches, None)
            return None if images is None else {'images': images}

    model = onnx.load_from_string(content)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    # A linear layer multiplies maps with a constant, a filter a constant with maps.
    constants = {tensor.name for tensor in model.graph.initializer}
    filters = [n for n in model.graph.node if n.op_type == 'MatMul' and n.input[1] not in constants]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder, 'model.onnx')
        quantization.quantize_static(
            model,
            path,
            Reader(),
            op_types_to_quantize=['Conv', 'MatMul', 'Gemm'],
            nodes_to_exclude=[node.name for node in filters],
            per_channel=True,
        )
        model = onnx.load(path)
    onnx.helper.set_model_props(model, properties)
    result: bytes = model.SerializeToString()
    return result


@contextlib.contextmanager
def _needed(*packages: str) -> Iterator[None]:
    try:
        yield
    except ImportError as e:
        raise ExportError(
            f"this needs {' and '.join(packages)} ({e}): pip install 'gfnet-dense[export]'"
        ) from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings of exporters about themselves from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)


# Runtimes


def runs_of(content: bytes, suffix: str) -> tuple[dict[str, Run], dict[str, str]]:
    """Return what runs a file, by the name of the runtime, with as many threads as torch has.

    Returns:
        The runtimes; and why OpenVINO, where it is installed, cannot run the file.

    Raises:
        ExportError: If ONNX Runtime is missing.
    """
    if suffix == '.pt2':
        with _quiet():
            program = torch.export.load(io.BytesIO(content)).module()
        return {'torch.export': _of_module(program)}, {}
    with _needed('onnxruntime'):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])
    runs: dict[str, Run] = {'ONNX Runtime': lambda images: session.run(None, {'images': images})}
    try:
        import openvino

        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(content),
            'CPU',
            # Without this hint a processor with bfloat16 would round to it.
            dict(INFERENCE_PRECISION_HINT='f32', INFERENCE_NUM_THREADS=torch.get_num_threads()),
        )
    except ImportError:
        return runs, {}
    except RuntimeError as e:
        return runs, {'OpenVINO': ' '.join(str(e).split())}
    # Outputs are views into memory that the next call overwrites.
    runs['OpenVINO'] = lambda images: [y.copy() for y in compiled(images).values()]
    return runs, {}


def _of_module(module: nn.Module) -> Run:
    @torch.inference_mode()
    def run(images: Array) -> list[Array]:
        return [y.numpy() for y in module(torch.from_numpy(images))]

    return run


# Proof


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


@dataclass
class Exported:
    """A file that was proved equal to its model."""

    path: Path
    task: str
    precision: str
    images: str  # that proved it
    comparisons: list[Comparison]
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
    runs = {'PyTorch': _of_module(reference), **runs}
    comparisons = {name: Comparison(name) for name in runs}
    batches = list(_batches(samples, batch))
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


def _batches(samples: Sequence[Sample], batch: int | None) -> Iterator[list[Sample]]:
    if batch is None:  # all sizes from 1 up
        batch, samples = max(1, len(samples) - 1), samples
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
    return _labels(torch.from_numpy(outputs[0]), deployed.network).numpy()


def _confusion(truth: Array, labels: Array, num_classes: int, ignore_index: int) -> Array:
    labels = labels.astype(np.int32)
    if labels.shape != truth.shape:
        size = truth.shape[1], truth.shape[0]
        labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    known = truth != ignore_index
    pairs = truth[known].astype(np.int64) * num_classes + labels[known]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


# Images of a proof


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
        Sample(_open(info['img_path']), None if truth is None else np.asarray(truth))
        for info, truth in zip(infos, truths, strict=True)
    ]
    # Every label of an image is that of a class, 255, too.
    return samples, getattr(dataset, 'ignore_index', 255) if segments else -1


def _open(path: str | Path) -> Image.Image:
    return Image.fromarray(read_image(path))


def photographs(count: int) -> list[Sample]:
    """Return parts of the photograph that matplotlib, which mmengine needs, comes with."""
    from matplotlib import cbook

    photograph = _open(cbook.get_sample_data('grace_hopper.jpg', asfileobj=False))
    side = min(photograph.size)
    boxes = [
        (x, y, x + side // part, y + side // part)
        for part in (1, 2, 3, 4)
        for y in range(0, photograph.height - side // part + 1, side // part)
        for x in range(0, side - side // part + 1, side // part)
    ]
    return [Sample(photograph.crop(box)) for box in boxes[:count]]


# The whole


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
    num_images: int = _NUM_IMAGES,
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
        FileNotFoundError: If there is no such config, checkpoint or image.
        CheckpointError: If the weights cannot be read or are not those of the model.
        InputError: If an image cannot be decoded.
        ExportError: If the model has no such output, a package is missing, or a runtime differs
            from PyTorch by more than :data:`BOUNDS`.
    """
    out = Path(out)
    _check_request(out, shapes, batch, precision, num_images)
    loaded, cfg = load_model(config, checkpoint)
    model: Any = loaded
    task = find_task(cfg)
    reference = deploy(model, task, output)
    samples, ignore_index = [Sample(_open(path)) for path in images], 255
    source = 'given images'
    if not samples:
        samples, ignore_index = samples_of(cfg, task, num_images)
        source = 'images of the test data'
    if not samples:
        samples = photographs(num_images)
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
        write = to_pt2 if out.suffix == '.pt2' else to_onnx
        content = write(deployed, example, batch is None, metadata)
        if precision == 'int8':
            training = copy.deepcopy(cfg)
            training.test_dataloader = cfg.get('train_dataloader')
            scaling = [] if images else samples_of(training, 'any', _NUM_CALIBRATION)[0]
            parts = _batches(scaling or samples, batch)
            content = quantized(
                content, (np.stack([resized(s.image, shape) for s in part]) for part in parts)
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path) as file:
            file.write(content)
            runs, failures = runs_of(content, out.suffix)
            classes = model.dataset_meta['classes']
            comparisons = prove(
                reference,
                runs,
                samples,
                shape,
                batch,
                BOUNDS[precision],
                len(classes),
                ignore_index,
            )
        proof = f'{len(samples)} {source}'
        exported.append(Exported(path, task, precision, proof, comparisons, failures))
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
    if not shapes or any(side < 1 for shape in shapes for side in shape):
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
    steps = [s for s in dataset.get('pipeline', ()) if 'Resize' in s.type]
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
