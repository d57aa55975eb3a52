"""What a folder of one's own data holds: pairs of images and masks, classes, sizes, splits.

`gfnet new` writes a config from it.
"""

import itertools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from .errors import DataError, join_first, not_permitted

Value = int | tuple[int, int, int]  # a class in a mask: an index, or a colour
Colour = tuple[int, int, int]

_READ = 400  # images and masks that are opened, evenly spread
_MOST_CLASSES = 256
_HELD_OUT = 0.2  # share of the validation images where the data have no split
_TRAINING = {'train', 'training', 'trainset'}
_VALIDATION = {'val', 'valid', 'validation', 'valset'}
_UNLABELLED = {'void', 'unlabelled', 'unlabeled', 'ignore', 'ignored'}


@dataclass
class Split:
    """The images of training and of validation, and what was guessed about them."""

    images: Path
    train: list[str] = field(default_factory=list)  # names without suffix, below `images`
    val: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Masks(Split):
    """Images with label maps.

    Attributes:
        masks: Folder of the label maps.
        suffix: End of the names of images, `.jpg` for example.
        mask_suffix: End of the names of label maps.
        values: What a mask holds for each class.
        classes: Names of the classes.
        palette: A colour for each class, for pictures.
        ignored: Values of pixels without a class.
        unnamed: Other values in the masks, to which the list of classes gives no name.
        sampled: Whether only some masks were read, so that there may be more values.
        side: Median of the shorter sides of the images.
    """

    masks: Path = Path()
    suffix: str = ''
    mask_suffix: str = ''
    values: list[Value] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    palette: list[Colour] = field(default_factory=list)
    ignored: list[Value] = field(default_factory=list)
    unnamed: list[Value] = field(default_factory=list)
    sampled: bool = False
    side: int = 0

    @property
    def are_indices(self) -> bool:
        """Whether the masks hold only the numbers of the classes, and 255 for no class."""
        indexed = self.values == [*range(len(self.values))] and {*self.ignored} <= {255}
        return indexed and not self.unnamed and not self.sampled


def look_at_masks(
    images: Path, masks: Path, named: Sequence[tuple[str, Value | None]], ignored: Sequence[Value]
) -> Masks:
    """Find pairs of images and masks, their classes, sizes and splits.

    Args:
        images: Folder of the images; subfolders are searched, too.
        masks: Folder of the masks, with the same subfolders. It may be the same folder.
        named: Classes as :func:`read_classes` returns them; empty to take those of the masks.
        ignored: Values of pixels without a class.

    Raises:
        DataError: If there are no pairs, or the masks do not hold classes.
    """
    suffix, mask_suffix, stems = _pairs(images, masks)
    found = Masks(images, masks=masks, suffix=suffix, mask_suffix=mask_suffix, ignored=[*ignored])
    found.notes.append(
        f'{len(stems)} pairs: images in {images} ending in {suffix}, masks in {masks} ending in '
        f'{mask_suffix}'
    )
    _note_left_out(found, stems)
    _split(found, stems)
    chosen = _spread(stems)
    found.sampled = len(chosen) < len(stems)
    counts, palette = _read_masks([masks / f'{stem}{mask_suffix}' for stem in chosen])
    _name_classes(found, counts, palette, named)
    if found.sampled:
        found.notes.append(
            f'values were looked for in {len(chosen)} of {len(stems)} masks; pixels of values '
            'that are not among them are not trained (--classes)'
        )
    found.side = _median_side([images / f'{stem}{suffix}' for stem in chosen], found)
    return found


def read_classes(text: str) -> list[tuple[str, Value | None]]:
    """Return names and values of classes.

    Args:
        text: Names divided by commas, or a file. A line of a file is a name, perhaps with the
            index or the colour of the class before or after it: `road 128 64 128`. A file in JSON
            is a list of names or a dict from name to index or colour.

    Raises:
        DataError: If no class is named, a name is repeated, or only some classes have a value.
    """
    path = Path(text)
    named: list[tuple[str, Value | None]]
    if not os.path.isfile(text):  # Path.is_file raises for long lists of names
        named = [(name.strip(), None) for name in text.split(',') if name.strip()]
        if repeated := _repeated(named):
            raise DataError(
                f'--classes repeats {join_first(repeated)}: give each class a name of its own'
            )
        return named
    content = path.read_text(encoding='utf-8-sig')
    if path.suffix == '.json':
        loaded = json.loads(content, object_pairs_hook=tuple)  # a dict would drop repeated names
        items = loaded if isinstance(loaded, tuple) else [(name, None) for name in loaded]
        named = [(str(k), tuple(v) if isinstance(v, list) else v) for k, v in items]
    else:
        named = _parse_lines(content)
    if not named:
        raise DataError(f'{path} names no class: write a name into each line')
    if repeated := _repeated(named):
        raise DataError(
            f'{path} repeats the names {join_first(repeated)}: give each class a name of its own. '
            'A number in a line is the value of its class; write names with numbers as JSON, '
            'such as {"grade 1": 1}'
        )
    lacking = [name for name, value in named if value is None]
    if 0 < len(lacking) < len(named):
        raise DataError(
            f'{path} has numbers for some classes, but not for {join_first(lacking)}: give an '
            'index or a colour to each class or to none'
        )
    return named


