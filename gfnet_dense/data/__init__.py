"""What feeds the models."""

from .digits import CLASSES, PALETTE, preview_digits, write_digits
from .pictures import label_grid

__all__ = ['CLASSES', 'PALETTE', 'label_grid', 'preview_digits', 'write_digits']
