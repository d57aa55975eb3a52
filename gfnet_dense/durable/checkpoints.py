"""Checkpoints that are whole or not there, and finding the one to resume from."""

import contextlib
import fcntl
import hashlib
import logging
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from gfnet_dense.serialization import CheckpointError, load_file

from .optimizers import makes_step

INTERRUPTED = 'interrupted.pth'
LAST = 'last_checkpoint'  # the file in which mmengine notes the path of the last checkpoint
_RESUMABLE = re.compile(rf'(?:iter|epoch)_\d+\.pth|{INTERRUPTED}')


def latest_checkpoint(work_dir: str | Path) -> Path | None:
    """Return the checkpoint that the run in a folder continues from, None if there is none.

    This is the last one that the run saved. If that one is missing or unreadable, it is the one
    with the most iterations among the others. The log names files that cannot be read.
    """
    note = Path(work_dir) / LAST
    files = [path for path in note.parent.glob('*.pth') if _RESUMABLE.fullmatch(path.name)]
    with contextlib.suppress(OSError):
        noted = Path(note.read_text().strip())
        if _iterations(noted) is not None:
            # A killed run may leave a whole checkpoint that it has not noted yet.
            written = note.stat().st_mtime_ns
            files = [path for path in files if path.stat().st_mtime_ns > written] + [noted]
    progress = {path: n for path in files if (n := _iterations(path)) is not None}
    return max(progress, key=lambda path: progress[path], default=None)


def _iterations(path: Path) -> int | None:
    """Return how many iterations are in a checkpoint, None if it cannot be resumed."""
    if not path.is_file():
        return None
    try:
        content = load_file(path, mmap=True)
        return int(content['meta']['iter']) if 'optimizer' in content else None
    except (CheckpointError, OSError, KeyError, TypeError) as e:
        print_log(f'skipped {path}: {e}', logger='current', level=logging.WARNING)
        return None


def local_file(name: str | Path) -> str:
    """Return the path of a checkpoint. A URL is downloaded once, into the folder of torch.hub.

    Raises:
        OSError: If it cannot be downloaded.
    """
    url = str(name)
    if not url.startswith(('http://', 'https://')):
        return url
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    folder.mkdir(parents=True, exist_ok=True)
    # Many files are called iter_160000.pth.
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    path = folder / f'{digest}-{Path(urlparse(url).path).name}'
    with (folder / f'{digest}.lock').open('w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # of the processes of a run, one downloads
        if not path.exists():
            torch.hub.download_url_to_file(url, str(path))
    return str(path)


class _DeferredRemovals(LocalBackend):
    """Local files whose removal waits until `remove_noted`."""

    def __init__(self) -> None:
        self._paths: list[str] = []

    def remove(self, filepath: str | Path) -> None:
        self._paths.append(str(filepath))

    def remove_noted(self) -> None:
        while self._paths:
            Path(self._paths.pop()).unlink(missing_ok=True)


@HOOKS.register_module()
class DurableCheckpointHook(CheckpointHook):
    """mmengine's hook, but it removes an older checkpoint only after the newer one is written.

    It takes the arguments of :class:`mmengine.hooks.CheckpointHook`, which
    :class:`~gfnet_dense.durable.DurableRunner` replaces by this one.
    """

    file_backend: Any = None  # none in an evaluation
    _due = False

    def before_train(self, runner: Runner) -> None:
        """Set up as mmengine does, and remove partial files of a killed run."""
        super().before_train(runner)
        if isinstance(self.file_backend, LocalBackend):
            self.file_backend = _DeferredRemovals()
            if is_main_process():
                for partial in Path(self.out_dir).glob('*.pth.*.partial'):
                    partial.unlink()

    def every_n_train_iters(self, runner: Runner, n: int, start: int = 0) -> bool:
        """Return whether to save; accumulated gradients postpone this to the next step."""
        self._due = self._due or super().every_n_train_iters(runner, n, start)
        due = self._due and makes_step(runner.optim_wrapper)
        self._due = self._due and not due
        return due

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Replace numpy's numbers, which metrics such as mmseg's mIoU return, by Python's.

        mmengine's own loading, also in `init_model`, `init_detector` and the inferencers, takes few
        of numpy's types for safe. For a file with another one it turns its safety off.
        """
        info = checkpoint['message_hub']['runtime_info']
        for key, value in info.items():
            if isinstance(value, np.generic):
                info[key] = value.item()

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Save if it is time to."""
        last = self.last_ckpt
        super().after_train_iter(runner, *args, **kwargs)
        self._remove_outdated(runner, last)

    def after_train_epoch(self, runner: Runner) -> None:
        """Save if it is time to."""
        last = self.last_ckpt
        super().after_train_epoch(runner)
        self._remove_outdated(runner, last)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        """Save if these metrics are the best so far."""
        last = self.last_ckpt
        super().after_val_epoch(runner, metrics)
        self._remove_outdated(runner, last)

    def _remove_outdated(self, runner: Runner, last: str | None) -> None:
        if is_main_process() and self.last_ckpt != last:
            (Path(runner.work_dir) / INTERRUPTED).unlink(missing_ok=True)
        if isinstance(self.file_backend, _DeferredRemovals):
            self.file_backend.remove_noted()
