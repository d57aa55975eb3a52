"""What the files of a data set hold, read through its own pipeline, once.

Images and labels are loaded by the steps of the data set's pipeline that load them, so that what
is read here is what the model will see. Verdicts are kept in the user's cache and hold as long as
the files and the relevant part of the config stay the same.
"""

import hashlib
import io
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine import fileio
from PIL import Image
from tqdm import tqdm

from gfnet_dense.serialization import write_whole

from .errors import DataError, not_permitted

_VERSION = 2  # raise it when the same files give another result
_MOST = 200_000  # files; of larger data sets as many are read, evenly spread
_SAMPLED = 64  # images that the pipeline decodes, besides Pillow
_ORIENTATION = 0x0112  # of EXIF
_DARK = 4096  # an image of 16 bits with lower values alone uses at most 12 of them
_AT_ONCE = 4096  # files in the queue of the threads
_THREADS = 16
_PIXELS = 2**28  # in all threads together; a pixel takes about 10 bytes while it is read
# Packages whose transforms run in several threads, and those whose versions decide what is read.
_LIBRARIES = {'mmcv', 'mmdet', 'mmseg'}
_THREAD_SAFE = {*_LIBRARIES, __name__.partition('.')[0]}
_VERSIONS = 'PIL', 'cv2', 'mmcv', 'mmdet', 'mmseg'
_DEEPEST = 6  # levels of what transforms hold
_MASK_SIZE = 'mask size'  # a kind of fault
_SECONDS = 3  # without a progress bar
_WORTH_REMEMBERING = 1.0  # seconds; what takes less is read again


@dataclass
class Contents:
    """What a data set holds; the keys are texts, as in JSON.

    Attributes:
        samples: Number of samples.
        read: How many of them were read.
        sizes: Images of each size, `'WIDTHxHEIGHT'`, as loaded.
        modes: Images of each mode of Pillow, such as `'RGB'`, or array type.
        pixels: Pixels of each label, after `reduce_zero_label` and the label map.
        images: Images with each label, or with objects of each class.
        examples: A file with each label.
        objects: Objects of each class.
        crowds: Objects marked as crowds, which training ignores.
        outside: Boxes that leave their image.
        empty: Images without objects, or without labelled pixels.
        faults: What is wrong with files: the text about the first one of each kind.
        notes: What a person should see of files, in the same way.
        counts: How many files there are of each kind of fault or note.
    """

    samples: int
    read: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    pixels: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    objects: Counter[str] = field(default_factory=Counter)
    crowds: int = 0
    outside: int = 0
    empty: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> 'Contents':
        """Return what `vars` and JSON made of it."""
        contents = cls(**values)
        for name in ('sizes', 'modes', 'pixels', 'images', 'objects', 'counts'):
            setattr(contents, name, Counter(getattr(contents, name)))
        return contents


class Sample(NamedTuple):
    """What was read of one sample; None is what it does not have."""

    size: tuple[int, int] | None = None
    mode: str | None = None
    labels: dict[int, int] | None = None
    seg_map: str = ''
    fault: tuple[str, str] | None = None
    note: tuple[str, str] | None = None


