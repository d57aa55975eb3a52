"""What mmsegmentation, mmdetection and mmengine need to train and test the networks."""

from .accuracy import Accuracy
from .classifier import ClassificationPreprocessor, ImageClassifier
from .complexity import Complexity, count_macs, measure_complexity
from .launch import evaluate, find_config, train
from .layer_decay import LayerDecayOptimWrapperConstructor
from .sampler import RepeatAugSampler
from .schedule import WarmupCosineLR

__all__ = [
    'Accuracy',
    'ClassificationPreprocessor',
    'Complexity',
    'ImageClassifier',
    'LayerDecayOptimWrapperConstructor',
    'RepeatAugSampler',
    'WarmupCosineLR',
    'count_macs',
    'evaluate',
    'find_config',
    'measure_complexity',
    'train',
]
