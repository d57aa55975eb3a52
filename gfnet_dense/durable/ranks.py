"""What concerns the several processes of a run."""

from collections.abc import Callable
from typing import Any

from mmengine.dist import all_reduce_params, broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


def on_main_process(function: Callable[[], Any]) -> None:
    """Call a function in the first process alone; all processes raise the error that it raises.

    All processes have to call this.
    """
    error: list[Exception | None] = [None]
    if is_main_process():
        try:
            function()
        except Exception as e:
            error = [e]
    broadcast_object_list(error)
    if error[0] is not None:
        raise error[0]


@HOOKS.register_module()
class AverageBuffersHook(Hook):
    """Average running statistics over the processes after each iteration.

    On CPUs BN replaces SyncBN. Without this hook, each process would evaluate another model.
    """

    priority = 'ABOVE_NORMAL'  # before the hooks that save a checkpoint

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Average the floating-point buffers of the model."""
        buffers = [buffer for buffer in runner.model.buffers() if buffer.is_floating_point()]
        all_reduce_params(buffers, op='mean')
