"""Checks of data sets in COCO's layout, before training starts.

A built data set knows its images and how it numbers categories. Only the annotation file knows the
names of the categories and what the data set left out, so the checks read that file again.
"""

import gc
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mmengine import fileio
from PIL import Image

from .contents import Contents, keep_random_state, loaders
from .errors import Fault, Findings, Note, join_first, not_permitted, raise_first
from .files import absent_infos, can_load, listed_infos

# What mmdet reads of every image, category and annotation.
_KEYS = {
    'images': ('id', 'file_name', 'width', 'height'),
    'categories': ('id', 'name'),
    'annotations': ('id', 'image_id', 'category_id', 'bbox', 'area'),
}
_ID = int | float | str
_TYPES = dict(id=_ID, image_id=_ID, category_id=_ID, file_name=str)
_SEGMENT_MAPS = 64  # maps of panoptic segments that are opened
_Content = Mapping[str, Any]
_Object = Mapping[str, Any]
_Objects = Sequence[_Object]


def is_coco(part: Any) -> bool:
    """Tell whether a data set is like mmdet's `CocoDataset`; files of LVIS have other keys."""
    names = [base.__name__ for base in type(part).__mro__]
    return (
        hasattr(part, 'cat2label')
        and str(getattr(part, 'ann_file', '')).endswith('.json')
        and not any(name.startswith('LVIS') for name in names)
    )


def check_coco_file(dataset: Mapping[str, Any]) -> str:
    """Check the annotation file of a data set that could not be built.

    Args:
        dataset: Config of the data set.

    Returns:
        A clause for an error message: how many images and annotations the file has. Empty if the
        file is not in COCO's layout.

    Raises:
        DataError: If the file is at fault.
    """
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    file = fileio.join_path(dataset.get('data_root') or '', dataset.get('ann_file') or '')
    options = dict(backend_args=dataset.get('backend_args'))
    if not file.endswith('.json') or not fileio.exists(file, **options):
        return ''
    content = read_file(file, options['backend_args'])
    if 'Coco' not in str(dataset.get('type')) and 'images' not in content:
        return ''  # another layout
    raise_first(check_file(content, file))
    panoptic = _is_panoptic(content)
    if content.get('annotations') and panoptic != ('Panoptic' in str(dataset.get('type'))):
        held = 'panoptic segments' if panoptic else 'no panoptic segments'
        text = f'{file} has {held}, other than {dataset.get("type")} reads: set the type of the'
        raise_first([Fault(f'{text} dataset that fits, or another ann_file')])
    classes = (dataset.get('metainfo') or {}).get('classes') or ()
    raise_first(_absent_classes(classes, content, file))
    count = len(content.get('annotations', ()))
    return f', where {file} has {len(content["images"])} images and {count} annotations'


def read_file(file: str, backend_args: Any = None) -> Any:
    """Read an annotation file.

    Raises:
        DataError: If it is not JSON, or may not be read.
    """
    collects = gc.isenabled()
    gc.disable()  # which goes through the millions of values again and again while they are made
    try:
        return fileio.load(file, backend_args=backend_args)
    except ValueError as e:
        raise_first([Fault(f'{file} is not JSON: {e}: get it again, or write it again')])
    except PermissionError:
        raise_first([Fault(not_permitted(file))])
    finally:
        if collects:
            gc.enable()


def check_part(part: Any, use: str, **_: Any) -> Findings:
    """Find what is wrong with the annotation file of a data set, its classes and its images."""
    content = read_file(part.ann_file, part.backend_args)
    found = list(check_file(content, part.ann_file, _loads_masks(part), use))
    yield from found
    if any(isinstance(finding, Fault) for finding in found):
        return
    yield from _check_categories(part, content)
    yield from _check_samples(part, use)
    left_out = len(content['images']) - len(part)
    if left_out and part._indices is None:
        yield Note(
            f'{left_out} of {len(content["images"])} images of {part.ann_file} are left out by '
            f'filter_cfg={part.filter_cfg}: they have no objects of the classes, or are too small'
        )


def _loads_masks(part: Any) -> bool:
    return any(getattr(step, 'with_mask', False) for step in part.pipeline.transforms)


