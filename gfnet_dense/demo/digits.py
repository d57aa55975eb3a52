"""The embedded data set: handwritten digits on photographs, in the layouts of ADE20K and COCO.

Every pixel comes with scikit-learn: 1,797 scans of handwritten digits (`load_digits`, 8x8, from
the UCI set "Optical Recognition of Handwritten Digits") are drawn onto crops of its two sample
photographs (`load_sample_images`). Training on them tests an installation or a change on real
pixels, without a download. Validation scenes use scans and photograph regions that no training
scene uses. :func:`write_digits` writes this folder::

    images/training/ADE_train_00000001.jpg       RGB
    images/validation/ADE_val_00000001.jpg
    annotations/training/ADE_train_00000001.png  0 not labelled, 1 background, 2..11 digits 0..9
    annotations/validation/ADE_val_00000001.png
    annotations/instances_training.json          COCO: boxes, areas and RLE masks, same scenes
    annotations/instances_validation.json
    digits.json                                  the parameters and the version of the format

:func:`write_digit_scans` writes the scans alone, for classification, with the same split::

    train/0/0000.png    8x8, grey; a folder for each digit, in scikit-learn's order
    val/0/0000.png
    digits.json
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .pictures import label_grid

_DIGITS = 'zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine'
CLASSES = ('background', *_DIGITS)
"""The classes, in the order of their indices after `reduce_zero_label` has removed label 0."""

PALETTE = (
    (56, 56, 56),
    (224, 40, 48),
    (36, 160, 60),
    (250, 216, 40),
    (40, 96, 224),
    (248, 136, 24),
    (136, 48, 176),
    (64, 220, 232),
    (240, 72, 208),
    (150, 96, 48),
    (172, 232, 128),
)
"""One RGB colour for each of :data:`CLASSES`."""

# Raise these whenever the same parameters produce other scenes or other files.
FORMAT_VERSION = 1
SCANS_FORMAT_VERSION = 1
MANIFEST = 'digits.json'
SUBSETS = {'training': 'ADE_train', 'validation': 'ADE_val'}
SCAN_SPLITS = {'train': 'training', 'val': 'validation'}

PREVIEW_ROWS = 6

TRAINING_SHARE = 0.8  # of the scans of every digit
# Of every photograph. The split follows a border of JPEG blocks, so that no block is in both parts.
TRAINING_ROWS = 288
CROP_SIDE = (64, 128)  # pixels of the photograph
BRIGHTNESS = (0.3, 0.6)  # factor that darkens the photograph
INK_COLOUR = (165, 255)  # range of each channel
ROTATION = (-12, 12)  # degrees
PLACEMENTS = 25  # tries to place a digit without covering another one

# Enlarged scans are blurred. This table maps their ink, 0 to 255, to opacity: zero up to the first
# fraction, full from the second. Strokes get edges and loops stay open. A pixel belongs to the
# digit where the opacity is at least one half. Between a quarter and a half it is ambiguous, and
# not labelled.
OPACITY = np.rint(np.interp(np.arange(256) / 255, (0.2, 0.65), (0, 255))).astype(np.uint8)
DIGIT_OPACITY = 128
RIM_OPACITY = 64

BACKGROUND = 0
RIM = -1


@dataclasses.dataclass(frozen=True)
class DigitsSpec:
    """The parameters of a data set, see :func:`write_digits`; they determine every pixel."""

    num_training: int
    num_validation: int
    image_size: int
    digits_per_image: tuple[int, int]
    digit_height: tuple[int, int]
    seed: int

    def count(self, subset: str) -> int:
        """Return the number of scenes in a subset."""
        return int(getattr(self, f'num_{subset}'))


@dataclasses.dataclass(frozen=True)
class Material:
    """The scans and photographs that the scenes of one subset are drawn from.

    Attributes:
        scans: Ink from 0 to 255, (N, 8, 8) uint8.
        digits: The digit on each scan, 0 to 9, (N,).
        photographs: Regions of the photographs, RGB.
    """

    scans: np.ndarray
    digits: np.ndarray
    photographs: tuple[Image.Image, ...]


@dataclasses.dataclass(frozen=True)
class Scene:
    """One drawn scene of S x S pixels.

    Attributes:
        image: RGB, (S, S, 3) uint8.
        owner: What each pixel belongs to, (S, S) int8: `BACKGROUND`, `RIM`, or k for the k-th
            digit.
        digits: The first, second, ... digit, 0 to 9.
    """

    image: np.ndarray
    owner: np.ndarray
    digits: tuple[int, ...]

    @property
    def labels(self) -> np.ndarray:
        """Labels as in ADE20K, (S, S) uint8: 0 not labelled, 1 background, 2 to 11 the digits."""
        label_of = [1, *(digit + 2 for digit in self.digits), 0]  # RIM, -1, indexes the last
        return np.array(label_of, np.uint8)[self.owner]


def write_digits(
    root: str | os.PathLike[str],
    *,
    num_training: int = 3000,
    num_validation: int = 500,
    image_size: int = 64,
    digits_per_image: tuple[int, int] = (1, 2),
    digit_height: tuple[int, int] = (26, 46),
    seed: int = 0,
) -> Path:
    """Write the data set to `root`, unless it is there already, and return `root`.

    The folder appears under its name only when it is complete. A folder that holds the data set
    with these parameters is left unchanged. A folder that holds anything else is an error and is
    left unchanged, too. Several processes may call this at once.

    Scene i of a subset depends on the seed and on i, not on the number of scenes. Pixels and
    annotations are the same on every machine. The bytes of the JPEG and PNG files are the same
    wherever Pillow brings the same versions of their codecs.

    Args:
        root: The folder. Missing folders above it are created.
        num_training: Number of training scenes, 1 or more.
        num_validation: Number of validation scenes, 1 or more.
        image_size: Height and width of a scene in pixels, 8 to 4096.
        digits_per_image: The fewest and the most digits in a scene, 1 to 20.
        digit_height: Height of the lowest and the highest digit in pixels, 8 to `image_size`.
        seed: Seed of the random numbers, 0 to 2**32 - 1.

    Raises:
        ValueError: If an argument is out of its range.
        FileExistsError: If `root` holds something else, or the data set with other parameters
            or with files missing.
        OSError: If `root` cannot be written.
    """
    spec = DigitsSpec(
        num_training=_integer('num_training', num_training, 1, 99_999_999),
        num_validation=_integer('num_validation', num_validation, 1, 99_999_999),
        image_size=_integer('image_size', image_size, 8, 4096),
        digits_per_image=_range('digits_per_image', digits_per_image, 1, 20),
        digit_height=_range('digit_height', digit_height, 8, image_size),
        seed=_integer('seed', seed, 0, 2**32 - 1),
    )
    manifest = {
        'format': 'gfnet_dense digits',
        'version': FORMAT_VERSION,
        **dataclasses.asdict(spec),
    }
    files = {'annotations/instances_*.json': len(SUBSETS)}
    for subset in SUBSETS:
        patterns = f'images/{subset}/*.jpg', f'annotations/{subset}/*.png'
        files |= dict.fromkeys(patterns, spec.count(subset))
    return _publish(Path(root), manifest, files, lambda folder: _write_folder(folder, spec))


def write_digit_scans(root: str | os.PathLike[str]) -> Path:
    """Write the scans as images of ten classes to `root`, unless they are there; return `root`.

    There are 1,433 scans for training and 364 for validation, with the split of
    :func:`load_material`. Images are the scans, with values scaled to 0 to 255. `root` is handled
    as in :func:`write_digits`.

    Raises:
        FileExistsError: If `root` holds something else, or the scans with files missing.
        OSError: If `root` cannot be written.
    """
    counts = {
        f'{split}/{digit}/*.png': count
        for split, subset in SCAN_SPLITS.items()
        for digit, count in enumerate(np.bincount(load_material(subset).digits).tolist())
    }
    manifest = {'format': 'gfnet_dense digit scans', 'version': SCANS_FORMAT_VERSION}
    return _publish(Path(root), manifest, counts, _write_scans)


def preview_digits(root: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Write a PNG of the first scenes in `root`, next to their labels, and return its path.

    Args:
        root: A folder that :func:`write_digits` wrote.
        path: The PNG to write. Missing folders above it are created.

    Raises:
        OSError: If a file cannot be read or written.
    """
    columns = []
    for subset in SUBSETS:
        images = sorted(Path(root, 'images', subset).glob('*.jpg'))[:PREVIEW_ROWS]
        labels = sorted(Path(root, 'annotations', subset).glob('*.png'))[:PREVIEW_ROWS]
        columns.append([np.asarray(Image.open(file)) for file in images])
        # As with reduce_zero_label, label 0 wraps around to 255.
        columns.append([np.asarray(Image.open(file)) - np.uint8(1) for file in labels])
    return label_grid(
        list(zip(*columns, strict=False)),  # the smaller subset ends the sheet
        path,
        titles=['training image', 'truth', 'validation image', 'truth'],
        classes=CLASSES,
        palette=PALETTE,
    )


def load_material(subset: str) -> Material:
    """Load the scans and photograph regions of a subset, `'training'` or `'validation'`.

    Training gets the upper part of the photographs and the first 80% of the scans of every digit,
    in scikit-learn's order. Neighbouring scans are often by the same writer (scikit-learn MOOC,
    "Sample grouping"), so a random split would put the same writers into training and validation.

    Raises:
        ValueError: If there is no such subset.
    """
    # Imported here, because scikit-learn takes seconds to import and training does not need it.
    from sklearn.datasets import load_digits, load_sample_images

    scans, digits = load_digits(return_X_y=True)
    scans = np.rint(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # 16 is full ink
    for_training = np.zeros(len(digits), bool)
    for digit in range(10):
        found = np.flatnonzero(digits == digit)
        for_training[found[: int(len(found) * TRAINING_SHARE)]] = True

    if subset == 'training':
        chosen, rows = for_training, slice(None, TRAINING_ROWS)
    elif subset == 'validation':
        chosen, rows = ~for_training, slice(TRAINING_ROWS, None)
    else:
        raise ValueError(f'subset must be one of {list(SUBSETS)}, got {subset!r}')
    regions = (photograph[rows] for photograph in load_sample_images().images)
    return Material(scans[chosen], digits[chosen], tuple(map(Image.fromarray, regions)))


def draw_scene(material: Material, spec: DigitsSpec, subset: str, index: int) -> Scene:
    """Draw a scene of a subset; `index` counts from 0."""
    stream = np.random.SeedSequence(spec.seed, spawn_key=(list(SUBSETS).index(subset), index))
    rng = np.random.Generator(np.random.PCG64(stream))

    image = _draw_background(material.photographs, spec.image_size, rng)
    owner = np.full(image.shape[:2], BACKGROUND, np.int8)
    digits = []
    for number in range(1, rng.integers(*spec.digits_per_image, endpoint=True) + 1):
        chosen = rng.integers(len(material.scans))
        opacity = _place_digit(material.scans[chosen], owner != BACKGROUND, spec.digit_height, rng)
        colour = rng.uniform(*INK_COLOUR, size=3)
        image += opacity[..., None] / 255 * (colour - image)
        owner[opacity >= RIM_OPACITY] = RIM
        owner[opacity >= DIGIT_OPACITY] = number
        digits.append(int(material.digits[chosen]))
    return Scene(np.rint(image).astype(np.uint8), owner, tuple(digits))


def _draw_background(
    photographs: tuple[Image.Image, ...], size: int, rng: np.random.Generator
) -> np.ndarray:
    """Return a darkened crop of one of the photographs, (size, size, 3) float64."""
    photograph = photographs[rng.integers(len(photographs))]
    side = int(rng.integers(*CROP_SIDE, endpoint=True))
    left = int(rng.integers(photograph.width - side, endpoint=True))
    top = int(rng.integers(photograph.height - side, endpoint=True))
    crop = photograph.resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
    )
    return np.asarray(crop) * rng.uniform(*BRIGHTNESS)


