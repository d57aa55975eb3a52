"""The networks: what is learned."""

from .classifier import ClassificationPreprocessor, ImageClassifier
from .gfnet import GFNet, GFNetPyramid
from .global_filter import GlobalFilter
from .timm_models import TimmGFNet, TimmGFNetPyramid

__all__ = [
    'ClassificationPreprocessor',
    'GFNet',
    'GFNetPyramid',
    'GlobalFilter',
    'ImageClassifier',
    'TimmGFNet',
    'TimmGFNetPyramid',
]
