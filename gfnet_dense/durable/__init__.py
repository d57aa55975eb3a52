"""Fault tolerance for runs of mmengine: `runner_type='DurableRunner'` in a config.

Importing the package registers the runner and its parts in mmengine's registries. Each part has a
switch in the config, see :class:`Switches`.
"""

from mmengine.logging import HistoryBuffer

from gfnet_dense import serialization

from .checkpoints import DurableCheckpointHook, latest_checkpoint
from .interrupts import InterruptHook
from .non_finite import NonFiniteLossError, NonFiniteLossHook
from .runner import DurableRunner, GFNetRunner
from .summary import RunSummaryHook
from .switches import Switches
from .work_dir import WorkDirError, lock_work_dir

# Checkpoints hold mmengine's logs, which a resumed run goes on writing.
serialization.PLAIN_TYPES[serialization.HISTORY] = HistoryBuffer

__all__ = [
    'DurableCheckpointHook',
    'DurableRunner',
    'GFNetRunner',
    'InterruptHook',
    'NonFiniteLossError',
    'NonFiniteLossHook',
    'RunSummaryHook',
    'Switches',
    'WorkDirError',
    'latest_checkpoint',
    'lock_work_dir',
]
