"""What trains and tests the networks, on top of mmengine."""

from .complexity import Complexity, count_macs, measure_complexity
from .launch import evaluate, find_config, train
from .layer_decay import LayerDecayOptimWrapperConstructor
from .summary import RunSummaryHook

__all__ = [
    'Complexity',
    'LayerDecayOptimWrapperConstructor',
    'RunSummaryHook',
    'count_macs',
    'evaluate',
    'find_config',
    'measure_complexity',
    'train',
]
