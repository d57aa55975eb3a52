"""Checks of the data that a run is about to read, and a data set of image folders."""

from .errors import DataError
from .image_folder import ImageFolder

__all__ = ['DataError', 'ImageFolder']