def _repeated(named: Sequence[tuple[str, Value | None]]) -> list[str]:
    return [name for name, count in Counter(name for name, _ in named).items() if count > 1]


def _parse_lines(content: str) -> list[tuple[str, Value | None]]:
    named: list[tuple[str, Value | None]] = []
    for line in filter(None, map(str.strip, content.splitlines())):
        words = re.split(r'[\s,;:]+', line)
        numbers = [int(word) for word in words if word.isdecimal()]
        name = ' '.join(word for word in words if not word.isdecimal())
        value: Value | None = None
        if len(numbers) >= 3:
            red, green, blue = numbers[-3:] if not words[-1].isalpha() else numbers[:3]
            value = red, green, blue
        elif numbers:
            value = numbers[0]
        if name and not line.startswith('#'):
            named.append((name, value))
    return named


def parse_value(text: str) -> Value:
    """Return an index such as `255`, or a colour such as `224,224,192`.

    Raises:
        ValueError: If the text is neither.
    """
    match text.split(','):
        case [index] if index.isdecimal():
            return int(index)
        case [red, green, blue] if all(map(str.isdecimal, (red, green, blue))):
            return int(red), int(green), int(blue)
    raise ValueError(f'{text} is no value of a mask: give an index as 255, or a colour as 1,2,3')


@dataclass
class Boxes(Split):
    """Images with annotations in COCO's layout.

    Attributes:
        contents: What the annotation files of training and validation hold.
        val_images: Folder of the validation images.
        classes: Names of the categories, in the order of their ids.
        has_masks: Whether all annotations have a segmentation.
        side: Median of the shorter sides of the images.
    """

    contents: dict[str, dict[str, Any]] = field(default_factory=dict)
    val_images: Path = Path()
    classes: list[str] = field(default_factory=list)
    has_masks: bool = False
    side: int = 0


def look_at_coco(file: Path, images: Path | None, val_file: Path | None) -> Boxes:
    """Read an annotation file, find its images, and divide it if there is none for validation.

    Raises:
        DataError: If a file is not in COCO's layout, or the images are not there.
    """
    content = _read_coco(file)
    names = [str(image['file_name']) for image in content['images']]
    folder = _folder_of(file, names, images)
    found = Boxes(folder, contents=dict(train=content), val_images=folder)
    found.notes.append(
        f'{len(names)} images in {folder}, {len(content["annotations"])} annotations in {file}'
    )
    if val_file:
        found.contents['val'] = _read_coco(val_file)
        val_names = [str(image['file_name']) for image in found.contents['val']['images']]
        found.val_images = _folder_of(val_file, val_names, images)
        found.notes.append(
            f'validation on {len(val_names)} images in {found.val_images}, {val_file}'
        )
    else:
        train, val = _held_out(names)
        for use, chosen in (('train', {*train}), ('val', {*val})):
            kept = [image for image in content['images'] if image['file_name'] in chosen]
            ids = {image['id'] for image in kept}
            annotations = [a for a in content['annotations'] if a['image_id'] in ids]
            found.contents[use] = {**content, 'images': kept, 'annotations': annotations}
        found.notes.append(f'no split: {len(val)} images, drawn at random, are for validation')
    categories = sorted(content['categories'], key=lambda category: category['id'])
    found.classes = [str(category['name']) for category in categories]
    found.notes.append(f'{len(found.classes)} classes: {join_first(found.classes, 8)}')
    found.has_masks = bool(content['annotations']) and all(
        annotation.get('segmentation') for annotation in content['annotations']
    )
    found.side = _median_side([folder / name for name in _spread(names)], found)
    return found


@dataclass
class Folders(Split):
    """Images in one folder per class.

    Attributes:
        classes: Names of the classes: those of the folders.
        names: The names of the folders of training and validation in `images`; None if the classes
            lie in `images` itself.
        side: Median of the shorter sides of the images.
    """

    classes: list[str] = field(default_factory=list)
    names: tuple[str, str] | None = None
    side: int = 0


