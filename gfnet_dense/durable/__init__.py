"""Runs that survive: whole checkpoints, exact resume, interrupts, steps that are not finite."""

from mmengine.logging import HistoryBuffer

from gfnet_dense import serialization

from .checkpoints import DurableCheckpointHook, InterruptHook, latest_checkpoint
from .non_finite import NonFiniteLossError, NonFiniteLossHook
from .peers import RankDiedError
from .runner import GFNetRunner
from .summary import RunSummaryHook
from .work_dir import WorkDirError

# Checkpoints hold mmengine's logs, which a resumed run goes on writing.
serialization.PLAIN_TYPES[serialization.HISTORY] = HistoryBuffer

__all__ = [
    'DurableCheckpointHook',
    'GFNetRunner',
    'InterruptHook',
    'NonFiniteLossError',
    'NonFiniteLossHook',
    'RankDiedError',
    'RunSummaryHook',
    'WorkDirError',
    'latest_checkpoint',
]
