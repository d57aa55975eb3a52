"""The embedded data set: handwritten digits on photographs, in the layouts of ADE20K and COCO.

Every pixel comes with scikit-learn: 1,797 scans of handwritten digits (`load_digits`, 8x8, from
the UCI set "Optical Recognition of Handwritten Digits") are drawn onto crops of its two sample
photographs (`load_sample_images`). So the check of an installation, or of a change, trains on real
pixels and downloads nothing. Validation scenes are made of scans and of photograph regions that no
training scene uses. :func:`write_digits` makes this folder::

    images/training/ADE_train_00000001.jpg       RGB
    images/validation/ADE_val_00000001.jpg
    annotations/training/ADE_train_00000001.png  0 not labelled, 1 background, 2..11 digits 0..9
    annotations/validation/ADE_val_00000001.png
    annotations/instances_training.json          COCO: boxes, areas and RLE masks, same scenes
    annotations/instances_validation.json
    digits.json                                  the parameters and the format's version

:func:`write_digit_scans` writes the scans alone, divided in the same way, for classification::

    train/0/0000.png    8x8, grey; by digit, in the order of the file
    val/0/0000.png
    digits.json
"""

import dataclasses
import json
import math
import numbers
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .pictures import label_grid

CLASSES = (
    'background',
    'zero',
    'one',
    'two',
    'three',
    'four',
    'five',
    'six',
    'seven',
    'eight',
    'nine',
)
"""The classes, in the order of their indices once `reduce_zero_label` has removed label 0."""

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

# To be raised whenever the same parameters come to mean other scenes or other files.
FORMAT_VERSION = 1
SCANS_FORMAT_VERSION = 1
MANIFEST = 'digits.json'
SUBSETS = {'training': 'ADE_train', 'validation': 'ADE_val'}
SCAN_SPLITS = {'train': 'training', 'val': 'validation'}

PREVIEW_ROWS = 6

TRAINING_SHARE = 0.8  # of the scans of every digit
TRAINING_ROWS = 288  # of every photograph; on a border of its JPEG blocks, which so stay apart
CROP_SIDE = (64, 128)  # pixels of the photograph
BRIGHTNESS = (0.3, 0.6)  # what the darkened photograph keeps
INK_COLOUR = (165, 255)  # each channel
ROTATION = (-12, 12)  # degrees
PLACEMENTS = 25  # tried for ink that covers no other ink

# Enlarged scans are soft. This table turns their ink, 0 to 255, into opacity: none up to the first
# fraction, full from the second, so that strokes get edges and loops stay open. Where ink hides at
# least half of the photograph the pixel is digit; where it hides a quarter to a half nobody can
# say, and the pixel is not labelled.
OPACITY = np.rint(np.interp(np.arange(256) / 255, (0.2, 0.65), (0, 255))).astype(np.uint8)
DIGIT_OPACITY = 128
RIM_OPACITY = 64

BACKGROUND = 0
RIM = -1


@dataclasses.dataclass(frozen=True)
class DigitsSpec:
    """What determines a data set to the last pixel; :func:`write_digits` describes the fields."""

    num_training: int
    num_validation: int
    image_size: int
    digits_per_image: tuple[int, int]
    digit_height: tuple[int, int]
    seed: int

    @property
    def counts(self) -> dict[str, int]:
        """How many scenes each subset has."""
        return {'training': self.num_training, 'validation': self.num_validation}