def look_at_folders(root: Path) -> Folders:
    """Find the classes of images in one folder per class, `SPLIT/CLASS` or `CLASS`.

    Raises:
        DataError: If there are none.
    """
    names = [name for name in _images_in(root) if os.sep in name]
    folders = sorted({name.split(os.sep)[0] for name in names})
    folders = [folder for folder in folders if not _is_written(root / folder)]
    found = Folders(root, train=[name for name in names if name.split(os.sep)[0] in folders])
    train, val = _split_folders(folders)
    if train and val:
        found.names = train[0], val[0]
        found.classes = _subfolders(root / train[0])
        found.val = [n for n in found.train if n.startswith(found.names[1] + os.sep)]
        found.train = [n for n in found.train if n.startswith(found.names[0] + os.sep)]
        found.notes.append(f'training in {train[0]}, validation in {found.names[1]}')
    else:
        found.classes = folders
        found.notes.append(f'{len(folders)} classes: {join_first(folders, 8)}')
        _split_classes(found)
    if not found.train or not found.val or len(found.classes) < 2:
        raise DataError(
            f'{root} holds no images in folders of classes, as in {root}/CLASS/ or '
            f'{root}/train/CLASS/: move them, or give --masks or --coco'
        )
    found.side = _median_side([root / name for name in _spread(found.train)], found)
    return found


def _is_written(folder: Path) -> bool:
    """Return whether `gfnet new` wrote a folder: it divides images of classes by links."""
    files = (path for path in folder.rglob('*') if not path.is_dir())
    return {*os.listdir(folder)} == {'train', 'val'} and all(path.is_symlink() for path in files)


def _read_coco(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding='utf-8-sig'))
        content['images'][0]['file_name'], content['annotations'][0]['image_id']
        content['categories'][0]['name']
    except (ValueError, KeyError, IndexError, TypeError) as e:
        raise DataError(
            f"{file} is not in COCO's layout, with images, annotations and categories: {e}"
        ) from e
    return dict(content)


def _folder_of(file: Path, names: Sequence[str], images: Path | None) -> Path:
    """Return `images`, or a folder in it, beside it or beside the file that holds the images."""
    parents = [images, images.parent] if images else []
    parents += [file.parent, file.parent.parent]
    subfolders = ['', 'images', file.stem, file.stem.removeprefix('instances_'), 'train', 'data']
    for folder in (parent / name for parent in parents for name in subfolders):
        if (folder / names[0]).is_file():
            return folder
    place = f'neither in {images} nor' if images else 'not'
    raise DataError(f'{names[0]} of {file} lies {place} beside that file: give --images DIR')


# Pairs and splits


