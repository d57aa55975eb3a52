"""Which files to predict from, and what their results are called."""

import glob
import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from gfnet_dense.data.errors import not_permitted

IMAGES = {*IMG_EXTENSIONS, '.gif', '.jp2', '.avif'}
VIDEOS = {'.mp4', '.mov', '.avi', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg'}


class Input(NamedTuple):
    """A file, and the path of its results below the output folder: of a video the whole name."""

    path: Path
    name: Path

    @property
    def is_video(self) -> bool:
        """Whether the file is a video by its name."""
        return self.path.suffix.lower() in VIDEOS


class Inputs:
    """The images and videos that arguments of the command line name.

    Iterating lists folders as it goes and keeps nothing of the files in them but their paths, so
    that each file is found once. Names of results keep the tree of the inputs below the folder
    that all arguments lie in. They end in the file's suffix, too, where another image beside it
    has the same name but for that. No two inputs have one name.

    Args:
        arguments: Files, folders, which are searched for images and videos with their subfolders,
            patterns such as `photos/**/*.png`, or `-` for paths on standard input, one on a line.
        out: The output folder. Folders are not searched in it, and nothing in its `labels` and
            `overlays` is an input.

    Attributes:
        skipped: How many files of folders are no images and no videos by their names, after an
            iteration; `.txt` for example.
        suffixes: Their suffixes.
        failures: What is wrong with each folder that cannot be listed, by its path, after an
            iteration.
    """

    def __init__(self, arguments: Sequence[str], out: Path) -> None:
        self._arguments = list(dict.fromkeys(arguments))
        self._folders = [Path(os.path.abspath(a)) for a in arguments if Path(a).is_dir()]
        self._out = out.resolve()
        self._results = self._out / 'labels', self._out / 'overlays'
        self._root = Path(os.path.commonpath([_folder(argument) for argument in arguments]))
        self.skipped = 0
        self.suffixes: set[str] = set()
        self.failures: dict[str, str] = {}
        _names.cache_clear()  # the folders may have changed since

    def count(self) -> int | None:
        """Return how many there are, None if standard input is among them."""
        return None if '-' in self._arguments else sum(1 for _ in self)

    def __iter__(self) -> Iterator[Input]:
        self.skipped = 0
        paths: set[str] = set()
        names: set[Path] = set()
        for path in self._paths():
            absolute = Path(os.path.abspath(path))
            resolved = absolute.resolve()
            if str(absolute) in paths or any(map(resolved.is_relative_to, self._results)):
                continue
            paths.add(str(absolute))
            if absolute.is_relative_to(self._root):
                name = absolute.relative_to(self._root)
            else:
                name = absolute.relative_to(absolute.anchor)
            # The name without its suffix is the first choice, then the whole name, then a number.
            choices: Iterator[Path] = (
                name.with_name(f'{name.name}-{i}') for i in itertools.count(2)
            )
            choices = itertools.chain([name], choices)
            if absolute.suffix.lower() not in VIDEOS and _names(absolute.parent)[absolute.stem] < 2:
                choices = itertools.chain([name.with_suffix('')], choices)
            name = next(choice for choice in choices if choice not in names)
            names.add(name)
            yield Input(path, name)

    def _paths(self) -> Iterator[Path]:
        for argument in self._arguments:
            if argument == '-':
                yield from (Path(line.strip()) for line in sys.stdin if line.strip())
            elif Path(argument).is_dir():
                if not self._is_listed(Path(argument)):
                    yield from self._files(argument)
            elif glob.has_magic(argument) and not Path(argument).exists():
                # A pattern without a match is passed on, and named as a file that is not there.
                for match in sorted(glob.iglob(argument, recursive=True)) or [argument]:
                    if self._is_listed(Path(match)):
                        continue
                    if not Path(match).is_dir():
                        yield Path(match)
                    elif '**' not in argument:
                        yield from self._files(match)
            elif not self._is_listed(Path(argument)):
                yield Path(argument)

    def _is_listed(self, path: Path) -> bool:
        """Return whether a path is found in a folder that is another argument."""
        known = path.is_dir() or path.suffix.lower() in IMAGES | VIDEOS
        parents = Path(os.path.abspath(path)).parents
        return known and any(folder in parents for folder in self._folders)

    def _files(self, folder: str) -> Iterator[Path]:
        visited = {self._out}  # links may lead back
        for place, folders, files in os.walk(folder, onerror=self._fail, followlinks=True):
            if (resolved := Path(place).resolve()) in visited and place != folder:
                folders.clear()
                continue
            visited.add(resolved)
            folders[:] = sorted(name for name in folders if name[0] != '.')
            for name in sorted(files):
                suffix = Path(name).suffix.lower()
                if suffix in IMAGES | VIDEOS and name[0] != '.':
                    yield Path(place, name)
                elif name[0] != '.':
                    self.skipped += 1
                    self.suffixes.add(suffix or name)

    def _fail(self, error: OSError) -> None:
        folder = error.filename
        reason = f'{folder} cannot be listed: {error.strerror}'
        is_forbidden = isinstance(error, PermissionError)
        self.failures[folder] = not_permitted(folder) if is_forbidden else reason


def _folder(argument: str) -> str:
    """Return the folder below which the inputs of an argument lie."""
    path = Path('x' if argument == '-' else argument)
    if path.is_dir():
        return os.path.abspath(path)
    while glob.has_magic(str(path)) and not path.exists():
        path = path.parent
        if not glob.has_magic(str(path)):
            return os.path.abspath(path)
    return os.path.abspath(path.parent)


@lru_cache(maxsize=32)
def _names(folder: Path) -> Counter[str]:
    """Return how many images and videos of a folder have a name, with or without its suffix."""
    try:
        files = [Path(entry.name) for entry in os.scandir(folder)]
    except OSError:
        return Counter()
    files = [file for file in files if file.suffix.lower() in IMAGES | VIDEOS]
    return Counter(name for file in files for name in (file.stem, file.name))
