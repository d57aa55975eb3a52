"""Pictures of images and label maps."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CELL_INCHES = 2.0
LEGEND_ENTRY_INCHES = (1.3, 0.2)  # width and height
TITLE_INCHES = 0.3
NOT_LABELLED = ('not labelled', (255, 255, 255))


def label_grid(
    rows: Sequence[Sequence[np.ndarray]],
    path: str | os.PathLike[str],
    *,
    titles: Sequence[str],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> Path:
    """Write a PNG of images and label maps with a legend of their classes, and return its path.

    Args:
        rows: Rows with one cell for each title. A cell of shape (H, W, 3), uint8, is an RGB image.
            A cell of shape (H, W) is a map of class indices. Values that are no index of `classes`,
            such as mmseg's 255, are drawn white, as not labelled.
        path: The PNG to write. Missing folders above it are created.
        titles: Titles of the columns.
        classes: Names of the classes.
        palette: RGB colours of the classes, 0 to 255.

    Raises:
        ValueError: If there are no rows, a row has another length than `titles`, or `palette` has
            another length than `classes`.
        OSError: If `path` cannot be written.
    """
    # Imported here, because matplotlib is slow to import and training does not need it. A Figure
    # without pyplot needs no display and does not change the caller's figures.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lengths = [len(row) for row in rows]
    if set(lengths) != {len(titles)}:
        raise ValueError(f'each row needs {len(titles)} cells, one per title, but got {lengths}')
    if len(palette) != len(classes):
        raise ValueError(
            f'palette needs {len(classes)} colours, one for each class, but got {len(palette)}'
        )
    names = [*classes, NOT_LABELLED[0]]
    colours = np.array([*palette, NOT_LABELLED[1]], np.uint8)
    cells = [_index_colours(cell, len(classes)) for row in rows for cell in row]
    present = sorted(set().union(*(np.unique(cell) for cell in cells if cell.ndim == 2)))

    width = CELL_INCHES * len(titles)
    entry_width, entry_height = LEGEND_ENTRY_INCHES
    legend_columns = max(1, int(width / entry_width))
    legend_height = entry_height * (math.ceil(len(present) / legend_columns) + 1)
    height = TITLE_INCHES + CELL_INCHES * len(rows) + legend_height
    figure = Figure(figsize=(width, height), dpi=150, layout='constrained')
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    for axis, cell in zip(axes.flat, cells, strict=True):
        axis.imshow(cell if cell.ndim == 3 else colours[cell], interpolation='nearest')
        axis.set_axis_off()
    figure.legend(
        handles=[
            Patch(facecolor=colours[index] / 255, edgecolor='grey', label=names[index])
            for index in present
        ],
        loc='outside lower center',
        ncols=legend_columns,
        fontsize=9,
        frameon=False,
    )

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format='png')
    return path


def _index_colours(cell: np.ndarray, num_classes: int) -> np.ndarray:
    """Replace what is no class in a label map by `num_classes`; return images unchanged."""
    if cell.ndim == 3:
        return cell
    return np.where((cell >= 0) & (cell < num_classes), cell.astype(int), num_classes)