@dataclasses.dataclass(frozen=True)
class Material:
    """What the scenes of one subset are made of.

    Attributes:
        scans: Ink from 0 to 255, (N, 8, 8) uint8.
        digits: What is on each scan, 0 to 9, (N,).
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
        owner: Whose every pixel is, (S, S) int8: `BACKGROUND`, `RIM`, or k for the k-th digit.
        digits: What the first, second, ... digit is, 0 to 9.
    """

    image: np.ndarray
    owner: np.ndarray
    digits: tuple[int, ...]

    @property
    def labels(self) -> np.ndarray:
        """ADE20K's map, (S, S) uint8: 0 not labelled, 1 background, 2 to 11 the digits 0 to 9."""
        label_of = [1, *(digit + 2 for digit in self.digits), 0]  # RIM, -1, reads the last
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
    """Write the data set to `root`, or find it there.

    The folder appears under its name when it is complete and not before. A folder that holds the
    data set with these parameters is left as it is; one that holds anything else is an error, and
    nothing in it is touched. Several processes may call this at once.

    Scene i of a subset depends on the seed and on i, not on how many scenes there are. Pixels and
    annotations are drawn alike on every machine; the bytes of the JPEG and PNG files are the same
    wherever Pillow brings the same versions of their codecs.

    Args:
        root: The folder; those above it are made.
        num_training: Number of training scenes, 1 or more.
        num_validation: Number of validation scenes, 1 or more.
        image_size: Height and width of a scene in pixels, 8 to 4096.
        digits_per_image: The fewest and the most digits in a scene, 1 to 20.
        digit_height: Height of the lowest and the highest digit in pixels, 8 to `image_size`.
        seed: Seed of all that is random, 0 to 2**32 - 1.

    Returns:
        `root`.

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
    return _publish(
        Path(root), _manifest(spec), _files(spec), lambda folder: _write_folder(folder, spec)
    )


def write_digit_scans(root: str | os.PathLike[str]) -> Path:
    """Write the scans as images of ten classes to `root`, or find them there.

    1,433 scans for training and 364 for validation, divided as in :func:`load_material`. Nothing
    is drawn or random: a pixel is the scan's, from 0 to 255.

    What is said of the folder in :func:`write_digits` holds here, too.

    Args:
        root: The folder; those above it are made.

    Returns:
        `root`.

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
    """Write a PNG of the first scenes that lie in `root`, with their labels beside them.

    Args:
        root: A folder that :func:`write_digits` wrote.
        path: The PNG to write; missing folders above it are made.

    Returns:
        `path`.

    Raises:
        OSError: If a file cannot be read or written.
    """
    columns = []
    for subset in SUBSETS:
        images = sorted(Path(root, 'images', subset).glob('*.jpg'))[:PREVIEW_ROWS]
        labels = sorted(Path(root, 'annotations', subset).glob('*.png'))[:PREVIEW_ROWS]
        columns.append([np.asarray(Image.open(file)) for file in images])
        # As reduce_zero_label does: label 0 wraps around to 255.
        columns.append([np.asarray(Image.open(file)) - np.uint8(1) for file in labels])
    return label_grid(
        list(zip(*columns, strict=False)),  # the smaller subset ends the sheet
        path,
        titles=['training image', 'truth', 'validation image', 'truth'],
        classes=CLASSES,
        palette=PALETTE,
    )


def load_material(subset: str) -> Material:
    """The scans and photograph regions of a subset, `'training'` or `'validation'`.

    Training has the upper part of the photographs, and of the scans of every digit the first 80%
    in the order of the file. Neighbours in the file tend to be by one hand (scikit-learn MOOC,
    "Sample grouping"), so a random split would show the writers of validation in training.

    Raises:
        ValueError: If there is no such subset.
    """
    # Imported here: scikit-learn takes seconds to import, and training does without it.
    from sklearn.datasets import load_digits, load_sample_images

    scans, digits = load_digits(return_X_y=True)
    scans = np.rint(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # 16 is all ink
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
    """Draw scene `index`, counted from 0, of a subset."""
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
    """A darkened crop of one of the photographs, (size, size, 3) float64."""
    photograph = photographs[rng.integers(len(photographs))]
    side = rng.integers(*CROP_SIDE, endpoint=True)
    left = rng.integers(photograph.width - side, endpoint=True)
    top = rng.integers(photograph.height - side, endpoint=True)
    crop = photograph.resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
    )
    return np.asarray(crop) * rng.uniform(*BRIGHTNESS)


def _place_digit(
    scan: np.ndarray,
    occupied: np.ndarray,
    heights: tuple[int, int],
    rng: np.random.Generator,
) -> np.ndarray:
    """The opacity, (S, S) uint8, of a scan's ink somewhere in the scene.

    Size, place and angle are drawn until the ink leaves the `occupied` (S, S) pixels alone, or
    else the try that covers fewest of them counts.
    """
    columns = np.flatnonzero(scan.any(axis=0))
    scan = scan[:, columns[0] : columns[-1] + 1]
    padded = Image.fromarray(np.pad(scan, 2))  # for the cubic kernel to fade into
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
    """Opacity, (size, size) uint8, of a scan turned by `angle` radians around `centre`."""
    x, y = centre
    # Pillow asks for the way back, from a pixel of the scene to a cell of the scan.
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    across = (cos, sin, scan.width / 2 - cos * x - sin * y)
    down = (-sin, cos, scan.height / 2 + sin * x - cos * y)
    enlarged = scan.transform(
        (size, size), Image.Transform.AFFINE, across + down, Image.Resampling.BICUBIC
    )
    return OPACITY[np.asarray(enlarged)]


