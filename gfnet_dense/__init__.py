"""GFNet (Global Filter Networks, arXiv 2107.00645) for dense prediction.

The operator, :mod:`gfnet_dense.spectral`, needs torch alone; the networks need timm, too, and
importing the package registers them there: `timm.create_model('gfnet_h_s')`. Where mmengine is
installed, importing also registers backbones, hooks and data sets for mmsegmentation and
mmdetection: `custom_imports = dict(imports=['gfnet_dense'])` in a config.
"""

import importlib.util
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference import Predictor

from .spectral import global_filter, resize_spectrum

__version__ = '0.1.0'

__all__ = [
    'GFNet',
    'GFNetPyramid',
    'GlobalFilter',
    '__version__',
    'global_filter',
    'load',
    'resize_spectrum',
]

# The operator works where timm is missing, and the networks where mmengine is.
_networks_error = ''
try:
    from .models import GFNet, GFNetPyramid, GlobalFilter
except ImportError as e:
    _networks_error = str(e)
else:
    if importlib.util.find_spec('mmengine') is not None:
        try:
            from . import openmmlab  # noqa: F401
        except ImportError as e:
            warnings.warn(f'GFNet is not registered in mmengine: {e}', stacklevel=2)


def load(config: Any, checkpoint: Any, device: Any = None, **options: Any) -> 'Predictor':
    """Load a trained model that predicts from images: see :func:`gfnet_dense.inference.load`."""
    from .inference import load  # needs OpenMMLab

    return load(config, checkpoint, device, **options)


def __getattr__(name: str) -> Any:
    if name in __all__:
        raise ImportError(f'{name} needs timm 1.0.26 or later: {_networks_error}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
