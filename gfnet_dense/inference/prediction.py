"""What a model finds in an image."""

import base64
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gfnet_dense.serialization import write_whole

from .drawing import Colour, draw_classes, draw_instances, draw_labels
from .images import Array

_SIDE = 1024  # of the largest picture in a notebook, in pixels
_ROWS = 10  # of the longest table there


def no_class_label(count: int) -> int:
    """Return the label of pixels of none of `count` classes: 255, or 65535 of more than 255."""
    return 255 if count < 256 else 65535


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """What a model finds in an image of H x W pixels. A notebook shows it as a picture.

    Attributes:
        task: One of :data:`gfnet_dense.inference.TASKS`.
        image: The image, RGB of shape `(H, W, 3)`, uint8.
        classes: Names of the classes.
        palette: A colour for each class.
        labels: Class indices. For segmentation one for each pixel, `(H, W)`, uint8 or, of more
            than 255 classes, uint16; :func:`no_class_label` is for pixels whose class is not
            among those asked for. For detection one for each of the N objects, `(N,)`. For
            classification those asked for, all by default, the most probable one first.
        scores: The probability of each label, from 0 to 1, float32. For segmentation `(H, W)`, 0
            where the label stands for no class; None with test-time augmentation. Otherwise
            falling.
        boxes: Left, top, right and bottom of each object in pixels, `(N, 4)`, float32; None
            without detection.
        masks: Pixels of each object, `(N, H, W)`, bool; None without instance segmentation.
    """

    task: str
    image: Array
    classes: tuple[str, ...]
    palette: list[Colour]
    labels: Array
    scores: Array | None = None
    boxes: Array | None = None
    masks: Array | None = None

    @property
    def nbytes(self) -> int:
        """What the arrays take in memory."""
        arrays = self.image, self.labels, self.scores, self.boxes, self.masks
        return sum(array.nbytes for array in arrays if array is not None)

    def draw(self, opacity: float = 0.5, threshold: float = 0.3) -> Image.Image:
        """Draw the prediction over the image.

        Args:
            opacity: From 0, for the image alone, to 1, for colours that hide it.
            threshold: Objects of a lower score are not drawn.

        Returns:
            A picture of the size of the image; of a classifier, the image over the names of its
            first classes.
        """
        if self.task == 'segmentation':
            return draw_labels(self.image, self.labels, self.classes, self.palette, opacity)
        assert self.scores is not None
        if self.boxes is None:
            names = [self.classes[label] for label in self.labels[:3]]
            return draw_classes(self.image, names, self.scores[:3].tolist())
        shown = self.scores >= threshold
        labels = self.labels[shown]
        return draw_instances(
            self.image,
            self.boxes[shown],
            [f'{self.classes[i]} {s:.2f}' for i, s in zip(labels, self.scores[shown], strict=True)],
            [self.palette[i] for i in labels],
            None if self.masks is None else self.masks[shown],
            opacity,
        )

    def save(self, path: str | Path) -> None:
        """Write the labels of a segmentation as a grey PNG, or a list of what is found as JSON.

        The file is there when it is whole. Missing folders are created.

        Raises:
            OSError: If it cannot be written.
            ValueError: If the name ends in something else.
        """
        path, suffix = Path(path), '.png' if self.task == 'segmentation' else '.json'
        if path.suffix.lower() != suffix:
            raise ValueError(f'{path} must end in {suffix}, which holds results of {self.task}')
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path) as file:
            if self.task == 'segmentation':
                Image.fromarray(self.labels).save(file, 'PNG')
            else:
                file.write(json.dumps(self.objects()).encode())

    def objects(self) -> list[dict[str, Any]]:
        """Return objects or classes as plain values, the highest score first.

        Returns:
            A dict each with `label`, `class` and `score`; of an object also its `bbox` as left,
            top, width and height in pixels and, where there are masks, `segmentation`, a mask as
            COCO's run-length encoding. Empty for segmentation.
        """
        if self.task == 'segmentation' or self.scores is None:
            return []
        found: list[dict[str, Any]] = [
            {'label': label, 'class': self.classes[label], 'score': score}
            for label, score in zip(self.labels.tolist(), self.scores.tolist(), strict=True)
        ]
        if self.boxes is not None:
            for item, (x1, y1, x2, y2) in zip(found, self.boxes.tolist(), strict=True):
                item['bbox'] = [x1, y1, x2 - x1, y2 - y1]
        if self.masks is not None:
            from pycocotools import mask as coco_mask  # comes with mmdet

            for item, mask in zip(found, self.masks, strict=True):
                rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
                item['segmentation'] = {**rle, 'counts': rle['counts'].decode()}
        return found

    def summary(self) -> list[tuple[int, str]]:
        """Return class indices and a figure each: per cent of the pixels, or score.

        Pixels of a segmentation count by class, the most frequent one first.
        """
        if self.task != 'segmentation' and self.scores is not None:
            return [
                (int(label), f'{score:.2f}')
                for label, score in zip(self.labels, self.scores, strict=True)
            ]
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))[: len(self.classes)]
        order = np.argsort(-counts, kind='stable')
        return [
            (int(i), f'{100 * counts[i] / self.labels.size:.1f} %') for i in order if counts[i] > 0
        ]

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        found = [f'{self.classes[i]} {figure}' for i, figure in self.summary()]
        more = ', ...' if len(found) > _ROWS else ''
        text = ', '.join(found[:_ROWS]) or 'nothing found'
        return f'<{self.task} of {height} x {width} pixels: {text}{more}>'

    def _repr_png_(self) -> bytes:
        picture = self.draw()
        picture.thumbnail((_SIDE, _SIDE))
        file = io.BytesIO()
        picture.save(file, 'PNG')
        return file.getvalue()

    def _repr_html_(self) -> str:
        rows = [
            f'<tr><td style="background:rgb{tuple(self.palette[i])};width:1em"></td>'
            f'<td style="text-align:left">{html.escape(self.classes[i])}</td>'
            f'<td>{figure}</td></tr>'
            for i, figure in self.summary()[:_ROWS]
        ]
        picture = base64.b64encode(self._repr_png_()).decode()
        return f'<img src="data:image/png;base64,{picture}"><table>{"".join(rows)}</table>'
