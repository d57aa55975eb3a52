"""Checkpoints that other programs, too, can read without trusting them."""

from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class PortableCheckpointHook(Hook):
    """Save Python numbers where metrics gave numpy's.

    mmengine's own loading, which `init_model`, `init_detector` and the inferencers use, knows few
    of numpy's types as safe. For a file with another one, as of mmseg's mIoU, it turns its safety
    off.
    """

    priority = 'LOWEST'

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Replace the numbers of what the run knows about itself, such as its best metric."""
        info = checkpoint['message_hub']['runtime_info']
        for key, value in info.items():
            if isinstance(value, np.generic):
                info[key] = value.item()
