"""One training in a work directory at a time."""

import contextlib
import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from mmengine.logging import print_log

from .checkpoints import latest_checkpoint

_LOCK = '.in_use'
_SAVED = re.compile(r'(?:iter|epoch|best|interrupted)[_.]')


class WorkDirError(OSError):
    """A work directory cannot be written to, is in use, or holds another run."""


def make_work_dir(work_dir: str | Path) -> None:
    """Make the folder of a run.

    Raises:
        WorkDirError: If it cannot be written to.
    """
    try:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        Path(work_dir, _LOCK).touch()
    except OSError as e:
        raise WorkDirError(
            e.errno, f'{e.strerror}: {work_dir} cannot be written to; choose another --work-dir'
        ) from e


@contextlib.contextmanager
def lock_work_dir(work_dir: str | Path, resumed: str | Path | None = None) -> Iterator[None]:
    """Keep other processes from locking a work directory within the block.

    `resumed` is the checkpoint that the run continues from, if any.

    Raises:
        WorkDirError: If the folder cannot be written to, another process has locked it, or it holds
            checkpoints of a run that this one does not continue.
    """
    make_work_dir(work_dir)
    folder = Path(work_dir).absolute()
    with (folder / _LOCK).open('r+') as file:
        try:
            # Not flock: data loading processes would keep that lock after their parent is killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkDirError(
                f'{folder} is in use by {file.read().strip()}: choose another --work-dir'
            ) from None
        except OSError as e:  # some network file systems have no locks
            print_log(f'{folder} cannot be locked: {e}', logger='current', level=logging.WARNING)
        own = resumed and (
            Path(resumed).absolute().parent == folder or Path(resumed) == latest_checkpoint(folder)
        )
        found = sorted(path.name for path in folder.glob('*.pth') if _SAVED.match(path.name))
        if found and not own:
            raise WorkDirError(
                f'{folder} holds the checkpoints of another run, such as {found[0]}, and this one '
                'would overwrite them: continue with --resume, or choose another --work-dir'
            )
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield
