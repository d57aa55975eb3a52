"""The embedded digits and their pictures; needs the extra `demo`."""

from .digits import CLASSES, PALETTE, preview_digits, write_digit_scans, write_digits
from .pictures import label_grid

__all__ = [
    'CLASSES',
    'PALETTE',
    'label_grid',
    'preview_digits',
    'write_digit_scans',
    'write_digits',
]
