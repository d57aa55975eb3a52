"""One training in a work directory at a time."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from mmengine.logging import print_log

from .checkpoints import latest_checkpoint


class WorkDirError(OSError):
    """A work directory cannot be written to, is in use, or holds another run."""


@contextlib.contextmanager
def reserved(work_dir: str | Path, resume: bool) -> Iterator[None]:
    """Within it, no other training can use a work directory.

    Of several processes the first reserves it for all.

    Args:
        work_dir: The folder, made if need be.
        resume: Whether the run continues one in that folder, or leads there from a checkpoint.

    Raises:
        WorkDirError: If the folder cannot be written to, is in use, or holds the checkpoints of a
            run that this one would write over.
    """
    # As launchers say it, for the processes do not know each other yet.
    ranks = (os.environ.get(name) for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'))
    if int(next(filter(None, ranks), 0)) > 0:
        yield
        return
    folder = Path(work_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / '.in_use').open('a+')
    except OSError as e:
        raise WorkDirError(
            e.errno, f'{e.strerror}: {folder} cannot be written to; choose another --work-dir'
        ) from e
    with file:
        try:
            # Not flock, which data loading processes would go on holding after a kill.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise WorkDirError(
                f'{folder} is in use by {file.read().strip()}: choose another --work-dir'
            ) from None
        except OSError as e:  # some network file systems have no locks
            print_log(f'{folder} cannot be reserved: {e}', logger='current', level='WARNING')
        if not resume and (found := latest_checkpoint(folder)):
            raise WorkDirError(
                f'{folder} holds the checkpoints of another run, the last of them {found.name}, '
                'which this one would write over: continue with --resume, or choose another '
                '--work-dir'
            )
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield
