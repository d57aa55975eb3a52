"""What feeds the models."""

from .digits import CLASSES, PALETTE, preview_digits, write_digit_scans, write_digits
from .errors import DataError
from .image_folder import ImageFolder
from .pictures import label_grid

__all__ = [
    'CLASSES',
    'PALETTE',
    'DataError',
    'ImageFolder',
    'label_grid',
    'preview_digits',
    'write_digit_scans',
    'write_digits',
]