def _images_in(folder: Path) -> list[str]:
    """Return the images below a folder, relative to it."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would leave the folder out

    try:
        if not folder.is_dir():
            raise DataError(f'there is no folder {folder}')
        return sorted(
            os.path.relpath(os.path.join(place, name), folder)
            for place, _, names in os.walk(folder, onerror=refuse, followlinks=True)
            for name in names
            if os.path.splitext(name)[1].lower() in (*IMG_EXTENSIONS, '.gif') and name[0] != '.'
        )
    except PermissionError as e:
        raise DataError(not_permitted(e.filename)) from None


def _pairs(images: Path, masks: Path) -> tuple[str, str, list[str]]:
    """Return the ends of names that give most pairs, and the names in front of them."""
    names, mask_names = _images_in(images), _images_in(masks)
    # Whole extensions, and what follows the last underscore or dot: photo.jpg, a_leftImg8bit.png.
    stems: dict[str, list[str]] = defaultdict(list)  # of images, by the ends of their names
    for name in names:
        stem, end = os.path.splitext(name)
        stems[end].append(stem)
    for name in names:
        if match := re.search(r'[_.-][^_.\-/]*\.\w+$', name):
            stems[match[0]].append(name[: match.start()])
    mask_ends: dict[str, list[str]] = defaultdict(list)  # by what is in front of them
    for name in mask_names:
        stem = os.path.splitext(name)[0]
        while stem:
            mask_ends[stem].append(name[len(stem) :])
            shorter = re.match(r'(.*)[_.-]', stem)
            stem = shorter[1] if shorter else ''
    best: tuple[str, str, list[str]] = '', '', []
    for end, candidates in stems.items():
        # Of equal numbers of pairs, those with the longest name in common.
        if (len(candidates), -len(end)) <= (len(best[2]), -len(best[0])):
            continue  # an end that few images have: numbered images have one each
        pairs: dict[str, list[str]] = defaultdict(list)
        for stem in sorted(candidates):
            for mask_end in mask_ends.get(stem, ()):
                if images != masks or mask_end != end:
                    pairs[mask_end].append(stem)
        for mask_end, paired in pairs.items():
            if (len(paired), -len(end)) > (len(best[2]), -len(best[0])):
                best = end, mask_end, paired
    if not best[2]:
        raise DataError(
            f'no image in {images} ({join_first(names)}) has a mask in {masks} '
            f'({join_first(mask_names)}): names must begin alike, as a.jpg and a_mask.png'
        )
    return best


def _note_left_out(found: Masks, stems: Sequence[str]) -> None:
    paired = {f'{stem}{found.suffix}' for stem in stems}
    # An end such as _leftImg8bit.png is a part of the name and an extension.
    part = re.sub(r'\.\w+$', '', found.suffix)
    others, without = Counter[str](), 0
    for name in _images_in(found.images):
        if name in paired or (found.images == found.masks and name.endswith(found.mask_suffix)):
            continue
        stem, extension = os.path.splitext(name)
        mask = found.masks / f'{stem.removesuffix(part)}{found.mask_suffix}'
        if stem.endswith(part) and mask.is_file():
            others[f'{part}{extension}'] += 1
        else:
            without += 1
    if others:
        found.notes.append(
            f'{others.total()} images with masks end in {join_first(others)} and are left out: a '
            'config takes images of one ending, so convert or rename them'
        )
    if without:
        found.notes.append(
            f'{without} images have no mask ending in {found.mask_suffix}, and are left out'
        )


def _split(found: Split, names: Sequence[str]) -> None:
    train, val = _split_folders(sorted({name.split(os.sep)[0] for name in names if os.sep in name}))
    if train and val:
        found.train = [name for name in names if name.split(os.sep)[0] in train]
        found.val = [name for name in names if name.split(os.sep)[0] in val]
        found.notes.append(f'split by folders: {join_first([*train, *val])}')
    else:
        found.train, found.val = _held_out(names)
        found.notes.append(f'no split: {len(found.val)} pairs, drawn at random, are for validation')


def _split_folders(folders: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the folders of training and of validation; `test` validates if no other does."""
    train = [name for name in folders if name.lower() in _TRAINING]
    val = [name for name in folders if name.lower() in _VALIDATION]
    return train, val or [name for name in folders if name.lower() == 'test']


def _split_classes(found: Folders) -> None:
    """Hold out images of each class: the splits must have the same classes."""
    parts = []
    for name, group in itertools.groupby(found.train, lambda name: name.split(os.sep)[0]):
        names = [*group]
        if len(names) == 1:
            raise DataError(
                f'{found.images / name} has a single image, but both training and validation need '
                'one of each class: add images to the folder, or move it elsewhere'
            )
        parts.append(_held_out(names))
    found.train = [name for train, _ in parts for name in train]
    found.val = [name for _, val in parts for name in val]
    found.notes.append(
        f'no split: {len(found.val)} images, drawn at random from each class, are for validation'
    )


def _held_out(names: Sequence[str]) -> tuple[list[str], list[str]]:
    if len(names) < 2:
        raise DataError(f'{len(names)} images cannot be divided for training and validation')
    order = np.random.default_rng(0).permutation(len(names))
    count = max(1, round(_HELD_OUT * len(names)))
    train, val = ({names[i] for i in part} for part in (order[count:], order[:count]))
    return [name for name in names if name in train], [name for name in names if name in val]


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f'there is no folder {folder}')
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != '.')


def _spread(items: Sequence[str]) -> list[str]:
    return [items[i] for i in np.linspace(0, len(items) - 1, min(len(items), _READ)).astype(int)]


