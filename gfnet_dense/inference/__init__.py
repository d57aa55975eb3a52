"""What one does with a trained model. mmseg and mmdet are imported when a model is loaded."""

from .export import ExportError, export_model
from .files import Report, predict_files
from .images import InputError, read_image
from .loading import TASKS, find_task, load_model
from .outputs import OutputError
from .prediction import Prediction
from .predictor import Predictor, load

__all__ = [
    'TASKS',
    'ExportError',
    'InputError',
    'OutputError',
    'Prediction',
    'Predictor',
    'Report',
    'export_model',
    'find_task',
    'load',
    'load_model',
    'predict_files',
    'read_image',
]