def parts(dataset: Any) -> Iterator[Any]:
    """Yield the data sets inside wrappers."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset
    else:
        for part in inner:
            yield from parts(part)


def remember(
    part: Any, use: str, options: Any, compute: Callable[[], tuple[Any, bool]]
) -> dict[str, Any]:
    """Return what was computed for a data set, from the cache if nothing has changed.

    Args:
        part: A data set without wrappers.
        use: `'train'`, `'val'` or `'test'`.
        options: What else the result depends on.
        compute: Returns what JSON can hold, and whether to remember it.
    """
    key, cache = _key(part, [use, options]), _cache_file(part, use)
    if key:
        try:
            remembered = json.loads(cache.read_text())
            if remembered['key'] == key:
                return remembered['result']
        except (OSError, ValueError, KeyError, TypeError):
            pass  # there is none, or one of another version
    begun = time.monotonic()
    result, keep = compute()
    if key and keep and time.monotonic() - begun > _WORTH_REMEMBERING:
        try:
            text = json.dumps(dict(key=key, result=result))
            cache.parent.mkdir(parents=True, exist_ok=True)
            with write_whole(cache) as file:
                file.write(text.encode())
        except (OSError, TypeError):
            # The home cannot be written to, or a data set has values of a type of its own. The
            # files are read again next time.
            pass
    return result


def _cache_file(part: Any, use: str) -> Path:
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    name = repr([
        type(part).__name__, use, os.path.abspath(getattr(part, 'data_root', None) or ''),
        getattr(part, 'data_prefix', None), getattr(part, 'ann_file', None),
    ])  # fmt: skip
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return Path(base, 'gfnet-dense', 'data_checks', f'{digest}.json')


def _key(part: Any, options: Any) -> str | None:
    """Return what a verdict depends on; None if it cannot be known, as for remote files."""
    if getattr(part, 'backend_args', None):
        return None
    names = 'metainfo', 'ignore_index', 'filter_cfg', 'img_suffix', '_indices'
    versions = [getattr(sys.modules.get(name), '__version__', None) for name in _VERSIONS]
    values = [_described(getattr(part, name, None)) for name in names]
    options = [_VERSION, versions, options, _described(_steps(part)), values]
    digest = hashlib.sha256(repr(options).encode())
    ann_file, folders = getattr(part, 'ann_file', None), set()
    try:
        if isinstance(ann_file, str) and ann_file:
            _add_status(digest, ann_file)
        for i in range(len(part)):
            info = part.get_data_info(i)
            for name in ('img_path', 'seg_map_path'):
                if isinstance(info.get(name), str):
                    _add_status(digest, info[name])
                    folders.add(os.path.dirname(info[name]))
        for folder in sorted(folders):  # changes when a file is added or renamed
            _add_status(digest, folder)
    except OSError:
        return None
    return digest.hexdigest()


def _add_status(digest: Any, path: str) -> None:
    status = os.stat(path)
    times = status.st_mtime_ns, status.st_ctime_ns
    digest.update(f'{path} {status.st_size} {times} {status.st_ino}\n'.encode())


def _described(value: Any, depth: int = 0) -> Any:
    """Return what `repr` writes in the same way in each process, without addresses in memory."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    if depth == _DEEPEST:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return [(_described(k, depth + 1), _described(v, depth + 1)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [_described(item, depth + 1) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(_described(item, depth + 1)) for item in value)
    if isinstance(name := getattr(value, '__qualname__', None), str):  # of a class or function
        return value.__module__, name
    held = getattr(value, '__dict__', {})
    if not held and getattr(type(value), '__repr__', None) is not object.__repr__:
        return repr(value)
    return type(value).__module__, type(value).__qualname__, _described(held, depth + 1)


def _steps(part: Any) -> list[Any]:
    return list(getattr(getattr(part, 'pipeline', None), 'transforms', None) or ())


def read_contents(part: Any, use: str = 'train', ignored: Sequence[int] = (255,)) -> Contents:
    """Read what a data set holds, in several threads if its transforms allow that.

    Args:
        part: A data set without wrappers, whose files exist.
        use: `'train'`, `'val'` or `'test'`; masks that are evaluated must have their image's size.
        ignored: Labels that are not counted as content.
    """
    count = len(part)
    contents = Contents(count)
    for i in range(count):
        _add_objects(contents, part.get_data_info(i))
    with keep_random_state():
        load_image, load_labels, same_size = loaders(part, part.get_data_info(0), use)
        if load_image is None:
            return contents
        most = _SAMPLED if getattr(part, 'backend_args', None) else _MOST
        chosen = np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()
        decoded = {*np.linspace(0, count - 1, min(count, _SAMPLED)).astype(int).tolist()}

        def read(i: int) -> Sample:
            info = part.get_data_info(i)
            try:
                content = fileio.get(info['img_path'], getattr(part, 'backend_args', None))
            except OSError:
                content = b''  # a transform of one's own may load it from elsewhere
            return _read_sample(info, content, load_image, load_labels, i in decoded, same_size)

        place = getattr(part, 'data_root', None) or type(part).__name__
        bar = tqdm(total=len(chosen), desc=f'checking {place}', leave=False, delay=_SECONDS)
        threads = _thread_count(part, chosen, load_image, load_labels)
        misfit = None
        with bar, ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(chosen), _AT_ONCE):
                indices = chosen[start : start + _AT_ONCE]
                for i, sample in zip(indices, pool.map(read, indices), strict=True):
                    _add(contents, sample, ignored)
                    bar.update()
                    if misfit is None and sample.fault and sample.fault[0] == _MASK_SIZE:
                        misfit = i
        if use == 'train' and misfit is not None and _become_equal(part, misfit):
            contents.notes[_MASK_SIZE] = (
                f'{contents.faults.pop(_MASK_SIZE)} if it should have the size of its image. The '
                'pipeline brings both to one size'
            )
    return contents