def _median_side(paths: Iterable[Path], found: Split) -> int:
    sizes = []
    for path in paths:
        try:
            with Image.open(path) as file:
                sizes.append(file.size)
        except OSError as e:
            raise DataError(f'{path} cannot be read: {e}; restore or remove it') from e
    sides = sorted(min(size) for size in sizes)
    low, high = min(sizes), max(sizes)
    text = f'{low[0]}x{low[1]}' if low == high else f'{low[0]}x{low[1]} to {high[0]}x{high[1]}'
    found.notes.append(f'images of {text} pixels')
    return sides[len(sides) // 2]


# Classes of masks


def _read_masks(paths: Sequence[Path]) -> tuple[Counter[Value], dict[int, Colour]]:
    """Count the pixels of each value, and return the colours of a palette."""
    counts: Counter[Value] = Counter()
    palette: dict[int, Colour] = {}
    for path in paths:
        try:
            with Image.open(path) as mask:
                mode, colours, array = mask.mode, mask.getpalette(), np.asarray(mask)
        except OSError as e:
            raise DataError(f'{path} cannot be read: {e}; restore or remove it') from e
        if array.ndim == 3 and array.shape[2] >= 3:
            codes = array[..., :3].astype(np.int64) @ [1 << 16, 1 << 8, 1]
            values, pixels = np.unique(codes, return_counts=True)
            kinds: list[Value] = [(int(v) >> 16, int(v) >> 8 & 255, int(v) & 255) for v in values]
        else:
            array = array[..., 0] if array.ndim == 3 else array
            values, pixels = np.unique(array, return_counts=True)
            kinds = [int(value) for value in values]
            if mode == 'P' and colours:
                for v in map(int, values):
                    red, green, blue = [*colours, *[0] * 768][3 * v : 3 * v + 3]
                    palette[v] = red, green, blue
        counts.update(dict(zip(kinds, map(int, pixels), strict=True)))
        if len(counts) > _MOST_CLASSES or len({type(value) for value in counts}) > 1:
            raise DataError(
                f'{path} and the masks before it hold {len(counts)} values, which cannot be '
                'classes: masks are PNG files with one index or colour for each class, not JPEG, '
                'and no numbers of single objects, for which --coco is'
            )
    return counts, palette


def _name_classes(
    found: Masks,
    counts: Counter[Value],
    palette: dict[int, Colour],
    named: Sequence[tuple[str, Value | None]],
) -> None:
    values = sorted(counts, key=lambda value: (value,) if isinstance(value, int) else value)
    colours = isinstance(values[0], tuple)
    used = [value for value in values if value not in found.ignored]
    if not colours and 255 in used and len(used) > 2:
        found.ignored.append(255)
        used.remove(255)
        found.notes.append('255 in the masks marks pixels without a class')
    if not used:
        raise DataError(
            f'--ignore leaves no class: the masks hold only {join_first(values)}; ignore fewer'
        )
    if named and all(value is not None for _, value in named):
        valued = {name: value for name, value in named if value is not None}
        found.ignored += [value for name, value in valued.items() if name.lower() in _UNLABELLED]
        found.classes = [name for name, value in valued.items() if value not in found.ignored]
        found.values = [valued[name] for name in found.classes]
        classed = {*found.values, *found.ignored}
        found.unnamed = [value for value in used if value not in classed]
        if found.unnamed:
            share = sum(counts[value] for value in found.unnamed) / counts.total()
            found.notes.append(
                f'{100 * share:.2g}% of the pixels have values of no class and are not trained: '
                f'{join_first(found.unnamed)}'
            )
    elif named and colours:
        raise DataError(
            f'the masks are colours, {join_first(used)}: --classes needs a file with the colour of '
            'each class, in lines such as "road 128 64 128"'
        )
    elif named:
        names = [name for name, _ in named]
        # Indices of which some do not appear, or any other values in their order.
        indexed = max(map(int, used)) < len(names)  # type: ignore[arg-type]
        found.values = [*range(len(names))] if indexed else [*used]
        found.classes = names
        if len(names) != len(found.values):
            raise DataError(
                f'{len(names)} classes are named, but the masks hold {len(used)} values, '
                f'{join_first(used, 10)}: name each, or give --ignore for those without a class'
            )
    else:
        found.values = used
        found.classes = [
            f'#{v[0]:02x}{v[1]:02x}{v[2]:02x}' if isinstance(v, tuple) else f'class {v}'
            for v in used
        ]
    if len(found.values) < 2:
        raise DataError(
            f'the masks hold {len(found.values)} class, {join_first(found.values)}: training needs '
            'two or more, background counts'
        )
    kind = 'colours' if colours else 'indices' if found.are_indices else 'values'
    pairs = [f'{v} {name}' for v, name in zip(found.values, found.classes, strict=True)]
    found.notes.append(f'masks hold {kind} of {len(pairs)} classes: {join_first(pairs, 8)}')
    found.palette = [
        v if isinstance(v, tuple) else palette.get(v, class_colour(i))
        for i, v in enumerate(found.values)
    ]


def class_colour(index: int) -> Colour:
    """Return a colour of the Pascal VOC palette, whose bits are those of the index, reversed."""
    red = green = blue = 0
    for bit in range(8):
        red |= (index >> 0 & 1) << 7 - bit
        green |= (index >> 1 & 1) << 7 - bit
        blue |= (index >> 2 & 1) << 7 - bit
        index >>= 3
    return red, green, blue
