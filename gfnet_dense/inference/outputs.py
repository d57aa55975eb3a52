"""Predictions written to files as they come."""

import csv
import fcntl
import io
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gfnet_dense.data.coco import read_file
from gfnet_dense.data.errors import join_first
from gfnet_dense.serialization import write_whole

from .images import Array
from .inputs import Input
from .loading import find_test_data, type_name, unwrapped_dataset
from .prediction import Prediction, no_class_label
from .predictor import Predictor

_logger = logging.getLogger(__name__)

_TOP = 5  # classes of an image in a table
_RECORDS = '.records.jsonl'
_ORIGIN = '.made_by.json'  # what made the results; older ones beside it are of something else
_LOCK = '.in_use'
_TABLES = ('predictions.csv', 'predictions.json', 'images.json')
_JPEG_SIDE = 65_500  # the longest that a JPEG can have


class OutputError(ValueError):
    """The output folder is in use, or holds files that the run must not overwrite."""


class Outputs:
    """A folder of results. Every file in it is there when it is whole.

    - Segmentation: `labels/`, class indices as grey PNG.
    - Detection: `predictions.json`, COCO's format of results, and `images.json`, the image and
      category behind each id. These are the config's own where its annotation file is
      there and has the image.
    - Classification: `predictions.csv`, the five most probable classes of each image.
    - All: `overlays/`, pictures.

    Args:
        folder: The folder. :meth:`open` creates it if it is missing.
        predictor: The model.
        opacity: See :meth:`Prediction.draw`.
        as_annotations: Write labels of segmentation in the coding of the config's annotations,
            that is, before `reduce_zero_label` and a change of classes.
        resume: Keep the results that are there, if the same model and options made them from the
            same files. Without this, tables are removed at the start, and labels and overlays of
            the same names are replaced.

    Raises:
        ValueError: If the config does not say how its annotations are coded.
    """

    def __init__(
        self,
        folder: Path,
        predictor: Predictor,
        *,
        opacity: float = 0.5,
        as_annotations: bool = False,
        resume: bool = False,
    ) -> None:
        self.folder = folder
        self.task = predictor.task
        self.opacity = opacity
        self._coding = _annotation_coding(predictor) if as_annotations else None
        self._origin = predictor.origin() | dict(opacity=opacity, as_annotations=as_annotations)
        self._resume = resume
        self._records = folder / _RECORDS
        # From the name of an input to the `_identity` of the file that its results are of.
        self._sources: dict[str, list[Any]] = {}
        detects = self.task in ('detection', 'instance segmentation')
        self._coco = _CocoNumbers(predictor) if detects else None
        self._next_id = max(self._coco.images.values(), default=0) + 1 if self._coco else 1

    @contextmanager
    def open(self) -> Iterator[None]:
        """Prepare the folder, and keep other processes from writing to it within the block.

        Raises:
            OutputError: If the folder holds files with the names of results that no prediction
                wrote, another process writes to it, or another model or other options made the
                results to keep.
            OSError: If the folder cannot be written to.
        """
        self._check_owner()
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open('w') as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f'another prediction writes to {self.folder}: wait for its end, or choose '
                    'another output folder (--out)'
                ) from None
            except OSError as e:  # some network file systems have no locks
                _logger.warning('%s cannot be locked: %s', self.folder, e)
            if not (self._resume and self._has_origin()):
                for name in (_RECORDS, *_TABLES):  # tables of another model must not stay
                    (self.folder / name).unlink(missing_ok=True)
                self._write_lines(_ORIGIN, iter([json.dumps(self._origin)]))
            self._open_records()
            yield

    def keep(self, source: Input) -> bool:
        """Return whether an input has results. If not, forget those of another file of its name."""
        name, identity = str(source.name), _identity(source.path)
        files = [self.picture(source)]
        if self.task == 'segmentation' and not source.is_video:
            files.append(self._labels(source.name))
        if self._sources.get(name) == identity and all(file.exists() for file in files):
            return True
        if name in self._sources:  # the old record must not stand for new files
            self._append(dict(input=name, source=None))
        self._sources[name] = identity
        return False

    def _check_owner(self) -> None:
        if (self.folder / _ORIGIN).exists():
            return
        for name in ('labels', 'overlays', *_TABLES):
            if (path := self.folder / name).exists():
                raise OutputError(
                    f'{path} is not a result of gfnet predict, which could overwrite it: '
                    'choose another output folder (--out)'
                )

    def _has_origin(self) -> bool:
        """Return whether the results that are there have an origin, which must be this one."""
        try:
            before = json.loads((self.folder / _ORIGIN).read_text())
        except FileNotFoundError:
            return False
        except ValueError:
            _logger.warning('%s does not say what made its results: they are replaced', self.folder)
            return False
        if differing := [key for key, value in self._origin.items() if before.get(key) != value]:
            raise OutputError(
                f'{self.folder} holds results of other {join_first(differing)}: choose another '
                'folder, or replace them without --resume'
            )
        return True

    def picture(self, source: Input) -> Path:
        """Return the path of the picture or video over an input."""
        name = source.name.name
        if not source.is_video:
            name += '.jpg'
        elif source.path.suffix.lower() != '.mp4':
            name += '.mp4'
        return self.folder / 'overlays' / source.name.with_name(name)

    def write(self, source: Input, prediction: Prediction) -> dict[str, Any]:
        """Write the files of an image, and return its record. Several threads may call this.

        Raises:
            OSError: If they cannot be written.
        """
        path = self.picture(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in (path, self._labels(source.name)):  # else new ones could stand beside old ones
            old.unlink(missing_ok=True)
        picture = prediction.draw(self.opacity)
        picture.thumbnail((_JPEG_SIDE, _JPEG_SIDE))
        with write_whole(path) as file:
            picture.save(file, 'JPEG', quality=92, subsampling=0)
        return self.write_labels(source, prediction)

    def write_labels(
        self, source: Input, prediction: Prediction, frame: int | None = None
    ) -> dict[str, Any]:
        """Write the files of an image or of a frame of a video, but no picture; return the record.

        It may be called by several threads.
        """
        name = source.name if frame is None else source.name / f'{frame:06}'
        file = str(source.path) if frame is None else f'{source.path}/{frame:06}'
        if self.task == 'segmentation':
            if self._coding is not None:
                prediction = replace(prediction, labels=self._coding[prediction.labels])
            prediction.save(self._labels(name))
        height, width = prediction.image.shape[:2]
        found = prediction.objects()
        return dict(
            input=str(source.name),
            source=self._sources[str(source.name)],
            file=file,
            picture=str(self.picture(source).relative_to(self.folder)),
            width=width,
            height=height,
            found=found if self._coco else found[:_TOP],
        )

    def add(self, record: dict[str, Any]) -> None:
        """Record what is found in an image. One thread calls this."""
        number = self._coco and self._coco.images.get(os.path.abspath(record['file']))
        if number is None:
            number = self._next_id
            self._next_id += 1
        self._append(dict(record, id=number))

    def _append(self, record: dict[str, Any]) -> None:
        with self._records.open('a', encoding='utf-8') as file:
            file.write(json.dumps(record) + '\n')

    def finish(self) -> list[Path]:
        """Write the tables of all images, and return where the results are."""
        written = [self.folder / 'overlays']
        if self.task == 'segmentation':
            return [self.folder / 'labels', *written]
        if self._coco is None:
            self._write_lines('predictions.csv', self._csv())
            return [self.folder / 'predictions.csv', *written]
        numbers = self._coco.categories
        self._write_lines('predictions.json', _json_list(self._coco_results(numbers)))
        categories = [
            dict(id=i, name=name) for i, name in zip(numbers, self._coco.classes, strict=True)
        ]
        images = _json_list(
            dict(id=r['id'], file_name=r['file'], width=r['width'], height=r['height'])
            for r in self._read_records()
        )
        self._write_lines('images.json', _wrapped('{"images": ', images, categories))
        return [self.folder / 'predictions.json', self.folder / 'images.json', *written]

    def _labels(self, name: Path) -> Path:
        return self.folder / 'labels' / name.with_name(f'{name.name}.png')

    # Records: one line an image, from which a later run resumes and the tables are made

    def _open_records(self) -> None:
        """Keep the records of what is there, and none of a video that is not there whole."""
        self._sources = {line['input']: line['source'] for line in self._read_lines()}
        kept = {}
        with write_whole(self._records) as file:
            for record in self._read_records():
                file.write(f'{json.dumps(record)}\n'.encode())
                kept[record['input']] = record['source']
                self._next_id = max(self._next_id, record['id'] + 1)
        self._sources = kept

    def _read_records(self) -> Iterator[dict[str, Any]]:
        """Yield the records whose picture is there. A video that failed has none."""
        # An input `a` is called `a.jpg` once there is an `a.png`.
        names = {line['source'][0]: line['input'] for line in self._read_lines() if line['source']}
        for record in self._read_lines():
            source, name = record['source'], record['input']
            is_last = source and source == self._sources.get(name) and name == names[source[0]]
            if is_last and (self.folder / record['picture']).exists():
                yield record

    def _read_lines(self) -> Iterator[dict[str, Any]]:
        if self._records.exists():
            with self._records.open(encoding='utf-8') as file:
                for line in file:
                    # A killed run may leave a part of a line, and earlier versions noted no source.
                    if line.endswith('\n') and 'source' in (record := json.loads(line)):
                        yield record

    def _csv(self) -> Iterator[str]:
        names = [f'{key}_{i}' if i > 1 else key for i in range(1, _TOP + 1) for key in _COLUMNS]
        yield _csv_row(['file', *names])
        for record in self._read_records():
            values = [item[key] for item in record['found'] for key in _COLUMNS]
            yield _csv_row([record['file'], *values])

    def _coco_results(self, numbers: list[int]) -> Iterator[dict[str, Any]]:
        for record in self._read_records():
            for item in record['found']:
                number = numbers[item.pop('label')]
                del item['class']
                yield dict(image_id=record['id'], category_id=number, **item)

    def _write_lines(self, name: str, lines: Iterator[str]) -> None:
        with write_whole(self.folder / name) as file:
            for line in lines:
                file.write(line.encode())


_COLUMNS = ('label', 'class', 'score')


class _CocoNumbers:
    """Numbers of images, by their paths, and of categories, as the config's annotations have them.

    Without an annotation file in COCO's format, both are numbered from 1.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.classes = predictor.classes
        self.images: dict[str, int] = {}
        self.categories = [i + 1 for i in range(len(self.classes))]
        dataset = find_test_data(predictor.cfg)
        file = Path(getattr(dataset, 'ann_file', '') or '')
        if file.suffix != '.json' or not file.is_file():
            return
        content = read_file(str(file))
        if not isinstance(content, dict) or 'images' not in content:
            return
        numbers = {item['name'].strip(): item['id'] for item in content.get('categories', [])}
        if set(self.classes) <= set(numbers):
            self.categories = [numbers[name] for name in self.classes]
            folder = dataset.data_prefix.get('img') or ''
            self.images = {
                os.path.abspath(os.path.join(folder, i['file_name'])): i['id']
                for i in content['images']
            }


def _annotation_coding(predictor: Predictor) -> Array:
    """Return the value in annotations for each class index, in an array that maps all labels."""
    if predictor.task != 'segmentation':
        raise ValueError(f'annotations of {predictor.task} have no coding of pixels')
    dataset = find_test_data(predictor.cfg)
    if dataset is None:
        raise ValueError(f'{predictor.cfg.filename} has no data set, whose coding could be used')
    no_class = no_class_label(len(predictor.classes))
    values = np.arange(no_class + 1)
    for step in unwrapped_dataset(predictor.cfg).pipeline:
        if type_name(step) == 'LoadCodedAnnotations':
            if any(np.ndim(value) for value in step['values']):
                raise ValueError('annotations of this data set are colours: take the overlays')
            codes = [*step['values']]
            values[: len(codes)] = codes
            # A code of a class must not stand for pixels without one.
            values[no_class] = next(v for v in (255, *range(65536)) if v not in codes)
    # As mmseg reads them: first 0 becomes the highest value and all others one less, then the
    # classes that are used are numbered anew.
    for old, new in (getattr(dataset, 'label_map', None) or {}).items():
        if new < len(predictor.classes):
            values[new] = old
    if getattr(dataset, 'reduce_zero_label', False):
        values = (values + 1) % len(values)
    return values.astype(np.min_scalar_type(values.max()))


def _identity(path: Path) -> list[Any]:
    """Return what changes when a path stands for another file, or for one that was changed."""
    try:
        stat = path.stat()
    except OSError:  # reading the file will fail, too
        return [os.path.abspath(path)]
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]


def _csv_row(values: list[Any]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(values)
    return line.getvalue()


def _json_list(items: Iterator[dict[str, Any]]) -> Iterator[str]:
    separator = '[\n'
    for item in items:
        yield separator + json.dumps(item)
        separator = ',\n'
    yield '[]' if separator == '[\n' else '\n]\n'


def _wrapped(start: str, images: Iterator[str], categories: list[dict[str, Any]]) -> Iterator[str]:
    yield start
    yield from images
    yield f', "annotations": [], "categories": {json.dumps(categories)}}}\n'
