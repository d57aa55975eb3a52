"""A checkpoint when a run is interrupted by a signal."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from gfnet_dense.serialization import load_file, write_whole

from .checkpoints import INTERRUPTED, LAST, latest_checkpoint
from .optimizers import makes_step

SAMPLES_OF_EPOCH = 'samples_of_epoch'  # in the message hub of a run interrupted within an epoch
_REPEATED = 5.0  # seconds in which a second signal counts as a repetition of the first


@HOOKS.register_module()
class InterruptHook(Hook):
    """On SIGTERM or Ctrl-C, finish the iteration, save a checkpoint and end the run.

    The checkpoint is `interrupted.pth` in the work directory; `--resume` continues from it. A
    signal that comes more than five seconds after the first ends the run at once.
    """

    priority = 'LOWEST'  # after the hooks that complete an iteration, such as the schedulers'

    def __init__(self) -> None:
        self._received: int | None = None
        self._since = 0.0
        self._epoch_began = 0
        self._handlers: dict[int, Any] = {}

    def before_train(self, runner: Runner) -> None:
        """Install the signal handlers."""
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # only the main thread can
                self._handlers[number] = signal.signal(number, self._on_signal)

    def after_train(self, runner: Runner) -> None:
        """Restore the previous signal handlers."""
        self.release()

    def release(self) -> None:
        """Restore the previous signal handlers."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def before_train_epoch(self, runner: Runner) -> None:
        """Note where the epoch began; a resumed run skips its first batches."""
        batches = runner.train_dataloader.batch_sampler
        self._epoch_began = runner.iter - getattr(batches, 'skip', 0)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Save and end the run if any process received a signal."""
        # A checkpoint does not hold accumulated gradients, so wait for the step that uses them.
        if self._agreed(runner) and makes_step(runner.optim_wrapper):
            done = runner.iter + 1 - self._epoch_began
            batch = getattr(runner.train_dataloader.batch_sampler, 'batch_size', 0)
            runner.message_hub.update_info(SAMPLES_OF_EPOCH, done * batch * runner.world_size)
            self._save(runner, runner.iter + 1)
            self._end(runner)

    def after_val_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """End the run if the last checkpoint is of this iteration.

        Otherwise wait for the end of the validation: its weights may be a moving average, which
        must not be saved as those of the run. Several processes wait for the next iteration.
        """
        if self._received and not runner.distributed:
            latest = latest_checkpoint(runner.work_dir)
            if latest and load_file(latest, mmap=True)['meta']['iter'] == runner.iter:
                self._end(runner)

    def after_val_epoch(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Save and end the run."""
        if self._received and not runner.distributed:
            self._save(runner, runner.iter)
            self._end(runner)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._received is None:
            self._received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > _REPEATED:  # launchers repeat signals at once
            self.release()
            os.kill(os.getpid(), number)

    def _agreed(self, runner: Runner) -> bool:
        if runner.distributed:  # all processes save after the same iteration
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
        barrier()  # launchers end all processes as soon as one has ended

    def _end(self, runner: Runner) -> None:
        assert self._received is not None
        name = signal.Signals(self._received).name
        runner.logger.warning(f'ended by {name}; --resume continues from the last checkpoint')
        self.release()
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._received)  # as shells report a process that a signal ended


def init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    """Make a data loading process ignore SIGTERM, unless its parent sends it.

    Launchers send the signal to all processes of a run, but the run still finishes its iteration.
    `init` is another function to call with the number of the process.
    """
    if init is not None:
        init(worker)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, args=[os.getppid()], daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
