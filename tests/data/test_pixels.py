"""What becomes of the pixels of images in formats of many kinds, in each of our loaders.

docs/faulty_data.md has the table. The expected pixels are those that were written.
"""

import cv2
import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from PIL import Image

from gfnet_dense.data.errors import DataError
from gfnet_dense.data.image_folder import _read
from gfnet_dense.openmmlab import find_config

y, x = np.mgrid[:16, :24]
GREY = (y * 16 + x).astype(np.uint8)
RGB = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)
ALPHA = np.where(x < 12, 0, 255).astype(np.uint8)
GREYS = np.stack([GREY] * 3, axis=-1)
PALETTE = Image.fromarray(RGB).quantize(64)


def wide(array):
    """Return 16 bits whose upper 8 are the array."""
    return array.astype(np.uint16) << 8 | 7


def save(path, image, **options):
    Image.fromarray(image).save(path, **options)


# Name of the file, how it is written, and what is to be loaded; None for an error.
KINDS = {
    'grey.png': (lambda path: save(path, GREY), GREYS),
    'rgb.png': (lambda path: save(path, RGB), RGB),
    'one_bit.png': (lambda path: save(path, GREY > 100), (GREYS > 100) * 255),
    'grey16.png': (lambda path: save(path, wide(GREY)), GREYS),
    'grey16.tif': (lambda path: save(path, wide(GREY)), GREYS),
    'grey16.pgm': (lambda path: cv2.imwrite(str(path), wide(GREY)), GREYS),
    'rgb16.png': (lambda path: cv2.imwrite(str(path), wide(RGB[..., ::-1])), RGB),
    'rgba16.png': (
        lambda path: cv2.imwrite(str(path), wide(np.dstack([RGB[..., ::-1], ALPHA]))),
        RGB,
    ),
    'int32.tif': (lambda path: save(path, GREY.astype(np.int32) * 1000), None),
    'float32.tif': (lambda path: save(path, GREY.astype(np.float32)), None),
    'palette.png': (lambda path: PALETTE.save(path), np.asarray(PALETTE.convert('RGB'))),
    'transparent.png': (
        lambda path: PALETTE.save(path, transparency=3),
        np.asarray(PALETTE.convert('RGB')),
    ),
    'palette.gif': (lambda path: PALETTE.save(path), np.asarray(PALETTE.convert('RGB'))),
    'rgba.png': (lambda path: save(path, np.dstack([RGB, ALPHA])), RGB),
    'grey_alpha.png': (lambda path: save(path, np.dstack([GREY, ALPHA])), GREYS),
    'cmyk.tif': (lambda path: Image.fromarray(RGB).convert('CMYK').save(path), RGB),
    'lossless.webp': (lambda path: save(path, RGB, lossless=True), RGB),
}


def step(name: str):
    """Return the step of a config that loads images, as the pipeline has it."""
    pipeline = Config.fromfile(find_config(name)).train_dataloader.dataset.pipeline
    (options,) = (dict(s) for s in pipeline if s.type == 'LoadImageFromFile')
    options.pop('type')
    return LoadImageFromFile(**options)


LOADERS = {
    'segmentation': 'upernet_gfnet_nano_digits',
    'ADE20K': 'fpn_gfnet_h_s_ade20k',
    'detection': 'retinanet_gfnet_nano_digits',
    'COCO': 'mask_rcnn_gfnet_h_s_coco',
}


def load(loader: str, path) -> np.ndarray:
    if loader == 'ImageFolder':
        return np.asarray(_read(str(path)))
    return step(LOADERS[loader])(dict(img_path=str(path)))['img'][..., ::-1]


# The fast lane leaves out the recipes, whose steps are those of the small configs.
@pytest.mark.parametrize(
    'loader',
    [
        *(pytest.param(k, marks=[pytest.mark.slow] * ('_h_' in v)) for k, v in LOADERS.items()),
        'ImageFolder',
    ],
)
def test_pixels_are_those_that_were_written(tmp_path, loader):
    for name, (write, expected) in KINDS.items():
        write(tmp_path / name)
        if expected is None:
            with pytest.raises((AssertionError, DataError), match=r'failed to load|cannot be'):
                load(loader, tmp_path / name)
        else:
            np.testing.assert_array_equal(load(loader, tmp_path / name), expected, err_msg=name)


@pytest.mark.parametrize('loader', [*LOADERS, 'ImageFolder'])
def test_cmyk_jpegs_have_their_colours(tmp_path, loader):
    path = tmp_path / 'cmyk.jpg'
    Image.fromarray(RGB).convert('CMYK').save(path, quality=100, subsampling=0)
    assert np.abs(load(loader, path).astype(int) - RGB).max() <= 2


@pytest.mark.parametrize('loader', [*LOADERS, 'ImageFolder'])
def test_orientation_turns_images_of_mmcv_and_not_those_of_folders(tmp_path, loader):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    save(tmp_path / 'turned.png', RGB, exif=exif)
    turned = RGB if loader == 'ImageFolder' else np.rot90(RGB, -1)
    np.testing.assert_array_equal(load(loader, tmp_path / 'turned.png'), turned)


@pytest.mark.parametrize('loader', [*LOADERS, 'ImageFolder'])
def test_truncated_images_are_errors(tmp_path, loader):
    whole = tmp_path / 'whole.jpg'
    save(whole, np.tile(RGB, (8, 8, 1)))
    (tmp_path / 'part.jpg').write_bytes(whole.read_bytes()[:-200])
    with pytest.raises((AssertionError, DataError), match=r'failed to load|cannot be'):
        load(loader, tmp_path / 'part.jpg')