def _thread_count(part: Any, chosen: Sequence[int], *loading: Any) -> int:
    """Return in how many threads to read.

    Transforms of others may hold what threads cannot share, such as an open file. Large images in
    many threads take all memory.
    """
    steps = [step for load in loading for step in getattr(load, 'steps', ())]
    if any(type(step).__module__.partition('.')[0] not in _THREAD_SAFE for step in steps):
        return 1
    probed = np.linspace(0, len(chosen) - 1, min(len(chosen), 8)).astype(int)
    largest = max(_pixels(part.get_data_info(chosen[i])['img_path']) for i in probed)
    fitting = max(1, _PIXELS // max(1, largest))
    return min(_THREADS, len(os.sched_getaffinity(0)), fitting)


def _pixels(path: str) -> int:
    """Return how many pixels an image has, from its first bytes; 0 if they do not tell."""
    try:
        with Image.open(path) as file:
            return file.width * file.height
    except Image.DecompressionBombError:
        return _PIXELS
    except Exception:  # a remote or a broken file, or one that Pillow cannot read
        return 0


def _become_equal(part: Any, index: int) -> bool:
    """Tell whether the pipeline resizes an image and its labels of another size to one size.

    Crops and padding do not count: they make sizes equal and leave the labels in a wrong place.
    """
    results: Any = _copy(part.get_data_info(index))
    equal = False
    try:
        for step in _steps(part):
            if any(word in type(step).__name__ for word in ('Crop', 'Pad', 'Pack')):
                break
            results = step(results)
            if 'img' in results and 'gt_seg_map' in results:
                equal = results['img'].shape[:2] == results['gt_seg_map'].shape[:2]
    except Exception:  # of any library
        return False
    return equal


def _add(contents: Contents, sample: Sample, ignored: Sequence[int]) -> None:
    contents.read += 1
    for found, finding in ((contents.faults, sample.fault), (contents.notes, sample.note)):
        if finding:
            found.setdefault(*finding)
            contents.counts[finding[0]] += 1
    if sample.size:
        contents.sizes['{}x{}'.format(*sample.size)] += 1
    if sample.mode:
        contents.modes[sample.mode] += 1
    if sample.labels is not None:
        for label, pixels in sample.labels.items():
            contents.pixels[str(label)] += pixels
            contents.images[str(label)] += 1
            contents.examples.setdefault(str(label), sample.seg_map)
        contents.empty += not sample.labels.keys() - {*ignored}


def _add_objects(contents: Contents, info: Mapping[str, Any]) -> None:
    """Count objects of detection and classes of classification, which need no file."""
    if (label := info.get('gt_label')) is not None and not isinstance(label, Sequence):
        contents.images[str(label)] += 1
    if (instances := info.get('instances')) is None:
        return
    used = [instance for instance in instances if not instance.get('ignore_flag')]
    labels = [str(instance['bbox_label']) for instance in used]
    contents.objects.update(labels)
    contents.images.update({*labels})
    contents.crowds += len(instances) - len(used)
    contents.empty += not used
    width, height = info.get('width', np.inf), info.get('height', np.inf)
    for instance in used:
        left, top, right, bottom = instance['bbox']
        # COCO's own boxes are rounded, and some leave the image by less than a pixel.
        # Coordinates of numpy compare to values that JSON cannot hold.
        contents.outside += bool(left < -1 or top < -1 or right > width + 1 or bottom > height + 1)


def loaders(
    part: Any, info: Mapping[str, Any], use: str
) -> tuple[Callable[..., Any] | None, '_Loading | None', bool]:
    """Return how the pipeline of a data set loads images and labels.

    Args:
        part: A data set without wrappers.
        info: Its first sample.
        use: As for :func:`read_contents`.

    Returns:
        A function from the info of a sample to its image, one to its label map, and whether both
        must have the same size. None where the pipeline loads no such thing.
    """
    if hasattr(part, 'load_image_for_checks'):
        return part.load_image_for_checks, None, False
    steps = _steps(part)
    # Data sets of detection have label maps, too, which their step loads after the image.
    has_labels = info.get('seg_map_path') is not None and 'reduce_zero_label' in info
    first = _find(steps, info, 'img')
    labels = next((i for i, step in enumerate(steps) if getattr(step, 'with_seg', False)), None)
    load_labels = None
    if has_labels and labels is not None:
        final = all(_is_known(step) for step in steps[labels:])
        load_labels = _Loading([steps[labels]], 'gt_seg_map', final)
    elif has_labels and (found := _find(steps, info, 'gt_seg_map')) is not None:
        labels, load_labels = found, _Loading(steps[: found + 1], 'gt_seg_map')
    # Steps between the two may bring the image to the size of the labels.
    same_size = use != 'train' or (first is not None and labels == first + 1)
    return None if first is None else _Loading(steps[: first + 1], 'img'), load_labels, same_size


def _is_known(step: Any) -> bool:
    return type(step).__module__.partition('.')[0] in (*_THREAD_SAFE, 'mmengine')


def _find(steps: Sequence[Any], info: Mapping[str, Any], key: str) -> int | None:
    """Return the index of the first step after which a sample has a key."""
    results: Any = _copy(info)
    for i, step in enumerate(steps):
        try:
            results = step(results)
        except Exception:  # the image at fault; whatever it is, this step was to load it
            return i if key == 'img' and i == 0 else None
        if not isinstance(results, Mapping):
            return None
        if key in results:
            return i
    return None


@dataclass(frozen=True)
class _Loading:
    """Steps of a pipeline, the last of which gives a sample a key."""

    steps: Sequence[Any]
    key: str
    final: bool = True  # no step of the user's follows, which may change labels

    def __call__(self, info: Mapping[str, Any]) -> Any:
        results: Any = _copy(info)
        for step in self.steps:
            results = step(results)
        return results[self.key]

    def option(self, name: str) -> Any:
        """Return an argument of the last step; None if it has none of this name."""
        return getattr(self.steps[-1], name, None)


def _option(load: Any, name: str) -> Any:
    return load.option(name) if isinstance(load, _Loading) else None


def _copy(info: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, list) else v for key, v in info.items()}


def _read_sample(
    info: Mapping[str, Any],
    content: bytes,
    load_image: Callable[..., Any],
    load_labels: '_Loading | None',
    decode: bool,
    same_size: bool,
) -> Sample:
    """Read the files of one sample.

    Args:
        info: The sample.
        content: The bytes of its image.
        load_image: As :func:`loaders` returns it.
        load_labels: As :func:`loaders` returns it.
        decode: Whether to load the image with `load_image`, too, and not with Pillow alone.
        same_size: Whether image and labels must have the same size.
    """
    path, size, mode, orientation, note = info['img_path'], None, None, 1, None
    backend = _option(load_image, 'imdecode_backend')
    in_colour = _option(load_image, 'color_type') == 'color'
    try:
        with Image.open(io.BytesIO(content)) as file:
            size, mode = file.size, file.mode
            orientation = file.getexif().get(_ORIENTATION) or 1
            file.draft(None, (1, 1))  # of JPEG an eighth of the pixels, after all of its bytes
            file.load()
            decode = decode or mode.startswith(('I', 'F'))
            if mode.startswith(('I', 'F')) and in_colour:
                if backend == 'pillow':
                    return Sample(size, mode, fault=('depth', _depth_fault(path, mode)))
                if mode != 'F' and (highest := np.asarray(file).max()) < _DARK:
                    note = 'dark', _dark_note(path, highest)
    except Exception as e:  # broken bytes raise errors of many kinds
        # OpenCV before 4.11 invents the missing part of a truncated file.
        if backend == 'cv2' and 'truncated' in str(e):
            return Sample(fault=('unreadable', _unreadable(path, e)))
        decode = True
    if decode or orientation != 1:
        stored = size
        try:
            image = np.asarray(load_image(info))
        except Exception as e:
            if mode in ('I', 'F'):
                return Sample(size, mode, fault=('depth', _depth_fault(path, mode)))
            return Sample(size, mode, fault=('unreadable', _unreadable(path, e)))
        size = image.shape[1], image.shape[0]
        mode = mode or f'{image.dtype} of shape (H, W{"".join(f", {n}" for n in image.shape[2:])})'
        followed = 'ignore_orientation' not in str(_option(load_image, 'color_type'))
        if followed and (orientation in (2, 3, 4) or (orientation != 1 and stored == size)):
            note = 'turned', _turned_note(path, orientation, isinstance(load_image, _Loading))
    fault = labels = None
    wanted = info.get('width'), info.get('height')
    if 'instances' in info and None not in wanted and size != wanted:
        fault = 'size', _size_fault(path, size, wanted, orientation)
    elif load_labels is not None:
        labels, fault = _read_labels(info, load_labels, size if same_size else None)
    return Sample(size, mode, labels, info.get('seg_map_path') or '', fault, note)