def check_file(
    content: Mapping[str, Any], file: str, with_masks: bool = False, use: str = 'train'
) -> Findings:
    """Find what is wrong with the content of an annotation file.

    Args:
        content: The JSON.
        file: Its path, for messages.
        with_masks: Whether `segmentation` of the annotations is used.
        use: `'evaluator'` for the file of a metric, which needs more.
    """
    if not isinstance(content, Mapping):
        yield Fault(f'{file} holds a {type(content).__name__}, not a dict in the layout of COCO')
        return
    boxes = _boxes(content)
    for check in _FILE_CHECKS:
        found = list(check(content, boxes, file, use))
        yield from found
        if any(isinstance(finding, Fault) for finding in found):
            return  # the next ones take this for granted
    if with_masks:
        yield from _check_masks(content, boxes, file, use)


def _boxes(content: _Content) -> _Objects:
    """Return all annotations; of a panoptic file the segments, each with its `image_id`."""
    annotations = content.get('annotations') or []  # files of test images have none
    if not _is_panoptic(content):
        return annotations
    return [
        dict(segment, image_id=annotation.get('image_id'))
        for annotation in annotations
        for segment in annotation.get('segments_info', ())
    ]


def _is_panoptic(content: _Content) -> bool:
    annotations = content.get('annotations')
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    return isinstance(first, Mapping) and 'segments_info' in first


def _counted(
    objects: Sequence[_Object], file: str, wrong: Callable[[_Object], bool], text: str
) -> Iterator[Fault]:
    """Yield one fault for all objects of a file that are wrong in one way."""
    ids = [some.get('id') for some in objects if wrong(some)]
    if ids:
        yield Fault(
            f'{len(ids)} of {len(objects)} annotations in {file} {text}, first the ids '
            f'{join_first(ids)}: correct the file'
        )


def _check_keys(content: _Content, boxes: _Objects, file: str, use: str) -> Findings:
    for kind, keys in _KEYS.items():
        objects = boxes if kind == 'annotations' else content.get(kind)
        if not isinstance(objects, list):
            yield Fault(f'{file} has no list of {kind}: correct the file')
            return
        if odd := [some for some in objects if not isinstance(some, Mapping)]:
            yield Fault(
                f'{len(odd)} of {len(objects)} {kind} in {file} are no dicts, first {odd[0]!r}: '
                'correct the file'
            )
            return
        if kind == 'categories' and _is_panoptic(content):
            keys = *keys, 'isthing'
        for key in keys:
            if lacking := [i for i, some in enumerate(objects) if some.get(key) is None]:
                ids = [objects[i].get('id', f'of number {i} in the list') for i in lacking]
                yield Fault(
                    f'{len(lacking)} of {len(objects)} {kind} in {file} have no {key}, first the '
                    f'ids {join_first(ids)}: correct the file'
                )
                continue
            kinds: Any = _TYPES.get(key, object)
            if odd := [some[key] for some in objects if not isinstance(some[key], kinds)]:
                yield Fault(
                    f'{len(odd)} of {len(objects)} {kind} in {file} have a {key} of a wrong type, '
                    f'first {odd[0]!r}: correct the file'
                )


def _check_ids(content: _Content, boxes: _Objects, file: str, use: str) -> Findings:
    for kind in _KEYS:
        if kind == 'annotations' and _is_panoptic(content):
            continue  # their ids count within an image
        objects = boxes if kind == 'annotations' else content[kind]
        counts = Counter(some['id'] for some in objects)
        twice = [i for i, count in counts.items() if count > 1]
        if twice:
            yield Fault(
                f'{len(twice)} ids of {kind} in {file} occur more than once, such as '
                f'{join_first(twice)}: number them anew'
            )
    names = Counter(image['file_name'] for image in content['images'])
    if twice := [name for name, count in names.items() if count > 1]:
        yield Note(f'{len(twice)} images in {file} occur more than once: {join_first(twice)}')


