"""Images of every kind, beside what OpenCV reads."""

import io

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from gfnet_dense.inference import InputError, read_image


@pytest.fixture(scope='module')
def rgb() -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 256, (6, 9, 3))
    return np.kron(values, np.ones((8, 8, 1))).astype(np.uint8)


def pillow(rgb: np.ndarray, mode: str) -> Image.Image:
    image = Image.fromarray(rgb)
    if mode == 'I;16':
        return Image.fromarray(rgb[:, :, 0].astype(np.uint16) * 257 - 100)
    if mode == 'P with transparency':
        image = image.quantize(16)
        image.info['transparency'] = 3
        return image
    image = image.convert(mode)
    if mode in ('RGBA', 'LA'):
        image.putalpha(Image.fromarray(rgb[:, :, 1]))
    return image


@pytest.mark.parametrize(
    ('mode', 'suffix'),
    [
        ('RGB', 'png'), ('RGB', 'jpg'), ('RGB', 'bmp'), ('RGB', 'webp'), ('RGB', 'tif'),
        ('L', 'png'), ('L', 'jpg'), ('1', 'png'), ('I;16', 'png'), ('I;16', 'tif'), ('P', 'png'),
        ('P with transparency', 'png'), ('RGBA', 'png'), ('LA', 'png'),
    ],
)  # fmt: skip
def test_files_are_read_as_opencv_reads_them(tmp_path, rgb, mode, suffix):
    path = tmp_path / f'image.{suffix}'
    pillow(rgb, mode).save(path, **({'lossless': True} if suffix == 'webp' else {}))
    expected = cv2.imread(str(path), cv2.IMREAD_COLOR)[:, :, ::-1]
    found = read_image(path)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_are_turned_as_the_camera_was_held(tmp_path, rgb, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / 'image.jpg'
    Image.fromarray(rgb).save(path, exif=exif)
    found = read_image(str(path))
    assert found.shape[:2] == ((48, 72) if orientation < 5 else (72, 48))
    np.testing.assert_array_equal(found, cv2.imread(str(path))[:, :, ::-1])


def test_16_bits_in_colour_and_cmyk(tmp_path, rgb):
    wide = rgb.astype(np.uint16) * 256 + 77
    cv2.imwrite(str(tmp_path / 'wide.png'), wide[:, :, ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / 'wide.png'), rgb)
    Image.fromarray(255 - rgb).convert('CMYK').save(tmp_path / 'cmyk.tif')  # its black is 0
    np.testing.assert_array_equal(read_image(tmp_path / 'cmyk.tif'), 255 - rgb)


def test_grey_of_16_and_32_bits(tmp_path, rgb):
    dark = (rgb[:, :, 0] // 2).astype(np.uint16)
    cv2.imwrite(str(tmp_path / 'dark.pgm'), dark)
    assert (read_image(tmp_path / 'dark.pgm') == 0).all()
    cv2.imwrite(str(tmp_path / 'wide.pgm'), dark * 512 + 3)
    np.testing.assert_array_equal(read_image(tmp_path / 'wide.pgm')[:, :, 1], dark * 2)
    for dtype in (np.int32, np.float32):
        Image.fromarray(dark.astype(dtype)).save(tmp_path / 'grey.tif')
        with pytest.raises(InputError, match=r'grey\.tif: mode [IF], of 32 bits, has no 8-bit'):
            read_image(tmp_path / 'grey.tif')


def test_two_bands_are_no_colours(tmp_path, rgb):
    path = tmp_path / 'radar.tif'
    tifffile.imwrite(path, rgb[:, :, :2], photometric='minisblack', extrasamples=['unspecified'])
    with pytest.raises(InputError, match=r'radar\.tif: more than one band'):
        read_image(path)


def test_the_first_frame_is_taken(tmp_path, rgb):
    first, second = Image.fromarray(rgb).quantize(200), Image.new('P', (72, 48))
    first.save(tmp_path / 'a.gif', save_all=True, append_images=[second])
    np.testing.assert_array_equal(read_image(tmp_path / 'a.gif'), np.array(first.convert('RGB')))


def test_arrays_tensors_and_images_of_pillow_mean_the_same(rgb):
    chw = torch.from_numpy(rgb.copy()).movedim(-1, 0)
    alpha = np.dstack([rgb, rgb[:, :, 0]])
    for source in (
        rgb, rgb.astype(np.int64), rgb.astype(np.uint16) * 256, rgb / 255, alpha, chw,
        chw.float() / 255, Image.fromarray(rgb), Image.fromarray(rgb).convert('RGBA'),
    ):  # fmt: skip
        np.testing.assert_array_equal(read_image(source), rgb)
    grey = np.repeat(rgb[:, :, :1], 3, axis=2)
    for source in (rgb[:, :, 0], rgb[:, :, :1], chw[:1], chw[0], Image.fromarray(rgb[:, :, 0])):
        np.testing.assert_array_equal(read_image(source), grey)


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        (np.zeros((4, 5, 2)), r'shape .* but got \(4, 5, 2\)'),
        (np.zeros((0, 5, 3)), r'but got \(0, 5, 3\)'),
        (torch.zeros(2, 3, 8, 8), r'but got '),
        (np.full((4, 5), 7.5), 'from 0 to 1, but got 7.5 to 7.5'),
        (np.full((4, 5), np.nan), 'but got nan'),
        (np.full((4, 5), -1), '8 or 16 bits are expected, but got -1'),
        (np.zeros((4, 5), complex), 'numbers are expected'),
        (7, 'int is no image'),
    ],
)
def test_what_is_no_image_is_named(source, message):
    with pytest.raises(InputError, match=message):
        read_image(source)


def test_images_beyond_the_limit_of_pillow(tmp_path, rgb, monkeypatch):
    Image.fromarray(rgb).save(tmp_path / 'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    expected = r'a\.png cannot .* \(3456 pixels\) exceeds limit of 2000 pixels: resize .* --tile$'
    with pytest.raises(InputError, match=expected):
        read_image(tmp_path / 'a.png')


def test_broken_files_are_named(tmp_path, rgb):
    path = tmp_path / 'a.jpg'
    Image.fromarray(rgb).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=rf'{path} cannot be read: .*truncated'):
        read_image(path)
    path.write_text('text')
    with pytest.raises(InputError, match=rf'{path} cannot be read: it is no image'):
        read_image(path)
    with pytest.raises(InputError, match=rf'{tmp_path} cannot be read: Is a directory'):
        read_image(tmp_path)
    with pytest.raises(InputError, match='BytesIO cannot be read: it is no image'):
        read_image(io.BytesIO(b'text'))
    with pytest.raises(InputError, match='cannot be read: No such file'):
        read_image(tmp_path / 'b.jpg')
