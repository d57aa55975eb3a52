"""GFNet (Global Filter Networks, arXiv 2107.00645) for dense prediction.

Importing the package registers its modules in mmengine's registries, where mmsegmentation and
mmdetection find them: `custom_imports = dict(imports=['gfnet_dense'])` in a config.
"""

import numpy as np
import torch

from . import engine, models

__version__ = '0.1.0'

# mmengine's checkpoints hold numpy numbers, but its list of types that are safe to unpickle lacks
# most of theirs: it then falls back to loading without any safety.
torch.serialization.add_safe_globals([type(np.dtype(kind)) for kind in '?bhilqBHILQefd'])

__all__ = ['__version__', 'engine', 'models']
