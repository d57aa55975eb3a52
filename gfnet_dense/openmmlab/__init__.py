"""What mmsegmentation, mmdetection and mmengine need to train and test the networks."""

import logging

from mmengine.logging import print_log

from gfnet_dense import data, durable  # noqa: F401  registers their parts

from .accuracy import Accuracy
from .backbones import GFNet, GFNetPyramid
from .classifier import ClassificationPreprocessor, ImageClassifier
from .complexity import Complexity, count_macs, measure_complexity
from .launch import evaluate, find_config, train
from .layer_decay import LayerDecayOptimWrapperConstructor
from .sampler import RepeatAugSampler
from .schedule import WarmupCosineLR


class _RunLog(logging.Handler):
    """Write what the core logs, such as the weights that were loaded, into the log of the run."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on to mmengine's current logger; without one mmengine prints it."""
        print_log(self.format(record), logger='current', level=record.levelno)


_core = logging.getLogger('gfnet_dense')
_core.addHandler(_RunLog(logging.INFO))
_core.setLevel(logging.INFO)

__all__ = [
    'Accuracy',
    'ClassificationPreprocessor',
    'Complexity',
    'GFNet',
    'GFNetPyramid',
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
