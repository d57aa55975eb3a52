"""The networks: what is learned."""

from .gfnet import GFNet, GFNetPyramid
from .global_filter import GlobalFilter

__all__ = ['GFNet', 'GFNetPyramid', 'GlobalFilter']
