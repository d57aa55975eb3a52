import numpy as np
import pytest
from PIL import Image

from gfnet_dense.demo import label_grid

CLASSES = ('water', 'land', 'ice')
PALETTE = ((0, 0, 200), (0, 160, 0), (240, 90, 10))


def shares(path) -> dict[tuple[int, ...], float]:
    """How much of a picture every colour covers, in pictures' cells of 300x300 pixels."""
    pixels = np.asarray(Image.open(path).convert('RGB')).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    return {
        tuple(colour.tolist()): count / 300**2
        for colour, count in zip(colours, counts, strict=True)
    }


def test_images_and_labels_show_in_their_colours(tmp_path):
    image = np.full((20, 20, 3), (123, 45, 67), np.uint8)
    labels = np.zeros((20, 20), np.uint8)
    labels[:10] = 1
    labels[15:] = 255
    path = tmp_path / 'new' / 'grid.png'
    titles = ['image', 'truth']
    assert label_grid([(image, labels)], path, titles=titles, classes=CLASSES, palette=PALETTE)
    share = shares(path)
    assert share[123, 45, 67] > 0.8
    assert share[PALETTE[1]] > 0.4  # half of its cell, and the legend's
    assert 0.2 < share[PALETTE[0]] < share[PALETTE[1]]
    assert PALETTE[2] not in share, 'the legend names a class that does not occur'


@pytest.mark.parametrize('titles', [['image'], ['image', 'truth', 'prediction']])
def test_rows_and_titles_must_match(tmp_path, titles):
    row = (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), int))
    with pytest.raises(ValueError, match=rf'needs {len(titles)} cells, .*\[2\]'):
        label_grid([row], tmp_path / 'a.png', titles=titles, classes=CLASSES, palette=PALETTE)
    with pytest.raises(ValueError, match=r'got \[\]'):
        label_grid([], tmp_path / 'a.png', titles=titles, classes=CLASSES, palette=PALETTE)
    assert not list(tmp_path.iterdir())


def test_every_class_needs_a_colour(tmp_path):
    row = [np.zeros((4, 4), int)]
    with pytest.raises(ValueError, match=r'needs 3 colours.* got 2'):
        label_grid([row], tmp_path / 'a', titles=['a'], classes=CLASSES, palette=PALETTE[:2])
