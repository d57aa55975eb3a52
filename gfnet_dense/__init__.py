"""GFNet (Global Filter Networks, arXiv 2107.00645) for dense prediction.

Importing the package registers its modules in mmengine's registries, where mmsegmentation and
mmdetection find them: `custom_imports = dict(imports=['gfnet_dense'])` in a config.
"""

from . import data, engine, models

__version__ = '0.1.0'

__all__ = ['__version__', 'data', 'engine', 'models']
