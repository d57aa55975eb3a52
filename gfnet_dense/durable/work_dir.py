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

_SAVED = re.compile(r'(?:iter|epoch|best|interrupted)[_.]')


class WorkDirError(OSError):
    """A work directory cannot be written to, is in use, or holds another run."""


@contextlib.contextmanager
def reserved(work_dir: str | Path, resume: str | None) -> Iterator[None]:
    """Within it, no other training can use a work directory.

    Of several processes the first reserves it for all.

    Args:
        work_dir: The folder, made if need be.
        resume: The checkpoint that the run continues from, `'auto'` for one in that folder.

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
            print_log(f'{folder} cannot be reserved: {e}', logger='current', level=logging.WARNING)
        own = resume == 'auto' or (resume and Path(resume).absolute().parent == folder.absolute())
        found = sorted(path.name for path in folder.glob('*.pth') if _SAVED.match(path.name))
        if found and not own:
            raise WorkDirError(
                f'{folder} holds the checkpoints of another run, {found[0]} among them, which this '
                'one would write over: continue with --resume, or choose another --work-dir'
            )
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield
