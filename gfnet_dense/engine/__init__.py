"""What trains and tests the networks, on top of mmengine."""

from .accuracy import Accuracy
from .checkpoints import DurableCheckpointHook, InterruptHook, latest_checkpoint
from .complexity import Complexity, count_macs, measure_complexity
from .launch import evaluate, find_config, train
from .layer_decay import LayerDecayOptimWrapperConstructor
from .non_finite import NonFiniteLossError, NonFiniteLossHook
from .peers import RankDiedError
from .runner import GFNetRunner
from .sampler import RepeatAugSampler
from .schedule import WarmupCosineLR
from .summary import RunSummaryHook
from .work_dir import WorkDirError

__all__ = [
    'Accuracy',
    'Complexity',
    'DurableCheckpointHook',
    'GFNetRunner',
    'InterruptHook',
    'LayerDecayOptimWrapperConstructor',
    'NonFiniteLossError',
    'NonFiniteLossHook',
    'RankDiedError',
    'RepeatAugSampler',
    'RunSummaryHook',
    'WarmupCosineLR',
    'WorkDirError',
    'count_macs',
    'evaluate',
    'find_config',
    'latest_checkpoint',
    'measure_complexity',
    'train',
]
