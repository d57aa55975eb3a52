"""The networks: what is learned."""

from .gfnet import GFNet, GFNetPyramid
from .global_filter import GlobalFilter
from .timm_models import TimmGFNet, TimmGFNetPyramid

__all__ = [
    'GFNet',
    'GFNetPyramid',
    'GlobalFilter',
    'TimmGFNet',
    'TimmGFNetPyramid',
]
