"""Checks of the data that a run is about to read, and folders of images."""

from .errors import DataError
from .image_folder import ImageFolder

__all__ = ['DataError', 'ImageFolder']
