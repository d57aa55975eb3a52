"""Checkpoints that are whole or not there, and finding the one to resume from."""

import contextlib
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from gfnet_dense.serialization import CheckpointError, load_file, write_whole

INTERRUPTED = 'interrupted.pth'
LAST = 'last_checkpoint'  # where mmengine notes the path of the last checkpoint
SAMPLES_OF_EPOCH = 'samples_of_epoch'  # in the message hub of a run that ended within an epoch
_REPEATED = 5.0  # seconds in which a signal counts as the one before
_RESUMABLE = re.compile(rf'(?:iter|epoch)_\d+\.pth|{INTERRUPTED}')


def latest_checkpoint(work_dir: str | Path) -> Path | None:
    """Return the checkpoint that a run continues from.

    That is the last one it saved, or, where that one is missing or cannot be read, the one of
    its others that is furthest along. Files that cannot be read are named in the log.

    Args:
        work_dir: Folder of the run.
    """
    note = Path(work_dir) / LAST
    files = [path for path in note.parent.glob('*.pth') if _RESUMABLE.fullmatch(path.name)]
    with contextlib.suppress(OSError):
        noted = Path(note.read_text().strip())
        if _iterations(noted) is not None:
            # A run that is killed may leave a whole checkpoint that it has not noted yet.
            written = note.stat().st_mtime_ns
            files = [path for path in files if path.stat().st_mtime_ns > written] + [noted]
    progress = {path: n for path in files if (n := _iterations(path)) is not None}
    return max(progress, key=progress.get, default=None)


def _iterations(path: Path) -> int | None:
    """Return how many iterations are in a checkpoint, None if it cannot be resumed."""
    if not path.is_file():
        return None
    try:
        content = load_file(path, mmap=True)
        return content['meta']['iter'] if 'optimizer' in content else None
    except (CheckpointError, OSError, KeyError, TypeError) as e:
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

    _due = False

    def before_train(self, runner: Runner) -> None:
        """Set up as mmengine does, and remove what a killed run has left half-written."""
        super().before_train(runner)
        if isinstance(self.file_backend, LocalBackend):
            self.file_backend = _DeferredRemovals()
            if is_main_process():
                for partial in Path(self.out_dir).glob('*.pth.*.partial'):
                    partial.unlink()

    def every_n_train_iters(self, runner: Runner, n: int, start: int = 0) -> bool:
        """Tell whether to save, at the next step of the optimizer if gradients accumulate."""
        self._due = self._due or super().every_n_train_iters(runner, n, start)
        due = self._due and runner.optim_wrapper.should_update()
        self._due = self._due and not due
        return due

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
    signal that comes some seconds after the first ends the run at once.
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

    def before_train_epoch(self, runner: Runner) -> None:
        """Note where the epoch begins, from the batches that a resumed run skips."""
        batches = runner.train_dataloader.batch_sampler
        self._epoch_began = runner.iter - getattr(batches, 'skip', 0)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Save and end, if one of the processes was told to."""
        # Gradients that wait for others to be accumulated are not in a checkpoint.
        if self._agreed(runner) and runner.optim_wrapper.should_update():
            done = runner.iter + 1 - self._epoch_began
            batch = getattr(runner.train_dataloader.batch_sampler, 'batch_size', 0)
            runner.message_hub.update_info(SAMPLES_OF_EPOCH, done * batch * runner.world_size)
            self._save(runner, runner.iter + 1)
            self._end(runner)

    def after_val_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """End where nothing is to be saved; several processes go on to the next iteration."""
        # Weights may be exchanged for others, as for a moving average.
        if self._received and not runner.distributed:
            latest = latest_checkpoint(runner.work_dir)
            if latest and load_file(latest, mmap=True)['meta']['iter'] == runner.iter:
                self._end(runner)

    def after_val_epoch(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Save and end."""
        if self._received and not runner.distributed:
            self._save(runner, runner.iter)
            self._end(runner)

    def _on_signal(self, number: int, frame: object) -> None:
        # Launchers repeat a signal that its process has had already.
        if self._received is None:
            self._received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > _REPEATED:
            self.release()
            os.kill(os.getpid(), number)

    def _agreed(self, runner: Runner) -> bool:
        if runner.distributed:  # all save after the same iteration
            received = torch.tensor(self._received or 0)
            all_reduce(received, 'max')
            if received > 0 and self._received is None:
                self._received, self._since = int(received), time.monotonic()
        return self._received is not None

    def _save(self, runner: Runner, iterations: int) -> None:
        meta = dict(epoch=runner.epoch, iter=iterations)
        runner.save_checkpoint(runner.work_dir, INTERRUPTED, meta=meta)
        path = Path(runner.work_dir) / INTERRUPTED
        if is_main_process():
            with write_whole(path.with_name(LAST)) as file:
                file.write(bytes(path))
        runner.logger.warning(f'saved iteration {iterations} in {path}')
        barrier()  # launchers end all processes when the first has ended

    def _end(self, runner: Runner) -> None:
        name = signal.Signals(self._received).name
        runner.logger.warning(f'ended by {name}; --resume continues from the last checkpoint')
        self.release()
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._received)  # as a shell reports the end by a signal


def init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    """Make a data loading process end with its run and not before.

    Launchers send the signal that ends a run to all its processes, but the iteration is still to be
    completed.

    Args:
        init: What else is to be done in the process.
        worker: Its number.
    """
    if init is not None:
        init(worker)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, args=[os.getppid()], daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
