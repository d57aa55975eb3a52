"""What trains and tests the networks, on top of mmengine."""

from .launch import evaluate, find_config, train
from .layer_decay import LayerDecayOptimWrapperConstructor
from .summary import RunSummaryHook

__all__ = [
    'LayerDecayOptimWrapperConstructor',
    'RunSummaryHook',
    'evaluate',
    'find_config',
    'train',
]
