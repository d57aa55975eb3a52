"""What trains and tests the networks, on top of mmengine."""

from .accuracy import Accuracy
from .launch import evaluate, find_config, train
from .layer_decay import LayerDecayOptimWrapperConstructor
from .sampler import RepeatAugSampler
from .schedule import WarmupCosineLR
from .summary import RunSummaryHook

__all__ = [
    'Accuracy',
    'LayerDecayOptimWrapperConstructor',
    'RepeatAugSampler',
    'RunSummaryHook',
    'WarmupCosineLR',
    'evaluate',
    'find_config',
    'train',
]
