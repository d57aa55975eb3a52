"""Checks of the data that a run is about to read, and a data set of image folders."""

from .errors import DataError
from .image_folder import ImageFolder
from .plot import plot_reports
from .report import Report, check_data

__all__ = ['DataError', 'ImageFolder', 'Report', 'check_data', 'plot_reports']
