"""A model with its preprocessing, for images in any form."""

import copy
import itertools
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, TRANSFORMS
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.nn import functional

from gfnet_dense.data.errors import join_first

from .drawing import Colour
from .images import ACCEPTED, Array, InputError, read_image
from .loading import find_task, load_model, type_name, unwrapped_dataset
from .prediction import Prediction, no_class_label

# The most images that wait for others of their size, in batches and, with results, in bytes.
_WINDOW = 4
_WINDOW_BYTES = 2**29
# Numbers of a score map that are resized at a time, 256 MB.
_NUMBERS = 2**26


def load(
    config: str | Path | Config,
    checkpoint: str | Path,
    device: str | torch.device | None = None,
    **options: Any,
) -> 'Predictor':
    """Load a trained model that predicts from images.

        model = gfnet_dense.load('upernet_gfnet_h_s_ade20k', 'iter_160000.pth')
        model.predict('photo.jpg').draw().save('result.jpg')

    Args:
        config: A config, its path, or the name of one of this project's.
        checkpoint: A checkpoint of its model. Nothing in it is executed.
        device: By default the GPU if there is one.
        **options: Those of :class:`Predictor`.

    Raises:
        FileNotFoundError: If there is no such config or checkpoint.
        CheckpointError: If the weights are not safe to read or not those of the model.
        ValueError: If the task of the model is unknown, or an option does not fit it.
    """
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    return Predictor(*load_model(config, checkpoint, device), **options)


@dataclass(eq=False)
class _Sample:
    """An image on its way through the network.

    Attributes:
        source: The image as it was given.
        image: RGB of shape `(H, W, 3)`, uint8.
        data: What the pipeline made of it; None if it is cut into tiles or cannot be read.
        result: What came out, None before.
    """

    source: Any
    image: Array | None = None
    data: dict[str, Any] | None = None
    result: Prediction | Exception | None = None

    @property
    def shapes(self) -> object:
        """What images of one batch share; None if it takes no part in a batch."""
        if self.data is None or self.image is None:
            return None
        inputs = self.data['inputs']
        if isinstance(inputs, Tensor):
            return tuple(inputs.shape)
        # The views of one image are averaged at its own size.
        return *(tuple(view.shape) for view in inputs), self.image.shape


