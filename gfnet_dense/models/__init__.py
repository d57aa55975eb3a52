"""The networks with timm's interface; importing registers them in timm."""

from .gfnet import GFNet, GFNetPyramid
from .global_filter import GlobalFilter

__all__ = ['GFNet', 'GFNetPyramid', 'GlobalFilter']
