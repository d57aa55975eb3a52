"""The networks: what is learned."""

from .classifier import ClassificationPreprocessor, ImageClassifier
from .gfnet import GFNet, GFNetPyramid
from .global_filter import GlobalFilter

__all__ = [
    'ClassificationPreprocessor',
    'GFNet',
    'GFNetPyramid',
    'GlobalFilter',
    'ImageClassifier',
]