class Predictor:
    """A model with its preprocessing. :func:`gfnet_dense.load` makes one from files.

    Args:
        model: A model of :func:`gfnet_dense.inference.load_model`.
        cfg: Its config, whose test pipeline prepares the images.
        batch_size: Most images in one batch. Images of one size, after the pipeline has resized
            them, share a batch; no image is padded for another one.
        classes: Names of the classes to predict, one or more; all by default.
        tta: Average over the views of the config's `tta_pipeline`.
        tile: Side of the windows, in pixels, into which larger images are cut for segmentation;
            `'auto'` for the size of the training images, else 512. Windows overlap by a quarter,
            and the probabilities are blended there. The memory for scores then does not grow with
            the height of the image. Pillow's
            limit on the size of images is lifted in this process.

    Attributes:
        task: One of :data:`gfnet_dense.inference.TASKS`.
        classes: Names of all classes of the model.
        palette: Their colours.

    Raises:
        ValueError: If `classes` has unknown names, the config has nothing for `tta`, or the task
            has no tiles.
        TypeError: If `classes` is a string.
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: Config,
        *,
        batch_size: int = 8,
        classes: Sequence[str] | None = None,
        tta: bool = False,
        tile: int | Literal['auto'] | None = None,
    ) -> None:
        self.model: Any = model
        self.cfg = cfg
        self.task = find_task(cfg)
        meta: Any = model.dataset_meta
        self.classes: tuple[str, ...] = meta['classes']
        self.palette: list[Colour] = meta['palette']
        if batch_size < 1:
            raise ValueError(f'batch_size must be at least 1, but got {batch_size}')
        self.batch_size = batch_size
        if tile == 'auto':
            tile = int(max((cfg.model.get('data_preprocessor') or {}).get('size') or [512]))
        self.tile: int | None = tile
        self._chosen = self._indices(classes)
        if tile is not None:
            if self.task != 'segmentation':
                raise ValueError(f'tiles are for segmentation, and this model is of {self.task}')
            if tta:
                raise ValueError('choose either tiles or test-time augmentation')
            if tile < 32:
                raise ValueError(f'tiles must have a side of 32 pixels or more, but got {tile}')
            Image.MAX_IMAGE_PIXELS = None  # Pillow's guard against images that are too large
        self._tta = tta
        if tta and (missing := sorted({'tta_model', 'tta_pipeline'} - set(cfg))):
            raise ValueError(
                f'{cfg.filename} has no {" and no ".join(missing)} for test-time augmentation'
            )
        with MODELS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
            self._network: Any = self.model
            if tta:
                self._network = registry.build(dict(cfg.tta_model, module=self.model))
            self._load_file, self._prepare = _preprocessing(cfg, self.task, tta)
        if tile is not None and self._load_file is not _read:
            raise ValueError(f'tiles are for images that Pillow reads, not by {cfg.filename}')

    def origin(self) -> dict[str, Any]:
        """Return what results depend on beside the images, as plain values."""
        weights = 0
        for value in self.model.state_dict().values():
            content = value.cpu().contiguous().flatten().view(torch.uint8)
            weights = zlib.crc32(content.numpy(), weights)
        pipeline = (unwrapped_dataset(self.cfg) or {}).get('pipeline')
        config = repr([self.cfg.model, pipeline, self.cfg.get('tta_pipeline')])
        return dict(
            weights=weights,
            config=zlib.crc32(config.encode()),
            classes=self._chosen,
            tta=self._tta,
            tile=self.tile,
        )

    def predict(self, images: Any) -> Any:
        """Predict from one image or several.

        Args:
            images: A path, a binary file, an array, a tensor or an image of Pillow, as
                :func:`gfnet_dense.inference.read_image` takes them; or a list, a generator or
                another iterable of such.

        Returns:
            A :class:`~gfnet_dense.inference.Prediction`; of a list a list of them, of a generator
            a generator that reads ahead no more than it needs.

        Raises:
            InputError: If an image cannot be read.
            TypeError: If `images` are bytes, a dict or a set.
        """
        if isinstance(images, bytes | bytearray | Mapping | set | frozenset):
            raise TypeError(f'{type(images).__name__} is no image: {ACCEPTED}')
        if isinstance(images, list | tuple):
            return list(self._predictions(images))
        single = isinstance(images, str | Path | np.ndarray | Tensor | Image.Image)
        single = single or hasattr(images, 'read')  # a file
        if isinstance(images, Iterable) and not single:
            return self._predictions(images)
        return next(self._predictions([images]))

    def _predictions(self, images: Iterable[Any]) -> Iterator[Prediction]:
        for _, result in self.stream(images):
            if isinstance(result, Exception):
                raise result
            yield result

    def stream(self, images: Iterable[Any]) -> Iterator[tuple[Any, Prediction | Exception]]:
        """Predict from images in their order, without an end to their number.

        Images are loaded in parallel to the network.

        Args:
            images: Images in any form that :meth:`predict` takes.

        Yields:
            Each image as it was given, and its prediction; or the error, where an image cannot be
            read or the network fails on it.
        """
        workers, ahead = min(8, os.cpu_count() or 1), self.batch_size
        if self.tile is not None:  # large images: decode one while another one is predicted
            workers, ahead = 1, 0
        pool = ThreadPoolExecutor(workers, 'loader')
        queue: deque[_Sample] = deque()  # what is not yielded yet
        groups: dict[object, list[_Sample]] = {}  # of these, what waits for others of its size
        try:
            for sample in in_parallel(pool, self._load, images, ahead + workers):
                queue.append(sample)
                if sample.result is None:
                    group = groups.setdefault(sample.shapes, [])
                    group.append(sample)
                    if len(group) == self.batch_size or sample.shapes is None:
                        self._run(groups.pop(sample.shapes))
                pixels = sum(each.image.size // 3 for each in queue if each.image is not None)
                too_large = pixels * self._bytes_of_pixel > _WINDOW_BYTES
                if len(queue) > _WINDOW * self.batch_size or too_large:
                    self._run_all(groups)
                while queue and (result := queue[0].result) is not None:
                    yield queue.popleft().source, result
            self._run_all(groups)
            for sample in queue:
                assert sample.result is not None
                yield sample.source, sample.result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    @property
    def _bytes_of_pixel(self) -> int:
        """What an image and its result take: masks of about 100 objects, or labels and scores."""
        return 103 if self.task == 'instance segmentation' else 8

    def _load(self, source: Any) -> _Sample:
        try:
            if self.tile is not None:
                image = read_image(source)
                if max(image.shape[:2]) > self.tile:
                    return _Sample(source, image)
                return _Sample(source, image, self._prepare(_results(image)))
            image, results = self._load_file(source)
            return _Sample(source, image, self._prepare(results))
        except InputError as e:
            return _Sample(source, result=e)
        except Exception as e:  # transforms of the pipeline raise errors of many kinds
            return _Sample(source, result=InputError(f'{_name(source)}: {type(e).__name__}: {e}'))

    def _run_all(self, groups: dict[object, list[_Sample]]) -> None:
        while groups:
            self._run(groups.popitem()[1])

    def _run(self, batch: Sequence[_Sample]) -> None:
        """Set the results of a batch."""
        try:
            for sample, result in zip(batch, list(self._predict(batch)), strict=True):
                sample.result = result
        except Exception as e:
            if len(batch) > 1:
                # Run each image alone to find the one that fails.
                for sample in batch:
                    self._run([sample])
                return
            error = next(iter(str(e).strip().splitlines()), '')
            batch[0].result = RuntimeError(
                f'{_name(batch[0].source)}: the network fails: {type(e).__name__}: {error}'
            )

    @torch.no_grad()
    def _predict(self, batch: Sequence[Any]) -> Iterator[Prediction]:
        if batch[0].data is None:
            yield self._segmentation(batch[0].image, *self._blend_tiles(batch[0].image))
            return
        outputs = self._test_step([sample.data for sample in batch])
        for sample, output in zip(batch, outputs, strict=True):
            if self.task == 'segmentation':
                if self._tta:  # has no scores of all views together
                    yield self._segmentation(sample.image, output.pred_sem_seg.data.squeeze(0))
                else:
                    found = self._resized(output.seg_logits.data, sample.image.shape[:2])
                    yield self._segmentation(sample.image, *found)
            elif self.task == 'classification':
                scores, labels = output.pred_score.sort(descending=True)
                yield self._prediction(sample.image, labels, scores)
            else:
                found = output.pred_instances
                found = found[found.scores.argsort(descending=True, stable=True)]
                yield self._prediction(
                    sample.image, found.labels, found.scores, found.bboxes, found.get('masks')
                )

    def _test_step(self, data: Sequence[Any]) -> Sequence[Any]:
        batch = pseudo_collate(data)
        if batch['data_samples'][0] is None:
            batch['data_samples'] = None
        if self.task == 'segmentation' and not self._tta:
            # The scores stay at the size of the network's input. `_labels` brings them to that of
            # the image piece by piece: those of a photograph for 150 classes take 7 GB.
            for sample in batch['data_samples']:
                sample.set_metainfo(dict(ori_shape=sample.img_shape[:2]))
        with MODELS.switch_scope_and_registry(self.cfg.get('default_scope')):
            return self._network.test_step(batch)

    def _prediction(
        self,
        image: Array,
        labels: Tensor,
        scores: Tensor,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> Prediction:
        for values in (scores, *([] if boxes is None else [boxes])):
            _check_finite(values)
        kept = slice(None) if self._chosen is None else np.isin(labels.cpu(), self._chosen)
        found: list[Any] = [
            None if value is None else value.cpu().numpy()[kept]
            for value in (labels, scores, boxes, masks)
        ]
        return Prediction(self.task, image, self.classes, self.palette, *found)

    # Segmentation

    def _segmentation(
        self, image: Array, labels: Tensor, scores: Tensor | None = None
    ) -> Prediction:
        no_class = no_class_label(len(self.classes))
        array = labels.cpu().numpy().astype(np.min_scalar_type(no_class))
        probabilities = None if scores is None else scores.cpu().numpy()
        if self._chosen is not None:
            left_out = ~np.isin(array, self._chosen)
            array[left_out] = no_class
            if probabilities is not None:
                probabilities[left_out] = 0
        return Prediction(self.task, image, self.classes, self.palette, array, probabilities)

    def _logits(self, output: Tensor) -> Tensor:
        """Return logits `(C, h, w)`, which can be resized, from what mmseg returns."""
        if len(output) > 1:
            return output
        logits = torch.logit(output.float(), eps=1e-6)  # one channel is a probability by then
        return torch.cat([torch.zeros_like(logits), logits])

    def _decided(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class of each pixel and its probability, `(H, W)`, of logits `(C, H, W)`."""
        best, labels = logits.max(dim=0)
        head = self.model.decode_head
        if isinstance(head, nn.ModuleList):  # a cascade
            head = head[-1]
        if head.out_channels == 1:  # compared with a threshold, perhaps not 0.5
            labels = (logits.softmax(dim=0)[1] > head.threshold).long()
            best = logits.gather(0, labels[None])[0]
        _check_finite(best)
        return labels.short(), (best - logits.logsumexp(dim=0)).exp()

    def _resized(self, output: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Resize what mmseg returns to an image's height and width, and decide its classes."""
        logits = self._logits(output)
        rows = max(1, _NUMBERS // (len(logits) * shape[1]))
        pieces = (
            _resize_rows(logits, first, min(first + rows, shape[0]), shape, self._corners)
            for first in range(0, shape[0], rows)
        )
        labels, scores = zip(*map(self._decided, pieces), strict=True)
        return torch.cat(labels), torch.cat(scores)

    @property
    def _corners(self) -> bool:
        return bool(self.model.align_corners)

    def _blend_tiles(self, image: Array) -> tuple[Tensor, Tensor]:
        """Segment an image window by window; return each pixel's class and probability, `(H, W)`.

        Of a window's probabilities, those that no later window adds to are decided at once. Those
        on its right wait for the next window, those at its bottom for the next row of windows.
        """
        assert self.tile is not None
        height, width = (min(self.tile, side) for side in image.shape[:2])
        tops, lefts = (_starts(side, self.tile) for side in image.shape[:2])
        labels = torch.empty(image.shape[:2], dtype=torch.int16)
        probabilities = torch.empty(image.shape[:2])
        above: list[Tensor] = []  # what waits at the bottom of the last row, column by column
        for top, next_top in itertools.pairwise([*tops, image.shape[0]]):
            below: list[Tensor] = []
            right = None
            windows = self._window_scores(image, top, lefts, height, width)
            for i, (left, next_left) in enumerate(itertools.pairwise([*lefts, image.shape[1]])):
                scores = next(windows)
                if right is not None:
                    scores[:, :, : right.shape[2]] += right
                done, right = scores.split([next_left - left, width - (next_left - left)], dim=2)
                if above:
                    done[:, : above[i].shape[1]] += above[i]
                part = np.s_[top:next_top, left:next_left]
                labels[part], probabilities[part] = self._decided(done[:, : next_top - top].log())
                below.append(done[:, next_top - top :].clone())
                right = right.clone()
            above = below
        return labels, probabilities

    def _window_scores(
        self, image: Array, top: int, lefts: Sequence[int], height: int, width: int
    ) -> Iterator[Tensor]:
        """Yield the weighted probabilities `(C, height, width)` of windows that start in a row."""
        assert self.tile is not None
        weights = [_ramp(side, self.tile // 4) for side in (height, width)]
        pipeline: Any = self._prepare
        # Windows keep the resolution of the image.
        prepare = Compose([s for s in pipeline.transforms if 'Resize' not in type(s).__name__])
        for batch in _batches(lefts, self.batch_size):
            windows = [image[top : top + height, left : left + width] for left in batch]
            prepared = [prepare(_results(window)) for window in windows]
            for output in self._test_step(prepared):
                scores = functional.interpolate(
                    self._logits(output.seg_logits.data)[None].float(),
                    (height, width),
                    mode='bilinear',
                    align_corners=self._corners,
                )[0].softmax(dim=0)
                scores *= weights[0].to(scores)[:, None] * weights[1].to(scores)
                yield scores

    def _indices(self, names: Sequence[str] | None) -> list[int] | None:
        if names is None:
            return None
        if isinstance(names, str):
            raise TypeError(f'classes must be a list of names, but got {names!r}: take [{names!r}]')
        if not names:
            raise ValueError('classes is empty: name one class or more')
        if unknown := [name for name in names if name not in self.classes]:
            raise ValueError(
                f'unknown classes {join_first(unknown)}: the model has '
                f'{join_first(self.classes, 200)}'
            )
        return [i for i, name in enumerate(self.classes) if name in names]  # two may share one


def _check_finite(values: Tensor) -> None:
    if not values.isfinite().all():
        raise FloatingPointError('what it computes is NaN or infinite')


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _starts(length: int, window: int) -> list[int]:
    """Return where windows start that cover a length and overlap by a quarter or more."""
    if length <= window:
        return [0]
    count = -(-(length - window) // (window - window // 4)) + 1
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


def _ramp(length: int, overlap: int) -> Tensor:
    """Return weights that rise from the ends of a window to 1 over its overlap."""
    distance = torch.arange(length).minimum(torch.arange(length - 1, -1, -1)) + 1
    return (distance / (overlap + 1)).clamp(max=1)


def _resize_rows(
    scores: Tensor, first: int, end: int, shape: Sequence[int], corners: bool
) -> Tensor:
    """Return rows `first` to `end` of a map resized to a shape, `(C, end - first, W)`, bilinear."""
    if (first, end) != (0, shape[0]):  # the rows, by the definition of the resize
        height = scores.shape[1]
        y = torch.arange(first, end, device=scores.device, dtype=torch.float64)
        if corners:
            y = y * (height - 1) / max(1, shape[0] - 1)
        else:
            y = ((y + 0.5) * height / shape[0] - 0.5).clamp(min=0)
        upper = y.long().clamp(max=height - 1)
        lower = (upper + 1).clamp(max=height - 1)
        scores = torch.lerp(scores[:, upper], scores[:, lower], (y - upper).to(scores)[:, None])
    return functional.interpolate(
        scores[None], (end - first, shape[1]), mode='bilinear', align_corners=corners
    )[0]


# Preprocessing

_Loader = Callable[[Any], tuple[Array, dict[str, Any]]]
_Preparation = Callable[[dict[str, Any]], dict[str, Any]]


def _preprocessing(cfg: Config, task: str, tta: bool) -> tuple[_Loader, _Preparation]:
    """Return a function that reads an image, and the pipeline that prepares it."""
    dataset = unwrapped_dataset(cfg) or {}
    if task == 'classification' and 'transform' in dataset:
        transform = create_transform(**dataset['transform'], normalize=False)

        def prepare(results: dict[str, Any]) -> dict[str, Any]:
            rgb = np.ascontiguousarray(results['img'][:, :, ::-1])
            return dict(inputs=transform(Image.fromarray(rgb)), data_samples=None)

        return _read, prepare
    pipeline = cfg.tta_pipeline if tta else dataset.get('pipeline') or cfg.get('test_pipeline')
    if not pipeline:
        raise ValueError(f'{cfg.filename} has no test pipeline, which prepares the images')
    loader, *steps = copy.deepcopy(list(pipeline))
    if (
        type_name(loader) in ('LoadImageFromFile', 'LoadImageFromNDArray')
        and loader.get('color_type', 'color') == 'color'
        and loader.get('imdecode_backend') != 'tifffile'
    ):
        return _read, Compose(_without_annotations(steps))
    # Images that only the config's own loader reads, of more bands for example.
    load_own = TRANSFORMS.build(loader)

    def read(source: Any) -> tuple[Array, dict[str, Any]]:
        if not isinstance(source, str | Path):
            return _read(source)
        try:
            results = load_own({**_results(), 'img_path': str(source)})
        except Exception as e:  # broken bytes raise errors of many kinds
            raise InputError(f'{source} cannot be read: {type(e).__name__}: {e}') from e
        return _displayed(results['img']), results

    return read, Compose(_without_annotations(steps))


def _read(source: Any) -> tuple[Array, dict[str, Any]]:
    image = read_image(source)
    return image, _results(image, str(source) if isinstance(source, str | Path) else '')


def _results(image: Array | None = None, path: str = '') -> dict[str, Any]:
    """Return what pipelines start from: the image in OpenCV's order of channels."""
    # Detectors ask for the scale, also after pipelines that do not resize.
    results: dict[str, Any] = dict(img_path=path, img_id=0, scale_factor=(1.0, 1.0))
    if image is not None:
        shape = image.shape[:2]
        bgr = np.ascontiguousarray(image[:, :, ::-1])
        results |= dict(img=bgr, img_shape=shape, ori_shape=shape)
    return results


def _displayed(image: Array) -> Array:
    """Return an RGB picture of an image with any number and range of bands."""
    image = image.astype(np.float32).reshape(*image.shape[:2], -1)
    image = image[:, :, 2::-1] if image.shape[2] > 2 else image[:, :, :1]
    low, high = image.min(), image.max()
    image = (image - low) * (255 / max(high - low, 1e-6))
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)), np.uint8)


def _without_annotations(steps: Iterable[Any]) -> list[Any]:
    """Leave the loading of annotations out of a pipeline, in the views of `TestTimeAug`, too."""
    kept = []
    for step in steps:
        if isinstance(step, Mapping) and 'Annotations' in str(step.get('type')):
            continue
        if isinstance(step, Mapping) and 'transforms' in step:
            views = [
                _without_annotations(v) if isinstance(v, list) else v for v in step['transforms']
            ]
            step = dict(step, transforms=[view for view in views if view != []])
        kept.append(step)
    return kept


def in_parallel(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any], ahead: int
) -> Iterator[Any]:
    """Yield a function's results in the order of items, computed up to `ahead` in advance."""
    running: deque[Future[Any]] = deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f'an image ({type(source).__name__})'
