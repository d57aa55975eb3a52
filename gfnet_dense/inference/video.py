"""Videos, read and written by PyAV, frame by frame."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from gfnet_dense.serialization import write_whole

from .images import Array, InputError


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
            stream = file.streams.video[0]
            rate, count = stream.average_rate or Fraction(25), stream.frames
    except (av.error.FFmpegError, IndexError) as e:
        raise InputError(f'{path} cannot be read as a video: {e}') from e

    def frames() -> Iterator[Array]:
        try:
            with av.open(str(path)) as file:
                file.streams.video[0].thread_type = 'AUTO'
                for frame in file.decode(video=0):
                    array = frame.to_ndarray(format='rgb24')
                    yield np.ascontiguousarray(np.rot90(array, round(frame.rotation / 90) % 4))
        except av.error.FFmpegError as e:
            raise InputError(f'{path} cannot be decoded: {e}') from e

    return rate, count, frames()


@contextmanager
def write_video(path: Path, rate: Fraction) -> Iterator[Callable[[Image.Image], None]]:
    """Open an MP4 in H.264 that appears at `path` when the block ends, and not if it raises.

    Yields:
        A function that appends a picture. All of them have one size.

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

    def add(picture: Image.Image) -> None:
        # Players want even sides.
        width, height = (side + side % 2 for side in picture.size)
        array = np.asarray(picture)
        padding = ((0, height - array.shape[0]), (0, width - array.shape[1]), (0, 0))
        frame = av.VideoFrame.from_ndarray(np.pad(array, padding, 'edge'), format='rgb24')
        if not stream.codec_context.is_open:
            stream.width, stream.height = width, height
        file.mux(stream.encode(frame))

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
