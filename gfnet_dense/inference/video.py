"""Videos, read and written by PyAV, frame by frame."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from gfnet_dense.serialization import write_whole

from .images import Array, InputError

_MISSING = 1.0  # seconds at the end of a video that may be missing


def read_video(path: Path) -> tuple[Fraction, int, Iterator[Array]]:
    """Return the frames per second of a video, how many it says it has, and its frames.

    Returns:
        The rate; the number, 0 if the file does not say; and the frames as the camera was held,
        RGB of shape `(H, W, 3)`, uint8.

    Raises:
        InputError: If PyAV is not installed, or the file is no video. The frames raise it where
            they cannot be decoded.
    """
    av = _pyav()
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise InputError(f'{path} cannot be read as a video: it has no pictures')
            stream = file.streams.video[0]
            rate, count = stream.average_rate or Fraction(25), stream.frames
    except av.error.FFmpegError as e:
        raise InputError(f'{path} cannot be read as a video: {e}') from e

    def frames() -> Iterator[Array]:
        try:
            with av.open(str(path)) as file:
                stream = file.streams.video[0]
                stream.thread_type = 'AUTO'
                end = 0.0
                for frame in file.decode(stream):
                    end = float(((frame.pts or 0) + (frame.duration or 0)) * stream.time_base)
                    array = frame.to_ndarray(format='rgb24')
                    yield np.ascontiguousarray(np.rot90(array, round(frame.rotation / 90) % 4))
                # Of a file that is cut, FFmpeg decodes what is there and says nothing.
                if (declared := _declared_end(file)) > end + _MISSING:
                    raise InputError(
                        f'{path} ends after {end:.1f} of {declared:.1f} seconds: a part is missing'
                    )
        except av.error.FFmpegError as e:
            raise InputError(f'{path} cannot be decoded: {e}') from e

    return rate, count, frames()


def _declared_end(file: Any) -> float:
    """Return when the video ends by its header, in seconds; 0 if the header does not say."""
    if not file.format.name.startswith(('mov', 'matroska')):  # FFmpeg guesses from the file's size
        return 0.0
    stream = file.streams.video[0]
    if stream.duration:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    if file.duration and len(file.streams) == 1:
        return float(file.duration / 1e6)  # in Matroska an absolute time
    return 0.0


@contextmanager
def write_video(path: Path, rate: Fraction) -> Iterator[Callable[[Image.Image], None]]:
    """Open an MP4 in H.264 that appears at `path` when the block ends, and not if it raises.

    Yields:
        A function that appends a picture. The video has the size of the first one, in which others
        are fitted.

    Raises:
        InputError: If there are no pictures, or they cannot be encoded.
        OSError: If the file cannot be written.
    """
    av = _pyav()
    try:
        with write_whole(path) as target, av.open(target, 'w', format='mp4') as file:
            yield from _encoded(av, file, rate)
    except av.error.FFmpegError as e:
        if isinstance(e, OSError):
            raise
        raise InputError(f'{path} cannot be encoded: {e}') from e


def _encoded(av: Any, file: Any, rate: Fraction) -> Iterator[Callable[[Image.Image], None]]:
    """Yield a function that encodes a picture into a file."""
    stream = file.add_stream('libx264', rate=rate, options={'crf': '18'})
    stream.pix_fmt = 'yuv420p'

    size: list[int] = []

    def add(picture: Image.Image) -> None:
        size[:] = size or picture.size
        if picture.size != tuple(size):
            picture = ImageOps.pad(picture, (size[0], size[1]))
        array = np.asarray(picture)
        padding = ((0, size[1] % 2), (0, size[0] % 2), (0, 0))  # players want even sides
        array = np.pad(array, padding, 'edge')
        if not stream.codec_context.is_open:
            stream.height, stream.width = array.shape[:2]
        file.mux(stream.encode(av.VideoFrame.from_ndarray(array, format='rgb24')))

    yield add
    if not stream.codec_context.is_open:
        raise InputError('the video has no frames')
    file.mux(stream.encode())


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError:
        raise InputError('videos need PyAV: pip install av') from None
    return av