def _unreadable(path: str, error: Exception) -> str:
    if isinstance(error, DataError):  # it names the file and says what to do
        return str(error)
    if isinstance(error, PermissionError):
        return not_permitted(path)
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f'{path} cannot be read: {reason}: restore or remove it'


def _depth_fault(path: str, mode: str) -> str:
    if mode.startswith('I;16'):
        remedy = "set imdecode_backend='cv2', which keeps the upper 8 of 16 bits"
    else:
        remedy = 'convert the images to 8 or 16 bits, or load them with a transform of your own'
    return f'{path} has mode {mode} of Pillow, of which the pipeline makes no 8 bits: {remedy}'


def _dark_note(path: str, highest: int) -> str:
    return (
        f'{path} has 16 bits, values up to {highest} and not 65535: the pipeline keeps the upper 8 '
        'bits, which are nearly black. Scale the images'
    )


def _turned_note(path: str, orientation: int, by_pipeline: bool) -> str:
    if not by_pipeline:
        return (
            f'{path} has the EXIF orientation {orientation}, which training and tests leave aside, '
            'as timm does, and prediction follows: save the images turned'
        )
    return (
        f'{path} has the EXIF orientation {orientation}: OpenCV and Pillow turn images by it, and '
        'not their annotations. If annotations were drawn on the stored pixels, set '
        "color_type='color_ignore_orientation' of LoadImageFromFile in all pipelines"
    )


def _size_fault(path: str, size: Any, wanted: Any, orientation: int) -> str:
    text = (
        f'{path} is loaded with {size[0]}x{size[1]} pixels, but its annotations are for '
        f'{wanted[0]}x{wanted[1]}'
    )
    if orientation > 4 and size[::-1] == wanted:
        return (
            f'{text}: its EXIF orientation {orientation} turns it. Set '
            "color_type='color_ignore_orientation' of LoadImageFromFile in all pipelines if boxes "
            "were drawn on the stored pixels, 'color' if on the turned ones"
        )
    return f'{text}: correct width and height of the annotations, or restore the image'


def _read_labels(
    info: Mapping[str, Any], load: '_Loading', size: tuple[int, int] | None
) -> tuple[dict[int, int] | None, tuple[str, str] | None]:
    path = info['seg_map_path']
    try:
        labels = np.asarray(load(info))
    except Exception as e:
        return None, ('unreadable', _unreadable(path, e))
    if labels.ndim != 2:
        return None, (
            'colours',
            f'{path} has shape {labels.shape}, not one label per pixel: convert it to labels',
        )
    fault = None
    if size is not None and labels.shape[::-1] != size:
        fault = (
            _MASK_SIZE,
            f'{path} has {labels.shape[1]}x{labels.shape[0]} pixels, but its image is loaded with '
            f'{size[0]}x{size[1]}: correct the file',
        )
    if labels.dtype == np.uint8:
        # np.bincount would make a copy of 8 bytes a pixel.
        counts = Image.fromarray(labels).histogram()
        found = {label: count for label, count in enumerate(counts) if count}
        # A transform of its own may read other labels than these eight bits of the file.
        by_library = type(load.steps[-1]).__module__.partition('.')[0] in _LIBRARIES
        fault = fault or (_coding_fault(path, load) if by_library and load.final else None)
    else:
        found = {
            int(k): int(n) for k, n in zip(*np.unique(labels, return_counts=True), strict=True)
        }
    return found, fault


def _coding_fault(path: str, load: '_Loading') -> tuple[str, str] | None:
    """Return what is wrong with a file of labels that the libraries read as 8 bits."""
    try:
        content = fileio.get(path, load.option('backend_args'))
        with Image.open(io.BytesIO(content)) as file:
            highest = np.asarray(file).max() if file.mode.startswith(('I', 'F')) else 0
            lossy = file.format == 'JPEG'
    except Exception:  # the pipeline can read what this cannot
        return None
    if highest > 255:
        return (
            'label depth',
            f'{path} has labels up to {highest}, of which the pipeline keeps 8 bits: write '
            'labels 0 to 255, or load them with a transform of your own',
        )
    if lossy:
        return (
            'lossy',
            f'{path} is a JPEG, whose compression changes labels: write PNG, from the labels '
            'before they were compressed',
        )
    return None


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Leave the global random numbers as they were, whatever transforms draw in the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
