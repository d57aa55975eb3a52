"""GFNet (Global Filter Networks, arXiv 2107.00645) for dense prediction.

Importing the package registers its modules in mmengine's registries, where mmsegmentation and
mmdetection find them: `custom_imports = dict(imports=['gfnet_dense'])` in a config.
"""

import importlib.util

if importlib.util.find_spec('mmengine') is None:
    raise ModuleNotFoundError(
        'gfnet_dense needs mmengine: pip install "gfnet-dense[openmmlab]", or onedl-mmengine alone '
        'for backbones and timm',
        name='mmengine',
    )

from . import data, durable, models, openmmlab

__version__ = '0.1.0'

__all__ = ['__version__', 'data', 'durable', 'models', 'openmmlab']
