"""Predicted label maps as PNG files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from PIL import Image

from gfnet_dense.data.errors import DataError


@METRICS.register_module()
class LabelMaps(BaseMetric):
    """Write each predicted label map to a PNG of its own; there are no numbers.

    mmseg's `IoUMetric` names a file by the last part of the image's path alone, so that images of
    the same name in several folders overwrite each other. This one keeps the folders. As there, a
    data set with `reduce_zero_label` gets the numbers of its files back: class 0 is written as 1.

    Args:
        out_dir: The folder to write to.
        root: The folder of the images. `ROOT/city/a.jpg` is written as `OUT_DIR/city/a.png`, an
            image outside of it without its folders.

    Raises:
        DataError: If two images would be written to one file.
    """

    default_prefix = 'label_maps'

    def __init__(self, out_dir: str | os.PathLike[str], root: str | os.PathLike[str] = '') -> None:
        super().__init__()
        self.out_dir, self.root = Path(out_dir), Path(root)
        self._images: dict[Path, str] = {}

    def path(self, image: str) -> Path:
        """Return the file that the label map of an image is written to."""
        inside = Path(image).is_relative_to(self.root)
        name = Path(image).relative_to(self.root) if inside else Path(Path(image).name)
        return self.out_dir / name.with_suffix('.png')

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Write the label maps of a batch."""
        for sample in data_samples:
            image, path = sample['img_path'], self.path(sample['img_path'])
            other = self._images.setdefault(path, image)
            if other != image:
                raise DataError(
                    f'{other} and {image} would both be written to {path}: evaluate one of them '
                    'at a time, or write a .pkl file'
                )
            labels = sample['pred_sem_seg']['data'].squeeze(0).cpu().numpy()
            labels = labels + bool(sample.get('reduce_zero_label'))
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels.astype(np.uint8 if labels.max() < 256 else np.uint16)).save(path)
            self.results.append(str(path))

    def compute_metrics(self, results: list[str]) -> dict[str, float]:
        """Return no numbers."""
        return {}