def _publish(
    root: Path,
    manifest: Mapping[str, Any],
    files: Mapping[str, int],
    write: Callable[[Path], None],
) -> Path:
    """Let `write` fill a folder that becomes `root` when it is complete, unless it is there."""
    if _holds(root, manifest, files):
        return root
    target = root.resolve()  # a link is followed, not replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, and so on its file system, where a rename is atomic.
    with TemporaryDirectory(prefix=f'.{target.name}.', dir=target.parent) as scratch:
        complete = Path(scratch) / target.name
        complete.mkdir()
        write(complete)
        _write_json(complete / MANIFEST, manifest)
        try:
            complete.rename(target)
        except OSError:
            # Another process may have been faster: then its folder is as good as ours.
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
        images = folder / 'images' / subset
        annotations = folder / 'annotations' / subset
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        coco: dict[str, Any] = {
            'info': {'description': f'gfnet_dense digits, {subset}'},
            'images': [],
            'annotations': [],
            'categories': [
                {'id': number, 'name': name} for number, name in enumerate(CLASSES) if number > 0
            ],
        }
        for index in tqdm(range(spec.counts[subset]), desc=f'drawing {subset} scenes'):
            scene = draw_scene(material, spec, subset, index)
            name = f'{prefix}_{index + 1:08}'
            Image.fromarray(scene.image).save(images / f'{name}.jpg', quality=95)
            Image.fromarray(scene.labels).save(annotations / f'{name}.png')
            _add_to_coco(coco, scene, f'{name}.jpg', index + 1)
        _write_json(folder / 'annotations' / f'instances_{subset}.json', coco)


def _add_to_coco(coco: dict[str, Any], scene: Scene, file_name: str, image_id: int) -> None:
    height, width = scene.owner.shape
    coco['images'].append(
        {'id': image_id, 'file_name': file_name, 'height': height, 'width': width}
    )
    for number, digit in enumerate(scene.digits, start=1):
        mask = scene.owner == number
        if not mask.any():  # later digits cover all of it
            continue
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        left, right, top, bottom = columns[0], columns[-1], rows[0], rows[-1]
        coco['annotations'].append(
            {
                'id': len(coco['annotations']) + 1,
                'image_id': image_id,
                'category_id': digit + 1,
                'bbox': [int(left), int(top), int(right - left + 1), int(bottom - top + 1)],
                'area': int(np.count_nonzero(mask)),
                'segmentation': {'size': [height, width], 'counts': _run_lengths(mask)},
                'iscrowd': 0,
            }
        )


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed RLE: runs down the columns, of zeros, ones, zeros, ..., zeros first."""
    pixels = mask.ravel(order='F').astype(np.int8)
    changes = np.flatnonzero(np.diff(pixels, prepend=0))
    return np.diff([0, *changes, pixels.size]).tolist()


def _manifest(spec: DigitsSpec) -> dict[str, Any]:
    """The manifest as JSON gives it back."""
    content = {'format': 'gfnet_dense digits', 'version': FORMAT_VERSION}
    return json.loads(json.dumps(content | dataclasses.asdict(spec)))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding='utf-8')


def _holds(root: Path, manifest: Mapping[str, Any], files: Mapping[str, int]) -> bool:
    """Whether `root` holds the data set; False if nothing is there, an error if anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    remedy = 'choose another folder, or move this one away'
    try:
        found = dict(json.loads((root / MANIFEST).read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError) as error:
        raise FileExistsError(
            f'{root} exists and is no digits data set, {MANIFEST} is not readable; {remedy}'
        ) from error
    differences = [
        f'{key}={found.get(key)} where {value} is asked for'
        for key, value in manifest.items()
        if found.get(key) != value
    ]
    if differences:
        raise FileExistsError(f'{root} holds digits with {", ".join(differences)}; {remedy}')
    for pattern, count in files.items():
        met = sum(1 for _ in root.glob(pattern))
        if met != count:
            raise FileExistsError(f'{root}/{pattern} are {met} files instead of {count}; {remedy}')
    return True


def _files(spec: DigitsSpec) -> dict[str, int]:
    """How many files of each pattern a complete folder has."""
    files = {'annotations/instances_*.json': len(SUBSETS)}
    for subset, count in spec.counts.items():
        files[f'images/{subset}/*.jpg'] = files[f'annotations/{subset}/*.png'] = count
    return files


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, numbers.Integral) or not low <= value <= high:
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
