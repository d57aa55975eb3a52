"""Predictions drawn over their images."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .images import Array

Colour = tuple[int, ...]
"""Red, green and blue, 0 to 255."""

_GRID = 256  # longest side of the map on which the places of names are found
_LEAST = 112  # shortest side of an image, in pixels, on which names are legible


def draw_labels(
    image: Array, labels: Array, classes: Sequence[str], palette: Sequence[Colour], opacity: float
) -> Image.Image:
    """Blend an image with the colours of its labels, and write each class into its largest region.

    Args:
        image: RGB of shape `(H, W, 3)`, uint8.
        labels: Class indices of shape `(H, W)`. Other values leave the image as it is.
        classes: Names of the classes.
        palette: A colour for each class.
        opacity: Of the colours, 0 to 1.
    """
    colours = np.zeros((np.iinfo(labels.dtype).max + 1, 3), np.uint8)
    colours[: len(palette)] = palette
    picture = Image.fromarray(colours[labels])
    base = Image.fromarray(image)
    if (other := labels >= len(palette)).any():
        picture.paste(base, mask=Image.fromarray(other))
    picture = Image.blend(base, picture, opacity)
    if min(picture.size) < _LEAST:
        return picture
    draw, font = ImageDraw.Draw(picture), _font(picture)
    scale = max(1.0, max(picture.size) / _GRID)
    size = [max(1, round(side / scale)) for side in picture.size]
    grid = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    for label in np.unique(grid[grid < len(classes)]):
        # The centre of the largest circle within the region. The edge of the image bounds it, too.
        region = np.pad((grid == label).astype(np.uint8), 1)
        distances = cv2.distanceTransform(region, cv2.DIST_L2, 3)[1:-1, 1:-1]
        _, radius, _, (x, y) = cv2.minMaxLoc(distances)
        if radius * scale > font.size / 2:
            _write(draw, (x * scale, y * scale), classes[label], font, picture.size)
    return picture


def draw_instances(
    image: Array,
    boxes: Array,
    texts: Sequence[str],
    colours: Sequence[Colour],
    masks: Array | None,
    opacity: float,
) -> Image.Image:
    """Draw boxes with a text each, and masks in their colours. The first is drawn last, on top.

    Args:
        image: RGB of shape `(H, W, 3)`, uint8.
        boxes: Left, top, right and bottom, `(N, 4)`.
        texts: N texts.
        colours: N colours.
        masks: Pixels of each object, `(N, H, W)`, bool; None to draw none.
        opacity: Of the masks, 0 to 1.
    """
    picture = Image.fromarray(image)
    # A network in float16 may overflow, and its boxes are NaN then.
    order = [i for i in reversed(range(len(boxes))) if np.isfinite(boxes[i]).all()]
    if masks is not None:
        for i in order:
            shape = Image.fromarray((masks[i] * round(255 * opacity)).astype(np.uint8))
            picture.paste(colours[i], mask=shape)
    draw, font = ImageDraw.Draw(picture), _font(picture)
    width = max(1, round(min(picture.size) / 250))
    for i in order:
        x1, y1, x2, y2 = boxes[i].tolist()
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colours[i], width=width)
        if min(picture.size) >= _LEAST:
            _, _, right, bottom = draw.textbbox((0, 0), texts[i], font)
            # Above the box, or in it where it reaches the upper edge.
            x = max(0, min(x1, picture.width - right - 4))
            y = y1 - bottom - 4 if y1 >= bottom + 4 else y1
            draw.rectangle((x, y, x + right + 4, y + bottom + 4), fill=colours[i])
            dark = np.dot(colours[i], (0.299, 0.587, 0.114)) < 128
            draw.text((x + 2, y + 2), texts[i], 'white' if dark else 'black', font)
    return picture


def draw_classes(image: Array, names: Sequence[str], scores: Sequence[float]) -> Image.Image:
    """Write the names of classes with their scores below an image. A small image is enlarged.

    Args:
        image: RGB of shape `(H, W, 3)`, uint8.
        names: Names, each on a line of its own.
        scores: Their scores, 0 to 1, shown as bars.
    """
    picture = Image.fromarray(image)
    if picture.width < 2 * _LEAST:
        times = -(-2 * _LEAST // picture.width)
        picture = picture.resize(
            (picture.width * times, picture.height * times), Image.Resampling.NEAREST
        )
    font = _font(picture)
    line = round(1.5 * font.size)
    canvas = Image.new('RGB', (picture.width, picture.height + line * len(names)), 'white')
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for i, (name, score) in enumerate(zip(names, scores, strict=True)):
        y = picture.height + i * line
        draw.rectangle((0, y, canvas.width * score, y + line - 2), fill=(176, 205, 240))
        draw.text((4, y + line // 2), f'{score:.2f}  {name}', 'black', font, anchor='lm')
    return canvas


def _font(picture: Image.Image) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(max(11, min(picture.size) // 32))
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _write(
    draw: ImageDraw.ImageDraw,
    centre: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    """Write a text, white with a dark edge, around a point but within the picture."""
    half = draw.textlength(text, font) / 2 + 2
    x = min(max(centre[0], half), max(half, size[0] - half))
    y = min(max(centre[1], font.size), size[1] - font.size)
    edge = max(1, round(font.size / 10))
    draw.text((x, y), text, 'white', font, anchor='mm', stroke_width=edge, stroke_fill='black')