def _place_digit(
    scan: np.ndarray, occupied: np.ndarray, heights: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Place a scan at random and return the opacity of its ink, (S, S) uint8.

    Size, place and angle are drawn until the ink covers none of the `occupied` (S, S) pixels. If
    no try succeeds, the one that covers the fewest is taken.
    """
    columns = np.flatnonzero(scan.any(axis=0))
    scan = scan[:, columns[0] : columns[-1] + 1]
    padded = Image.fromarray(np.pad(scan, 2))  # a margin for the bicubic kernel
    size = len(occupied)
    fewest = math.inf
    for _ in range(PLACEMENTS):
        height = rng.uniform(*heights)
        scale = height / scan.shape[0]
        width = min(scale * scan.shape[1], size)
        x = rng.uniform(width / 2, size - width / 2)
        y = rng.uniform(height / 2, size - height / 2)
        angle = math.radians(rng.uniform(*ROTATION))
        candidate = _enlarge(padded, scale, angle, (x, y), size)
        covered = np.count_nonzero(occupied & (candidate >= RIM_OPACITY))
        if covered < fewest:
            opacity, fewest = candidate, covered
        if covered == 0:
            break
    return opacity


def _enlarge(
    scan: Image.Image, scale: float, angle: float, centre: tuple[float, float], size: int
) -> np.ndarray:
    """Enlarge a scan, rotate it by `angle` radians, centre it, and return (size, size) opacity."""
    x, y = centre
    # Pillow takes the inverse map, from pixels of the scene to pixels of the scan.
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    across = (cos, sin, scan.width / 2 - cos * x - sin * y)
    down = (-sin, cos, scan.height / 2 + sin * x - cos * y)
    enlarged = scan.transform(
        (size, size), Image.Transform.AFFINE, across + down, Image.Resampling.BICUBIC
    )
    return OPACITY[np.asarray(enlarged)]


def _publish(
    root: Path, manifest: Mapping[str, Any], files: Mapping[str, int], write: Callable[[Path], None]
) -> Path:
    """Let `write` fill a temporary folder and rename it to `root`, unless the data are there.

    `manifest` is what :data:`MANIFEST` holds, and `files` the number of files of each pattern.
    """
    if _holds(root, manifest, files):
        return root
    target = root.resolve()  # a link is followed, not replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    # The temporary folder is on the same file system as the target, where a rename is atomic.
    with TemporaryDirectory(prefix=f'.{target.name}.', dir=target.parent) as scratch:
        complete = Path(scratch) / target.name
        complete.mkdir()
        write(complete)
        (complete / MANIFEST).write_text(json.dumps(manifest), encoding='utf-8')
        try:
            complete.rename(target)
        except OSError:
            # Another process may have been faster. Its folder then holds the same data.
            if not _holds(root, manifest, files):
                raise
    return root


def _write_scans(folder: Path) -> None:
    for split, subset in SCAN_SPLITS.items():
        material = load_material(subset)
        for digit in range(10):
            place = folder / split / str(digit)
            place.mkdir(parents=True)
            for number, scan in enumerate(material.scans[material.digits == digit]):
                Image.fromarray(scan).save(place / f'{number:04}.png')


def _write_folder(folder: Path, spec: DigitsSpec) -> None:
    for subset, prefix in SUBSETS.items():
        material = load_material(subset)
        images, annotations = folder / 'images' / subset, folder / 'annotations' / subset
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        categories = [{'id': i, 'name': name} for i, name in enumerate(CLASSES) if i > 0]
        info = {'description': f'gfnet_dense digits, {subset}'}
        coco: dict[str, Any] = dict(info=info, images=[], annotations=[], categories=categories)
        for index in tqdm(range(spec.count(subset)), desc=f'drawing {subset} scenes'):
            scene = draw_scene(material, spec, subset, index)
            name = f'{prefix}_{index + 1:08}'
            Image.fromarray(scene.image).save(images / f'{name}.jpg', quality=95)
            Image.fromarray(scene.labels).save(annotations / f'{name}.png')
            _add_to_coco(coco, scene, f'{name}.jpg', index + 1)
        path = folder / 'annotations' / f'instances_{subset}.json'
        path.write_text(json.dumps(coco), encoding='utf-8')


def _add_to_coco(coco: dict[str, Any], scene: Scene, file_name: str, image_id: int) -> None:
    height, width = scene.owner.shape
    coco['images'].append(dict(id=image_id, file_name=file_name, height=height, width=width))
    for number, digit in enumerate(scene.digits, start=1):
        mask = scene.owner == number
        box = Image.fromarray(mask).getbbox()
        if box is None:  # later digits cover it completely
            continue
        left, top, right, bottom = box
        annotation = dict(
            id=len(coco['annotations']) + 1,
            image_id=image_id,
            category_id=digit + 1,
            bbox=[left, top, right - left, bottom - top],
            area=int(np.count_nonzero(mask)),
            segmentation=dict(size=[height, width], counts=_run_lengths(mask)),
            iscrowd=0,
        )
        coco['annotations'].append(annotation)


def _run_lengths(mask: np.ndarray) -> list[int]:
    """Encode a mask as COCO's uncompressed RLE: runs of zeros, ones, zeros, ... down columns."""
    pixels = mask.ravel(order='F').astype(np.int8)
    changes = np.flatnonzero(np.diff(pixels, prepend=0))
    return np.diff([0, *changes, pixels.size]).tolist()


def _holds(root: Path, manifest: Mapping[str, Any], files: Mapping[str, int]) -> bool:
    """Tell whether `root` holds the data set; raise FileExistsError if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    remedy = 'choose another folder, or move this one away'
    try:
        found = dict(json.loads((root / MANIFEST).read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError) as error:
        raise FileExistsError(
            f'{root} is not a digits data set: {MANIFEST} cannot be read; {remedy}'
        ) from error
    differences = [
        f'{key}={found.get(key)} instead of {value}'
        for key, value in json.loads(json.dumps(manifest)).items()  # lists in place of tuples
        if found.get(key) != value
    ]
    if differences:
        raise FileExistsError(f'{root} holds digits with {", ".join(differences)}; {remedy}')
    for pattern, count in files.items():
        met = sum(1 for _ in root.glob(pattern))
        if met != count:
            raise FileExistsError(f'{root} has {met} files {pattern} instead of {count}; {remedy}')
    return True


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f'{name} must be an integer from {low} to {high}, got {value!r}')
    return int(value)


def _range(name: str, value: Any, low: int, high: int) -> tuple[int, int]:
    try:
        first, last = (_integer(name, end, low, high) for end in value)
    except (TypeError, ValueError):
        first, last = 1, 0
    if first > last:
        raise ValueError(
            f'{name} must be two integers from {low} to {high}, the lower first, got {value!r}'
        )
    return first, last
