"""Checkpoints that are whole or not there, and finding the one to resume from."""

import contextlib
import logging
import re
import signal
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from gfnet_dense.serialization import CheckpointError, load_file, write_whole

INTERRUPTED = 'interrupted.pth'
LAST = 'last_checkpoint'  # where mmengine notes the path of the last checkpoint
_RESUMABLE = re.compile(rf'(?:iter|epoch)_\d+\.pth|{INTERRUPTED}')


def latest_checkpoint(work_dir: str | Path) -> Path | None:
    """Return the checkpoint that a run continues from.

    That is the last one it saved, or, where that one is missing or cannot be read, the one of
    its others that is furthest along. Files that cannot be read are named in the log.

    Args:
        work_dir: Folder of the run.
    """
    folder = Path(work_dir)
    try:
        last = Path((folder / LAST).read_text().strip())
    except OSError:
        last = folder
    if _iterations(last) is not None:
        return last
    others = [path for path in folder.glob('*.pth') if _RESUMABLE.fullmatch(path.name)]
    progress = {path: n for path in others if (n := _iterations(path)) is not None}
    return max(progress, key=progress.get, default=None)


def _iterations(path: Path) -> int | None:
    """Return how many iterations are in a checkpoint, None if it cannot be resumed."""
    if not path.is_file():
        return None
    try:
        content = load_file(path, mmap=True)
        return content['meta']['iter'] if 'optimizer' in content else None
    except (CheckpointError, KeyError, TypeError) as e:
        print_log(f'passed over {path}: {e}', logger='current', level=logging.WARNING)
        return None


class _DeferredRemovals(LocalBackend):
    """Local files that are removed when they are no longer the newest whole ones."""

    def __init__(self) -> None:
        self._paths: list[str] = []

    def remove(self, filepath: str | Path) -> None:
        """Note a file to be removed."""
        self._paths.append(str(filepath))

    def remove_noted(self) -> None:
        while self._paths:
            Path(self._paths.pop()).unlink(missing_ok=True)


@HOOKS.register_module()
class DurableCheckpointHook(CheckpointHook):
    """mmengine's hook, but older checkpoints go only when the newer one is whole.

    Takes the arguments of :class:`mmengine.hooks.CheckpointHook`. :class:`GFNetRunner` puts it
    in the place of that one.
    """

    def before_train(self, runner: Runner) -> None:
        """Set up as mmengine does, and remove what a killed run has left half-written."""
        super().before_train(runner)
        if isinstance(self.file_backend, LocalBackend):
            self.file_backend = _DeferredRemovals()
            if is_main_process():
                for partial in Path(self.out_dir).glob('*.pth.*.partial'):
                    partial.unlink()

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        if is_main_process():
            (Path(runner.work_dir) / INTERRUPTED).unlink(missing_ok=True)
        self._remove_noted()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._remove_noted()

    def _remove_noted(self) -> None:
        if isinstance(self.file_backend, _DeferredRemovals):
            self.file_backend.remove_noted()


@HOOKS.register_module()
class InterruptHook(Hook):
    """End a run on SIGTERM or Ctrl-C after the iteration it is in, with a checkpoint.

    The checkpoint is `interrupted.pth` in the work directory, from which `--resume` goes on. A
    second signal ends the run at once.
    """

    priority = 'LOWEST'  # after the hooks that complete an iteration, such as the schedulers'

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def before_train(self, runner: Runner) -> None:
        """Listen for the signals."""
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # only the main thread can
                self._before[number] = signal.signal(number, self._on_signal)

    def after_train(self, runner: Runner) -> None:
        """Stop listening."""
        self.release()

    def release(self) -> None:
        """Give the signals back to whom they belonged."""
        while self._before:
            signal.signal(*self._before.popitem())

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Save and end, if one of the processes was told to."""
        # Gradients that wait for others to be accumulated are not in a checkpoint.
        if self._agreed(runner) and runner.optim_wrapper.should_update():
            self._end(runner, runner.iter + 1)

    def after_val_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Save and end; several processes go on to the next iteration of training."""
        if self._received and not runner.distributed:
            self._end(runner, runner.iter)

    def _on_signal(self, number: int, frame: object) -> None:
        self._received = number
        self.release()

    def _agreed(self, runner: Runner) -> bool:
        if runner.distributed:  # all save after the same iteration
            received = torch.tensor(self._received or 0)
            all_reduce(received, 'max')
            self._received = int(received) or None
        return self._received is not None

    def _end(self, runner: Runner, iterations: int) -> None:
        self.release()
        meta = dict(epoch=runner.epoch, iter=iterations)
        runner.save_checkpoint(runner.work_dir, INTERRUPTED, meta=meta)
        path = Path(runner.work_dir) / INTERRUPTED
        if is_main_process():
            with write_whole(path.with_name(LAST)) as file:
                file.write(bytes(path))
        runner.logger.warning(
            f'{signal.Signals(self._received).name}: saved iteration {iterations} in {path}; '
            '--resume continues from it'
        )
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._received)  # as a shell reports the end by a signal
