"""Images of every kind as arrays of RGB."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

Array = np.ndarray[Any, Any]

ACCEPTED = (
    'give a path, a binary file, an array, a tensor or an image of Pillow, or a list or generator '
    'of them'
)
_SAMPLES = 277  # TIFF's number of bands


class InputError(ValueError):
    """An input cannot be read as an image."""


def read_image(source: Any) -> Array:
    """Return an image as 8-bit RGB.

    Files are turned as their EXIF orientation says. Of 16-bit images the upper 8 bits are taken.
    Grey becomes RGB; palettes, CMYK and other colours are converted; transparency is dropped, and
    of several frames the first is taken. The loaders of OpenMMLab do the same, but for Pillow's
    16-bit images.

    Args:
        source: A path; a binary file; an image of Pillow; or an array of shape `(H, W)`,
            `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)` or a tensor of shape `(1, H, W)`, `(3, H, W)`
            or `(4, H, W)`, grey, RGB or RGBA, with integers of 8 or 16 bits or floats from 0 to 1.

    Returns:
        An array of shape `(H, W, 3)`, uint8.

    Raises:
        InputError: If it is none of these, or the file cannot be decoded.
    """
    if isinstance(source, Tensor):
        source = (
            source.detach().cpu().movedim(0, -1).numpy() if source.ndim == 3 else source.numpy()
        )
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _from_pillow(source)
    name = source if isinstance(source, str | Path) else type(source).__name__
    if not isinstance(source, str | Path) and not hasattr(source, 'read'):
        raise InputError(f'{name} is no image: {ACCEPTED}')
    try:
        with Image.open(source) as file:
            # Pillow reads the first of two bands of a TIFF as grey.
            if file.mode == 'L' and getattr(file, 'tag_v2', {}).get(_SAMPLES, 1) > 1:
                raise InputError('more than one band, but no colours and no transparency')
            return _from_pillow(file)
    except InputError as e:
        raise InputError(f'{name}: {e}') from None
    except Image.DecompressionBombError as e:
        size = str(e).partition(', could be')[0]  # and the limit
        raise InputError(
            f'{name} cannot be read: {size}: resize it, or for segmentation give --tile'
        ) from None
    except Exception as e:  # broken bytes raise errors of many kinds
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        if 'cannot identify' in reason:
            reason = 'it is no image, or its first bytes are damaged'
        raise InputError(f'{name} cannot be read: {reason or type(e).__name__}') from e


def _from_pillow(image: Image.Image) -> Array:
    # Pillow opens PGM of 16 bits in a mode of 32.
    wide = image.mode.startswith('I;16') or (image.mode, image.format) == ('I', 'PPM')
    image = ImageOps.exif_transpose(image)
    if wide:  # convert() would clip at 255
        return _from_array(np.asarray(image).astype(np.uint16))
    if image.mode in ('I', 'F'):  # and here nothing says what white is
        raise InputError(f'mode {image.mode}, of 32 bits, has no 8-bit colours: convert it')
    if image.mode == 'La':  # transparency multiplied in: it has no conversion to RGB
        image = image.convert('LA')
    return np.asarray(image.convert('RGB'))


def _from_array(array: Array) -> Array:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise InputError(
            f'an image has shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), as a tensor (1, H, W), '
            f'(3, H, W) or (4, H, W), but got {array.shape}'
        )
    array = array[:, :, :3]
    if array.dtype.kind == 'f':
        if not (array.min() >= 0 and array.max() <= 1):  # NaN, too
            raise InputError(
                f'floats are expected from 0 to 1, but got {array.min():g} to {array.max():g}: '
                'scale them, or give integers'
            )
        array = (array * 255).round()
    elif array.dtype.kind in 'iu':
        if array.min() < 0 or array.max() > 65535:
            raise InputError(
                f'integers of 8 or 16 bits are expected, but got {array.min()} to {array.max()}'
            )
        # Integers of 32 and 64 bits may hold numbers of 8 or of 16 bits.
        if array.dtype.itemsize == 2 or array.max() > 255:
            array = array >> 8
    else:
        raise InputError(f'numbers are expected, but got {array.dtype}')
    return np.ascontiguousarray(np.broadcast_to(array.astype(np.uint8), (*array.shape[:2], 3)))