def _check_values(content: _Content, boxes: _Objects, file: str, use: str) -> Findings:
    images = content['images']
    if not _are_finite([box['bbox'] for box in boxes], 4):
        text = 'have a bbox that is not four finite numbers'
        yield from _counted(boxes, file, lambda a: not _are_finite([a['bbox']], 4), text)
    if not _are_finite([box['area'] for box in boxes]):
        text = 'have an area that is no finite number'
        yield from _counted(boxes, file, lambda a: not _are_finite([a['area']]), text)
    if wrong := [i for i in images if not _is_size(i)]:
        yield Fault(
            f'{len(wrong)} of {len(images)} images in {file} have no positive width and height, '
            f'first {join_first(image["file_name"] for image in wrong)}: correct the file'
        )
    names = {category['id'] for category in content['categories']}
    unknown = Counter(box['category_id'] for box in boxes if box['category_id'] not in names)
    if unknown:
        yield Fault(
            f'{unknown.total()} of {len(boxes)} annotations in {file} have a category_id that is '
            f'not one of its categories: {join_first(sorted(unknown, key=str))}; they have '
            f'{join_first(sorted(names, key=str), 10)}: correct the file'
        )


def _check_places(content: _Content, boxes: _Objects, file: str, use: str) -> Findings:
    sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
    placed = [box for box in boxes if box['image_id'] in sizes]
    if boxes and not placed:
        first = boxes[0]['image_id']
        yield Fault(
            f'{len(boxes)} of {len(boxes)} annotations in {file} have an image_id that none of its '
            f'{len(sizes)} images has, such as {first!r}: correct the file, whose images have ids '
            f'such as {next(iter(sizes), None)!r}'
        )
        return
    size = np.array([sizes[box['image_id']] for box in placed], float).reshape(-1, 2)
    corners = np.array([box['bbox'] for box in placed], float).reshape(-1, 2, 2)
    start, extent = corners[:, 0], corners[:, 1]
    end = start + extent
    area = np.array([box['area'] for box in placed], float)
    # The rule of mmdet's `CocoDataset`.
    seen = (np.minimum(end, size) > np.maximum(start, 0)) & (extent >= 1)
    unused = int((~seen.all(axis=1) | (area <= 0)).sum())
    for count, reason in (
        (len(boxes) - len(placed), 'an image_id that none of its images has'),
        (unused, 'no area in their image'),
    ):
        if count:
            yield Note(f'{count} of {len(boxes)} boxes in {file} have {reason} and are not used')
    if placed and (area <= 0).all():
        yield Fault(
            f'all {len(placed)} annotations in {file} have an area of 0 or less, which training '
            'leaves out: write the area of each object in pixels'
        )
    elif placed and unused == len(placed):
        yield Fault(
            f'none of the {unused} boxes in {file} has an area of a pixel in its image, such as '
            f'{placed[0]["bbox"]}: write x, y, width and height in pixels'
        )
    (leaving,) = ((start < -1) | (end > size + 1)).any(axis=1).nonzero()
    are_corners = (start >= 0) & (start < extent) & (extent <= size + 1)
    if len(leaving) > len(placed) / 2 and are_corners.all():
        box, (width, height) = placed[leaving[0]]['bbox'], sizes[placed[leaving[0]]['image_id']]
        yield Fault(
            f'{len(leaving)} of {len(placed)} boxes in {file} leave their image, such as '
            f'{box} in {width}x{height}, and all would fit as corners x1, y1, '
            'x2, y2: write x, y, width and height'
        )
    if use == 'train' and placed and all(box.get('iscrowd') for box in placed):
        yield Fault(
            f'all {len(placed)} annotations in {file} have iscrowd=1, which training ignores: '
            'write iscrowd=0 for single objects'
        )


def _check_for_evaluation(content: _Content, boxes: _Objects, file: str, use: str) -> Findings:
    """Find what COCO's evaluation needs beyond what training does."""
    if use != 'evaluator':
        return
    yield from _counted(
        boxes, file, lambda a: 'iscrowd' not in a, 'have no iscrowd, which COCO evaluation reads'
    )
    yield from _counted(
        boxes,
        file,
        lambda a: not isinstance(a['id'], int) or a['id'] == 0,
        'have an id that is 0 or no number, which COCO evaluation counts as missed',
    )
    if 'annotations' not in content:
        yield Fault(f'{file} has no annotations, which evaluation needs: set format_only=True')


