"""Official weights by name: where they are published, and fetching them once.

Files go to the checkpoints folder of torch.hub, where timm and torchvision keep theirs, too. One
mechanism serves processes that start together, whether they belong to one distributed run or to
several: who holds the lock beside the file downloads it, the others wait and find it. The kernel
takes the lock from a process that dies. Nodes that share the folder share the lock if the file
system supports locks. Otherwise each node downloads the file, and the last complete download stays.
"""

import html
import logging
import re
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from gfnet_dense.serialization import CheckpointError, write_whole

# The file ids at the two places where the authors publish their weights: the official
# repository's README. No checksums are published.
OFFICIAL_WEIGHTS = {
    'gfnet-ti': ('3d0c1579aa524a0a99dd', '1_xrfC7c_ccZnVicYDnrViOA_T1N-xoHI'),
    'gfnet-xs': ('e0ab5b1583954a1fa9b2', '1paf9gQWdsLXrG58R77yJ3U0FiNINg9xN'),
    'gfnet-s': ('e5561fa070c44d9399bf', '18aRey_1abWNMmSL7TZQ4WxpplLRCDGEl'),
    'gfnet-b': ('2fbf264597af4d72afb3', '1OncnXYAXpdjZBq4JK5Y3xacIHOIMePQo'),
    'gfnet-h-ti': ('b22dd45eccbe462cbbfb', '1Nrq5sfHD9RklCMl6WkcVrAWI5vSVzwSm'),
    'gfnet-h-s': ('5229cb4d1daf48e69675', '1w4d7o1LTBjmSkb5NKzgXBBiwdBOlwiie'),
    'gfnet-h-b': ('954c5af21e824ba6b40c', '1F900_-yPH7GFYfTt60xn4tu5a926DYL0'),
}
# `confirm` stands for the page that Google Drive puts before files too large for its virus scan.
ADDRESSES = (
    'https://cloud.tsinghua.edu.cn/f/{}/?dl=1',
    'https://drive.usercontent.google.com/download?id={}&export=download&confirm=t',
)
TIMEOUT = 30.0  # seconds without a byte
SLOWEST = 10_000  # bytes per second on average; below, a server counts as stalled
_CHUNK = 1 << 18

_logger = logging.getLogger(__name__)


class DownloadError(OSError):
    """No address gives the weights."""


class _AddressError(Exception):
    """One address does not give the weights."""


def fetch(name: str, check: Callable[[Path], None]) -> Path:
    """Return the path of official weights, downloaded on first use.

    `name` is one of :data:`OFFICIAL_WEIGHTS`. `check` gets the path of a download before it is
    kept, and raises a :class:`CheckpointError` if the file is not what the name says.

    Raises:
        DownloadError: If no address gives the file; says what went wrong at each, and where to
            put the file by hand.
        OSError: If the file cannot be written.
    """
    path = Path(torch.hub.get_dir()) / 'checkpoints' / f'{name}.pth'
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f'{path}.lock')
    try:
        turn = lock.acquire(blocking=False)
    except Timeout:
        _logger.info('waiting for another process to download %s', path)
        turn = lock.acquire()
    with turn:
        if not path.is_file():
            _download(name, path, check)
    return path


def _download(name: str, path: Path, check: Callable[[Path], None]) -> None:
    failures = []
    for address, file_id in zip(ADDRESSES, OFFICIAL_WEIGHTS[name], strict=True):
        url = address.format(file_id)
        _logger.info('downloading %s from %s to %s', name, url, path)
        try:
            with write_whole(path) as file:
                for piece in _read(url, name):
                    file.write(piece)
                file.flush()
                check(Path(file.name))
        except (_AddressError, CheckpointError) as e:
            failures.append(f'{url}: {str(e).replace(file.name, "the download")}')
            _logger.warning(failures[-1])
        else:
            _logger.info('downloaded %s', path)
            return
    raise DownloadError(
        f'the official weights {name} cannot be downloaded: {"; ".join(failures)}'
        f'\nput the file at {path} by hand, or train from scratch: init_cfg=None of the '
        'backbone, in timm pretrained=False'
    )


def _read(url: str, name: str) -> Iterator[bytes]:
    """Yield what lies at an address in pieces, with a progress bar where there is a terminal."""
    request = Request(url, headers={'User-Agent': 'gfnet-dense'})
    try:
        with urlopen(request, timeout=TIMEOUT) as response:
            if response.headers.get_content_type() == 'text/html':
                raise _AddressError(f'the server sent a web page{_title(response.read1(_CHUNK))}')
            size, received, start = response.length, 0, time.monotonic()
            with tqdm(
                desc=name, total=size, unit='B', unit_scale=True, unit_divisor=1024, disable=None
            ) as progress:
                # A piece is what has come so far, however little, so that the time is looked at.
                while received != size and (piece := response.read1(_CHUNK)):
                    yield piece
                    received += len(piece)
                    progress.update(len(piece))
                    if time.monotonic() - start > TIMEOUT + received / SLOWEST:
                        raise _AddressError(f'slower than {SLOWEST} bytes per second')
    except HTTPError as e:
        raise _AddressError(str(e)) from e
    except (OSError, HTTPException) as e:
        raise _AddressError(getattr(e, 'reason', None) or str(e) or type(e).__name__) from e
    if size is not None and received < size:
        raise _AddressError(f'the connection was cut after {received} of {size} bytes')


def _title(page: bytes) -> str:
    match = re.search(r'<title>(.{1,200}?)</title>', page.decode(errors='replace'), re.DOTALL)
    return f' in place of the file: {" ".join(html.unescape(match[1]).split())}' if match else ''
