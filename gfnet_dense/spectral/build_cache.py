"""What is compiled on first use is kept in the user's cache, whole or not at all."""

import fcntl
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

_Loaded = TypeVar('_Loaded')


def load_or_build(
    name: str, build: Callable[[Path], None], load: Callable[[Path], _Loaded]
) -> _Loaded:
    """Load a file of the user's cache, which is built before if it is not there.

    Args:
        name: Name of the file. It has to tell apart everything that `build` depends on.
        build: Writes the file. One process at a time builds.
        load: Loads the file, which is not needed any more afterwards.

    Raises:
        OSError: If the file can be written or loaded neither in the cache nor in a temporary
            folder.
    """
    try:
        folder = _cache_folder()
        with _locked(folder):
            if not (folder / name).exists():
                _build(build, folder / name)
        return load(folder / name)
    except OSError as e:  # no home, not writable, full, or no programs may run from there
        logging.getLogger(__name__).info('Compiling without a cache: %s', e)
    # A folder of our own, which nobody else may write to.
    with tempfile.TemporaryDirectory() as temporary:
        build(Path(temporary) / name)
        return load(Path(temporary) / name)


def _cache_folder() -> Path:
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    folder = Path(base) / 'gfnet-dense'
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time build. The system lifts the lock of a process that dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _build(build: Callable[[Path], None], target: Path) -> None:
    """Build beside the target and rename the file: a target is always whole."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        result = Path(folder) / target.name
        build(result)
        with result.open('rb') as file:
            os.fsync(file.fileno())  # before its name says that it is whole
        result.replace(target)