_FILE_CHECKS = (_check_keys, _check_ids, _check_values, _check_places, _check_for_evaluation)


def _check_masks(content: _Content, boxes: _Objects, file: str, use: str) -> Findings:
    sizes = {image['id']: (image['height'], image['width']) for image in content['images']}
    some = [a for a in boxes if a.get('segmentation') and a['image_id'] in sizes]
    reasons: dict[str, list[_Object]] = {}
    for annotation in some:
        if reason := _mask_fault(annotation['segmentation'], sizes[annotation['image_id']], use):
            reasons.setdefault(reason, []).append(annotation)
    for reason, wrong in reasons.items():
        # Training ignores a polygon without area. Evaluation fails at it.
        kind = Note if reason == _NO_POLYGON and use != 'evaluator' else Fault
        yield kind(
            f'{len(wrong)} of {len(some)} annotations in {file} have a segmentation {reason}, '
            f'first the ids {join_first(a["id"] for a in wrong)}: correct the file'
        )


_NO_POLYGON = 'without a polygon of three points or more'


def _mask_fault(mask: Any, size: tuple[int, int], use: str) -> str | None:
    """Return what is wrong with a segmentation for an image of height and width `size`."""
    if isinstance(mask, Mapping):
        counts = mask.get('counts')
        if not isinstance(counts, list | str) or tuple(mask.get('size') or ()) != size:
            return 'in RLE without counts, or whose size is not [height, width] of the image'
        if isinstance(counts, list) and sum(counts) != size[0] * size[1]:
            return 'in RLE whose counts do not add up to the pixels of the image'
        return None
    if not isinstance(mask, list) or not all(isinstance(polygon, list) for polygon in mask):
        return 'that is neither a list of polygons [[x, y, ...], ...] nor RLE'
    try:
        finite = math.isfinite(sum(map(sum, mask)))
    except TypeError:
        finite = False
    if not finite:
        return 'with coordinates that are no finite numbers'
    if not any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask):
        return _NO_POLYGON
    if use == 'evaluator' and len(mask[0]) <= 4:
        return 'whose first polygon has less than three points, at which pycocotools fails'
    return None


def _are_finite(values: Sequence[Any], *shape: int) -> bool:
    """Tell whether all values are finite numbers, or lists of them of a shape."""
    try:
        array = np.array(values)
    except ValueError:  # lists of several lengths
        return False
    fits = array.shape == (len(values), *shape) and array.dtype.kind in 'iuf'
    return not values or (fits and bool(np.isfinite(array).all()))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_size(image: _Object) -> bool:
    return all(_is_finite(image[key]) and image[key] > 0 for key in ('width', 'height'))


def _absent_classes(classes: Sequence[str], content: _Object, file: str) -> Iterator[Fault]:
    names = [category['name'] for category in content['categories']]
    if absent := [name for name in classes if name not in names]:
        yield Fault(
            f'{len(absent)} of {len(classes)} classes are not categories of {file}: '
            f'{join_first(absent)}; it has {join_first(names, 10)}: correct the classes in the '
            'metainfo of the dataset'
        )


def _check_categories(part: Any, content: Mapping[str, Any]) -> Findings:
    file, classes = part.ann_file, part.metainfo['classes']
    if isinstance(classes, str):  # mmdet would take every category whose name is a part of it
        yield Fault(
            f'classes are the text {classes!r}: write a tuple of names, with a comma even for one, '
            f'({classes!r},)'
        )
        return
    found = list(_absent_classes(classes, content, file))
    yield from found
    if found:
        return
    names = {category['id']: category['name'] for category in content['categories']}
    labelled = tuple(names[i] for i in sorted(part.cat2label, key=part.cat2label.get))
    if labelled != tuple(classes):
        yield Fault(
            f'{file} lists the classes in another order, and labels follow it: write them as '
            f'{labelled} in the metainfo of the dataset'
        )
    if others := sorted({*names.values()} - {*classes}):
        yield Note(f'{len(others)} categories of {file} are no classes: {join_first(others, 5)}')


