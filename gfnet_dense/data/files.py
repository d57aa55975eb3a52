"""Which files of a data set exist, and which steps of its pipeline could load them."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from mmengine import fileio

from .contents import keep_random_state
from .errors import DataError, not_permitted

_REMOTE = 64  # files on another machine that are looked for
LIBRARIES = 'mmengine', 'mmcv', 'mmseg', 'mmdet', 'gfnet_dense'


def is_empty(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder has nothing in it.

    Raises:
        DataError: If what is in it may not be read.
        OSError: If there is no such folder.
    """
    try:
        os.stat(os.path.join(folder, '.'))  # takes the right to enter, as opening its files does
    except PermissionError:
        raise DataError(not_permitted(folder)) from None
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except PermissionError:  # files can be opened by their names, from a list
        return False


def listed_infos(part: Any) -> list[Any]:
    """Return the samples whose files are looked for: all, or 64 of those on another machine.

    They have no objects, which of all samples together would fill the memory.
    """
    count = len(part)
    if getattr(part, 'backend_args', None) or '://' in str(part.get_data_info(0).get('img_path')):
        chosen = np.unique(np.linspace(0, count - 1, min(count, _REMOTE)).astype(int)).tolist()
    else:
        chosen = range(count)
    return [without_objects(part.get_data_info(i)) for i in chosen]


def without_objects(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample without its `instances`."""
    return {key: value for key, value in info.items() if key != 'instances'}


def absent_infos(part: Any, infos: Sequence[Any], key: str) -> list[Any]:
    """Return the samples that name a file under a key, such as `img_path`, which is not there."""
    options = dict(backend_args=getattr(part, 'backend_args', None))
    named = [info for info in infos if info.get(key) is not None]
    return [info for info in named if not fileio.exists(info[key], **options)]


def can_load(load: Callable[[Any], Any] | None, info: Mapping[str, Any]) -> bool:
    """Tell whether a loading step of a pipeline loads a sample, wherever it finds it."""
    if load is None:
        return False
    with keep_random_state():
        try:
            load(info)
        except Exception:  # of any library
            return False
    return True


def has_own_steps(part: Any) -> bool:
    """Tell whether a pipeline has steps of the user, which may load anything."""
    return any(type(step).__module__.partition('.')[0] not in LIBRARIES for step in _steps(part))


def loads_annotations(part: Any) -> bool:
    """Tell whether a pipeline has a step of the libraries that loads annotations."""
    return any(getattr(s, 'with_seg', False) or 'Annotation' in repr(s) for s in _steps(part))


def _steps(part: Any) -> Sequence[Any]:
    return getattr(getattr(part, 'pipeline', None), 'transforms', None) or ()
