"""What mmsegmentation, mmdetection and mmengine need to train and test the networks."""

from gfnet_dense import data, durable  # noqa: F401  registers their parts

from .accuracy import Accuracy
from .annotations import LoadCodedAnnotations
from .backbones import GFNet, GFNetPyramid
from .classifier import ClassificationPreprocessor, ImageClassifier
from .complexity import Complexity, count_macs, measure_complexity
from .label_maps import LabelMaps
from .launch import evaluate, find_config, train
from .layer_decay import LayerDecayOptimWrapperConstructor
from .mixed_precision import CPUBFloat16OptimWrapper
from .new_config import new_config
from .sampler import RepeatAugSampler
from .schedule import WarmupCosineLR

__all__ = [
    'Accuracy',
    'CPUBFloat16OptimWrapper',
    'ClassificationPreprocessor',
    'Complexity',
    'GFNet',
    'GFNetPyramid',
    'ImageClassifier',
    'LabelMaps',
    'LayerDecayOptimWrapperConstructor',
    'LoadCodedAnnotations',
    'RepeatAugSampler',
    'WarmupCosineLR',
    'count_macs',
    'evaluate',
    'find_config',
    'measure_complexity',
    'new_config',
    'train',
]