def _check_samples(part: Any, use: str) -> Findings:
    if len(part) and 'segments_info' in part.get_data_info(0):
        yield from _check_segments(part)
    without_mask = 0
    for i in range(len(part)) if _loads_masks(part) else ():
        info = part.get_data_info(i)
        if 'segments_info' not in info:  # whose masks are files
            without_mask += sum('mask' not in instance for instance in info['instances'])
    infos = listed_infos(part)
    if missing := absent_infos(part, infos, 'img_path'):
        with keep_random_state():
            load_image = loaders(part, missing[0], use)[0]
        if not can_load(load_image, missing[0]):
            yield Fault(
                f'{len(missing)} of {len(infos)} images of {part.ann_file} do not exist: '
                f'{join_first(info["img_path"] for info in missing)}: restore them, or correct '
                'data_root and data_prefix'
            )
    if without_mask:
        yield Fault(
            f'{without_mask} objects in {part.ann_file} have no segmentation, but the pipeline '
            'loads masks: add them, or use a config for boxes alone, such as RetinaNet'
        )


def _check_segments(part: Any) -> Findings:
    """Look for the maps of panoptic segments, and into some of them, evenly spread."""
    infos = listed_infos(part)
    if missing := absent_infos(part, infos, 'seg_map_path'):
        yield Fault(
            f'{len(missing)} of {len(infos)} images of {part.ann_file} have no map of segments, '
            f'first {join_first(info["seg_map_path"] for info in missing)}: add them, or correct '
            'data_prefix'
        )
        return
    for i in np.unique(np.linspace(0, len(infos) - 1, min(len(infos), _SEGMENT_MAPS)).astype(int)):
        path, segments = infos[i].get('seg_map_path'), infos[i]['segments_info']
        if path is None:
            continue
        try:
            with Image.open(io.BytesIO(fileio.get(path, part.backend_args))) as file:
                colours = np.asarray(file.convert('RGB')).astype(int)
        except Exception as e:  # broken bytes raise errors of many kinds
            yield Fault(f'{path} cannot be read: {e}: restore it')
            return
        wanted, size = (infos[i]['width'], infos[i]['height']), colours.shape[1::-1]
        ids = {*np.unique(colours @ (1, 256, 256**2)).tolist()}
        # After a resize, small segments may have no pixel.
        absent = [segment['id'] for segment in segments if segment['id'] not in ids]
        if size != wanted:
            yield Fault(
                f'{path} has {size[0]}x{size[1]} pixels, but its annotations are for '
                f'{wanted[0]}x{wanted[1]}: correct the file'
            )
        elif segments and len(absent) == len(segments):
            yield Fault(
                f'none of the {len(segments)} segments of {path} has its id in a pixel, as R + 256 '
                f'G + 256^2 B, such as {absent[0]}: correct the file'
            )
        else:
            continue
        return


def check_objects(
    part: Any, contents: Contents, use: str, alone: bool = True, **_: Any
) -> Findings:
    """Find data sets without objects, and boxes that leave their image."""
    total = contents.objects.total()
    if not total and (use == 'train' or contents.crowds):
        crowds = f', {contents.crowds} are crowds (iscrowd=1)' if contents.crowds else ''
        # Other parts, and images that `indices` leaves out, may have objects.
        alone = alone and getattr(part, '_indices', None) is None
        alone = alone and 'thing_classes' not in part.metainfo  # stuff may be all there is
        kind = Fault if use == 'train' and alone else Note
        yield kind(
            f'no object of the classes is left in {part.ann_file}{crowds}: see the notes of the '
            'data checks, and classes in the metainfo'
        )
        return
    classes = part.metainfo.get('classes') or ()
    absent = [name for i, name in enumerate(classes) if not contents.objects[str(i)]]
    if absent and total:
        yield Note(f'{len(absent)} of {len(classes)} classes do not occur: {join_first(absent, 5)}')
    if contents.outside:
        yield Note(
            f'{contents.outside} of {total} boxes leave their image by more than a pixel; training '
            'uses them as they are'
        )
