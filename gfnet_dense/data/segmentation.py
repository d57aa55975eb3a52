"""Checks of data sets of semantic segmentation."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .contents import Contents, keep_random_state, loaders
from .errors import Fault, Findings, Note, join_first
from .files import absent_infos, can_load, has_own_steps, listed_infos, loads_annotations

# Why a line of a list of files has no image: what tells it, and what to do.
_LINES = (
    (lambda line, suffix: not line.strip(), 'is blank: remove it'),
    (lambda line, suffix: line[:1] == '\ufeff', 'begins with a byte order mark: save without it'),
    (lambda line, suffix: line.endswith(suffix), 'ends in {suffix}, which img_suffix adds again'),
    (lambda line, suffix: len(line.split()) > 1, 'has several words, not one name'),
)


def is_segmentation(part: Any) -> bool:
    """Tell whether a data set is one of semantic segmentation, like mmseg's `BaseSegDataset`."""
    return hasattr(part, 'get_data_info') and 'reduce_zero_label' in part.get_data_info(0)


def check_files(part: Any, use: str, **_: Any) -> Findings:
    """Find images and label maps that do not exist, and files that were left out."""
    for name in ('img_suffix', 'seg_map_suffix'):
        if not isinstance(suffix := getattr(part, name, ''), str):
            if _adds_suffixes(part):
                yield Fault(
                    f'{name} of {part.data_root} is {suffix!r}: write one text, such as ".jpg"'
                )
            return  # what follows compares texts
    infos = listed_infos(part)
    absent = absent_infos(part, infos, 'img_path')
    if absent and not can_load(_loaders(part, absent[0], use)[0], absent[0]):
        paths = [info['img_path'] for info in absent]
        yield Fault(
            f'{len(absent)} of {len(infos)} images do not exist, first {join_first(paths)}: '
            f'{_line_at_fault(part, paths[0]) or "restore them, or correct data_prefix"}'
        )
        return
    yield from _left_out(part, [info['img_path'] for info in infos])
    labelled = [info for info in infos if info.get('seg_map_path') is not None]
    missing = absent_infos(part, infos, 'seg_map_path')
    if missing:
        # A step shows what it loads with a sample that has all its files.
        whole = next((info for info in labelled if info not in missing), missing[0])
        load = _loaders(part, whole, use)[1]
        needed = use == 'train' or load is not None or loads_annotations(part)
        if needed and not can_load(load, missing[0]):
            yield Fault(
                f'{len(missing)} of {len(infos)} images have no annotation, first '
                f'{join_first(info["seg_map_path"] for info in missing)}: add the annotations, or '
                'remove the images'
            )
    if has_own_steps(part):
        return  # they may set gt_seg_map
    steps = getattr(getattr(part, 'pipeline', None), 'transforms', ())
    if not labelled and any(getattr(step, 'with_seg', False) for step in steps):
        yield Fault(
            f'the pipeline for {part.data_root} loads annotations, but data_prefix has no '
            'seg_map_path: set it, or remove LoadAnnotations from the pipeline'
        )
    elif use == 'train' and not any(
        key != 'img_path' and key.endswith('_path') for key in infos[0]
    ):
        yield Fault(
            f'training needs annotations: set seg_map_path of data_prefix, {part.data_root}'
        )


def _adds_suffixes(part: Any) -> bool:
    """Tell whether mmseg's own code adds suffixes to names; listing a folder takes several."""
    own = type(part).load_data_list.__qualname__ == 'BaseSegDataset.load_data_list'
    listed = os.path.isfile(getattr(part, 'ann_file', None) or '')
    return own and (listed or (part.data_prefix or {}).get('seg_map_path') is not None)


def _loaders(part: Any, info: Any, use: str) -> tuple[Any, Any, bool]:
    with keep_random_state():
        return loaders(part, info, use)


def _line_at_fault(part: Any, path: str) -> str | None:
    """Say which line of the list of files names an image that does not exist."""
    if not hasattr(part, 'img_suffix') or not os.path.isfile(part.ann_file or ''):
        return None
    lines = Path(part.ann_file).read_text(encoding='utf-8', errors='replace').splitlines()
    folder = part.data_prefix.get('img_path') or ''
    for number, line in enumerate(lines, 1):
        if os.path.join(folder, line.strip() + part.img_suffix) == path:
            for applies, remedy in _LINES:
                if applies(line, part.img_suffix):
                    remedy = remedy.format(suffix=part.img_suffix)
                    return f'line {number} of {part.ann_file} {remedy}'
            return f'line {number} of {part.ann_file} names the first one'
    return None


def _left_out(part: Any, images: Sequence[str]) -> Findings:
    """Find images that the suffix leaves out, and label maps without an image."""
    if not hasattr(part, 'img_suffix'):
        return
    folder, maps = (part.data_prefix.get(key) for key in ('img_path', 'seg_map_path'))
    listed = part.ann_file and not os.path.isdir(part.ann_file)
    if not folder or part.backend_args or listed or part._indices is not None:
        return  # a list of files leaves out others on purpose
    suffix = part.img_suffix
    stems = {path[: -len(suffix)] for path in images}
    others = [
        path
        for place, _, files in os.walk(folder)
        for path in (os.path.join(place, name) for name in files)
        if not path.endswith(suffix) and not os.path.basename(path).startswith('.')
    ]
    same = [
        path
        for path in others
        if path.lower().endswith(suffix.lower()) and path[: -len(suffix)] not in stems
    ]
    if same:
        stem = os.path.relpath(same[0][: -len(suffix)], folder)
        labelled = maps and os.path.exists(os.path.join(maps, stem + part.seg_map_suffix))
        text = (
            f'{len(same)} images in {folder} are left out, beside {len(images)} that are read, '
            f'because img_suffix is {suffix!r}: {join_first(same)}; rename them'
        )
        yield Fault(text) if labelled else Note(text)
    if rest := sorted({*others} - {*same}):
        yield Note(
            f'{len(rest)} other files in {folder} do not end in {suffix!r} and are not read: '
            f'{join_first(map(os.path.basename, rest))}'
        )
    if maps and os.path.isdir(maps):
        named = {os.path.relpath(stem, folder) + part.seg_map_suffix for stem in stems}
        extra = [
            os.path.relpath(os.path.join(place, name), maps)
            for place, _, files in os.walk(maps)
            for name in files
            if name.endswith(part.seg_map_suffix)
        ]
        if unused := sorted({*extra} - named):
            yield Note(f'{len(unused)} label maps in {maps} have no image: {join_first(unused)}')


def check_labels(
    part: Any, contents: Contents, ignored: Sequence[int], use: str, alone: bool = True
) -> Findings:
    """Find labels that belong to no class, and classes without labels.

    Args:
        part: The data set.
        contents: What was read of it.
        ignored: Labels that the heads, or the metric, ignore.
        use: `'train'`, `'val'` or `'test'`.
        alone: Whether there is no other data set of this use.
    """
    if not contents.pixels:
        return
    classes = part.metainfo.get('classes') or ()
    labels = {int(label): count for label, count in contents.pixels.items()}
    beyond = sorted(
        label for label in labels if not 0 <= label < len(classes) and label not in ignored
    )
    if classes and beyond:
        example = contents.examples[str(beyond[0])]
        reduced = getattr(part, 'reduce_zero_label', False)
        shifted = ' (after reduce_zero_label)' if reduced else ''
        yield Fault(
            f'{example} has labels {join_first(beyond)}{shifted}, but there are {len(classes)} '
            f'classes: labels 0 to {len(classes) - 1}, and {join_first(ignored)} for unlabelled '
            'pixels; correct the file, metainfo and reduce_zero_label of the dataset, or '
            'ignore_index of the heads and the metric'
        )
        return
    if classes:
        # Other parts, and images that `indices` leaves out, may have the other classes.
        alone = alone and getattr(part, '_indices', None) is None
        # A step of the user's may change labels after they were loaded.
        certain = use == 'train' and alone and not has_own_steps(part)
        kind = Fault if certain else Note
        yield from _training_on_nothing(part, contents, classes, ignored, kind)


def _training_on_nothing(
    part: Any,
    contents: Contents,
    classes: Sequence[str],
    ignored: Sequence[int],
    kind: type[Fault | Note],
) -> Iterator[Fault | Note]:
    reduced = getattr(part, 'reduce_zero_label', False)
    found = [i for i in range(len(classes)) if contents.pixels[str(i)] and i not in ignored]
    unlabelled = sum(contents.pixels[str(label)] for label in ignored)
    share = 100 * unlabelled / contents.pixels.total()
    if not found:
        yield kind(
            f'no pixel in {part.data_root} belongs to a class: all have the label '
            f'{join_first(ignored)}, which is ignored; correct the annotations or reduce_zero_label'
        )
    elif len(found) == 1 < len(classes) and contents.read > 1:
        reason = ''
        if reduced:
            reason = (
                '. reduce_zero_label=True ignores label 0 and takes 1 off the others: set it to '
                'False if the labels of the files begin at 0'
            )
        elif unlabelled:
            reason = f'. Label 255 is ignored ({share:.0f}% of the pixels): do not draw objects so'
        yield kind(
            f'all labelled pixels in {part.data_root} belong to the class {classes[found[0]]!r}, '
            f'of {len(classes)} classes{reason}'
        )
    elif reduced and found == list(range(len(classes) - 1)) and unlabelled:
        yield Note(
            f'the last class {classes[-1]!r} does not occur in {part.data_root}, all others do: '
            'if the labels of the files begin at 0, set reduce_zero_label=False, which now '
            f'ignores label 0 ({share:.0f}% of the pixels) and takes 1 off the others'
        )
    elif absent := [name for i, name in enumerate(classes) if i not in found]:
        yield Note(f'{len(absent)} of {len(classes)} classes do not occur: {join_first(absent, 5)}')
