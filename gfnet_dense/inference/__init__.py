"""What one does with a trained model. mmseg and mmdet are imported when a model is loaded."""

from .loading import find_task, load_model

__all__ = ['find_task', 'load_model']
