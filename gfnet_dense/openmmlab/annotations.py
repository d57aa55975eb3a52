"""Label maps whose pixels hold colours or any numbers in place of the indices of classes."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine import fileio
from mmengine.registry import TRANSFORMS
from PIL import Image


@TRANSFORMS.register_module()
class LoadCodedAnnotations:
    """Load a label map and number its values: a step of pipelines, like mmseg's `LoadAnnotations`.

    Args:
        values: What a pixel of each class holds: a colour `(R, G, B)` each, or a number each.
        ignore_index: The label of all other pixels, which are not trained.
    """

    def __init__(
        self, values: Sequence[int] | Sequence[tuple[int, int, int]], ignore_index: int = 255
    ) -> None:
        self.values, self.ignore_index = [*values], ignore_index
        self.are_colours = np.ndim(self.values[0]) == 1
        if not 0 <= ignore_index <= 255:  # labels are uint8
            raise ValueError(f'ignore_index must be within 0..255, but got {ignore_index}')
        codes = self._codes(np.array(self.values))
        if len(np.unique(codes)) != len(codes) or len(codes) > ignore_index:
            raise ValueError(
                f'values must be at most {ignore_index} different numbers or colours, but got '
                f'{self.values}'
            )
        self._order = codes.argsort()
        self._sorted = codes[self._order]

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add `gt_seg_map` of shape `(H, W)` to the results."""
        content = fileio.get(results['seg_map_path'])
        with Image.open(io.BytesIO(content)) as file:
            mask = np.asarray(file)
        if mask.ndim == 3 and mask.shape[2] < 3:  # grey and transparency
            mask = mask[..., 0]
        if mask.ndim != (3 if self.are_colours else 2):
            raise ValueError(
                f'{results["seg_map_path"]} has shape {mask.shape}, but values such as '
                f'{self.values[0]} are those of another kind of mask'
            )
        codes = self._codes(mask)
        place = np.searchsorted(self._sorted, codes).clip(max=len(self._sorted) - 1)
        found = self._sorted[place] == codes
        labels = np.where(found, self._order[place], self.ignore_index)
        results['gt_seg_map'] = labels.astype(np.uint8)
        results.setdefault('seg_fields', []).append('gt_seg_map')
        return results

    def _codes(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return colours `(..., 3)` as numbers, and numbers as they are."""
        values = values.astype(np.int64)
        return values[..., :3] @ np.array([1 << 16, 1 << 8, 1]) if self.are_colours else values

    def __repr__(self) -> str:
        return f'{type(self).__name__}({len(self.values)} values)'
