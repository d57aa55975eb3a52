"""From files to files: what `gfnet predict` does."""

import errno
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from gfnet_dense.data.errors import join_first

from .images import InputError
from .inputs import Input, Inputs
from .outputs import Outputs
from .prediction import Prediction
from .predictor import Predictor, in_parallel
from .video import read_video, write_video

_WRITERS = 4  # threads, and as many files wait for each
_WAITING = 2**29  # bytes of the results that wait
# No later result could be written, either.
_DISK_ERRORS = errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS


class Report(NamedTuple):
    """What came out of :func:`predict_files`.

    Attributes:
        images: How many images and frames were predicted.
        kept: How many inputs were left out because their results were there.
        seconds: How long it took.
        failures: What is wrong with each input that failed and each folder that cannot be listed,
            by its path.
        written: Where the results are.
    """

    images: int
    kept: int
    seconds: float
    failures: dict[str, str]
    written: list[Path]

    def __str__(self) -> str:
        rate = self.images / max(self.seconds, 1e-9)
        speed = f'{rate:.1f}' if rate >= 1 else f'{rate:.2g}'
        kept = f', {self.kept} were there' if self.kept else ''
        lines = [f'{self.images} images in {self.seconds:.1f} s ({speed} images/s){kept}']
        lines += [f'  {path}' for path in self.written]
        if self.failures:
            lines.append(f'{len(self.failures)} inputs failed:')
            lines += [f'  {text}' for text in self.failures.values()]
        return '\n'.join(lines)


def predict_files(
    predictor: Predictor,
    arguments: Sequence[str],
    out: str | Path,
    *,
    opacity: float = 0.5,
    as_annotations: bool = False,
    resume: bool = False,
) -> Report:
    """Predict from images and videos, and write the results to a folder.

    Of the number of inputs the memory holds no more than their paths. Inputs that cannot be read,
    and those whose results cannot be drawn or written, are left out.

    Args:
        predictor: The model.
        arguments: See :class:`Inputs`.
        out: The folder, see :class:`Outputs`, as for the other arguments.
        opacity: Of colours over an image, 0 to 1.
        as_annotations: Write labels in the coding of the config's annotations.
        resume: Leave out inputs whose results are there, unless the input has changed since.

    Raises:
        ValueError: If there are no inputs, or an option does not fit the model.
        OutputError: See :meth:`Outputs.open`.
        OSError: If the disk is full, read-only or broken.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f'opacity must be from 0 to 1, but got {opacity}')
    if not arguments:
        raise ValueError('no inputs: name files or folders')
    inputs = Inputs(arguments, Path(out))
    total = inputs.count()
    if total == 0:
        reasons = [f'no images and no videos in {join_first(arguments)}', *inputs.failures.values()]
        raise ValueError('; '.join(reasons))
    if inputs.skipped:
        tqdm.write(
            f'{inputs.skipped} files are left out that are no images by their names: '
            f'{join_first(sorted(inputs.suffixes), 5)}'
        )
    outputs = Outputs(
        Path(out), predictor, opacity=opacity, as_annotations=as_annotations, resume=resume
    )
    with outputs.open():
        return _Run(predictor, outputs).over(inputs, total)


class _Run:
    def __init__(self, predictor: Predictor, outputs: Outputs) -> None:
        self.predictor, self.outputs = predictor, outputs
        self.images = self.kept = 0
        self.failures: dict[str, str] = {}
        self.videos: list[Input] = []
        self.sources: deque[Input] = deque()  # those on their way through the network

    def over(self, inputs: Inputs, total: int | None) -> Report:
        start = time.monotonic()
        with ThreadPoolExecutor(_WRITERS, 'writer') as pool:
            with tqdm(total=total, unit=' images', smoothing=0.05) as self.bar:
                self._predict_images(inputs, pool)
            for video in self.videos:
                try:
                    self._predict_video(video, pool)
                except Exception as e:
                    if isinstance(e, OSError) and e.errno in _DISK_ERRORS:
                        raise
                    self._fail(video, e)
        seconds = time.monotonic() - start
        self.failures |= inputs.failures
        written = self.outputs.finish()
        return Report(self.images, self.kept, seconds, self.failures, written)

    def _predict_images(self, inputs: Inputs, pool: ThreadPoolExecutor) -> None:
        writing: deque[tuple[Input, int, Future[dict[str, Any]]]] = deque()

        def finish_first() -> None:
            source, _, future = writing.popleft()
            try:
                self.outputs.add(future.result())
            except Exception as e:  # drawing or encoding this one result fails
                if isinstance(e, OSError) and e.errno in _DISK_ERRORS:
                    raise
                self._fail(source, e)
            else:
                self.images += 1

        for _, result in self.predictor.stream(self._paths(inputs)):
            source = self.sources.popleft()
            if isinstance(result, Exception):
                self._fail(source, result)
            else:
                future = pool.submit(self.outputs.write, source, result)
                writing.append((source, result.nbytes, future))
            self.bar.update()
            # What is written is recorded soon, so that a killed run loses little.
            while writing and (
                writing[0][2].done()
                or len(writing) > 2 * _WRITERS
                or sum(size for _, size, _ in writing) > _WAITING
            ):
                finish_first()
        while writing:
            finish_first()

    def _paths(self, inputs: Inputs) -> Iterator[Path]:
        for source in inputs:
            if self.outputs.keep(source):
                self.kept += 1
            elif source.is_video:
                self.videos.append(source)
            else:
                self.sources.append(source)
                yield source.path
                continue
            self.bar.update()

    def _predict_video(self, source: Input, pool: ThreadPoolExecutor) -> None:
        rate, count, frames = read_video(source.path)
        path = self.outputs.picture(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it says that the results of all frames are there
        results = (result for _, result in self.predictor.stream(frames))

        def write(
            numbered: tuple[int, Prediction | Exception],
        ) -> tuple[dict[str, Any], Image.Image]:
            number, result = numbered
            if isinstance(result, Exception):
                raise InputError(f'{source.path}, frame {number}: {result}')
            record = self.outputs.write_labels(source, result, number)
            return record, result.draw(self.outputs.opacity)

        bar = tqdm(total=count or None, unit=' frames', desc=source.path.name, smoothing=0.05)
        with bar, write_video(path, rate) as add:
            ahead = 1 if self.outputs.task == 'instance segmentation' else 2 * _WRITERS
            for record, picture in in_parallel(pool, write, enumerate(results, 1), ahead):
                self.outputs.add(record)
                add(picture)
                self.images += 1
                bar.update()

    def _fail(self, source: Input, error: Exception) -> None:
        text = str(error)
        if not isinstance(error, InputError | RuntimeError | OSError):
            text = f'{type(error).__name__}: {text}'
        if str(source.path) not in text:
            text = f'{source.path}: {text}'
        self.failures[str(source.path)] = text
