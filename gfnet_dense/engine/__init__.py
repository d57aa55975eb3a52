"""What trains and tests the networks, on top of mmengine."""

from .launch import find_config, test, train
from .layer_decay import LayerDecayOptimWrapperConstructor
from .summary import RunSummaryHook

__all__ = [
    'LayerDecayOptimWrapperConstructor',
    'RunSummaryHook',
    'find_config',
    'test',
    'train',
]
